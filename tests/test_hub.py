"""Model folders: bit for bit there and back, whole or not at all, and every damage told."""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import forking
from maskgit import MaskGIT, hub
from maskgit.apps.cli.commands import main
from maskgit.checkpoints import folder as saving
from maskgit.checkpoints import weights
from maskgit.errors import CheckpointError, ConfigError, DownloadError, OutputError
from maskgit.foundation import files


def states(model):
    return {
        f"{s}.{k}": v for s in ("tokenizer", "transformer") for k, v in getattr(model, s).state_dict().items()
    }


def assert_equal(a, b):
    assert a.config == b.config
    assert states(a).keys() == states(b).keys()
    assert all(torch.equal(states(a)[name], states(b)[name]) for name in states(a))


@pytest.fixture
def folder(tiny, tmp_path):
    return tiny.save_pretrained(tmp_path / "model")


def test_a_model_survives_bit_for_bit(tiny, folder):
    again = MaskGIT.from_pretrained(folder)
    assert_equal(tiny, again)
    assert not again.tokenizer.training
    assert not again.transformer.training
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.*")) == [
        "model_index.json",
        "tokenizer/config.json",
        "tokenizer/model.safetensors",
        "transformer/config.json",
        "transformer/model.safetensors",
    ]
    assert json.loads((folder / "model_index.json").read_text())["_class_name"] == "MaskGIT"
    assert_equal(tiny, MaskGIT.from_pretrained(again.save_pretrained(folder)))


def test_half_precision_can_be_stored_and_loaded(tiny, tmp_path):
    folder = tiny.save_pretrained(tmp_path / "half", dtype=torch.float16)
    assert load_file(folder / "tokenizer" / "model.safetensors")["quantizer.codebook"].dtype == torch.float16
    assert MaskGIT.from_pretrained(folder).tokenizer.dtype == torch.float32
    half = MaskGIT.from_pretrained(folder, dtype=torch.float16)
    assert half.transformer.token_embedding.weight.dtype == torch.float16
    assert_equal(half, MaskGIT.from_pretrained(half.save_pretrained(tmp_path / "again"), dtype=torch.float16))


def test_a_tokenizer_survives_alone(tiny, folder, tmp_path):
    alone = hub.load_tokenizer(hub.save_tokenizer(tiny.tokenizer, tmp_path / "tokenizer"))
    inside = hub.load_tokenizer(folder)
    for name, tensor in tiny.tokenizer.state_dict().items():
        assert torch.equal(tensor, alone.state_dict()[name])
        assert torch.equal(tensor, inside.state_dict()[name])


def edit_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model_index.json").unlink(), "this is a model folder"),
        (lambda f: (f / "model_index.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "model_index.json").write_text("[]"), "not a JSON object"),
        (lambda f: (f / "model_index.json").write_text("[" * 100_000), "is not JSON"),
        (
            lambda f: save_file(
                {k: v.long() for k, v in load_file(f / "tokenizer/model.safetensors").items()},
                f / "tokenizer/model.safetensors",
            ),
            "is torch.int64",
        ),
        (
            lambda f: edit_json(f / "model_index.json", lambda v: v.update(format_version=9)),
            "format_version 9",
        ),
        (
            lambda f: edit_json(f / "model_index.json", lambda v: v.update(image_sise=1)),
            "Did you mean 'image_size'",
        ),
        (lambda f: edit_json(f / "model_index.json", lambda v: v.update(image_size=64)), "image_size is 64"),
        (
            lambda f: edit_json(f / "model_index.json", lambda v: v.pop("tokenizer")),
            "lacks the entry 'tokenizer'",
        ),
        (
            lambda f: edit_json(f / "tokenizer/config.json", lambda v: v.update(filters="x")),
            "filters must be a whole number",
        ),
        (
            lambda f: edit_json(f / "tokenizer/config.json", lambda v: v.update(filters=64)),
            "does not match its config",
        ),
        (lambda f: edit_json(f / "transformer/config.json", lambda v: v.update(num_layers=3)), "is missing"),
        (
            lambda f: edit_json(f / "transformer/config.json", lambda v: v.update(num_layers=10**9)),
            "num_layers",
        ),
        (lambda f: (f / "tokenizer/model.safetensors").unlink(), "cannot be read"),
        (lambda f: (f / "tokenizer/model.safetensors").write_bytes(b"\xff" * 100), "cannot be read"),
        (
            lambda f: save_file(
                load_file(f / "tokenizer/model.safetensors") | {"extra": torch.zeros(1)},
                f / "tokenizer/model.safetensors",
            ),
            "extra is unknown",
        ),
    ],
)
def test_damage_is_told(folder, damage, message):
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        hub.load_model(folder)


