"""Arrays, tensors and PIL images: ranges, rounding, fitting, settings in files, and sheets."""

import io
import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from maskgit import images
from maskgit.errors import ConfigError, ImageError, OutputError
from maskgit.images import encoding
from pictures import as_array, encoded, noise, over_white, picture

# Arrays and tensors


@given(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 3]), st.integers(0, 1000))
def test_eight_bits_make_the_round_trip(height, width, channels, seed):
    array = noise(height, width, channels, seed=seed)
    tensor = images.to_tensor(array)
    assert tensor.dtype == torch.float32
    assert tensor.shape == (1, 3, height, width)
    assert 0 <= float(tensor.min()) <= float(tensor.max()) <= 1
    expected = array if channels == 3 else np.stack([array] * 3, -1)
    assert np.array_equal(images.to_uint8(tensor)[0], expected)
    assert torch.equal(tensor, images.to_tensor(Image.fromarray(array)))
    assert np.array_equal(np.asarray(images.to_pil(tensor)[0]), expected)


@pytest.mark.parametrize("shape", [(2, 3), (1, 2, 3), (1, 1, 2, 3), (3, 2, 3), (1, 3, 2, 3), (4, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16])
def test_tensors_are_read_upright(shape, dtype):
    values = torch.arange(24)[: int(np.prod(shape))].reshape(shape) * (1 if dtype == torch.uint8 else 1 / 64)
    array = images.to_array(values.to(dtype))
    planes = values.reshape(-1, 2, 3)
    assert array.shape[:2] == (2, 3)
    for channel, plane in enumerate(planes):
        assert np.array_equal(array.reshape(2, 3, -1)[..., channel], plane.numpy())
    assert images.to_tensor(array).shape == (1, 3, 2, 3)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_arrays_keep_their_values(dtype):
    array = np.random.default_rng(0).random((4, 5, 3)).astype(dtype)
    tensor = images.to_tensor(array)
    assert np.array_equal(tensor[0].permute(1, 2, 0).numpy(), array.astype(np.float32))


def test_sixteen_bit_arrays():
    array = np.array([[0, 257, 65_535]], ">u2")
    assert torch.allclose(images.to_tensor(array)[0, 0, 0], torch.tensor([0, 1 / 255, 1]))
    assert torch.equal(images.to_tensor(array[..., None]), images.to_tensor(array))


@given(st.sampled_from([np.uint8, np.uint16]))
def test_alpha_of_an_array_lies_over_white(dtype):
    rgba = noise(5, 4, 4, dtype)
    expected = over_white(rgba / np.iinfo(dtype).max * 255) / 255
    assert np.allclose(images.to_tensor(rgba)[0].permute(1, 2, 0), expected, atol=1e-6)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"]
)
def test_pil_images_of_every_mode(mode):
    image = Image.new(mode, (5, 4))
    tensor = images.to_tensor(image)
    assert tensor.shape == (1, 3, 4, 5)
    shown = 1.0 if mode in ("LA", "La", "RGBA", "RGBa") else 0.0
    if mode not in ("CMYK", "YCbCr", "P", "PA"):
        assert (tensor == shown).all()


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_deep_pil_images_are_scaled(mode):
    assert images.to_tensor(Image.new(mode, (2, 2), 32_896)).unique().tolist() == pytest.approx([128 / 255])


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((2, 2, 2), np.uint8),
        np.zeros((2, 2, 5), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((1, 2, 2, 3), np.uint8),
        np.zeros((0, 2, 3), np.uint8),
        np.zeros((2, 2, 3), np.int64),
        np.zeros((2, 2, 3), bool),
        np.full((2, 2, 3), 1.01),
        np.full((2, 2, 3), -0.01),
        np.full((2, 2, 3), np.nan),
        [[0, 1]],
        "photo.png",
    ],
)
def test_arrays_that_are_refused(array):
    with pytest.raises(ImageError):
        images.to_tensor(array)


