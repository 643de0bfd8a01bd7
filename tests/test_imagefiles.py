"""Reading pictures: every mode and format, and files that are broken or hostile."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFile, ImageOps

from maskgit import images
from maskgit.errors import ImageError
from pictures import as_array, encoded, noise, over_white, picture

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
ORIENTATION = 0x0112


def png_chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, depth, colour, rows=b"", extra=b""):
    """A PNG put together by hand, for what Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + extra + data + png_chunk(b"IEND", b"")


# Reading


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_files_come_back_to_the_byte(kind, tmp_path):
    original = noise(7, 10)
    data = encoded(Image.fromarray(original), kind)
    path = tmp_path / "picture"
    path.write_bytes(data)
    for source in (path, str(path), data, io.BytesIO(data)):
        assert np.array_equal(as_array(source), original)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_read_at_its_size(kind):
    assert as_array(encoded(picture(11, 6), kind)).shape == (11, 6, 3)


def test_a_file_is_read_from_its_start():
    file = io.BytesIO(encoded(picture()))
    file.read(20)
    assert np.array_equal(as_array(file), np.asarray(picture()))


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey_has_three_equal_channels(mode):
    grey = picture().convert(mode)
    expected = np.asarray(grey.convert("L"))
    assert np.array_equal(as_array(encoded(grey)), np.stack([expected] * 3, -1))


def test_sixteen_bits_are_scaled_to_the_nearest_level():
    deep = np.arange(65_536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(deep / 65_535 * 255).astype(np.uint8)
    ppm = b"P5 256 256 65535\n" + deep.astype(">u2").tobytes()
    tiff = encoded(Image.fromarray(deep), "TIFF")
    for data in (encoded(Image.fromarray(deep)), tiff, ppm):
        assert np.array_equal(as_array(data)[..., 0], expected)


def test_sixteen_bit_colour_is_scaled():
    deep = noise(5, 4, 3, np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    got = as_array(png(4, 5, 16, 2, rows))
    assert np.abs(got - deep / 257).max() <= 1


def test_float_grey_must_be_between_0_and_1():
    values = np.linspace(0, 1, 20, dtype=np.float32).reshape(4, 5)
    assert np.array_equal(
        as_array(encoded(Image.fromarray(values), "TIFF"))[..., 1], np.rint(values * 255).astype(np.uint8)
    )
    for wrong in (values * 255, values - 1, values * np.nan):
        with pytest.raises(ImageError, match=r"within \[0, 1\]"):
            images.read_image(encoded(Image.fromarray(wrong), "TIFF"))


def test_integers_beyond_sixteen_bits_are_refused():
    for value in (-1, 65_536):
        with pytest.raises(ImageError, match="16 bits"):
            images.read_image(encoded(Image.new("I", (3, 3), value), "TIFF"))


def test_cmyk_is_converted():
    for colour in ((255, 0, 0), (255, 255, 255), (0, 0, 0), (20, 160, 60)):
        data = encoded(Image.new("RGB", (16, 16), colour).convert("CMYK"), "JPEG", quality=95)
        assert np.abs(as_array(data).astype(int) - colour).max() <= 4


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_transparency_lies_over_white(kind):
    rgba = noise(6, 8, 4)
    got = as_array(encoded(Image.fromarray(rgba), kind, lossless=True))
    seen = rgba[..., 3] > 0
    assert np.abs(got - over_white(rgba))[seen].max() <= 1
    assert (got[~seen] == 255).all()


def test_grey_with_alpha_lies_over_white():
    grey = Image.fromarray(noise(6, 8, 4)).convert("LA")
    expected = over_white(np.asarray(grey.convert("RGBA")))
    assert np.abs(as_array(encoded(grey)) - expected).max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_a_transparent_palette_entry_is_white(kind):
    indexed = Image.new("P", (4, 2), 0)
    indexed.putpalette([10, 20, 30, 200, 100, 50])
    indexed.putpixel((1, 0), 1)
    got = as_array(encoded(indexed, kind, transparency=1))
    assert got[0, 1].tolist() == [255, 255, 255]
    assert got[0, 0].tolist() == [10, 20, 30]


def test_palette_entries_may_be_partly_transparent():
    indexed = Image.new("P", (2, 1), 0)
    indexed.putpalette([0, 0, 0, 0, 0, 0])
    indexed.putpixel((1, 0), 1)
    got = as_array(encoded(indexed, transparency=bytes([255, 51])))
    assert got[0, 0].tolist() == [0, 0, 0]
    assert np.abs(got[0, 1].astype(int) - 204).max() <= 1


def test_a_transparent_level_of_deep_grey_is_white():
    rows = b"\0" + np.array([1000, 2570], ">u2").tobytes()
    got = as_array(png(2, 1, 16, 0, rows, png_chunk(b"tRNS", struct.pack(">H", 1000))))
    assert got[0, :, 0].tolist() == [255, 10]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind, orientation):
    stored = Image.new("RGB", (24, 16), "white")
    ImageDraw.Draw(stored).rectangle((0, 0, 7, 7), "red")
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"subsampling": 0, "quality": 95}}.get(kind, {})
    data = encoded(stored, kind, exif=exif, **options)
    got = images.read_image(data)
    # Where the stored upper left corner belongs, by the EXIF standard: row and column, −1 for the last.
    row, column = [(0, 0), (0, -1), (-1, -1), (-1, 0), (0, 0), (0, -1), (-1, -1), (-1, 0)][orientation - 1]
    assert got.size == ((24, 16) if orientation < 5 else (16, 24))
    pixels = np.asarray(got).astype(int)
    assert np.abs(pixels[row, column] - (255, 0, 0)).max() <= 12
    corners = {(y, x) for y in (0, -1) for x in (0, -1)} - {(row, column)}
    assert all(np.abs(pixels[corner] - 255).max() <= 12 for corner in corners)
    with Image.open(io.BytesIO(data)) as opened:
        assert np.array_equal(pixels, np.asarray(ImageOps.exif_transpose(opened)))