def test_a_truncated_weight_file_is_told(folder):
    path = folder / "transformer" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="cannot be read"):
        hub.load_model(folder)


def test_unknown_models_are_told(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'imagenet256'"):
        hub.from_pretrained("imagenet265")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="maskgit convert"):
        hub.from_pretrained(tmp_path / "file")
    with pytest.raises(DownloadError, match="no folder 'someone/something'"):
        hub.from_pretrained("someone/something")


def test_saving_never_destroys_what_is_no_model(tiny, tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds thesis\.txt, which is not part of a model"):
        tiny.save_pretrained(tmp_path / "full")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="is a file"):
        tiny.save_pretrained(tmp_path / "file")
    with pytest.raises(OutputError, match="cannot be written"):
        tiny.save_pretrained(tmp_path / "file" / "below")

    folder = tiny.save_pretrained(tmp_path / "model")

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(weights, "save_file", full_disk)
    with pytest.raises(OutputError, match="disk is full"):
        tiny.save_pretrained(folder)
    assert_equal(tiny, hub.load_model(folder))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full", "model"]


def test_an_official_model_is_converted_once(tiny, golden, monkeypatch):
    calls = []

    def fetched(url, folder):
        calls.append(url)
        return golden / ("tiny_tokenizer.msgpack" if "tokenizer_" in url else "tiny_transformer.msgpack")

    monkeypatch.setattr(saving.download, "fetch", fetched)
    first = hub.from_pretrained("imagenet256")
    assert len(calls) == 2
    assert all("imagenet256" in url for url in calls)
    assert_equal(first, hub.from_pretrained("imagenet256"))
    assert len(calls) == 2
    shutil.rmtree(files.cache_dir() / "models")


def test_what_was_downloaded_and_is_no_model_is_thrown_away(monkeypatch, tmp_path):
    page = tmp_path / "page"
    page.write_bytes(b"<html>log in</html>")
    (tmp_path / "page.json").write_text("{}")
    monkeypatch.setattr(saving.download, "fetch", lambda url, folder: page)
    with pytest.raises(CheckpointError, match="not imagenet512, and were deleted"):
        hub.from_pretrained("imagenet512")
    assert not list(tmp_path.iterdir())


def test_names_come_before_folders_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10").mkdir()
    assert hub.locate("cifar10") == hub.REGISTRY["cifar10"]
    assert hub.locate("./cifar10") == (tmp_path / "cifar10").relative_to(tmp_path)
    for odd in ("x" * 5000, "a/" + "x" * 5000, "~nobody-of-this-name/x", "/gone/for/good"):
        with pytest.raises((CheckpointError, ConfigError, DownloadError)):
            hub.locate(odd)


def test_weights_can_be_read_by_others_and_a_card_stays(tiny, folder):
    modes = {path.stat().st_mode & 0o777 for path in folder.rglob("*.*")}
    assert len(modes) == 1
    (folder / "README.md").write_text("a card")
    tiny.save_pretrained(folder)
    assert (folder / "README.md").read_text() == "a card"
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds notes\.txt"):
        tiny.save_pretrained(folder)
    assert (folder / "notes.txt").read_text() == "mine"


