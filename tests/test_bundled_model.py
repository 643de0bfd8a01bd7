"""The model that comes with the package."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskgit import MaskGIT, hub

DATA = Path(__file__).parents[2] / "shared" / "data" / "cifar10" / "test.parquet"
NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture(scope="module")
def bundled():
    return MaskGIT.from_pretrained()


def test_it_is_small_named_and_can_be_guided(bundled):
    folder = hub.locate(hub.DEFAULT_MODEL)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 24 * 2**20
    assert bundled.class_names == NAMES
    assert bundled.config.label_dropout > 0
    card = (folder / "README.md").read_text("utf-8")
    for word in ("CIFAR-10", "licence", "JPEG", "recipes/cifar10", "EffNet-FD"):
        assert word in card


def test_an_image_does_not_depend_on_its_batch(bundled):
    whole = bundled.generate(["frog", "ship", None], num_images=3, seed=5, steps=6, batch_size=9)
    alone = bundled.generate(["frog", "ship", None], num_images=3, seed=5, steps=6, batch_size=1)
    assert torch.equal(whole.tokens, alone.tokens)
    assert (whole.images - alone.images).abs().max() < 1 / 255


def test_the_tokenizer_keeps_what_the_card_says(bundled):
    if not DATA.is_file():
        pytest.skip("needs ../shared/data/cifar10, whose images this repository does not hold")
    parquet = pytest.importorskip("pyarrow.parquet")
    from maskgit.evaluation.metrics import codebook_usage, psnr

    column = parquet.read_table(DATA, columns=["image"])["image"].slice(0, 1000).to_pylist()
    files = [value["bytes"] if isinstance(value, dict) else value for value in column]
    array = np.stack([np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in files])
    images = torch.from_numpy(array).movedim(-1, 1).float() / 255
    tokens = bundled.tokenizer.encode(images)
    assert float(psnr(bundled.tokenizer.decode(tokens).clamp(0, 1), images).mean()) >= 22
    assert codebook_usage(tokens.flatten().bincount(minlength=bundled.vocabulary.num_codes).numpy()) >= 0.8