def test_a_broken_orientation_is_no_reason_to_refuse():
    for exif in (b"Exif\0\0rubbish", b"Exif\0\0II*\0\xff\xff\xff\xff", b""):
        data = encoded(picture(8, 5), "JPEG", exif=exif)
        assert as_array(data).shape == (8, 5, 3)


def test_a_phone_picture_with_a_second_one_inside_is_read():
    data = encoded(picture(16, 24), "MPO", save_all=True, append_images=[picture(8, 12)])
    assert as_array(data).shape == (16, 24, 3)


# Refusing


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_are_refused_with_their_frames(kind):
    frames = [picture(seed=seed) for seed in range(3)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match=r"3 frames.*extract one frame first"):
        images.read_image(data)


def test_sizes_are_checked_before_anything_is_decoded(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(100_000, 100_000, 8, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            ImageError, match=r"bomb\.png has 100000 × 100000 pixels, but the limit is 100,000,000"
        ):
            images.read_image(path)
        # Where Pillow itself would warn, and where it would raise.
        for side in (9_900, 13_000, 14_000):
            with pytest.raises(ImageError, match=f"{side} × {side} pixels"):
                images.read_image(png(side, side, 8, 2), max_pixels=side * side - 1)


@pytest.mark.parametrize("kind", FORMATS)
def test_max_pixels_is_the_largest_size_read(kind):
    data = encoded(picture(10, 20), kind)
    assert as_array(data, max_pixels=200).shape == (10, 20, 3)
    with pytest.raises(ImageError, match="20 × 10 pixels"):
        images.read_image(data, max_pixels=199)


def test_a_webp_bomb_is_refused():
    canvas = (16_383 - 1).to_bytes(3, "little") * 2
    extended = b"VP8X" + struct.pack("<I", 10) + bytes(4) + canvas
    data = b"RIFF" + struct.pack("<I", 4 + len(extended)) + b"WEBP" + extended
    with pytest.raises(ImageError):
        images.read_image(data)


@pytest.mark.parametrize("kind", FORMATS)
def test_files_that_are_cut_short_are_refused(kind, tmp_path):
    path = tmp_path / "cut"
    data = encoded(picture(64, 64), kind)
    for length in (len(data) // 2, 20):
        path.write_bytes(data[:length])
        with pytest.raises(ImageError, match=r"cut cannot be decoded; it may be damaged or cut short"):
            images.read_image(path)


@pytest.mark.parametrize("data", [b"just some words\n", b"%PDF-1.7 ", b"%!PS-Adobe-3.0 EPSF", b"\0" * 100])
def test_what_is_no_picture_is_refused(data, tmp_path):
    path = tmp_path / "notes.png"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"notes\.png is not a picture.*PNG, JPEG, WebP"):
        images.read_image(path)


def test_formats_beyond_the_list_are_refused():
    for kind in ("ICO", "TGA", "EPS"):
        with pytest.raises(ImageError, match="not a picture"):
            images.read_image(encoded(picture(32, 32), kind))


def test_paths_that_cannot_be_read(tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match=r"empty\.png is empty"):
        images.read_image(tmp_path / "empty.png")
    with pytest.raises(ImageError, match="No such file"):
        images.read_image(tmp_path / "missing.png")
    with pytest.raises(ImageError, match="directory"):
        images.read_image(tmp_path)
    with pytest.raises(ImageError, match="directory"):
        images.read_image(tmp_path / "empty.png" / "inside.png")
    with pytest.raises(ImageError, match="null"):
        images.read_image("a\0b.png")
    with pytest.raises(ImageError, match="is empty"):
        images.read_image(b"")


SEEDS = [encoded(picture(), kind) for kind in FORMATS] + [
    encoded(picture().convert("CMYK"), "JPEG"),
    encoded(picture().convert("P"), "PNG", transparency=3),
    encoded(Image.fromarray(noise(6, 6, 1, np.uint16))),
    encoded(picture(), "TIFF", compression="tiff_lzw"),
    encoded(picture(), "GIF", save_all=True, append_images=[picture(seed=1)]),
]


@given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=8),
    st.floats(0, 1),
)
@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_damaged_files_are_read_or_refused_and_nothing_else(data, changes, cut):
    damaged = bytearray(data)
    for place, value in changes:
        damaged[int(place**3 * (len(data) - 1))] = value
    if cut < 0.2:
        del damaged[int(cut * 5 * len(damaged)) :]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = images.read_image(bytes(damaged), max_pixels=10_000)
        except ImageError:
            return
    assert image.mode == "RGB"


