"""Where and for whom it runs: users without a home, systems that can be read only, other threads of a program."""

import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
import warnings
from pathlib import Path

import pytest
from PIL import Image

from maskgit.apps.cli.commands import main
from maskgit.engine import host

# A user whom the system does not know, on a system where one folder alone can be written, gives commands one after
# another: each is answered by a line with its exit code and what it wrote to standard error.
SCRIPT = """
import contextlib, errno, io, json, os, pwd, sys

def unknown(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")

pwd.getpwuid = unknown
writable = (sys.argv[1], "/dev/", "/proc/")
NAMED = {"os.mkdir": 0, "os.rename": 1, "os.remove": 0, "os.link": 1, "os.symlink": 1, "os.rmdir": 0, "os.chmod": 0}

def read_only(event, arguments):
    if event == "open":
        path, mode, flags = arguments
        if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
    elif event in NAMED:
        path = arguments[NAMED[event]]
        # Relative to an open folder, which was judged when what is in it was made.
        if arguments[-1] not in (-1, None) and not os.path.isabs(path):
            return
    else:
        return
    if isinstance(path, (str, bytes, os.PathLike)):
        path = os.path.abspath(os.fsdecode(path))
        if not path.startswith(writable):
            raise OSError(errno.EROFS, "Read-only file system", path)

from maskgit.apps.cli.commands import main
from maskgit.engine import host

# Which is measured anew without a cache, and takes long on a busy machine.
host._measure = lambda: dict.fromkeys(host.names(), 1.0)
sys.addaudithook(read_only)
answers = []
for arguments in json.loads(sys.argv[2]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(arguments)
    answers.append((code, said.getvalue()))
print(json.dumps(answers))
"""
HOMES = ("HOME", "MASKGIT_CACHE", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE")


def run(folder: Path, *commands: list[str], **environment: str) -> list[tuple[int, str]]:
    """Return the exit code of each command and what it wrote to standard error."""
    kept = {key: value for key, value in os.environ.items() if key not in HOMES}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), json.dumps(commands)],
        env=kept | {"TMPDIR": str(folder)} | environment,
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def save_photos(folder: Path) -> Path:
    for name in ("a", "b"):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (40, 40), (100 * i, 50, 0)).save(folder / "photos" / name / f"{i}.png")
    return folder / "photos"


@pytest.fixture
def photos(tmp_path):
    return save_photos(tmp_path)


COMMANDS = {
    "generate": "generate --class frog --steps 1 --out OUT/frogs",
    "edit": "edit PHOTO --box 0 0 8 8 --class frog --steps 1 --out OUT/edited",
    "info": "info cifar10",
    "pack": "pack PHOTOS OUT/packed --size 8",
    "convert": "convert cifar10 OUT/flax --to-flax",
}
# Neither is in a cache.
REMOTE = {"imagenet256": "MASKGIT_CACHE", "someone/model": "HF_HOME"}


HOMELESS = [{}, {"HOME": "/nowhere"}]


@pytest.fixture(scope="module")
def answers(request, tmp_path_factory) -> dict[str, tuple[int, str]]:
    """What all commands say without a home, and what `info` says of a model that needs a cache."""
    folder = tmp_path_factory.mktemp("homeless")
    photos = save_photos(folder)
    (folder / "out").mkdir()
    places = {"OUT": f"{folder}/out", "PHOTOS": f"{photos}", "PHOTO": f"{photos}/a/1.png"}
    commands = {
        name: [re.sub("[A-Z]+", lambda m: places[m[0]], word) for word in text.split()]
        for name, text in COMMANDS.items()
    }
    commands |= {model: ["info", model] for model in REMOTE}
    return dict(zip(commands, run(folder, *commands.values(), **request.param), strict=True))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("answers", HOMELESS, ids=["no-home", "unwritable-home"], indirect=True)
def test_what_needs_no_cache_works_without_a_home(command, answers):
    code, said = answers[command]
    assert code == 0, said
    assert "Traceback" not in said


@pytest.mark.parametrize("model", REMOTE)
@pytest.mark.parametrize("answers", HOMELESS[:1], ids=["no-home"], indirect=True)
def test_what_needs_a_cache_says_which_variable_to_set(model, answers):
    code, said = answers[model]
    assert code == 2
    assert REMOTE[model] in said
    assert "Traceback" not in said


@pytest.mark.parametrize("answers", HOMELESS[1:], ids=["unwritable-home"], indirect=True)
def test_a_home_that_cannot_be_written_is_no_fault_of_the_network(answers):
    code, said = answers["imagenet256"]
    assert code == 2
    assert "Read-only file system" in said
    assert "MASKGIT_CACHE" in said
    assert "network" not in said


# A number that no account has.
STRANGER = 12345
AS_STRANGER = ["setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups"]
# Python and its packages may lie in root's home; what is read is not what is tried here.
READING_ALL = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]


@functools.cache
def strangers_command() -> tuple[str, ...]:
    """Return what starts Python as a user whom the system does not know; who is not root stays who it is."""
    for prefix in ([*AS_STRANGER, *READING_ALL], AS_STRANGER):
        python = [*prefix, sys.executable]
        with contextlib.suppress(OSError):
            tried = subprocess.run(
                [*python, "-c", "import maskgit.apps.cli.commands"], capture_output=True, check=False, cwd="/"
            )
            if tried.returncode == 0:
                return tuple(python)
    return (sys.executable,)


