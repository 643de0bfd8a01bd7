"""Colour spaces of pictures: ICC profiles, PNG's colour chunks, EXIF's colour space.

The model works in sRGB. Colours are converted with relative colorimetric intent and black point compensation in both
directions, so colours that exist in both spaces survive a round trip.
Sources: ICC.1:2022; W3C PNG, third edition, §11.3.2; ITU-T H.273; DCF 2.0; IEC 61966-2-1.
"""

import io
import math
import struct
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageCms

from maskgit.foundation.notes import note

# Bytes; the largest profiles of cameras, scanners and printers have about three million.
MAX_PROFILE = 2**23
# Levels (of 255) by which a profile may differ from sRGB and still count as sRGB: its variants differ by rounding.
SAME = 2

# x and y of red, green, blue and white.
_D65 = (0.3127, 0.3290)
_SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), _D65)
_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), _D65)
_BT2020 = ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), _D65)
_ADOBE = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06), _D65)
_PRIMARIES = {1: _SRGB, 9: _BT2020, 12: _P3}
# ICC's parametric curves: exponent alone, or exponent, a, b, c and d of  (a·x + b)^g from d on, below it c·x.
_SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
_BT709_CURVE = (1 / 0.45, 1 / 1.099, 0.099 / 1.099, 1 / 4.5, 0.081)
_TRANSFERS = {1: _BT709_CURVE, 4: (2.2,), 6: _BT709_CURVE, 8: (1.0,), 13: _SRGB_CURVE, 14: _BT709_CURVE}
_ADOBE_GAMMA = 563 / 256
# A gamma this close to 1 / 2.2 is read as sRGB's curve, as in libpng: old programs, and many current ones, write
# nothing more precise.
_GAMMA_THRESHOLD = 0.05
# Modes that are not RGB; their profiles take precedence.
_INKS = {"CMYK": "CMYK", "LAB": "Lab"}


class BrokenError(Exception):
    """A profile cannot be used; the message says why."""


def profile_of(image: Image.Image, mode: str, name: str) -> bytes | None:
    """Return a picture's ICC profile; None for sRGB, or if the picture does not specify its colours.

    Args:
        image: its `info` may hold "icc_profile", PNG's "code_points", "srgb", "gamma" and "chromaticity".
        mode: the mode of its pixels: RGB, L, CMYK or LAB.
        name: for notes about colour information that cannot be used.

    Returns:
        For grey, an RGB profile in which equal red, green and blue look like that grey.
    """
    try:
        profile = _said(image, mode)
        if profile is None:
            return None
        if mode in _INKS:
            # Tried here, where an error can be reported.
            _converters(profile, mode)
            return profile
        return None if _is_srgb(profile) else profile
    except BrokenError as error:
        note(f"{name} {error}; its colours are read as sRGB.")
        return None


def _said(image: Image.Image, mode: str) -> bytes | None:
    info = image.info
    points = info.get("code_points")
    if points is not None and mode in ("RGB", "L"):
        primaries, curve = _PRIMARIES.get(points[0]), _TRANSFERS.get(points[1])
        if primaries and curve:
            return matrix_profile(primaries, curve)
        raise BrokenError(
            f"uses colours that are not supported (primaries {points[0]}, transfer {points[1]})"
        )
    icc = info.get("icc_profile")
    if isinstance(icc, bytes) and icc:
        return _checked(icc, mode)
    if mode == "LAB":
        return lab_profile()
    if mode not in ("RGB", "L") or "srgb" in info:
        return None
    if "gamma" in info or "chromaticity" in info:
        return _from_chunks(info.get("gamma"), info.get("chromaticity"))
    return matrix_profile(_ADOBE, (_ADOBE_GAMMA,)) if _exif_says_adobe(image) else None


def _checked(icc: bytes, mode: str) -> bytes:
    """Return a profile that fits a mode; a grey one is converted to RGB."""
    if len(icc) > MAX_PROFILE:
        raise BrokenError(f"has a colour profile of {len(icc):,} bytes, above {MAX_PROFILE:,}")
    space, wanted = icc[16:20].decode("latin-1").strip(), _INKS.get(mode, "RGB")
    if mode == "L" and space == "GRAY":
        return _grey_as_rgb(icc)
    # Grey with an RGB profile is a mistake that many programs make; the meaning is clear.
    if space != wanted:
        raise BrokenError(f"has a colour profile for {space!r:.10}, though its pixels are {mode}")
    return icc


