"""The order, the sharing out and the augmentation of training samples."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from maskgit.data.augment import AUGMENTATIONS, NUM_DRAWS, VIEWS, crop_boxes, resize_and_centre_crop
from maskgit.data.batches import ImageBatches, Shuffler, sample_numbers, spread
from maskgit.data.image_cache import ImageCache, write_image_cache
from maskgit.errors import ConfigError


def noise_images(count: int, side: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> ImageCache:
    # Every image bears its number in the middle, where no crop below takes it away.
    images = noise_images(23, 8)
    images[:, 3:5, 3:5] = np.arange(23)[:, None, None, None]
    labels = np.arange(23) % 3
    return write_image_cache(tmp_path_factory.mktemp("cache") / "images", images, labels, ["a", "b", "c"])


@given(length=st.integers(1, 300), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**40))
@settings(max_examples=30, deadline=None)
def test_each_epoch_visits_every_image_once(length, seed, epoch):
    order = Shuffler(length, seed).order(epoch)
    assert sorted(order) == list(range(length))


def test_epochs_and_seeds_differ_and_repeat():
    orders = [Shuffler(1000, seed).order(epoch) for seed in (0, 1) for epoch in (0, 1)]
    for one, other in itertools.combinations(orders, 2):
        assert (one == other).mean() < 0.05
    assert np.array_equal(Shuffler(1000, 1).order(1), orders[3])


def test_order_is_that_of_philox_words():
    # Pinned: a run that resumes under another numpy must go on in the same order.
    assert Shuffler(8, 7).order(3).tolist() == [2, 5, 7, 3, 0, 6, 4, 1]


def test_samples_go_through_the_epochs_in_turn():
    shuffler = Shuffler(7, 5)
    indices = shuffler.indices(np.arange(21))
    assert indices.tolist() == [i for epoch in range(3) for i in shuffler.order(epoch).tolist()]
    assert Shuffler(7, 5, shuffle=False).indices(np.arange(10)).tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 2]


@given(step=st.integers(0, 10**6), share=st.integers(1, 9), world=st.integers(1, 8))
def test_ranks_share_a_batch_in_turn(step, share, world):
    parts = [sample_numbers(step, share * world, rank, world) for rank in range(world)]
    assert np.array_equal(np.concatenate(parts), sample_numbers(step, share * world))
    assert np.concatenate(parts)[0] == step * share * world


def test_uneven_batch_is_refused():
    with pytest.raises(ConfigError, match="multiple of their number"):
        sample_numbers(0, 10, 0, 4)


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_batches_do_not_depend_on_processes_threads_or_restarts(cache, augment):
    settings = {"seed": 3, "global_batch": 12, "augment": augment, "size": 6}
    whole = list(itertools.islice(ImageBatches(cache, **settings), 5))
    for world in (2, 3, 4):
        ranks = [ImageBatches(cache, **settings, rank=rank, world=world) for rank in range(world)]
        for step, expected in enumerate(whole):
            parts = [rank.batch(step) for rank in ranks]
            for i, value in enumerate(expected):
                assert torch.equal(torch.cat([part[i] for part in parts]), value)
    threads = ImageBatches(cache, **settings, num_workers=3).from_step(2)
    for made, expected in zip(itertools.islice(threads, 3), whole[2:], strict=True):
        for one, other in zip(made, expected, strict=True):
            assert torch.equal(one, other)


def test_batches_carry_the_right_image_and_label(cache):
    batches = ImageBatches(cache, seed=0, global_batch=8, augment="flip")
    seen, flipped = [], 0
    for batch in itertools.islice(batches, 23):
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape == (8, 3, 8, 8)
        assert batch.images.is_contiguous()
        for image, label in zip(batch.images.permute(0, 2, 3, 1).numpy(), batch.labels, strict=True):
            index = int(image[4, 4, 0])
            seen.append(index)
            assert label == index % 3
            original = cache.images[index]
            if not np.array_equal(image, original):
                assert np.array_equal(image, original[:, ::-1])
                flipped += 1
    # 23 batches of 8 are 8 epochs of 23.
    assert np.bincount(seen).tolist() == [8] * 23
    assert 60 < flipped < 124


def test_settings_change_the_batches(cache):
    base = ImageBatches(cache, seed=0, global_batch=23).batch(0).images
    for changed in ({"seed": 1}, {"augment": "none"}, {"augment": "crop+flip"}, {"shuffle": False}):
        other = ImageBatches(cache, **{"seed": 0, "global_batch": 23, **changed}).batch(0).images
        assert not torch.equal(base, other)
    assert ImageBatches(cache, seed=0, global_batch=2, size=4).batch(0).images.shape == (2, 3, 4, 4)


def test_a_batch_larger_than_the_data_set_holds_repeats(cache):
    labels = ImageBatches(cache, seed=0, global_batch=46).batch(0).labels
    assert torch.bincount(labels).tolist() == [16, 16, 14]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"size": 9}, "pack the images again at 9"),
        ({"augment": "flop"}, "Did you mean 'flip'"),
        ({"rank": 2, "world": 2}, "rank"),
        ({"seed": -1}, "seed"),
        ({"num_workers": -1}, "num_workers"),
    ],
)
def test_bad_settings_are_refused(cache, changed, message):
    with pytest.raises(ConfigError, match=message):
        ImageBatches(cache, **{"seed": 0, "global_batch": 4, **changed})


def test_an_image_of_the_right_size_is_kept_exactly():
    image = Image.fromarray(noise_images(1, 9)[0])
    assert np.array_equal(resize_and_centre_crop(image, 9), image)


@pytest.mark.parametrize(("width", "height"), [(40, 30), (30, 40), (31, 31)])
def test_resizing_agrees_with_torch(width, height):
    # A smooth picture, as antialiasing filters agree on nothing else; below a factor of two.
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 5, y * 5, (x + y) * 3], axis=-1).astype(np.uint8)
    side = 24
    ours = np.asarray(resize_and_centre_crop(Image.fromarray(pixels), side)).astype(int)
    scale = side / min(width, height)
    shape = (round(height * scale), round(width * scale))
    scaled = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    scaled = F.interpolate(scaled, shape, mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()
    top, left = (shape[0] - side) // 2, (shape[1] - side) // 2
    expected = scaled[top : top + side, left : left + side].clip(0, 255)
    assert np.abs(ours - expected).max() <= 1


def test_large_images_are_halved_by_averaging_first():
    pixels = noise_images(1, 32)[0]
    means = pixels.reshape(8, 4, 8, 4, 3).mean((1, 3))
    # Two halvings, each of two passes that round to whole levels.
    assert np.abs(np.asarray(resize_and_centre_crop(Image.fromarray(pixels), 8)) - means).max() <= 2


def test_crop_boxes_are_square_inside_and_spread():
    draws = np.random.default_rng(0).random((5000, 3), dtype=np.float32)
    left, top, right, bottom = crop_boxes(draws, 100).T
    assert np.allclose(right - left, bottom - top)
    assert min(left.min(), top.min()) >= 0
    assert max(right.max(), bottom.max()) <= 100
    side = right - left
    assert side.min() >= 79.99
    assert abs(side.mean() - 90) < 0.5
    # The place of a box is uniform among those that fit.
    assert abs((left / (100 - side)).mean() - 0.5) < 0.02


def test_random_crop_of_a_gradient_is_a_gradient():
    y, x = np.mgrid[:20, :20]
    images = np.stack([x * 10, y * 10, 0 * x], axis=-1).astype(np.uint8)[None]
    # The smallest crop is 16 of 20 pixels; the draws for its place put it at (2, 4); no flip, then one.
    for first, mirrored in ((0.9, False), (0.1, True)):
        draws = np.array([[first, 0.0, 0.5, 1.0]], np.float32)
        crop = AUGMENTATIONS["crop+flip"](images, draws, 12)[0].astype(float)
        if mirrored:
            crop = crop[:, ::-1]
        centres = (np.arange(12) + 0.5) * 16 / 12 - 0.5
        inner = slice(1, -2)
        assert np.abs(crop[inner, inner, 0] - 10 * (2 + centres)[None, inner]).max() <= 1
        assert np.abs(crop[inner, inner, 1] - 10 * (4 + centres)[inner, None]).max() <= 1


def test_ten_crops_are_corners_and_centre_and_their_mirrors():
    images = noise_images(2, 7)
    draws = np.zeros((2, NUM_DRAWS), np.float32)
    views = [VIEWS["ten_crop"].make(images, draws, 4, view) for view in range(10)]
    corners = [(1, 1), (0, 0), (0, 3), (3, 0), (3, 3)]
    for (top, left), crop, mirrored in zip(corners, views[:5], views[5:], strict=True):
        assert np.array_equal(crop, images[:, top : top + 4, left : left + 4])
        assert np.array_equal(mirrored, crop[:, :, ::-1])


def test_every_beginning_of_a_spread_order_has_its_share_of_every_class():
    labels = np.repeat([2, 0, 5], [60, 30, 10])
    order = spread(labels, 3)
    assert sorted(order) == list(range(100))
    for count in range(100):
        found = np.bincount(labels[order[:count]], minlength=6)
        assert np.abs(found - np.array([0.3, 0, 0.6, 0, 0, 0.1]) * count).max() < 1.01
    assert order.tolist() == spread(labels, 3).tolist() != spread(labels, 4).tolist()