def test_a_lazy_pil_image_that_is_cut_short_is_an_image_error():
    data = encoded(picture(64, 64), "JPEG")
    with pytest.raises(ImageError, match="cut short"):
        images.to_tensor(Image.open(io.BytesIO(data[: len(data) // 2])))


@given(st.lists(st.floats(-0.5, 1.5, width=32), min_size=1, max_size=20))
def test_rounding_is_to_the_nearest_level(values):
    tensor = torch.tensor(values).expand(1, 3, 1, -1)
    got = images.to_uint8(tensor)[0, 0, :, 0].astype(np.float64)
    wanted = np.clip(np.array(values, np.float64), 0, 1) * 255
    assert np.abs(got - wanted).max() <= 0.5 + 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_rounded_in_float32(dtype):
    tensor = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert np.array_equal(images.to_uint8(tensor), images.to_uint8(tensor.float()))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_are_named(value):
    tensor = torch.zeros(2, 3, 4, 4)
    tensor[1, 2, 3, 0] = value
    with pytest.raises(ImageError, match="NaN or infinite"):
        images.to_pil(tensor)


@pytest.mark.parametrize(
    "tensor", [torch.zeros(3, 4, 4), torch.zeros(1, 4, 4, 3), torch.zeros(1, 3, 4, 4).byte()]
)
def test_tensors_that_are_refused(tensor):
    with pytest.raises(ImageError, match=r"\(B, 3, H, W\)"):
        images.to_uint8(tensor)


# Fitting


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_fit_makes_squares(width, height, size):
    assert images.fit(picture(height, width), size).size == (size, size)


@pytest.mark.parametrize(("height", "width"), [(16, 23), (22, 16), (16, 16)])
def test_what_only_needs_cutting_keeps_its_pixels(height, width):
    array = noise(height, width)
    top, left = (height - 16) // 2, (width - 16) // 2
    got = np.asarray(images.fit(Image.fromarray(array), 16))
    assert np.array_equal(got, array[top : top + 16, left : left + 16])


def test_squares_are_resized_as_by_the_official_reader():
    image = picture(50, 50)
    assert np.array_equal(images.fit(image, 32), image.resize((32, 32), Image.Resampling.BICUBIC))


def test_fit_reads_any_mode_and_refuses_absurd_sizes():
    assert images.fit(picture().convert("P"), 8).mode == "RGB"
    for size in (0, -1, 10**9):
        with pytest.raises(ConfigError, match="size"):
            images.fit(picture(), size)


# Writing

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values, max_size=5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_settings_and_pixels_make_the_round_trip(tmp_path, stored):
    path = tmp_path / "made.png"
    images.save_png(path, picture(), settings=stored)
    assert images.read_settings(path) == stored
    assert np.array_equal(as_array(path), np.asarray(picture()))
    assert [entry.name for entry in tmp_path.iterdir()] == ["made.png"]


def test_settings_are_a_plain_text_chunk_that_others_can_read(tmp_path):
    images.save_png(tmp_path / "made.PNG", picture(), settings={"class": "Bär", "seed": 3})
    with Image.open(tmp_path / "made.PNG") as opened:
        assert json.loads(opened.info["maskgit"]) == {"class": "Bär", "seed": 3}


def test_metadata_of_the_picture_is_not_written(tmp_path):
    image = picture()
    image.info["icc_profile"] = b"secret"
    images.save_png(tmp_path / "a.png", image)
    assert b"iCCP" not in (tmp_path / "a.png").read_bytes()


def with_text(text, key="maskgit"):
    chunks = PngInfo()
    chunks.add_text(key, text)
    return encoded(picture(), pnginfo=chunks)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (encoded(picture()), "no settings"),
        (encoded(picture(), "JPEG", comment=b"{}"), "no settings"),
        (with_text("{}", "other"), "no settings"),
        (with_text("{1: 2}"), "not JSON"),
        (with_text("[" * 500_000), "not JSON"),
        (with_text("[1]"), "JSON object"),
        (with_text("1"), "JSON object"),
        (with_text('{"a": "' + "x" * encoding.MAX_SETTINGS_CHARS + '"}'), "settings is longer than"),
        (b"no picture", "not a picture"),
    ],
)
def test_settings_that_cannot_be_read(data, reason):
    with pytest.raises(ImageError, match=reason):
        images.read_settings(data)


@pytest.mark.parametrize("stored", [{"a": {1, 2}}, {"a": float("nan")}, {"a": b"x"}, {"a": "x" * 2**21}])
def test_settings_that_cannot_be_written(stored, tmp_path):
    with pytest.raises(ConfigError, match="settings"):
        images.save_png(tmp_path / "a.png", picture(), settings=stored)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("form", "side"), [("jpeg", 65_501), ("webp", 16_384)])
def test_pictures_too_large_for_a_format_are_refused(form, side):
    with pytest.raises(OutputError, match=f"{side} × 1 pixels.*use png"):
        images.encode(Image.new("RGB", (side, 1)), form)
    assert images.encode(Image.new("RGB", (side - 1, 1)), form)


def test_missing_folders_are_made_and_files_replaced_unless_forbidden(tmp_path):
    path = tmp_path / "new" / "folder" / "a.png"
    images.save_png(path, picture(seed=1))
    images.save_png(path, picture(seed=2))
    with pytest.raises(OutputError, match=r"a\.png exists already"):
        images.save_png(path, picture(seed=3), overwrite=False)
    assert np.array_equal(as_array(path), np.asarray(picture(seed=2)))
    images.save_png(path.with_name("b.png"), picture(), overwrite=False)


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(OutputError, match=r"a\.png cannot be written"):
        images.save_png(tmp_path / "file" / "a.png", picture())
    with pytest.raises(OutputError, match="is a folder"):
        images.save_png(tmp_path / "folder.png", picture())
    with pytest.raises(OutputError, match=r"must end in \.png"):
        images.save_png(tmp_path / "a.jpg", picture())
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder.png"]


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    images.save_png(tmp_path / "a.png", picture(seed=1))
    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OutputError, match="disk is full"):
        images.save_png(tmp_path / "a.png", picture(seed=2))
    assert np.array_equal(as_array(tmp_path / "a.png"), np.asarray(picture(seed=1)))
    assert len(list(tmp_path.iterdir())) == 1