def _grey_as_rgb(icc: bytes) -> bytes:
    try:
        (count,) = struct.unpack_from(">I", icc, 128)
        for number in range(min(count, 100)):
            tag, start, length = struct.unpack_from(">4sII", icc, 132 + 12 * number)
            if tag == b"kTRC" and start + length <= len(icc):
                return matrix_profile(_SRGB, icc[start : start + length])
    except struct.error:
        pass
    raise BrokenError("has a grey colour profile without a tone curve")


def _from_chunks(gamma: Any, chromaticity: Any) -> bytes | None:
    """Return the profile that PNG's gAMA (a float) and cHRM (white, red, green, blue) say."""
    curve: tuple[float, ...] = _SRGB_CURVE
    if gamma is not None:
        if not 0.01 < gamma < 100:
            raise BrokenError(f"says a gamma of {gamma}")
        if abs(gamma * 2.2 - 1) > _GAMMA_THRESHOLD:
            curve = (1 / gamma,)
    primaries = _SRGB
    if chromaticity is not None:
        white, *colours = (tuple(chromaticity[i : i + 2]) for i in range(0, 8, 2))
        primaries = (colours[0], colours[1], colours[2], white)
    return matrix_profile(primaries, curve)


def _exif_says_adobe(image: Image.Image) -> bool:
    """Return whether EXIF specifies Adobe RGB, by its colour space or, as cameras do, its interoperability index."""
    if "exif" not in image.info:
        return False
    try:
        exif = image.getexif()
        taken = exif.get_ifd(ExifTags.IFD.Exif)
        space = taken.get(ExifTags.Base.ColorSpace)
        has_index = ExifTags.IFD.Interop in taken
        index = exif.get_ifd(ExifTags.IFD.Interop).get(ExifTags.Interop.InteropIndex) if has_index else None
    # The metadata are broken.
    except (OSError, SyntaxError, ValueError, TypeError, LookupError, RuntimeError, struct.error):
        return False
    return space == 2 or (space != 1 and isinstance(index, str) and index.strip("\0 ") == "R03")


class _Converters(NamedTuple):
    """Transforms between a profile and sRGB; `back` is None if the profile can only be converted from."""

    forth: ImageCms.ImageCmsTransform
    back: ImageCms.ImageCmsTransform | None


# Few, because a transform of a profile with tables takes some megabytes, and its key up to eight.
@lru_cache(maxsize=8)
def _converters(icc: bytes, mode: str) -> _Converters:
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
    relative = ImageCms.Intent.RELATIVE_COLORIMETRIC
    try:
        own, srgb = ImageCms.ImageCmsProfile(io.BytesIO(icc)), ImageCms.createProfile("sRGB")
        forth = ImageCms.buildTransform(own, srgb, mode, "RGB", relative, flags)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        raise BrokenError("has a broken colour profile") from error
    except ImportError as error:
        raise BrokenError("has a colour profile, which this build of Pillow cannot read") from error
    try:
        back = ImageCms.buildTransform(srgb, own, "RGB", mode, relative, flags)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        back = None
    return _Converters(forth, back)


@lru_cache(maxsize=64)
def _is_srgb(icc: bytes) -> bool:
    """Return whether an RGB profile's colours are sRGB's.

    Raises:
        BrokenError: it cannot be used.
    """
    levels = np.linspace(0, 255, 18).round().astype(np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 1, 3)
    greys = np.repeat(np.arange(256, dtype=np.uint8)[:, None, None], 3, 2)
    colours = np.concatenate([grid, greys])
    seen = np.asarray(_apply(_converters(icc, "RGB").forth, Image.fromarray(colours)))
    return bool(np.abs(seen.astype(int) - colours).max() <= SAME)