def test_an_old_model_comes_back_if_the_new_cannot_take_its_place(tiny, folder, monkeypatch):
    replace = os.replace

    def refuse(source, target):
        if str(source).endswith("new"):
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OutputError, match="Input/output error"):
        tiny.save_pretrained(folder)
    assert_equal(tiny, hub.load_model(folder))


def test_push_to_hub_uploads_a_whole_folder(tiny, monkeypatch):
    import huggingface_hub

    seen = {}

    class Api:
        def __init__(self, token=None):
            seen["token"] = token

        def create_repo(self, repo_id, **options):
            seen["repo"] = (repo_id, options)

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            seen["model"] = hub.load_model(folder_path)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert tiny.push_to_hub("someone/model", private=True).endswith("someone/model")
    assert seen["repo"] == ("someone/model", {"private": True, "exist_ok": True})
    assert_equal(tiny, seen["model"])


# It imports once and saves in children, which wait for one another.
SAVE = """
import os, sys, traceback
from maskgit import hub

model = hub.load_model(sys.argv[1])
gates = [os.pipe() for _ in range(3)]
children = []
for gate in gates:
    child = os.fork()
    if child == 0:
        try:
            os.read(gate[0], 1)
            model.save_pretrained(sys.argv[2])
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    children.append(child)
for gate in gates:
    os.write(gate[1], b"x")
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children))
"""


def test_processes_may_save_into_one_new_folder(tiny, folder, tmp_path):
    target = tmp_path / "new" / "model"
    done = forking.run("-c", SAVE, folder, target)
    assert done.returncode == 0, done.stderr
    assert_equal(tiny, hub.load_model(target))
    assert list(target.parent.iterdir()) == [target]


def test_another_save_in_the_middle_of_ours_harms_neither(tiny, tmp_path, monkeypatch):
    """The other one puts its folder in place after we have looked, and before we put ours."""
    target, write = tmp_path / "model", weights.save_file

    def meanwhile(state, path, **options):
        monkeypatch.setattr(weights, "save_file", write)
        tiny.save_pretrained(target)
        (target / "README.md").write_text("a card")
        write(state, path, **options)

    monkeypatch.setattr(weights, "save_file", meanwhile)
    tiny.save_pretrained(target)
    assert_equal(tiny, hub.load_model(target))
    assert (target / "README.md").read_text() == "a card"

    def strangers(state, path, **options):
        shutil.rmtree(target)
        target.mkdir()
        (target / "thesis.txt").write_text("mine")
        write(state, path, **options)

    monkeypatch.setattr(weights, "save_file", strangers)
    with pytest.raises(OutputError, match=r"holds thesis\.txt"):
        tiny.save_pretrained(target)
    assert (target / "thesis.txt").read_text() == "mine"


def test_a_link_to_a_folder_is_followed(tiny, folder, tmp_path):
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "latest"
    link.symlink_to("../model")
    half = tiny.save_pretrained(link, dtype=torch.float16)
    assert half == link
    assert link.is_symlink()
    assert load_file(folder / "tokenizer/model.safetensors")["quantizer.codebook"].dtype == torch.float16
    assert [path.name for path in (tmp_path / "links").iterdir()] == ["latest"]
    shutil.rmtree(folder)
    assert_equal(tiny, hub.load_model(tiny.save_pretrained(link)))
    assert folder.is_dir()


def test_a_tilde_is_the_home(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert tiny.save_pretrained("~/mine/model") == tmp_path / "mine" / "model"
    assert_equal(tiny, hub.load_model("~/mine/model"))
    assert_equal(tiny, hub.from_pretrained("~/mine/model"))
    hub.save_tokenizer(tiny.tokenizer, "~/tokenizer")
    hub.load_tokenizer("~/tokenizer")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "tokenizer"]


