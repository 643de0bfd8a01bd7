"""What docs/stability.md promises: names, commands, exit codes, and folders of every format version."""

import importlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import maskgit
from maskgit import MaskGIT, hub
from maskgit.apps.cli import commands as cli
from maskgit.errors import CheckpointError

ROOT = Path(__file__).parents[1]
# Written by the release that made this format version, never anew; record.json is what it computed then.
FORMATS = sorted((ROOT / "tests" / "golden").glob("model_format_*"))
PAGE = (ROOT / "docs" / "stability.md").read_text("utf-8")


def found(name: str) -> object:
    """Return what a dotted name means."""
    module, rest = name, []
    while True:
        try:
            value: object = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, _, last = module.rpartition(".")
            rest.insert(0, last)
    for part in rest:
        value = getattr(value, part)
    return value


NAMES = sorted(set(re.findall(r"`(maskgit(?:\.\w+)+)`", PAGE)))


@pytest.mark.parametrize("name", NAMES)
def test_stable_names_are_there(name):
    assert found(name) is not None


def test_all_that_is_public_is_promised():
    assert {f"maskgit.{name}" for name in maskgit.__all__} <= set(NAMES)
    methods = re.findall(r"`(\w+)`", PAGE.partition("Of `MaskGIT`:")[2].partition("\n\n")[0])
    assert all(hasattr(MaskGIT, name) for name in methods)
    # What is left out serves the engine and the server alone.
    others = {"decode_on_device", "fill", "fill_batches", "free_memory", "predictor"}
    assert {name for name in dir(MaskGIT) if not name.startswith("_")} - set(methods) == others


def test_names_in_other_documents_are_there():
    documents = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(path.read_text("utf-8") for path in documents)
    imports = re.findall(r"^from (maskgit[\w.]*) import ([\w, ]+)$", text, re.MULTILINE)
    assert len(imports) > 10
    for module, names in imports:
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def test_exit_codes_are_those_that_are_promised(capsys):
    assert cli.main(["info"]) == 0
    assert cli.main(["info", "nonsense"]) == cli.main(["nonsense"]) == 2
    from maskgit.training.run.stopping import EXIT_INTERRUPTED

    assert (EXIT_INTERRUPTED, cli.EXIT_INTERRUPTED) == (75, 130)


def test_every_format_version_has_a_folder_here():
    assert [int(path.name.rpartition("_")[2]) for path in FORMATS] == list(range(1, hub.FORMAT_VERSION + 1))


@pytest.mark.parametrize("folder", FORMATS, ids=lambda path: path.name)
def test_folders_of_every_format_version_are_read(folder, tmp_path):
    record = {
        name: torch.tensor(value) for name, value in json.loads((folder / "record.json").read_text()).items()
    }
    model = MaskGIT.from_pretrained(folder)
    assert model.class_names == ("night heron", "kestrel")
    sampler = model.sampler_config()
    assert (sampler.steps, sampler.policy, sampler.policy_options["form"]) == (3, "remdm", "cap")
    assert torch.allclose(model.predict_logits(record["sequence"]), record["logits"], atol=1e-5)
    assert torch.allclose(model.decode_tokens(record["tokens"]), record["image"], atol=1e-5)
    # Written again in today's format, it is the same model.
    again = MaskGIT.from_pretrained(model.save_pretrained(tmp_path / "again"))
    assert again.config == model.config
    for stage in ("tokenizer", "transformer"):
        name = f"{stage}/model.safetensors"
        before, after = load_file(folder / name), load_file(tmp_path / "again" / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_settings_that_a_folder_lacks_keep_the_model_as_it_was(tmp_path):
    folder = shutil.copytree(FORMATS[0], tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    for later in ("tables", "force_guidance", "choice_schedule", "temperature_schedule", "guidance_schedule"):
        index["sampler"].pop(later)
    (folder / "model_index.json").write_text(json.dumps(index))
    assert MaskGIT.from_pretrained(folder).config == MaskGIT.from_pretrained(FORMATS[0]).config


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"format_version": hub.FORMAT_VERSION + 1}, "format_version"),
        ({"sampler": {"steps": 3, "from_the_future": 1}}, "from_the_future"),
        ({"from_the_future": 1}, "from_the_future"),
    ],
)
def test_what_a_newer_release_wrote_is_refused(change, told, tmp_path):
    folder = shutil.copytree(FORMATS[0], tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | change))
    with pytest.raises(CheckpointError, match=told):
        MaskGIT.from_pretrained(folder)


def test_a_tensor_of_the_future_is_refused(tmp_path):
    folder = shutil.copytree(FORMATS[0], tmp_path / "model")
    path = folder / "transformer" / "model.safetensors"
    save_file(load_file(path) | {"from_the_future": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="from_the_future"):
        MaskGIT.from_pretrained(folder)
