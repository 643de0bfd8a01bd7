"""Model folders: bit for bit there and back, whole or not at all, and every damage told."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from maskgit import MaskGIT, hub
from maskgit.errors import CheckpointError, ConfigError, DownloadError, OutputError


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
        (lambda f: (f / "model_index.json").unlink(), "is this a model folder"),
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
            "filters must be of type",
        ),
        (
            lambda f: edit_json(f / "tokenizer/config.json", lambda v: v.update(filters=64)),
            "does not fit its config",
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

    monkeypatch.setattr(hub, "save_file", full_disk)
    with pytest.raises(OutputError, match="disk is full"):
        tiny.save_pretrained(folder)
    assert_equal(tiny, hub.load_model(folder))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full", "model"]


def test_an_official_model_is_converted_once(tiny, golden, monkeypatch):
    calls = []

    def fetched(url, folder):
        calls.append(url)
        return golden / ("tiny_tokenizer.msgpack" if "tokenizer_" in url else "tiny_transformer.msgpack")

    monkeypatch.setattr(hub.download, "fetch", fetched)
    first = hub.from_pretrained("imagenet256")
    assert len(calls) == 2
    assert all("imagenet256" in url for url in calls)
    assert_equal(first, hub.from_pretrained("imagenet256"))
    assert len(calls) == 2
    shutil.rmtree(hub.download.cache_dir() / "models")


def test_what_was_downloaded_and_is_no_model_is_thrown_away(monkeypatch, tmp_path):
    page = tmp_path / "page"
    page.write_bytes(b"<html>log in</html>")
    (tmp_path / "page.json").write_text("{}")
    monkeypatch.setattr(hub.download, "fetch", lambda url, folder: page)
    with pytest.raises(CheckpointError, match="not imagenet512, and was thrown away"):
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