# Sheets


def test_a_sheet_holds_every_image_enlarged_in_reading_order():
    pictures = [picture(32, 32, seed=i) for i in range(6)]
    sheet = np.asarray(images.contact_sheet(pictures, padding=3))
    assert sheet.shape == (2 * 131 + 3, 3 * 131 + 3, 3)
    for i, one in enumerate(pictures):
        top, left = 3 + i // 3 * 131, 3 + i % 3 * 131
        cell = sheet[top : top + 128, left : left + 128]
        assert np.array_equal(cell, np.asarray(one).repeat(4, 0).repeat(4, 1))
    assert (sheet[:3] == 255).all()
    assert (sheet[:, -3:] == 255).all()


@pytest.mark.parametrize(("side", "scale"), [(8, 16), (32, 4), (100, 2), (128, 1), (256, 1)])
def test_small_images_are_enlarged_to_a_size_that_can_be_seen(side, scale):
    sheet = images.contact_sheet(torch.rand(1, 3, side, side), padding=0)
    assert sheet.size == (side * scale, side * scale)


@pytest.mark.parametrize(
    ("count", "columns", "rows"),
    [
        (1, 1, 1),
        (2, 2, 1),
        (3, 3, 1),
        (4, 2, 2),
        (5, 3, 2),
        (6, 3, 2),
        (7, 3, 3),
        (8, 4, 2),
        (12, 4, 3),
        (16, 4, 4),
    ],
)
def test_sheets_are_nearly_square_and_full_where_they_can_be(count, columns, rows):
    assert images.contact_sheet(torch.rand(count, 3, 4, 4), padding=0, scale=1).size == (
        4 * columns,
        4 * rows,
    )


def test_settings_of_a_sheet():
    tensor = torch.rand(5, 3, 4, 6)
    assert images.contact_sheet(tensor, columns=5, padding=1, scale=2).size == (5 * 13 + 1, 8 + 2)
    assert images.contact_sheet(tensor, columns=1, padding=0, scale=1).size == (6, 20)
    assert images.contact_sheet(tensor, columns=9, padding=0, scale=1).size == (30, 4)


def test_images_of_several_sizes_are_centred():
    white, black = Image.new("RGB", (8, 8), "white"), Image.new("L", (4, 2), 0)
    sheet = np.asarray(images.contact_sheet([white, black], padding=0, scale=1))
    dark = np.argwhere(sheet[..., 0] == 0)
    assert dark.min(0).tolist() == [3, 10]
    assert dark.max(0).tolist() == [4, 13]


def test_captions_stand_under_their_images_and_are_cut_to_the_width():
    grey = torch.full((2, 3, 64, 64), 0.5)
    long = "a class of a very long name indeed " * 3
    with_caption = np.asarray(images.contact_sheet(grey, captions=["cat", long], padding=4))
    without = np.asarray(images.contact_sheet(grey, captions=["", ""], padding=4))
    assert with_caption.shape == without.shape
    changed = np.argwhere((with_caption != without).any(-1))
    assert changed[:, 0].min() >= 4 + 128
    assert changed[:, 0].max() < with_caption.shape[0] - 4
    assert not ((changed[:, 1] > 4 + 128) & (changed[:, 1] < 8 + 128)).any()
    assert (changed[:, 1] < 128).any()
    assert (changed[:, 1] > 140).any()
    # Any text can be drawn, whatever the font holds.
    images.contact_sheet(grey, captions=["日本語\n🐸", "\0"], padding=0, scale=1)
    images.contact_sheet(grey[:, :, :1, :1], captions=["frog", "cat"], scale=1)


def test_sheets_that_are_refused():
    tensor = torch.rand(2, 3, 4, 4)
    with pytest.raises(ImageError, match="at least one"):
        images.contact_sheet([])
    with pytest.raises(ConfigError, match="3 captions for 2 images"):
        images.contact_sheet(tensor, captions=["a", "b", "c"])
    for wrong in ({"columns": 0}, {"padding": -1}, {"scale": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            images.contact_sheet(tensor, **wrong)
    with pytest.raises(ImageError, match="fewer images"):
        images.contact_sheet(torch.zeros(1, 3, 64, 64).expand(40, 3, 64, 64), scale=128)


def test_an_overlay_tints_the_masked_tokens_alone():
    tensor = torch.full((1, 3, 8, 12), 0.5)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    mask[1, 2] = True
    shown = np.asarray(images.overlay_mask(tensor, mask)).astype(int)
    assert (shown[4:, 8:, 0] > shown[4:, 8:, 1]).all()
    shown[4:, 8:] = 128
    assert (shown == 128).all()
    for wrong in (mask[:, :, None], torch.zeros(3, 3) > 0):
        with pytest.raises(ImageError, match="does not fit"):
            images.overlay_mask(tensor, wrong)
