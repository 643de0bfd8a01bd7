"""Reading untrusted image files, and converting every kind of pixel to RGB."""

import importlib
import io
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

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
from maskgit.foundation.files import expand
from maskgit.foundation.notes import note
from maskgit.images.formats import Facts, deep_numbers, is_deep, readable_png, without_end
from maskgit.images.profiles import can_be_written, profile_of, to_srgb
from maskgit.images.provenance import refreshed

Source = str | os.PathLike[str] | bytes | BinaryIO

# The readers are called directly. `Image.open` would try every plugin that some package has registered, warn
# about large pictures before their size can be refused, and take a phone's JPEG with a depth map for two frames.
_READERS: tuple[tuple[bytes, type[ImageFile.ImageFile]], ...] = (
    (rb"\x89PNG\r\n\x1a\n", PngImageFile),
    (rb"\xff\xd8\xff", JpegImageFile),
    (rb"RIFF....WEBP", WebPImageFile),
    (rb"GIF8[79]a", GifImageFile),
    (rb"BM", BmpImageFile),
    (rb"II[*+]\0|MM\0[*+]", TiffImageFile),
    (rb"P[1-6]\s", PpmImageFile),
)
MAX_PIXELS = 100_000_000
_FORMATS = "PNG, JPEG, WebP, AVIF, GIF, BMP, TIFF or PPM"


class _Optional(NamedTuple):
    """A format that not every installation can read: its name, the reader's module and class, and what to install."""

    name: str
    module: str
    reader: str
    package: str


# The first brand is the format itself, or a family followed by the compatible formats.
_OPTIONAL: tuple[tuple[bytes, _Optional], ...] = (
    (
        rb".{4}ftyp(?:avi[fs]|(?:mif1|msf1).{4}(?:.{4})*?avi[fs])",
        _Optional("AVIF", "PIL.AvifImagePlugin", "AvifImageFile", "--upgrade pillow"),
    ),
    (
        rb".{4}ftyp(?:he[iv][cmsx]|heif|mif1|msf1)",
        _Optional("HEIC", "pillow_heif", "HeifImageFile", "pillow-heif"),
    ),
)

# What Pillow's readers raise for damaged files.
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

# Metadata that stays with a picture.
METADATA = ("icc_profile", "exif", "xmp")

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
    """Turn any failure to read a picture into an `ImageError` that calls the picture `name`."""
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
    """Open a picture, reading only its header.

    Args:
        source: a path, a file's bytes, or a binary file that can seek.
        max_pixels: the largest width × height.

    Yields:
        The name for messages, and the picture; it can be decoded until the block ends.

    Raises:
        ImageError: it cannot be read, is damaged or too large, or its format is not supported.
    """
    name = str(Path(source)) if isinstance(source, str | os.PathLike) else "The picture"
    with decoding(name), _binary(source) as file:
        file.seek(0)
        start = file.read(64)
        file.seek(0)
        if not start:
            raise ImageError(f"{name} is empty; give a {_FORMATS} file.")
        reader = _reader(name, start)
        if reader is None:
            raise ImageError(f"{name} is not a picture in a supported format; convert it to {_FORMATS}.")
        facts = Facts()
        if reader is PngImageFile:
            file, facts = readable_png(file, name)
        image = reader(file)
        if facts.profile:
            image.info["icc_profile"] = facts.profile
        for key, value in (("code_points", facts.code_points), ("significant_bits", facts.bits)):
            if value:
                image.info[key] = value
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError(
                f"{name} has {width} × {height} pixels, but the limit is {max_pixels:,}; "
                "make it smaller first."
            )
        yield name, image


