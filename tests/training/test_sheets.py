"""Which images are shown and measured: all classes, by seed, whatever the batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from maskgit.data.image_cache import ImageCache, write_image_cache
from maskgit.data.token_cache import TokenCache, write_token_cache
from maskgit.evaluation.metrics import psnr
from maskgit.training.distributed import Distributed
from maskgit.training.evaluation import (
    class_columns,
    class_members,
    evaluate_loss,
    evaluate_tokenizer,
    reconstruction_sheet,
    sample,
)

ALONE = Distributed(0, 1, torch.device("cpu"))
NAMES = ("plain", "noise", "stripes")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> ImageCache:
    """Ten pictures, sorted by class: six of one grey each, three of noise, one of stripes."""
    pixels = np.zeros((10, 32, 32, 3), np.uint8)
    pixels[:6] = np.arange(0, 240, 40)[:, None, None, None]
    pixels[6:9] = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3))
    pixels[9, ::2] = 255
    return write_image_cache(
        tmp_path_factory.mktemp("sorted") / "images", pixels, np.repeat([0, 1, 2], [6, 3, 1]), NAMES
    )


@pytest.fixture(scope="module")
def tokens(images, tiny, tmp_path_factory) -> TokenCache:
    return write_token_cache(
        images,
        tiny.tokenizer,
        tmp_path_factory.mktemp("tokens") / "tokens",
        tokenizer_fingerprint="0" * 64,
        num_codes=tiny.config.tokenizer.codebook_size,
        views="centre",
    )


def test_columns_are_classes_that_the_seed_chooses():
    thousand = [class_columns(np.arange(1000), seed, 16) for seed in (0, 1)]
    assert all(len(np.unique(columns)) == 8 and (np.diff(columns) > 0).all() for columns in thousand)
    assert thousand[0].tolist() != thousand[1].tolist()
    assert class_columns(np.array([4, 7, 9]), 0, 16).tolist() == [4, 4, 7, 7, 9, 9]
    assert class_columns(np.arange(5), 0, 16).tolist() == [0, 1, 2, 3, 4]
    assert len(class_columns(np.arange(5), 0, 2)) == 2
    assert class_columns(np.array([0]), 0, 4).tolist() == [0] * 4


def test_a_sheet_takes_different_images_of_each_class_while_there_are_any(images):
    columns = class_columns(np.arange(3), 0, 12)
    members = class_members(images.labels, columns, 0, 12)
    assert images.labels[members].tolist() == [0, 0, 1, 1, 2, 2] * 2
    assert len(set(members[[0, 1, 6, 7]])) == 4
    assert set(members[[2, 3, 8, 9]]) == {6, 7, 8}
    assert set(members[[4, 5, 10, 11]]) == {9}


def loss(tiny, cache, batch_size: int, labels: np.ndarray | None = None) -> float:
    return evaluate_loss(
        tiny.transformer,
        cache if labels is None else replace(cache, labels=labels),
        tiny.vocabulary,
        classes=torch.arange(10),
        seed=0,
        batch_size=batch_size,
        mask_schedule="cosine",
        precision=torch.float32,
        distributed=ALONE,
    )


def test_every_test_image_counts_once_whatever_the_batch_size(tiny, tokens):
    # Alone, each image has its own loss; the mean over all is that of any batch size.
    totals = [loss(tiny, tokens, size) for size in (1, 3, 4, 10, 64)]
    assert totals == pytest.approx([totals[0]] * 5, rel=1e-5)
    changed = tokens.labels.copy()
    changed[-1] = 0
    assert loss(tiny, tokens, 4, changed) != pytest.approx(totals[0], rel=1e-6)


def test_a_part_of_the_test_images_is_taken_from_all_classes(tiny, images):
    def scores(num_images, batch_size=4):
        return evaluate_tokenizer(
            tiny.tokenizer,
            images,
            size=32,
            seed=0,
            precision=torch.float32,
            num_images=num_images,
            feature_net=None,
            batch_size=batch_size,
            distributed=ALONE,
        )

    def own(indices):
        pixels = torch.from_numpy(images.images[indices].transpose(0, 3, 1, 2).copy()).float() / 255
        rebuilt = tiny.tokenizer.decode(tiny.tokenizer.encode(pixels)).clamp(0, 1)
        return float(psnr(pixels, rebuilt).clamp(max=100).mean())

    assert scores(None)["test_psnr"] == pytest.approx(own(np.arange(10)), rel=1e-4)
    assert scores(None, 3) == pytest.approx(scores(None, 10), rel=1e-4)
    first = own(np.arange(5))
    assert abs(scores(5)["test_psnr"] - first) > 0.1


def test_reconstructions_stand_below_their_images_a_class_a_column(tiny, images):
    sheet = reconstruction_sheet(tiny.tokenizer, images, size=32, seed=0, precision=torch.float32)
    assert sheet.columns == 6
    assert sheet.captions[:6] == ("plain", "plain", "noise", "noise", "stripes", "stripes")
    assert all(caption.startswith("rebuilt, ") for caption in sheet.captions[6:12])
    assert len(sheet.images) == len(sheet.captions) == 24
    originals = sheet.images[:6]
    assert float(sheet.images[4].mean()) == pytest.approx(0.5)
    level = float(psnr(originals, sheet.images[6:12])[4])
    assert sheet.captions[10] == f"rebuilt, {level:.1f} dB"


def test_samples_show_a_class_a_column(tiny):
    names = tuple(f"class {i}" for i in range(tiny.config.transformer.num_classes))
    made = sample(
        tiny.transformer,
        tiny.tokenizer,
        tiny.vocabulary,
        class_names=names,
        num_images=16,
        seed=3,
        sampler=replace(tiny.config.sampler, steps=1),
        precision=torch.float32,
    )
    columns = class_columns(np.arange(len(names)), 3, 16)
    assert made.sheet.columns == len(columns)
    assert made.sheet.captions == tuple(names[c] for c in (*columns, *columns))
