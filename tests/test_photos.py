"""Photos of any size and kind: the window that the model sees, and every other pixel's bytes."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from maskgit.editing import photos
from maskgit.editing.photos import Photo, Window
from maskgit.errors import ImageError, RegionError
from pictures import noise


@st.composite
def masked_photos(draw):
    width, height = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    box = (left, top, draw(st.integers(1, width - left)), draw(st.integers(1, height - top)))
    mask = np.zeros((height, width), np.bool_)
    mask[top : top + box[3], left : left + box[2]] = True
    return mask, box


@given(masked_photos())
def test_the_window_covers_the_mask_with_room_around_it(drawn):
    mask, (left, top, width, height) = drawn
    high, wide = mask.shape
    window = photos.window_around(mask, 32)
    assert window.left <= left
    assert left + width <= window.left + window.side
    assert window.top <= top
    assert top + height <= window.top + window.side
    assert window.side >= 32
    for start, length, first, count in ((window.left, wide, left, width), (window.top, high, top, height)):
        inside = start >= 0 and start + window.side <= length
        assert inside or (start <= 0 and start + window.side >= length)
        assert start <= 0 or first - start >= window.side / 16
        assert start + window.side >= length or start + window.side - first - count >= window.side / 16
    longest = max(width, height)
    if 2 * longest <= min(wide, high):
        assert window.side == max(32, 2 * longest)
    assert window.side <= max(32, min(2 * longest, max(wide, high)))


@settings(max_examples=25, deadline=None)
@given(masked_photos(), st.integers(0, 9))
def test_every_pixel_away_from_the_window_and_the_mask_keeps_its_bytes(tiny, drawn, seed):
    mask, box = drawn
    array = noise(*mask.shape, seed=seed)
    window = photos.window_around(mask, 32)
    for made in (tiny.inpaint(array, mask, 1, steps=1), tiny.edit(array, box, 1, steps=1)):
        result = np.asarray(made.photos[0])
        assert result.shape == array.shape
        rows, columns = (np.arange(n) for n in mask.shape)
        # A token is side / 8 pixels; two tokens and four deviations of the blur from the mask, weights are 0.
        reach = 3 * window.side / 8 + 4 * window.side / 32
        left, top, width, height = box
        near_rows = (rows >= top - reach) & (rows < top + height + reach)
        near_columns = (columns >= left - reach) & (columns < left + width + reach)
        far = ~(near_rows[:, None] & near_columns)
        assert (result[far] == array[far]).all()
        assert made.images.shape == (1, 3, 32, 32)


@given(masked_photos(), st.sampled_from([0, 1, 5]))
def test_nothing_new_shows_the_windows_edge_inside_the_photo(drawn, radius):
    mask, _ = drawn
    window = photos.window_around(mask, 32)
    everything = torch.ones(8, 8, dtype=torch.bool)
    weights = photos.soft_weights(everything, mask, window, mask.shape[::-1], window.side, radius)
    step = 255 * 16 / window.side
    inner = (
        (window.left > 0, weights[:, 0]),
        (window.top > 0, weights[0]),
        (window.left + window.side < mask.shape[1], weights[:, -1]),
        (window.top + window.side < mask.shape[0], weights[-1]),
    )
    for is_inside, edge in inner:
        assert (edge <= step if is_inside else edge.max() > 250).all()


def test_a_large_photo_is_edited_in_its_window_alone(tiny):
    array = noise(400, 600)
    mask = np.zeros((400, 600), np.bool_)
    mask[200:206, 300:309] = True
    made = tiny.inpaint(array, mask, 2, steps=2)
    window = photos.window_around(mask, 32)
    assert window == (288, 187, 32)
    part = array[187:219, 288:320]
    assert torch.equal(made.before, tiny.prepare(part))
    small = tiny.inpaint(part, mask[187:219, 288:320], 2, steps=2)
    assert torch.equal(small.tokens, made.tokens)
    expected = array.copy()
    expected[187:219, 288:320] = np.asarray(small.photos[0])
    assert (np.asarray(made.photos[0]) == expected).all()


def test_a_box_in_a_scaled_window_masks_what_it_covers(tiny):
    array = noise(128, 128)
    box = (32, 40, 60, 20)
    made = tiny.edit(array, box, 2, steps=2)
    mask = np.zeros((128, 128), np.bool_)
    mask[40:60, 32:92] = True
    window = photos.window_around(mask, 32)
    assert window == (2, 0, 120)
    token = 120 / 8
    rows, columns = made.token_mask.nonzero(as_tuple=True)
    assert (rows.min(), rows.max()) == (int(40 / token), int(59.99 / token))
    assert (columns.min(), columns.max()) == (int(30 / token), int(89.99 / token))


def test_a_small_photo_is_mirrored_around_its_edges():
    array = noise(5, 40)
    shown = photos.cut(Photo(Image.fromarray(array)), Window(4, -14, 32), 32)
    expected = np.pad(array, ((14, 13), (0, 0), (0, 0)), mode="symmetric")[:, 4:36]
    assert np.array_equal((shown[0].movedim(0, -1) * 255).round().byte().numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("shape", [(24, 40), (1, 24, 40), (1, 1, 24, 40)])
def test_a_grey_tensor_is_not_turned(tiny, shape, dtype):
    grey = noise(24, 40, 1, seed=1).reshape(24, 40)
    tensor = torch.from_numpy(grey).reshape(shape)
    tensor = tensor if dtype == torch.uint8 else tensor / 255
    assert np.array_equal(np.asarray(photos.read_photo(tensor).rgb)[..., 0], grey)
    assert torch.equal(tiny.prepare(tensor), tiny.prepare(grey))
    made, expected = (tiny.outpaint(image, right=8, label=1, steps=1) for image in (tensor, grey))
    assert torch.equal(made.images, expected.images)


def test_a_file_is_edited_as_it_is_seen(tiny, tmp_path):
    array = noise(40, 60)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(array).save(tmp_path / "turned.png", exif=exif)
    seen = np.rot90(array, -1)
    mask = np.zeros((60, 40), np.bool_)
    mask[50:, 30:] = True
    Image.fromarray(mask).save(tmp_path / "mask.png")
    turned = tiny.inpaint(tmp_path / "turned.png", tmp_path / "mask.png", 1, steps=2)
    straight = tiny.inpaint(seen, mask, 1, steps=2)
    assert turned.photos[0].size == (40, 60)
    assert np.array_equal(np.asarray(turned.photos[0]), np.asarray(straight.photos[0]))
    assert np.array_equal(np.asarray(turned.photos[0])[:20], seen[:20])
    with pytest.raises(RegionError, match="as it is seen, has 40 × 60"):
        tiny.inpaint(tmp_path / "turned.png", mask.T, 1)


def test_transparency_is_kept_and_can_be_filled_in(tiny, tmp_path):
    array = noise(64, 64, 4)
    array[..., 3] = 255
    array[10:20, 40:60, 3] = 0
    array[12, 41, 3] = 130
    Image.fromarray(array).save(tmp_path / "clear.png")
    made = tiny.inpaint(tmp_path / "clear.png", "alpha", 1, steps=2).photos[0]
    filled = np.asarray(made)
    assert made.mode == "RGBA"
    assert (filled[..., 3] == 255).all()
    assert (filled[40:] == array[40:]).all()
    assert (filled[10:20, 40:60, :3] != array[10:20, 40:60, :3]).mean() > 0.9

    elsewhere = np.asarray(tiny.edit(tmp_path / "clear.png", (8, 48, 4, 4), 1, steps=2).photos[0])
    assert (elsewhere[..., 3] == array[..., 3]).all()
    assert (elsewhere[:20, 40:] == array[:20, 40:]).all()
    assert (elsewhere[48:52, 8:12, :3] != array[48:52, 8:12, :3]).any()


def test_what_lies_under_transparency_is_not_seen():
    visible = np.full((32, 32, 4), 200, np.uint8)
    visible[..., 3] = 255
    visible[8:24, 8:24] = (255, 0, 0, 0)
    shown = photos.cut(photos.read_photo(visible), Window(0, 0, 32), 32)
    assert (shown - 200 / 255).abs().max() <= 1.5 / 255
    visible[..., 3] = 0
    assert photos.cut(photos.read_photo(visible), Window(0, 0, 32), 32).isfinite().all()


def test_new_colours_over_transparency_follow_the_over_operator():
    rng = np.random.default_rng(0)
    array, new = noise(32, 32, 4), noise(32, 32, seed=1)
    weights = rng.integers(0, 256, (32, 32)).astype(np.uint8)
    weights[4:] = weights[4:].clip(1)
    weights[:4] = 0
    result = np.asarray(
        photos.paste(photos.read_photo(array), Window(0, 0, 32), Image.fromarray(new), weights)
    )
    assert (result[:4] == array[:4]).all()
    w, a = weights[..., None] / 255, array[..., 3:] / 255
    alpha = w + (1 - w) * a
    colour = (w * new + (1 - w) * a * array[..., :3]) / np.maximum(alpha, 1e-9)
    assert np.abs(result[..., 3:] - 255 * alpha).max() <= 1
    assert np.abs(result[..., :3] - colour)[4:].max() <= 2


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "CMYK", "I;16", "F", "RGBA"])
def test_every_kind_of_picture_comes_back_as_it_looks(tiny, mode):
    grey = Image.fromarray(noise(48, 48, 1))
    picture = {
        "I;16": lambda: Image.fromarray(noise(48, 48, 1, np.uint16)),
        "F": lambda: Image.fromarray(noise(48, 48, 1).astype(np.float32) / 255),
    }.get(mode, lambda: grey.convert(mode))()
    made = tiny.edit(picture, (0, 0, 4, 4), 1, steps=1).photos[0]
    assert made.mode == ("RGBA" if mode in ("LA", "RGBA") else "RGB")
    before = photos.read_photo(picture)
    assert (np.asarray(made)[40:, 40:, :3] == np.asarray(before.rgb)[40:, 40:]).all()


def test_exact_numbers_stay_exact(tiny):
    array = np.random.default_rng(0).random((32, 32, 3)).astype(np.float32)
    made = tiny.edit(array, (0, 0, 4, 4), 1, steps=1)
    assert torch.equal(made.images[..., 16:, 16:], torch.from_numpy(array).movedim(-1, 0)[None, :, 16:, 16:])
    four = np.concatenate([array, np.ones((32, 32, 1), np.float32)], 2)
    assert tiny.edit(four, (0, 0, 4, 4), 1, steps=1).photos[0].mode == "RGBA"


def test_fifty_megapixels_take_little_more_than_their_bytes():
    size = (8660, 5774)
    photo = Photo(Image.new("RGB", size, "red"))
    mask = np.zeros(size[::-1], np.bool_)
    mask[2000:2300, 4000:4600] = True
    tracemalloc.start()
    window = photos.window_around(mask, 256)
    shown = photos.cut(photo, window, 256)
    tokens = photos.painted_tokens(mask, window, 16, 0.0, 0)
    weights = photos.soft_weights(tokens, mask, window, size, window.side, 15 * window.side / 256)
    photos.paste(photo, window, Image.new("RGB", (256, 256)), weights)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert window.side == 1200
    assert shown.shape == (1, 3, 256, 256)
    # The photo has 150 MB; Pillow's copies, one for the result, are not counted.
    assert peak < 60e6


def test_what_is_too_large_is_refused(tiny):
    line = Image.new("RGB", (12_000, 10))
    with pytest.raises(RegionError, match="cut or shrink"):
        tiny.edit(line, (0, 0, 12_000, 10), 1)
    assert tiny.edit(line, (5000, 0, 20, 10), 1, steps=1).photos[0].size == (12_000, 10)
    huge = np.broadcast_to(np.zeros((1, 1, 3), np.uint8), (20_000, 20_000, 3))
    with pytest.raises(ImageError, match="100,000,000 are the limit"):
        tiny.edit(huge, (0, 0, 8, 8), 1)
