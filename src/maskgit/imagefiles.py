"""Opening picture files that nobody vouches for, and bringing every kind of pixel to RGB.

`images` holds what others call; here is what Pillow needs around it.
"""

import io
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.PpmImagePlugin import PpmImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from maskgit.errors import ImageError, MaskGITError

Source = str | os.PathLike[str] | bytes | BinaryIO

# The readers are called directly. `Image.open` would ask every plugin that some package has registered, warn
# of large pictures before their size can be refused, and take a phone's JPEG with a depth map for two frames.
_READERS: tuple[tuple[bytes, type[ImageFile.ImageFile]], ...] = (
    (rb"\x89PNG\r\n\x1a\n", PngImageFile),
    (rb"\xff\xd8\xff", JpegImageFile),
    (rb"RIFF....WEBP", WebPImageFile),
    (rb"GIF8[79]a", GifImageFile),
    (rb"BM", BmpImageFile),
    (rb"II[*+]\0|MM\0[*+]", TiffImageFile),
    (rb"P[1-6]\s", PpmImageFile),
)
_FORMATS = "PNG, JPEG, WebP, GIF, BMP, TIFF or PPM"

# What Pillow's readers raise on damaged files.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@contextmanager
def decoding(name: str) -> Iterator[None]:
    """Turn whatever goes wrong while a picture is read into an `ImageError` that calls it by `name`."""
    try:
        yield
    except MaskGITError:
        raise
    except _DECODE_ERRORS as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise ImageError(f"{name} cannot be read: {error.strerror}. Check the path.") from error
        reason = str(error).rstrip(".") or type(error).__name__
        if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning | MemoryError):
            raise ImageError(f"{name} is too large; make it smaller first ({reason}).") from error
        raise ImageError(f"{name} cannot be decoded; it may be damaged or cut short ({reason}).") from error


@contextmanager
def opened(source: Source, max_pixels: int) -> Iterator[tuple[str, ImageFile.ImageFile]]:
    """Give a source's name and its picture, of which only the header has been read.

    Args:
        source: a path, a file's bytes, or a binary file that can seek.
        max_pixels: the largest width × height.

    Yields:
        The name for messages, and the picture; it can be decoded until the block ends.

    Raises:
        ImageError: it cannot be read, is no picture of our formats, is damaged or too large.
    """
    name = str(Path(source)) if isinstance(source, str | os.PathLike) else "The picture"
    with decoding(name), _binary(source) as file:
        file.seek(0)
        start = file.read(16)
        file.seek(0)
        if not start:
            raise ImageError(f"{name} is empty; give a {_FORMATS} file.")
        reader = next((r for pattern, r in _READERS if re.match(pattern, start, re.DOTALL)), None)
        if reader is None:
            raise ImageError(f"{name} is not a picture that can be read; convert it to {_FORMATS}.")
        image = reader(file)
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError(
                f"{name} has {width} × {height} pixels, but {max_pixels:,} are the limit; "
                "make it smaller first."
            )
        yield name, image


def _binary(source: Source) -> Any:
    if isinstance(source, str | os.PathLike):
        return open(source, "rb")
    return nullcontext(io.BytesIO(source) if isinstance(source, bytes) else source)


def read(source: Source, max_pixels: int, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """Read a picture of one frame, turned the way it is meant to be seen and without metadata.

    Args:
        source, max_pixels: as in `opened`.
        convert: brings the pixels to another mode, before the picture's metadata is removed.

    Raises:
        ImageError: as in `opened`, or it is animated.
    """
    with opened(source, max_pixels) as (name, image):
        frames = getattr(image, "n_frames", 1)
        if frames > 1:
            raise ImageError(f"{name} is animated or has pages ({frames} frames); extract one frame first.")
        if isinstance(image, PngImageFile):
            _check_png_whole(image)
        image.load()
        return upright(convert(image), orientation(image))


def _check_png_whole(image: PngImageFile) -> None:
    """Check that a PNG's pixel data is as long as its size asks for: Pillow leaves what is missing black.

    Source: the PNG specification (ISO/IEC 15948), sections 7.2, 8.2 and 11.2.2.

    Raises:
        ValueError: it ends early.
    """
    file = image.fp
    assert file is not None
    at = file.tell()
    file.seek(16)
    width, height, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", file.read(13))
    bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    passes = (
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    )
    left = 0
    for x, y, across, down in passes if interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - x) // across), -(-(height - y) // down)
        left += rows * (1 + (columns * bits + 7) // 8) if columns > 0 and rows > 0 else 0
    unpacking = zlib.decompressobj()
    file.seek(8)
    while left > 0 and not unpacking.eof and len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IDAT":
            data = file.read(length)
            while data and left > 0 and not unpacking.eof:
                left -= len(unpacking.decompress(data, 2**20))
                data = unpacking.unconsumed_tail
            file.seek(4, os.SEEK_CUR)
        else:
            file.seek(length + 4, os.SEEK_CUR)
    file.seek(at)
    if left > 0:
        raise ValueError(f"{left:,} bytes of its pixels are missing")


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8, of a decoded picture; 1 if it is missing or broken."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except _DECODE_ERRORS:
        # Broken metadata says nothing about the orientation, and the pixels are sound.
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """Return a picture turned the way it is meant to be seen, with its metadata removed."""
    image = image.transpose(_TURNS[orientation]) if orientation in _TURNS else image.copy()
    image.info = {}
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Return a picture of any mode in RGB: transparency over white, deep grey scaled to 8 bits."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _shallow(image).convert("RGB")
    if image.mode == "La":
        # Pillow turns only the coloured premultiplied mode into a plain one.
        grey, alpha = image.split()
        image = Image.merge("RGBa", (grey, grey, grey, alpha))
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(rgba)
        image = white
    return image.convert("RGB")


def keep_alpha(image: Image.Image) -> Image.Image:
    """Return a picture of any mode in RGBA if it has transparency, else in RGB; see `to_rgb`."""
    if image.mode == "La":
        grey, alpha = image.split()
        image = Image.merge("RGBa", (grey, grey, grey, alpha))
    deep = image.mode == "F" or image.mode.startswith("I")
    return image.convert("RGBA") if image.has_transparency_data and not deep else to_rgb(image)


def _shallow(image: Image.Image) -> Image.Image:
    """Return deep grey (16 bits, or floats) as 8 bits; Pillow's own conversion clips instead of scaling."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 1):
            raise ImageError(f"Floating-point grey must be within [0, 1], but runs from {low} to {high}.")
        grey = np.rint(values * 255)
    else:
        if low < 0 or high > 65_535:
            raise ImageError(
                f"Grey must be of 8 or 16 bits, within [0, 65535], but runs from {low} to {high}."
            )
        # The nearest of 256 levels: 65535 = 257 · 255.
        grey = (values.astype(np.int32) + 128) // 257
        transparent = image.info.get("transparency")
        if isinstance(transparent, int):
            grey[values == transparent] = 255
    return Image.fromarray(grey.astype(np.uint8))
