"""Outpainting and panoramas: what is known stays, the size is exact, and nothing depends on the batch."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from maskgit import MaskGIT
from maskgit.editing import outpaint as outpainting
from maskgit.editing import windows as canvas
from maskgit.editing.outpaint import outpaint, panorama
from maskgit.editing.windows import decode_canvas, encode_canvas, plan_windows
from maskgit.errors import ConfigError, ImageError, RegionError
from maskgit.results import join_outputs
from pictures import noise


@pytest.fixture(scope="module")
def named(tiny):
    """The tiny model as if it had been trained with label dropout."""
    return MaskGIT(dataclasses.replace(tiny.config, label_dropout=0.1), tiny.tokenizer, tiny.transformer)


@pytest.fixture(scope="module")
def bundled():
    return MaskGIT.from_pretrained()


@pytest.fixture
def spy(named, monkeypatch):
    """The named model with a record of every (sequences, first_index, tokens) that it fills."""
    seen = []
    fill_batches = MaskGIT.fill_batches

    def recorded(self, sequences, config, draw, **options):
        made = join_outputs(list(fill_batches(self, sequences, config, draw, **options)))
        seen.append((sequences, draw.first_index, made.tokens))
        yield made

    monkeypatch.setattr(MaskGIT, "fill_batches", recorded)
    return seen


@st.composite
def canvases(draw):
    side = draw(st.integers(1, 9))
    rows, columns = draw(st.integers(side, 4 * side + 3)), draw(st.integers(side, 4 * side + 3))
    width, height = draw(st.integers(0, columns)), draw(st.integers(0, rows))
    left, top = draw(st.integers(0, columns - width)), draw(st.integers(0, rows - height))
    return rows, columns, (left, top, width, height), side


def replay(rows, columns, known, windows):
    """Fill a canvas by its windows; yield what each of them knew, bool (side, side)."""
    left, top, width, height = known
    filled = torch.zeros(rows, columns, dtype=torch.bool)
    filled[top : top + height, left : left + width] = True
    for window in windows:
        assert window.rows.min() >= 0
        assert window.rows.max() < rows
        before = window.read(filled[None])[0]
        assert torch.equal(window.unknown, ~before)
        assert window.unknown.any()
        yield before
        window.write(filled[None], torch.ones_like(before)[None])
    assert filled.all()


@given(canvases())
@settings(max_examples=150, deadline=None)
def test_windows_fill_any_canvas_and_know_half_of_what_they_see(case):
    rows, columns, known, side = case
    windows = plan_windows(rows, columns, known, side)
    large = side > 1 and known[2] >= side and known[3] >= side
    for before in replay(rows, columns, known, windows):
        # Whole rows or columns, so that what is new has an edge to go on from.
        assert not large or before.all(0).sum() >= side / 2 or before.all(1).sum() >= side / 2


@given(st.integers(2, 9), st.integers(0, 30), st.integers(0, 12))
@settings(max_examples=80, deadline=None)
def test_windows_close_a_loop_between_two_known_parts(side, more_columns, more_rows):
    rows, columns = side + more_rows, side + side // 2 + more_columns
    windows = plan_windows(rows, columns, (0, 0, 0, 0), side, loop=True)
    knew = list(replay(rows, columns, (0, 0, 0, 0), windows))
    assert all(before.float().mean() >= 0.5 for before in knew[1:])
    first_band = [before for before, window in zip(knew, windows, strict=True) if window.rows[0] == 0]
    if side > 2:
        assert first_band[-1][:, 0].all()
        assert first_band[-1][:, -1].all()


@pytest.mark.parametrize("shape", [(32, 32), (20, 50), (70, 31), (9, 7)])
def test_the_result_has_the_size_asked_for_and_keeps_the_image(named, shape):
    photo = Image.fromarray(noise(*shape))
    scale = 32 / min(shape) if min(shape) > 32 else 1
    width, height = round(shape[1] * scale), round(shape[0] * scale)
    made = outpaint(named, photo, left=5, right=13, top=0, bottom=6, steps=2, num_images=2, feather=3)
    assert made.images.shape == (2, 3, height + 6, width + 18)
    assert made.images.dtype == torch.float32
    assert 0 <= float(made.images.min()) <= float(made.images.max()) <= 1
    before = torch.from_numpy(
        np.asarray(photo.resize((width, height), Image.Resampling.BICUBIC)) / np.float32(255)
    )
    before = before.movedim(-1, 0)
    # The feather is 3 pixels on the sides that go on; the top does not.
    assert torch.equal(
        made.images[:, :, : height - 3, 8 : 5 + width - 3],
        before[:, : height - 3, 3 : width - 3].expand(2, -1, -1, -1),
    )
    assert not torch.equal(made.images[0], made.images[1])


def test_tokens_of_the_image_stay_and_windows_agree(named, spy):
    photo = noise(32, 32)
    made = outpaint(named, photo, left=24, right=40, top=10, bottom=30, label=3, steps=2, num_images=3)
    kept = made.tokens[:, ~made.token_mask]
    original = named.tokenizer.encode(named.prepare(photo)).reshape(1, -1)
    assert torch.equal(kept, original.expand(3, -1))
    assert len(spy) > 8
    mask = named.vocabulary.mask
    for sequences, _, tokens in spy:
        grid = named.vocabulary.grid(sequences)
        known = grid != mask
        assert known.float().mean() >= 0.5
        assert torch.equal(tokens[known], grid[known])
        assert (sequences[:, 0] == named.vocabulary.num_codes + 3).all()
    assert made.tokens.max() < named.vocabulary.num_codes
    # No two windows draw the same noise.
    assert len({first for _, first, _ in spy}) == len(spy)


@pytest.mark.parametrize("maker", ["outpaint", "panorama"])
def test_an_image_does_not_depend_on_its_batch(named, maker):
    def make(**options):
        if maker == "outpaint":
            return outpaint(named, noise(32, 32), left=20, bottom=10, seed=4, steps=3, **options)
        return panorama(named, [1, None, 2], 70, height=40, seed=4, steps=3, **options)

    whole = make(num_images=5)
    assert torch.equal(whole.tokens, make(num_images=5, batch_size=2).tokens)
    alone = make(first_index=3)
    assert torch.equal(whole.tokens[3:4], alone.tokens)
    assert (whole.images[3] - alone.images[0]).abs().max() < 1 / 255
    assert len({image.numpy().tobytes() for image in whole.tokens}) == 5
    assert not torch.equal(make().tokens, alone.tokens)


def test_a_canvas_is_the_same_as_amounts(named):
    photo = noise(32, 32)
    by_sides = outpaint(named, photo, left=10, right=4, top=3, bottom=11, steps=2)
    placed = outpaint(named, photo, canvas=(46, 46), position=(10, 3), steps=2)
    assert torch.equal(by_sides.images, placed.images)
    middle = outpaint(named, photo, canvas=np.array([46, 46]), steps=2)
    assert torch.equal(
        middle.images, outpaint(named, photo, left=7, right=7, top=7, bottom=7, steps=2).images
    )


def test_the_callback_counts_steps_through_all_windows(named):
    seen = []

    def callback(step, indices, tokens):
        seen.append((step, indices.tolist(), tokens.shape))

    outpaint(named, noise(32, 32), right=30, num_images=2, first_index=5, steps=3, callback=callback)
    assert seen == [(step, [5, 6], (2, 8, 8)) for step in range(6)]


def test_windows_are_not_decoded(named, monkeypatch):
    monkeypatch.setattr(MaskGIT, "decode_on_device", None)
    named.outpaint(noise(32, 32), right=16, steps=2)
    named.panorama("3", 200, steps=2)


def test_the_first_window_of_a_panorama_is_a_generated_image(tiny):
    made = panorama(tiny, 3, 32, seed=7, first_index=2, num_images=2, steps=4)
    generated = tiny.generate(3, seed=7, first_index=2, num_images=2, steps=4)
    assert torch.equal(made.tokens, generated.tokens)
    assert torch.equal(made.images, generated.images)
    wide = panorama(tiny, 3, 50, seed=7, first_index=2, steps=4)
    assert torch.equal(wide.tokens[0, :, :8], generated.tokens[0])
    assert wide.images.shape == (1, 3, 32, 50)
    assert panorama(tiny, 3, 9, height=50, steps=1).images.shape == (1, 3, 50, 9)


def test_labels_follow_each_other(named, spy):
    panorama(named, [4, None, 5], 96, height=48, steps=1)
    codes = named.vocabulary.num_codes
    # Five windows in each of two bands.
    expected = [codes + 4, codes + 4, named.vocabulary.mask, named.vocabulary.mask, codes + 5]
    assert [int(sequences[0, 0]) for sequences, _, _ in spy] == expected * 2


def test_a_loop_closes(named):
    made = panorama(named, 1, 48, loop=True, steps=2, seed=3)
    assert made.images.shape == (1, 3, 32, 48)
    # Turned by any number of tokens, the same tokens give the same picture.
    side = named.config.transformer.grid_size
    turned = decode_canvas(named.tokenizer, made.tokens.roll(6, -1), side, loop=True)
    assert (turned.roll(-24, -1) - made.images).abs().mean() < 0.05


@pytest.mark.parametrize("loop", [False, True])
def test_tiles_give_the_picture_of_the_whole(bundled, monkeypatch, loop):
    # The bundled tokenizer normalizes each pixel on its own, so that tiles may differ at their edges only.
    side, generator = bundled.config.transformer.grid_size, torch.Generator().manual_seed(0)
    tokens = torch.randint(0, bundled.vocabulary.num_codes, (2, 40, 56), generator=generator)
    around = torch.cat([tokens] * 3, -1) if loop else tokens
    whole = bundled.tokenizer.decode(around).clamp(0, 1)
    whole = whole[..., 224:448] if loop else whole
    monkeypatch.setattr(canvas, "TILE_PIXELS", 96 * 96)
    tiled = decode_canvas(bundled.tokenizer, tokens, side, loop=loop)
    assert tiled.shape == whole.shape
    assert (tiled - whole).abs().mean() < 0.01
    images = torch.from_numpy(noise(160, 224)).movedim(-1, 0)[None] / 255
    agree = encode_canvas(bundled.tokenizer, images, side) == bundled.tokenizer.encode(images)
    assert agree.float().mean() > 0.97


def test_the_bundled_models_panorama_has_no_seams(bundled):
    made = panorama(bundled, "ship", 32 + 6 * 16, num_images=4, seed=1, steps=8)
    change = made.images.diff(dim=-1).abs().mean((0, 1, 2))
    # The first window ends at pixel 32, each other one 16 later; change[i] lies between pixels i and i + 1.
    borders = torch.zeros(len(change), dtype=torch.bool)
    borders[31::16] = True
    patches = torch.zeros_like(borders)
    patches[3::4] = True
    assert change[borders].mean() / change[~borders].mean() <= 1.5
    assert change[borders].mean() / change[patches & ~borders].mean() <= 1.5


def test_colours_that_the_tokenizer_changes_make_no_step(named, monkeypatch):
    scene = torch.linspace(0.3, 0.5, 64).expand(1, 3, 64, 64)
    monkeypatch.setattr(outpainting, "decode_canvas", lambda *_: scene + 0.2)
    made = outpaint(named, scene[..., 16:48, 16:48], left=16, right=16, top=16, bottom=16, steps=1).images
    assert torch.equal(made[..., 20:44, 20:44], scene[..., 20:44, 20:44])
    for axis in (-1, -2):
        assert made.diff(dim=axis).abs().max() < 0.05
    torch.testing.assert_close(made[..., :8, :8], scene[..., :8, :8] + 0.2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, RegionError, "Nothing is to be added"),
        ({"left": -1}, ConfigError, "left must be between"),
        ({"left": 1.5}, ConfigError, "left must be a whole number"),
        ({"left": 10**7}, RegionError, "make fewer or smaller"),
        ({"left": 8, "num_images": 10**6}, RegionError, "make fewer or smaller"),
        ({"left": 8, "position": (0, 0)}, RegionError, "give the canvas"),
        ({"left": 8, "canvas": (64, 64)}, RegionError, "not both"),
        ({"canvas": (31, 64)}, RegionError, "must be larger than the image"),
        ({"canvas": (32, 32)}, RegionError, "must be larger than the image"),
        ({"canvas": (64, 64), "position": (33, 0)}, RegionError, r"from \(0, 0\) to \(32, 32\)"),
        ({"canvas": (64, 64), "position": (0,)}, ConfigError, "two whole numbers"),
        ({"canvas": "64x64"}, ConfigError, "two whole numbers"),
        ({"left": 8, "label": 10}, ConfigError, "classes are 0 to 9"),
        ({"left": 8, "stepz": 2}, ConfigError, "Did you mean 'steps'"),
        ({"left": 8, "feather": -1}, ConfigError, "feather must be between"),
        ({"left": 8, "batch_size": 0}, ConfigError, "batch_size must be between"),
        ({"left": 8, "first_index": 2**40}, ConfigError, "first_index must be between"),
        ({"left": 8, "seed": -1}, ConfigError, "seed"),
    ],
)
def test_wrong_arguments_are_told(named, arguments, error, message):
    with pytest.raises(error, match=message):
        outpaint(named, noise(32, 32), **arguments)


def test_wrong_pictures_and_panoramas_are_told(named, tiny, tmp_path):
    with pytest.raises(ImageError, match="must be a path, a PIL image, an array or a tensor, but is 3"):
        outpaint(named, 3, right=4, label=0)
    with pytest.raises(RegionError, match="at least 4 pixels a side"):
        outpaint(named, noise(3, 40), left=8)
    with pytest.raises(ImageError):
        outpaint(named, tmp_path / "none.png", left=8)
    with pytest.raises(ConfigError, match="name a class"):
        outpaint(tiny, noise(32, 32), left=8)
    with pytest.raises(RegionError, match="multiple of 4 pixels, at least 48"):
        panorama(named, 1, 50, loop=True)
    with pytest.raises(RegionError, match="multiple of 4 pixels, at least 48"):
        panorama(named, 1, 44, loop=True)
    for labels in ([], [1, 2, 3]):
        with pytest.raises(ConfigError, match="takes from 1 to 2 labels"):
            panorama(named, labels, 48)
    with pytest.raises(ConfigError, match="width must be between"):
        panorama(named, 1, 0)
    with pytest.raises(RegionError, match="make fewer or smaller"):
        panorama(named, 1, 100_000, height=100_000)
