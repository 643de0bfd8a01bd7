"""Edits: what must stay does, for any mask, policy and photo; full masks against plain generation."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from maskgit import MaskGIT
from maskgit.editing import regions
from maskgit.editing.masks import read_mask
from maskgit.editing.photos import Photo
from maskgit.errors import ConfigError, ImageError, RegionError
from maskgit.images import to_uint8
from maskgit.sampler.policies import POLICIES
from pictures import encoded, noise

MASKS = arrays(np.bool_, (32, 32), elements=st.booleans(), fill=st.just(False))


@pytest.fixture(scope="module")
def free(tiny):
    """The tiny model as if it had been trained with label dropout."""
    return MaskGIT(dataclasses.replace(tiny.config, label_dropout=0.1), tiny.tokenizer, tiny.transformer)


@pytest.fixture(scope="module")
def photo():
    return noise(32, 32)


def as_images(made):
    return np.stack([np.asarray(picture) for picture in made.photos])


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_keeps_what_is_known_and_touches_no_other_pixel(tiny, photo, policy):
    @settings(max_examples=6, deadline=None)
    @given(MASKS, st.sampled_from([0.0, 0.3, 1.0]), st.integers(0, 2), st.integers(0, 3))
    def check(mask, share, dilate, start_step):
        made = tiny.inpaint(
            photo,
            mask,
            1,
            share=share,
            dilate=dilate,
            start_step=start_step,
            num_images=2,
            steps=4,
            policy=policy,
        )
        known = ~made.token_mask
        tokens = tiny.tokenizer.encode(tiny.prepare(photo))
        assert torch.equal(made.tokens[:, known], tokens.expand(2, -1, -1)[:, known])
        # Two tokens away from the mask, even the enlarged mask's soft edge and a blur of radius 1 have ended.
        far = ~regions.shares_to_token_mask(made.token_mask.double(), 0.0, 2)
        far = far.repeat_interleave(4, 0).repeat_interleave(4, 1).numpy()
        assert (as_images(made)[:, far] == photo[far]).all()
        far = torch.from_numpy(far)
        assert torch.equal(made.images[..., far], made.before.expand(2, -1, -1, -1)[..., far])

    check()


@pytest.mark.parametrize("policy", POLICIES)
def test_an_empty_mask_returns_the_photo_and_a_full_one_a_generation(tiny, photo, policy):
    options = {"num_images": 2, "seed": 4, "steps": 5, "policy": policy, "first_index": 3}
    empty = tiny.inpaint(photo, np.zeros((32, 32), np.bool_), 1, **options)
    assert (as_images(empty) == photo).all()
    assert torch.equal(empty.images, tiny.prepare(photo).expand(2, -1, -1, -1))
    full = tiny.inpaint(photo, np.ones((32, 32), np.bool_), 1, **options)
    plain = tiny.generate(1, **options)
    assert torch.equal(full.tokens, plain.tokens)
    assert torch.equal(full.images, plain.images)
    assert [p.tobytes() for p in full.photos] == [p.tobytes() for p in plain.to_pil()]


@pytest.mark.parametrize("size", [(20, 20), (50, 20), (90, 100)])
def test_a_full_mask_is_a_generation_for_photos_of_any_size(tiny, size):
    array = noise(*size)
    plain = tiny.generate(2, steps=3).tokens
    assert torch.equal(tiny.inpaint(array, np.ones(size, np.bool_), 2, steps=3).tokens, plain)
    whole = (0, 0, size[1], size[0])
    assert torch.equal(tiny.edit(array, whole, 2, steps=3, start_step=0).tokens, plain)


def test_an_image_of_an_edit_is_a_function_of_seed_and_index(tiny, photo):
    mask = noise(32, 32, 1) > 128
    whole = tiny.inpaint(photo, mask, 1, share=0.5, num_images=9, seed=2, steps=4)
    for size in (1, 4):
        again = tiny.inpaint(photo, mask, 1, share=0.5, num_images=9, seed=2, steps=4, batch_size=size)
        assert torch.equal(again.tokens, whole.tokens)
    alone = tiny.inpaint(photo, mask, 1, share=0.5, seed=2, steps=4, first_index=6)
    assert torch.equal(alone.tokens[0], whole.tokens[6])
    assert not torch.equal(tiny.inpaint(photo, mask, 1, share=0.5, seed=3, steps=4).tokens, whole.tokens[:1])


@settings(max_examples=15, deadline=None)
@given(MASKS)
def test_painted_pixels_are_new_entirely(tiny, mask):
    made = tiny.inpaint(noise(32, 32), mask, 1, steps=1)
    new = tiny.decode_tokens(made.tokens)
    painted = torch.from_numpy(mask)
    assert torch.equal(made.images[..., painted], new[..., painted])
    assert (as_images(made)[:, mask] == to_uint8(new)[:, mask]).all()


def test_masks_come_in_any_form(tiny, photo, tmp_path):
    mask = np.zeros((32, 32), np.bool_)
    mask[5:14, 9:30] = True
    grey = (mask * 255).astype(np.uint8)
    clear = Image.merge("LA", (Image.fromarray(grey), Image.fromarray(grey)))
    red = Image.fromarray(np.stack([grey, 0 * grey, 0 * grey], 2))
    for name, picture in (("grey", Image.fromarray(grey)), ("clear", clear), ("red", red)):
        picture.save(tmp_path / f"{name}.png")
    (tmp_path / "bit.png").write_bytes(encoded(Image.fromarray(mask)))
    forms = [
        grey, mask.astype(np.uint8), mask.astype(np.float64), mask[..., None], torch.from_numpy(mask)[None],
        np.stack([grey] * 3, 2), np.stack([mask] * 3, 2), np.stack([grey, 0 * grey, 0 * grey], 2), grey[None, None],
        np.stack([mask.astype(np.float32)] * 3, 2), np.stack([grey] * 3), torch.from_numpy(mask)[None, None],
        torch.from_numpy(np.stack([grey] * 3)[None]), torch.from_numpy(mask)[None, None].bfloat16(), grey[None, ..., None],
        np.stack([grey | 255] * 3 + [grey], 2), mask[None, ..., None].astype(np.uint8),
        Image.fromarray(grey), Image.fromarray(mask), clear, red, tmp_path / "grey.png", str(tmp_path / "clear.png"),
        tmp_path / "red.png", tmp_path / "bit.png",
    ]  # fmt: skip
    expected = tiny.inpaint(photo, mask, 3, steps=2)
    for form in forms:
        assert torch.equal(tiny.inpaint(photo, form, 3, steps=2).tokens, expected.tokens)


@pytest.mark.parametrize("shape", [(3, 3), (4, 3), (3, 4), (1, 4)])
def test_masks_of_photos_as_small_as_there_are_channels(shape):
    photo = Photo(Image.new("RGB", shape[::-1]))
    mask = np.random.default_rng(0).random(shape) < 0.5
    for form in (mask, mask[..., None], mask[None], np.stack([mask] * 3, 2), mask[None, None]):
        assert (read_mask(form, photo) == mask).all()
    if shape != (3, 3):
        assert (read_mask(np.stack([mask] * 3), photo) == mask).all()


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (np.zeros((31, 32), np.bool_), RegionError, "32 × 31 pixels, but the photo, as it is seen, has 32 × 32"),
        (np.zeros((32, 32, 2), np.uint8), RegionError, r"C = 1, 3 or 4, or a batch of one such, but is \(32, 32, 2\)"),
        (np.zeros((2, 1, 32, 32), np.uint8), RegionError, r"a batch of one such, but is \(2, 1, 32, 32\)"),
        (np.zeros((1, 1, 31, 32), np.uint8), RegionError, "32 × 31 pixels, but the photo"),
        (torch.zeros(32), RegionError, r"but is \(32,\)"),
        (np.full((32, 32), 1.5), RegionError, r"within \[0, 1\]"),
        (np.full((32, 32), np.nan), RegionError, r"within \[0, 1\]"),
        (np.zeros((32, 32), np.int64), RegionError, "bool, uint8 or float"),
        (Image.new("L", (8, 8)), RegionError, "8 × 8 pixels"),
        ("alpha", RegionError, "no transparency"),
        ("none.png", ImageError, "cannot be read"),
        (b"no picture", ImageError, "not a picture"),
        (encoded(Image.new("L", (32, 32)))[:50], ImageError, "damaged"),
        (5, ImageError, "must be a path"),
        (
            encoded(Image.new("L", (32, 32)), "GIF", save_all=True, append_images=[Image.new("L", (32, 32), 9)]),
            ImageError,
            "animated",
        ),
    ],
)  # fmt: skip
def test_wrong_masks_are_told(tiny, photo, mask, error, message):
    with pytest.raises(error, match=message):
        tiny.inpaint(photo, mask, 1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"share": 1.5}, ConfigError, "share must be between"),
        ({"dilate": -1}, ConfigError, "dilate must be between"),
        ({"dilate": 1.5}, ConfigError, "dilate must be a whole number"),
        ({"feather": 99}, ConfigError, "feather must be between"),
        ({"start_step": 8, "steps": 8}, ConfigError, "start_step"),
        ({"num_images": 0}, ConfigError, "num_images must be between"),
        ({"num_images": 10**6}, RegionError, "make fewer at a time"),
        ({"stepz": 3}, ConfigError, "Did you mean 'steps'"),
        ({"label": None}, ConfigError, "name a class"),
        ({"label": 10}, ConfigError, "classes are 0 to 9"),
    ],
)
def test_wrong_arguments_are_told(tiny, photo, options, error, message):
    with pytest.raises(error, match=message):
        tiny.inpaint(photo, np.eye(32, dtype=np.bool_), **({"label": 1} | options))


def test_wrong_photos_are_told(tiny, photo, tmp_path):
    frames = encoded(
        Image.new("L", (32, 32)), "GIF", save_all=True, append_images=[Image.new("L", (32, 32), 9)]
    )
    (tmp_path / "moving.gif").write_bytes(frames)
    for wrong, message in (
        (tmp_path / "moving.gif", "animated"),
        (tmp_path / "none.png", "cannot be read"),
        (5, "must be a path"),
        (np.zeros((3, 32, 32)), "array must be"),
        (torch.zeros(2, 3, 32, 32), "array must be"),
    ):
        with pytest.raises(ImageError, match=message):
            tiny.edit(wrong, (0, 0, 8, 8), 1)
    for boxes in ((0, 0, 33, 8), [], [(0, 0, 8, 8), (30, 0, 8, 8)], "1234", None, [5], [[]]):
        with pytest.raises(RegionError, match=r"box"):
            tiny.edit(photo, boxes, 1)


def test_several_boxes_are_edited_together(tiny, photo):
    boxes = [(0, 0, 4, 4), (16, 20, 8, 4)]
    made = tiny.edit(photo, boxes, 2, steps=3)
    assert torch.equal(made.token_mask, regions.boxes_to_token_mask(boxes, 32, 4))
    one = tiny.edit(photo, (16, 20, 8, 4), 2, steps=3)
    assert torch.equal(one.token_mask, regions.box_to_token_mask((16, 20, 8, 4), 32, 4))
    assert torch.equal(one.token_mask, tiny.edit(photo, np.array([[16, 20, 8, 4]]), 2, steps=3).token_mask)


def test_an_edit_of_the_models_size_is_the_official_composite(tiny, photo):
    made = tiny.edit(photo, (8, 8, 12, 8), 2, steps=3, rule="official")
    mask = regions.box_to_token_mask((8, 8, 12, 8), 32, 4, "official")
    assert torch.equal(made.token_mask, mask)
    before = tiny.prepare(photo)
    assert torch.equal(made.before, before)
    expected = regions.composite(before, tiny.decode_tokens(made.tokens), mask, 4)
    assert torch.equal(made.images, expected)
    assert (as_images(made) == to_uint8(expected)).all()
    assert made.to_pil() == made.photos


def test_a_class_is_guessed_from_what_is_known(tiny, free, photo):
    mask = np.zeros((32, 32), np.bool_)
    mask[:, 12:] = True
    made = tiny.inpaint(photo, mask, steps=2)
    scores = tiny.guess_class(tiny.encode_pixels(tiny.prepare(photo)), made.token_mask)
    assert torch.equal(made.class_guess.log_likelihoods, scores)
    assert made.class_guess.label == int(scores.argmax())
    label = made.class_guess.label
    named = tiny.inpaint(photo, mask, label, steps=2)
    assert torch.equal(named.tokens, made.tokens)
    assert named.class_guess is None
    without, classed = (free.inpaint(photo, mask, x, steps=2, return_steps=True) for x in (None, label))
    assert not torch.equal(without.trace.confidence, classed.trace.confidence)
    with pytest.raises(RegionError, match="name a class"):
        tiny.inpaint(photo, np.ones((32, 32), np.bool_))