def _apply(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    result = ImageCms.applyTransform(image, transform)
    assert result is not None, "a copy was asked for"
    return result


def can_be_written(icc: bytes) -> bool:
    """Return whether colours can be converted to a profile from `profile_of`, and not only from it."""
    return _converters(icc, "RGB").back is not None


def to_srgb(image: Image.Image, icc: bytes | None) -> Image.Image:
    """Return a picture in sRGB.

    Args:
        image: mode RGB, RGBA, CMYK or LAB.
        icc: its profile, as `profile_of` returns it; None leaves the picture as it is.

    Returns:
        RGB, or RGBA with unchanged alpha.
    """
    if icc is None:
        return image
    return _converted(image, _converters(icc, image.mode if image.mode in _INKS else "RGB").forth)


def from_srgb(image: Image.Image, icc: bytes | None) -> Image.Image:
    """Return an sRGB picture, mode RGB or RGBA, in the colours of an RGB profile; see `to_srgb`."""
    if icc is None:
        return image
    back = _converters(icc, "RGB").back
    assert back is not None, "see `can_be_written`"
    return _converted(image, back)


def _converted(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    if image.mode != "RGBA":
        return _apply(transform, image)
    result = _apply(transform, image.convert("RGB"))
    result.putalpha(image.getchannel("A"))
    return result


@lru_cache(maxsize=1)
def lab_profile() -> bytes:
    """Return the profile of CIE L*a*b* relative to D50."""
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB", 5000)).tobytes()


@lru_cache(maxsize=32)
def matrix_profile(
    primaries: tuple[tuple[float, ...], ...], curve: tuple[float, ...] | bytes, name: str = "RGB"
) -> bytes:
    """Return an ICC profile (version 4) of RGB colours.

    Args:
        primaries: x and y of red, green, blue and white.
        curve: of all three channels: an exponent; exponent, a, b, c, d of ICC's parametric type 3; or an ICC
            curve as its bytes.
        name: what the profile is called.

    Raises:
        BrokenError: the primaries do not span a colour space.
    """
    matrix, adapted = _matrix(primaries)
    if isinstance(curve, tuple):
        values = b"".join(_fixed(value) for value in curve)
        curve = b"para" + bytes(4) + struct.pack(">HH", 0 if len(curve) == 1 else 3, 0) + values
    tags = {b"desc": _words(name), b"cprt": _words("None"), b"wtpt": _xyz(_D50), b"chad": _chad(adapted)}
    tags |= {tag: _xyz(column) for tag, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), matrix.T, strict=True)}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    return _assembled(tags)


_D50 = np.array([0.9642, 1.0, 0.8249])
# Bradford's cone responses.
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def _matrix(primaries: tuple[tuple[float, ...], ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return RGB → XYZ relative to D50, and the adaptation of the white."""
    try:
        columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in primaries]).T
        white = columns[:, 3]
        matrix = columns[:, :3] * np.linalg.solve(columns[:, :3], white)
        cones = (_BRADFORD @ _D50) / (_BRADFORD @ white)
    except (ZeroDivisionError, ValueError, np.linalg.LinAlgError) as error:
        raise BrokenError("names primary colours that do not span a colour space") from error
    adapted = np.linalg.inv(_BRADFORD) @ (cones[:, None] * _BRADFORD)
    matrix = adapted @ matrix
    if not (np.isfinite(matrix).all() and np.abs(matrix).max() < 100 and np.linalg.det(matrix) > 1e-3):
        raise BrokenError("names primary colours that do not span a colour space")
    return matrix, adapted


def _fixed(value: float) -> bytes:
    return struct.pack(">i", max(-(2**31), min(2**31 - 1, math.floor(value * 65_536 + 0.5))))


def _xyz(values: np.ndarray) -> bytes:
    return b"XYZ " + bytes(4) + b"".join(_fixed(float(value)) for value in values)


def _chad(matrix: np.ndarray) -> bytes:
    return b"sf32" + bytes(4) + b"".join(_fixed(float(value)) for value in matrix.flat)


def _words(text: str) -> bytes:
    data = text.encode("utf-16-be")
    return b"mluc" + bytes(4) + struct.pack(">II2s2sII", 1, 12, b"en", b"US", len(data), 28) + data


def _assembled(tags: Mapping[bytes, bytes]) -> bytes:
    table, data = struct.pack(">I", len(tags)), b""
    start = 132 + 12 * len(tags)
    places: dict[bytes, int] = {}
    for tag, value in tags.items():
        # Equal values are stored once.
        if value not in places:
            places[value] = start + len(data)
            data += value + bytes(-len(value) % 4)
        table += struct.pack(">4sII", tag, places[value], len(value))
    date = struct.pack(">6H", 2000, 1, 1, 0, 0, 0)
    head = struct.pack(
        ">I4sI4s4s4s", 128 + len(table) + len(data), b"", 0x04300000, b"mntr", b"RGB ", b"XYZ "
    )
    head += date + b"acsp" + bytes(4 + 4 + 4 + 4 + 8) + struct.pack(">I", 1)
    head += b"".join(_fixed(float(value)) for value in _D50)
    return head.ljust(128, b"\0") + table + data