@contextlib.contextmanager
def as_a_stranger(folder, *arguments):
    """Start a command as a user without name and home, to whom one folder belongs."""
    folder.mkdir()
    if os.getuid() == 0:
        os.chown(folder, STRANGER, STRANGER)
    kept = {key: value for key, value in os.environ.items() if key not in HOMES}
    with subprocess.Popen(
        [*strangers_command(), "-m", "maskgit", *arguments],
        env=kept | {"TMPDIR": str(folder)},
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def address(process):
    """Return the URL that a command says it is at."""
    said = []
    for line in process.stdout:
        said.append(line)
        if found := re.search(r"http://[^ \n]+", line):
            return found.group()
    pytest.fail("".join(said))


def test_a_user_without_a_name_generates(tmp_path):
    # How to go the fast way is measured, for want of a cache to read it from.
    arguments = (
        "generate",
        "--class",
        "frog",
        "--steps",
        "1",
        "--fast",
        "--out",
        str(tmp_path / "tmp" / "out"),
    )
    with as_a_stranger(tmp_path / "tmp", *arguments) as process:
        said, _ = process.communicate()
    assert process.returncode == 0, said
    assert Image.open(tmp_path / "tmp" / "out" / "frog-0-00000.png").size == (32, 32)


@pytest.mark.parametrize("command", ["serve", "app"])
def test_a_user_without_a_name_serves(command, tmp_path):
    with as_a_stranger(tmp_path / "tmp", command, "--port", "0") as process:
        url = address(process)
        with urllib.request.urlopen(f"{url}/") as page:
            assert b"MaskGIT" in page.read()
        if command == "serve":
            body = json.dumps({"class": "frog", "steps": 1}).encode()
            headers = {"Content-Type": "application/json", "Accept": "image/png"}
            with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/generate", body, headers)) as made:
                assert made.read(8) == b"\x89PNG\r\n\x1a\n"


def test_the_command_line_knows_the_tilde_everywhere(tmp_path, monkeypatch, photos, capsys):
    monkeypatch.setattr(host, "measured", lambda **_: dict.fromkeys(host.names(), 1.0))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    sizes = ["--steps", "1"]
    assert main(["generate", "--class=frog", "--out=~/frogs", *sizes]) == 0
    Image.new("L", (40, 40), 255).save(tmp_path / "mask.png")
    photo = "~/photos/a/1.png"
    assert main(["inpaint", photo, "--mask=~/mask.png", "--class=frog", "--out=~/filled", *sizes]) == 0
    assert main(["interpolate", photo, "~/photos/b/1.png", "--class=frog", "--out=~/between", *sizes]) == 0
    assert main(["pack", "~/photos", "~/packed", "--size=8"]) == 0
    assert main(["convert", "cifar10", "~/flax", "--to-flax"]) == 0
    assert main(["convert", "~/flax", "~/model"]) == 0
    assert main(["info", "~/model"]) == 0
    (tmp_path / "preset.json").write_text(json.dumps({"sampler": {"steps": 1}}))
    assert main(["generate", "--class=1", "--model=~/model", "--preset=~/preset.json", "--out=~/ones"]) == 0
    capsys.readouterr()
    made = {"frogs", "filled", "between", "packed", "flax", "model", "ones"}
    assert made <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "~").exists()


def test_python_and_recipes_know_the_tilde(tmp_path, monkeypatch, photos):
    from maskgit import convert, hub, images
    from maskgit.data.image_cache import ImageCache
    from maskgit.data.npz import open_npz
    from maskgit.data.pack import pack_images
    from maskgit.evaluation.networks.weights import local_file

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert images.read_image("~/photos/a/1.png").size == (40, 40)
    assert images.read_image(Path("~/photos/a/1.png")).size == (40, 40)
    images.save_png("~/new/picture.png", Image.new("RGB", (3, 3)))
    packed = pack_images("~/photos", "~/packed", size=8)
    assert packed.path == tmp_path / "packed"
    # As recipes name their data.
    assert ImageCache.open("~/packed").fingerprint == packed.fingerprint
    convert.save_official(hub.from_pretrained(), "~/flax")
    convert.load_official("~/flax/tokenizer_checkpoint", "~/flax/maskgit_checkpoint")
    assert local_file("~/weights.safetensors") == tmp_path / "weights.safetensors"
    (tmp_path / "file.npz").write_bytes(b"PK\x05\x06" + bytes(18))
    with open_npz("~/file.npz") as archive:
        assert not archive.names
    assert {"new", "packed", "flax"} <= {path.name for path in tmp_path.iterdir()}
    assert not (tmp_path / "~").exists()


def test_the_command_line_gives_a_programs_own_signal_handler_back(capsys):
    def own(*_):
        pass

    before = signal.signal(signal.SIGTERM, own)
    try:
        for arguments in (["policies"], ["info", "no such model"]):
            main(arguments)
            assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_checkpoint_leaves_the_programs_warning_filters_alone(tmp_path):
    """The filters belong to all threads: what one adds during another's save must still be there after it."""
    import torch
    from torch.distributed import checkpoint as dcp

    from maskgit.training.run.checkpoint import Checkpoints

    checkpoints, whole = Checkpoints(tmp_path), dcp.save

    def save(*args, **options):
        warnings.filterwarnings("ignore", message="of another thread")
        return whole(*args, **options)

    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcp, "save", save)
        checkpoints.save(1, {"step": torch.tensor(1)})
        patterns = [entry[1].pattern for entry in warnings.filters if entry[1] is not None]
    assert "of another thread" in patterns