def _reader(name: str, start: bytes) -> type[ImageFile.ImageFile] | None:
    """Return the reader for a file that begins with these bytes, or None.

    Raises:
        ImageError: the format needs a package that is not installed.
    """
    for pattern, reader in _READERS:
        if re.match(pattern, start, re.DOTALL):
            return reader
    for pattern, optional in _OPTIONAL:
        if re.match(pattern, start, re.DOTALL):
            try:
                module = importlib.import_module(optional.module)
            except ImportError:
                module = None
            # Pillow may have been built without the format.
            if module is None or not getattr(module, "SUPPORTED", True):
                raise ImageError(
                    f"{name} is an {optional.name} file; to read it, pip install {optional.package}, or convert it to PNG "
                    "or JPEG."
                )
            return getattr(module, optional.reader)
    return None


def _binary(source: Source) -> Any:
    if isinstance(source, str | os.PathLike):
        return open(expand(source), "rb")
    return nullcontext(io.BytesIO(source) if isinstance(source, bytes) else source)


def read_image(source: Source, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read a picture as it is meant to be displayed, in RGB and without metadata.

    The EXIF orientation is applied, transparency is composited over white, grey becomes RGB, and 16 bits per channel
    are scaled to 8. The size in the header is checked before anything is decoded.

    Args:
        source: a path, a file's bytes, or a binary file that can seek; PNG, JPEG, WebP, AVIF, GIF, BMP,
            TIFF or PPM, and HEIC where pillow-heif is installed.
        max_pixels: the largest width × height that is read.

    Returns:
        A PIL image of mode RGB.

    Raises:
        ImageError: it cannot be read, is damaged, too large or animated, or its format is not supported.
    """
    return read(source, max_pixels, to_rgb)


def read(source: Source, max_pixels: int, convert: Callable[[Image.Image, str], Image.Image]) -> Image.Image:
    """Read a picture of one frame, with its orientation applied.

    Args:
        source, max_pixels: as in `opened`.
        convert: `to_rgb`, or `keep_alpha`, which keeps the picture's metadata in its `info`.

    Raises:
        ImageError: as in `opened`, or it is animated.
    """
    with opened(source, max_pixels) as (name, image):
        frames = getattr(image, "n_frames", 1)
        if frames > 1:
            raise ImageError(
                f"{name} is animated or has several pages ({frames} frames); extract one frame first."
            )
        if isinstance(image, PngImageFile):
            _check_png_whole(image)
        decoded = _decoded(image, name)
        result = convert(decoded, name)
        info = result.info
        turned = upright(result, orientation(decoded))
        turned.info = {key: info[key] for key in METADATA if key in info}
        if "exif" in turned.info:
            turned.info["exif"] = _upright_exif(decoded, name)
        if "xmp" in turned.info:
            turned.info["xmp"] = refreshed(turned.info["xmp"])
        turned.info = {key: value for key, value in turned.info.items() if value}
        return turned


def _decoded(image: ImageFile.ImageFile, name: str) -> Image.Image:
    """Return a picture with its pixels read, and 16-bit colour reduced to 8 bits."""
    deep = image if isinstance(image, PngImageFile) and is_deep(image) else None
    if deep is not None and _needs_depth(deep):
        return _from_deep(deep, name)
    try:
        image.load()
    except OSError:
        if not isinstance(image, JpegImageFile):
            raise
        whole = without_end(image)
        if whole is None:
            raise
        note(f"{name} lacks its end marker, but the picture is complete.")
        return whole
    if deep and 0 < np.asarray(image.convert("RGB")).max() < 16:
        _say_dark(name)
    return image


def _check_png_whole(image: PngImageFile) -> None:
    """Check that a PNG has all the pixel data that its size requires: Pillow leaves missing pixels black.

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
    """Return the EXIF orientation of a decoded picture, 1 to 8; 1 if it is missing or invalid."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
    except _DECODE_ERRORS:
        # The metadata are broken, but the pixels are sound.
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def _upright_exif(image: Image.Image, name: str) -> bytes:
    """Return the EXIF of a picture turned upright, without its thumbnail and the tags that describe a TIFF."""
    try:
        exif = image.getexif()
        kept = Image.Exif()
        for tag in exif:
            if tag not in _OF_THE_FILE:
                kept[tag] = exif[tag]
        if ExifTags.IFD.GPSInfo in exif:
            kept[ExifTags.IFD.GPSInfo] = exif.get_ifd(ExifTags.IFD.GPSInfo)
        if ExifTags.IFD.Exif in exif:
            taken = dict(exif.get_ifd(ExifTags.IFD.Exif))
            # The picture may have been rotated, and the result may be larger.
            for tag in (ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight):
                taken.pop(tag, None)
            if ExifTags.IFD.Interop in taken:
                taken[ExifTags.IFD.Interop] = exif.get_ifd(ExifTags.IFD.Interop)
            kept[ExifTags.IFD.Exif] = taken
        return kept.tobytes() if len(kept) else b""
    except _DECODE_ERRORS:
        note(f"{name} has broken EXIF metadata, which the result will not contain.")
        return b""


# TIFF tags for how pixels are stored, the orientation, and what is stored elsewhere: IPTC and Photoshop data, the
# ICC profile, XMP.
_OF_THE_FILE = {254, 255, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 317, 320, 322, 323}
_OF_THE_FILE |= {324, 325, 330, 338, 339, 347, 513, 514, 529, 530, 531, 532, 700, 33723, 34377, 34675}


def upright(image: Image.Image, orientation: int) -> Image.Image:
    """Return a picture with an EXIF orientation applied and its metadata removed."""
    image = image.transpose(_TURNS[orientation]) if orientation in _TURNS else image.copy()
    image.info = {}
    return image


def to_rgb(image: Image.Image, name: str = "The picture") -> Image.Image:
    """Return a picture of any mode as sRGB, mode RGB: transparency over white, 16-bit grey scaled to 8 bits."""
    picture, profile = _in_own_colours(image, name)
    picture = to_srgb(picture, profile)
    if picture.mode == "RGBA":
        picture = over_white(picture)
    picture.info = {}
    return picture


def over_white(picture: Image.Image) -> Image.Image:
    """Return an RGBA picture over white, mode RGB."""
    white = Image.new("RGBA", picture.size, "white")
    white.alpha_composite(picture)
    return white.convert("RGB")


def keep_alpha(image: Image.Image, name: str = "The picture") -> Image.Image:
    """Return a picture of any mode in RGBA if it has transparency, else in RGB, in its own colours.

    Its `info` holds only metadata; an "icc_profile" describes the result, which is sRGB if there is none. A picture whose
    profile is not RGB, or can only be converted from, becomes sRGB.
    """
    picture, profile = _in_own_colours(image, name)
    if profile is not None and not can_be_written(profile):
        note(f"{name} has a colour profile that can only be converted from; the result will be sRGB.")
        picture, profile = to_srgb(picture, profile), None
    info: dict[str | tuple[int, int], Any] = {k: image.info[k] for k in ("exif", "xmp") if k in image.info}
    if isinstance(image, TiffImageFile):
        # Its tags are EXIF tags.
        info["exif"] = b"tags"
    if not isinstance(info.get("xmp", b""), bytes):
        del info["xmp"]
    picture.info = info | ({"icc_profile": profile} if profile else {})
    return picture


def _in_own_colours(image: Image.Image, name: str) -> tuple[Image.Image, bytes | None]:
    """Return a copy of a picture of any mode as RGB or RGBA, and its ICC profile; None means sRGB."""
    if image.mode == "F" or image.mode.startswith("I"):
        return _shallow(image, name), profile_of(image, "L", name)
    if image.mode in ("CMYK", "LAB"):
        profile = profile_of(image, image.mode, name)
        return (image.convert("RGB") if profile is None else to_srgb(image, profile)), None
    grey = image.mode in ("1", "L", "LA", "La")
    profile = profile_of(image, "L" if grey else "RGB", name)
    if image.mode == "La":
        # Pillow converts only the coloured premultiplied mode.
        level, alpha = image.split()
        image = Image.merge("RGBa", (level, level, level, alpha))
    clear = image.has_transparency_data
    picture = image.convert("RGBA" if clear else "RGB")
    return (picture.copy() if picture is image else picture), profile


def _shallow(image: Image.Image, name: str) -> Image.Image:
    """Return 16-bit or floating-point grey as 8 bits, mode RGB, or RGBA if one grey level is transparent.

    Pillow's own conversion clips instead of scaling.
    """
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 1):
            raise ImageError(f"Floating-point grey must be within [0, 1], but ranges from {low} to {high}.")
        return Image.fromarray(np.rint(values * 255).astype(np.uint8)).convert("RGB")
    if low < 0 or high > 65_535:
        raise ImageError(f"Grey must have 8 or 16 bits, within [0, 65535], but ranges from {low} to {high}.")
    grey = Image.fromarray(_eight_bits(values, _bits(image), name)).convert("RGB")
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _bits(image: Image.Image) -> int:
    """Return the significant bits of 16-bit grey according to its file."""
    if isinstance(image, TiffImageFile):
        # Pillow reads 12 bits as they are.
        stored = image.tag_v2.get(258, (16,))
        return min(int(stored[0] if isinstance(stored, tuple) else stored), 16)
    said = image.info.get("significant_bits")
    return said[0] if said and 0 < said[0] <= 16 else 16


def _eight_bits(values: np.ndarray, bits: int, name: str) -> np.ndarray:
    """Return 16-bit numbers as the nearest of 256 levels, uint8.

    The PNG standard requires data with fewer bits to be scaled to all 16; many programs only record how many bits they
    wrote.

    Args:
        values: whole numbers in [0, 65535].
        bits: how many are significant according to the file.
        name: for notes.
    """
    numbers = np.arange(65_536)
    # The nearest of 256 levels: 65535 = 257 · 255.
    levels = (numbers + 128) // 257
    high = int(values.max())
    if bits < 16 and high < 2**bits:
        top = 2**bits - 1
        step = 65_535 / top
        used = np.zeros(len(numbers), np.bool_)
        used[values] = True
        # The distance to the values that scaled data can have.
        if np.abs(numbers - np.rint(numbers / step) * step)[used].max() >= 1:
            note(f"{name} declares {bits}-bit values in 16 bits; {top:,} is taken as white.")
            levels = np.minimum((numbers * 510 + top) // (2 * top), 255)
    elif bits == 16 and 0 < high < 4096:
        _say_dark(name)
    return levels.astype(np.uint8)[values]


def _say_dark(name: str) -> None:
    note(
        f"All values in {name} are below 4,096, as in 12-bit data, but the file does not declare this; they are "
        "read as 16-bit values, which is nearly black. Scale them to 65,535 first, or add an sBIT chunk."
    )


def _needs_depth(image: PngImageFile) -> bool:
    """Return whether a picture with 16 bits per channel needs more than its upper 8 bits."""
    return "transparency" in image.info or min(image.info.get("significant_bits", (16,))) < 16


def _from_deep(image: PngImageFile, name: str) -> Image.Image:
    """Return a PNG with 16 bits per channel in 8 bits, mode L, RGB, LA or RGBA."""
    values = deep_numbers(image)
    colours = values.shape[2] - (values.shape[2] in (2, 4))
    said = image.info.get("significant_bits", ())
    bits = [max(said[:colours], default=16), *said[colours:]]
    parts = [_eight_bits(values[..., :colours], bits[0], name)]
    if colours < values.shape[2]:
        parts.append(_eight_bits(values[..., colours:], bits[1] if len(bits) > 1 else 16, name))
    clear = image.info.get("transparency")
    if colours == values.shape[2] and clear is not None:
        hidden = (values == np.array(clear)).all(2, keepdims=True)
        parts.append(np.where(hidden, 0, 255).astype(np.uint8))
    # Metadata may follow the pixels.
    image.load()
    pixels = np.concatenate(parts, 2)
    result = Image.fromarray(pixels)
    result.info = {key: value for key, value in image.info.items() if key != "transparency"}
    return result
