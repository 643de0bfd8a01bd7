"""The notebook: what is committed, and that it runs on the bundled model and on Google's by one line."""

import importlib.util
import json
import re
from pathlib import Path

import nbformat
import pytest

from maskgit import MaskGIT, hub
from maskgit.config import ModelConfig
from maskgit.networks.classes import imagenet_class_names
from maskgit.networks.config import TokenizerConfig, TransformerConfig
from maskgit.networks.tokenizer import Tokenizer
from maskgit.networks.transformer import Transformer

DOCS = Path(__file__).parents[1] / "docs"
MODEL_LINE = 'MODEL = "cifar10"'


@pytest.fixture
def notebook():
    return nbformat.read(DOCS / "demo.ipynb", as_version=4)


@pytest.fixture(scope="module")
def run():
    spec = importlib.util.spec_from_file_location("run_notebook", DOCS / "run_notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.run


def outputs(cell):
    return sorted(kind for output in cell.outputs for kind in output.get("data", {}))


def test_what_is_committed_was_run(notebook):
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    assert sum("image/png" in outputs(cell) for cell in cells) >= 10
    assert any("image/gif" in outputs(cell) for cell in cells)


def test_what_is_committed_is_small_and_tells_nothing_of_a_machine(notebook):
    text = (DOCS / "demo.ipynb").read_text("utf-8")
    assert len(text) < 600_000
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("image/png", None)
            output.get("data", {}).pop("image/gif", None)
    said = json.dumps(notebook).replace("/content/maskgit", "")
    assert not re.findall(r"/(?:work|home|root|tmp|usr|Users|content)/\S*|Warning|0x[0-9a-f]{6}", said)


def test_one_line_names_the_model(notebook):
    source = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert source.count(MODEL_LINE) == 1
    assert "imagenet256" in hub.REGISTRY


def test_it_runs_from_top_to_bottom(notebook, run, monkeypatch):
    monkeypatch.setenv("MASKGIT_CACHE", "/nowhere")
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    committed = [outputs(cell) for cell in cells]
    for cell in cells:
        # Whether what is trained is any good is seen in what is committed.
        cell.source = re.sub(r"\bsteps=(350|450),", "steps=40,", cell.source)
        cell.source = cell.source.replace("range(300)", "range(30)")
    assert sum("steps=40," in cell.source or "range(30)" in cell.source for cell in cells) == 3
    run(notebook)
    assert [outputs(cell) for cell in cells] == committed


def test_it_runs_on_googles_models(notebook, run, tmp_path, monkeypatch):
    # A small one of random weights stands in the cache where the released one would, converted.
    tokenizer = TokenizerConfig(32, 1, (1, 1, 1, 1, 1), embedding_dim=4, codebook_size=16, norm="LN")
    transformer = TransformerConfig(16, 1000, 16, 8, 1, 1, 8)
    config = ModelConfig(tokenizer, transformer, image_size=256, class_names=imagenet_class_names())
    model = MaskGIT(config, Tokenizer(tokenizer), Transformer(transformer))
    model.save_pretrained(tmp_path / "models" / "imagenet256")
    monkeypatch.setenv("MASKGIT_CACHE", str(tmp_path))
    # What is trained does not depend on the model.
    (last,) = [i for i, cell in enumerate(notebook.cells) if cell.source.startswith("## Train")]
    notebook.cells = notebook.cells[:last]
    for cell in notebook.cells:
        cell.source = cell.source.replace(MODEL_LINE, 'MODEL = "imagenet256"')
    run(notebook)
    (greeting,) = [
        o.text
        for cell in notebook.cells
        for o in cell.get("outputs", [])
        if "pixels from" in o.get("text", "")
    ]
    assert greeting.startswith("256 × 256 pixels from 16 × 16 tokens")