def test_reading_leaves_pillow_as_it_was():
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    images.read_image(encoded(picture()))
    with pytest.raises(ImageError):
        images.read_image(png(100_000, 100_000, 8, 2))
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))


def png_of(mode: str, interlaced: bool, rows_missing: int) -> bytes:
    """A PNG of 13 × 11 pixels, whole in itself, whose pixel data ends early."""
    depth, colour, bits = {"1": (1, 0, 1), "P4": (4, 3, 4), "RGB": (8, 2, 24), "RGBA16": (16, 6, 64)}[mode]
    passes = [
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ]
    lines = []
    for x, y, across, down in passes if interlaced else [(0, 0, 1, 1)]:
        columns = len(range(x, 13, across))
        lines += [bytes(1 + -(-columns * bits // 8))] * len(range(y, 11, down))
    data = zlib.compress(b"".join(lines[: len(lines) - rows_missing]))

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 13, 11, depth, colour, 0, 0, interlaced)
    palette = chunk(b"PLTE", bytes(48)) if mode == "P4" else b""
    parts = [chunk(b"IDAT", data[start : start + 7]) for start in range(0, len(data), 7)]
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + palette + b"".join(parts) + chunk(b"IEND", b"")


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("mode", ["1", "P4", "RGB", "RGBA16"])
def test_a_png_whose_pixels_end_early_is_refused(mode, interlaced):
    assert images.read_image(png_of(mode, interlaced, 0)).size == (13, 11)
    for missing in (1, 5):
        with pytest.raises(ImageError, match="cut short"):
            images.read_image(png_of(mode, interlaced, missing))