CONVERT = """
import sys
from pathlib import Path
from maskgit import hub
from maskgit.checkpoints import folder as saving
golden, cache = map(Path, sys.argv[1:])

def fetched(url, folder):
    print("fetches", flush=True)
    sys.stdin.readline()
    return golden / ("tiny_tokenizer.msgpack" if "tokenizer_" in url else "tiny_transformer.msgpack")

saving.download.fetch = fetched
print(hub.locate("imagenet256", cache_dir=cache))
"""


def test_an_official_model_is_converted_by_one_process(golden, tmp_path):
    def start():
        return forking.Python(
            "-c",
            CONVERT,
            golden,
            tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    first = start()
    assert first.stdout.readline() == "fetches\n"
    second = start()
    assert "Waiting for the conversion of imagenet256, by process" in second.stderr.readline()
    out, error = first.communicate("\n\n", timeout=120)
    assert first.returncode == 0, error
    # It never asks for a line, so it found the work done.
    out, error = second.communicate(timeout=120)
    assert second.returncode == 0, error
    assert out.strip() == str(tmp_path / "models" / "imagenet256")
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["imagenet256"]


def test_an_official_model_may_be_asked_for_without_a_download(tiny, golden, tmp_path, monkeypatch):
    def fetched(url, folder):
        raise AssertionError("nothing is to be fetched")

    monkeypatch.setattr(saving.download, "fetch", fetched)
    with pytest.raises(DownloadError, match="local_files_only"):
        hub.from_pretrained("imagenet256", cache_dir=tmp_path, local_files_only=True)
    tiny.save_pretrained(tmp_path / "models" / "imagenet256")
    assert_equal(tiny, hub.from_pretrained("imagenet256", cache_dir=tmp_path, local_files_only=True))


class FakeHub(http.server.BaseHTTPRequestHandler):
    """As much of the Hugging Face Hub as a download asks for: one private model with two revisions."""

    folder = None
    commits = {"main": "a" * 40, "v1": "b" * 40}  # noqa: RUF012

    def do_GET(self):
        if self.headers.get("Authorization") != "Bearer hf_secret":
            return self.answer(401, {"error": "unauthorized"}, {"X-Error-Code": "RepoNotFound"})
        parts = self.path.partition("?")[0].strip("/").split("/")
        asked = parts[5] if parts[0] == "api" else parts[3]
        commit = asked if asked in self.commits.values() else self.commits.get(asked)
        if commit is None:
            return self.answer(404, {"error": "no revision"}, {"X-Error-Code": "RevisionNotFound"})
        if parts[0] == "api":
            files = [p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*.*")]
            if parts[4] == "tree":
                sizes = {name: (self.folder / name).stat().st_size for name in files}
                found = [{"type": "file", "path": k, "size": v, "oid": "0" * 40} for k, v in sizes.items()]
                return self.answer(200, found)
            return self.answer(
                200, {"id": "user/model", "sha": commit, "siblings": [{"rfilename": f} for f in files]}
            )
        content = (self.folder / "/".join(parts[4:])).read_bytes()
        if parts[4:] == ["model_index.json"] and commit == "b" * 40:
            content = content.replace(b'"label_dropout": 0.0', b'"label_dropout": 0.5')
        return self.answer(
            200, content, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        )

    do_HEAD = do_GET

    def answer(self, code, content, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


ASK = """
import json, os, sys
from maskgit import MaskGIT
for options in json.loads(sys.argv[1]):
    environment = options.pop("environment", {})
    os.environ.update(environment)
    try:
        print(MaskGIT.from_pretrained("user/model", **options).config.label_dropout)
    except Exception as error:
        print(type(error).__name__, " ".join(str(error).split()))
    for name in environment:
        del os.environ[name]
"""


def ask(questions, **environment):
    given = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"} | environment
    kept = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"}
    done = forking.run("-c", ASK, json.dumps(questions), env=kept | given)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_model_on_the_hub_has_revisions_a_token_and_a_cache(folder, tmp_path):
    FakeHub.folder, token = folder, "hf_secret"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        place = {"HF_ENDPOINT": f"http://127.0.0.1:{running.server_port}", "HF_HOME": str(tmp_path / "home")}
        cache = str(tmp_path / "cache")
        (tmp_path / "file").touch()
        private, unknown, first, second, kept, nothing, unwritable = ask(
            [
                {"cache_dir": cache},
                {"cache_dir": cache, "token": token, "revision": "v7"},
                {"cache_dir": cache, "token": token},
                {"cache_dir": cache, "token": token, "revision": "v1"},
                {"cache_dir": cache, "revision": "v1", "local_files_only": True},
                {"local_files_only": True},
                {"cache_dir": str(tmp_path / "file" / "cache"), "token": token},
            ],
            **place,
        )
        running.shutdown()
    assert private.startswith("DownloadError")
    assert "give a token" in private
    assert "has no revision 'v7'" in unknown
    assert (first, second, kept) == ("0.0", "0.5", "0.5")
    assert "local_files_only forbids downloads" in nothing
    assert str(tmp_path / "home") in nothing
    assert unwritable.startswith("OutputError")
    assert "HF_HOME" in unwritable
    offline, cached = ask([{}, {"cache_dir": cache}], **place | {"HF_HUB_OFFLINE": "1"})
    assert "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) turns offline mode on" in offline
    assert "check the name" not in offline
    assert cached == "0.0"
    (gone,) = ask([{}], **place)
    assert "check the name and the network" in gone


def test_a_name_may_hold_the_revision(folder, tmp_path, monkeypatch):
    asked = []

    def download(repo_id, *, revision, **_):
        asked.append((repo_id, revision))
        return folder

    monkeypatch.setattr(saving.hugging_face, "download", download)
    monkeypatch.chdir(tmp_path)
    for revision in ("v1", "refs/pr/3", "0" * 40):
        assert hub.locate(f"user/model@{revision}") == folder
        assert asked[-1] == ("user/model", revision)
    assert main(["info", "user/model@v1"]) == 0
    assert hub.load_tokenizer("user/model@v1").config == hub.load_tokenizer(folder).config
    assert asked[-2:] == [("user/model", "v1")] * 2
    with pytest.raises(ConfigError, match="give only one"):
        hub.locate("user/model@v1", revision="v2")
    for wrong in ("user/model@", "user/model@a@b", "user/model@../..", "cifar10@v1"):
        with pytest.raises((ConfigError, CheckpointError)):
            hub.locate(wrong)
    # A folder that is called so is a folder.
    shutil.copytree(folder, tmp_path / "user" / "model@v1")
    assert hub.locate("user/model@v1") == Path("user/model@v1")
    assert len(asked) == 5


PROXIES = ["ALL_PROXY", "https_proxy", "HTTPS_PROXY"]


@pytest.fixture(scope="module")
def behind_socks(tmp_path_factory) -> dict[str, str]:
    """What is said where each variable names a SOCKS proxy and the package for it is not installed."""
    folder = tmp_path_factory.mktemp("socks")
    (folder / "socksio.py").write_text("raise ImportError('not there')")
    path = os.pathsep.join([str(folder), *sys.path])
    questions = [
        {"cache_dir": str(folder), "environment": {variable: "socks5://127.0.0.1:9"}} for variable in PROXIES
    ]
    return dict(zip(PROXIES, ask(questions, PYTHONPATH=path, HF_ENDPOINT=""), strict=True))


@pytest.mark.parametrize("variable", PROXIES)
def test_a_proxy_that_needs_a_package_is_no_fault_of_the_network(variable, behind_socks):
    told = behind_socks[variable]
    assert told.startswith("ConfigError The environment names a SOCKS proxy, which needs the package socksio")


def test_only_models_on_the_hub_have_revisions(folder):
    for name in ("cifar10", "imagenet256", folder, "./gone"):
        with pytest.raises(ConfigError, match="leave it out"):
            hub.from_pretrained(name, revision="main")
