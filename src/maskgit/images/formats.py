"""PNG and JPEG files beyond what Pillow reads of them: facts that it does not expose, flaws that make it fail.

Sources: W3C, Portable Network Graphics (PNG) Specification, third edition; ITU-T T.81 (JPEG).
"""

import io
import re
import struct
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from maskgit.foundation.notes import note
from maskgit.images.profiles import MAX_PROFILE

# Text chunks that are used, and their maximum length; Pillow refuses a file with any compressed text that is longer.
TEXTS = (b"maskgit", b"XML:com.adobe.xmp", b"Raw profile type exif", b"exif")
MAX_TEXT = 2**20
_END = struct.pack(">I", 0) + b"IEND" + struct.pack(">I", zlib.crc32(b"IEND"))
_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}

# Bytes; such a file is read again as a whole, and larger ones are refused.
MAX_JPEG = 2**28
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)


class Facts(NamedTuple):
    """What a PNG file holds besides its pixels.

    Attributes:
        profile: its ICC profile, or None.
        bits: the significant bits of each channel (grey, or red, green and blue, then alpha), or None.
        code_points: its colour primaries and transfer function (ITU-T H.273), or None.
    """

    profile: bytes | None = None
    bits: tuple[int, ...] | None = None
    code_points: tuple[int, int] | None = None


class _Parts(io.RawIOBase):
    """Spans of a file, concatenated and read as a file."""

    def __init__(self, file: BinaryIO, spans: list[tuple[int, int]], tail: bytes) -> None:
        self._file, self._spans, self._tail = file, spans, tail
        self._length = sum(stop - start for start, stop in spans)
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._length + len(self._tail))[whence])
        return self._at

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        place = self._at
        for start, stop in self._spans:
            if place < stop - start:
                self._file.seek(start + place)
                data = self._file.read(min(len(buffer), stop - start - place))
                break
            place -= stop - start
        else:
            data = self._tail[place : place + len(buffer)]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def readable_png(file: BinaryIO, name: str) -> tuple[BinaryIO, Facts]:
    """Return a PNG file in a form that Pillow can read, and the facts in it.

    Unused text chunks and the profile are left out; a missing end marker is added.

    Args:
        file: at its start.
        name: for notes.
    """
    spans: list[tuple[int, int]] = [(0, 8)]
    texts: dict[bytes, tuple[int, int]] = {}
    facts, seen = Facts(), set()
    stop = 8
    for kind, start, length in _chunks(file):
        stop = start + length + 4
        seen.add(kind)
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            key = _wanted(file, kind, start, length)
            if key is not None:
                # Of two texts with one key the later one counts, as it does for Pillow.
                texts[key] = (start - 8, stop)
        elif kind == b"iCCP":
            facts = facts._replace(profile=_profile(_read(file, start, length, MAX_PROFILE), name))
        else:
            if kind == b"sBIT":
                facts = facts._replace(bits=tuple(_read(file, start, length, 4) or b"") or None)
            elif kind == b"cICP":
                points = _read(file, start, length, 4) or b""
                facts = facts._replace(code_points=(points[0], points[1]) if len(points) == 4 else None)
            _extend(spans, start - 8, stop)
    tail = b""
    if b"IEND" not in seen:
        rest = file.seek(0, io.SEEK_END) - stop
        if b"IDAT" in seen and rest < 12:
            note(f"{name} lacks its end marker, but the picture is complete.")
            tail = _END
        else:
            _extend(spans, stop, stop + rest)
    # Texts go before the pixels, where Pillow reads them with the header.
    header = spans[0][0], min(spans[0][1], 33)
    spans = [header, *texts.values(), (header[1], spans[0][1]), *spans[1:]]
    file.seek(0)
    return io.BufferedReader(_Parts(file, spans, tail), 2**16), facts


def _chunks(file: BinaryIO) -> Iterator[tuple[bytes, int, int]]:
    """Yield the type, start and length of each complete chunk, up to the end marker."""
    size = file.seek(0, io.SEEK_END)
    place = 8
    while True:
        file.seek(place)
        head = file.read(8)
        if len(head) < 8:
            return
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if place + 12 + length > size or not kind.isalpha():
            return
        yield kind, place + 8, length
        if kind == b"IEND":
            return
        place += 12 + length


def _extend(spans: list[tuple[int, int]], start: int, stop: int) -> None:
    if spans[-1][1] == start:
        spans[-1] = (spans[-1][0], stop)
    else:
        spans.append((start, stop))


def _read(file: BinaryIO, start: int, length: int, limit: int) -> bytes | None:
    if length > limit:
        return None
    file.seek(start)
    return file.read(length)


def _wanted(file: BinaryIO, kind: bytes, start: int, length: int) -> bytes | None:
    """Return a text chunk's key if it is used and not too long."""
    data = _read(file, start, length, 2 * MAX_TEXT)
    if data is None:
        return None
    key, _, rest = data.partition(b"\0")
    if key not in TEXTS:
        return None
    if kind == b"zTXt":
        packed: bytes | None = rest[1:]
    elif kind == b"iTXt" and rest[:1] == b"\1":
        # A language and a translated key come first.
        packed = rest[2:].split(b"\0", 2)[-1]
    else:
        packed = None
    return key if packed is None or _inflated(packed, MAX_TEXT) is not None else None


def _inflated(packed: bytes, limit: int) -> bytes | None:
    """Return the decompressed data, or None if they are damaged or longer than the limit."""
    inflating = zlib.decompressobj()
    try:
        data = inflating.decompress(packed, limit + 1)
    except zlib.error:
        return None
    return data if len(data) <= limit else None


def _profile(chunk: bytes | None, name: str) -> bytes | None:
    packed = (chunk or b"").partition(b"\0")[2][1:]
    profile = _inflated(packed, MAX_PROFILE) if packed else None
    if not profile:
        note(f"{name} has a damaged or very large colour profile; its colours are read as sRGB.")
    return profile


def is_deep(image: ImageFile.ImageFile) -> bool:
    """Return whether an undecoded PNG has 16 bits per channel and is not plain grey."""
    return bool(image.tile) and str(image.tile[0].args) in _LOW


# Raw modes with which Pillow reads the lower instead of the upper bytes; for grey with alpha, all four.
_LOW = {"RGB;16B": "RGB;16L", "RGBA;16B": "RGBA;16L", "LA;16B": "RGBA"}


def deep_numbers(image: PngImageFile) -> np.ndarray:
    """Return a PNG's 16-bit values, uint16 (H, W, 2, 3 or 4), of which Pillow reads only the upper 8 bits.

    Args:
        image: undecoded, with 16 bits per channel; see `is_deep`. It can be decoded afterwards.
    """
    assert image.fp is not None
    layout = str(image.tile[0].args)
    halves = []
    for raw in (layout, _LOW[layout]):
        image.fp.seek(0)
        again = PngImageFile(image.fp)
        again.tile = [tile._replace(args=raw) for tile in again.tile]
        again._exclusive_fp = False
        again.load()
        halves.append(np.asarray(again).astype(np.uint16))
    high, low = halves
    if layout == "LA;16B":
        return low[..., ::2] << 8 | low[..., 1::2]
    return high << 8 | low


def without_end(image: JpegImageFile) -> Image.Image | None:
    """Return a JPEG that lacks only its end marker, or None if part of its picture is missing as well."""
    file = image.fp
    if file is None:
        # It was read to its end, so something else is wrong with it.
        return None
    file.seek(0)
    data = file.read(MAX_JPEG + 1)
    if len(data) > MAX_JPEG or not _all_scans(data):
        return None
    # The last byte may be the first half of the marker.
    data = data.removesuffix(b"\xff")
    end = b"\xff\xd9"
    # Bytes after a complete picture change no pixel; where data are missing, they are decoded in their place.
    readings = []
    for filler in (b"", b"\x55" * 256, b"\xaa" * 256):
        with JpegImageFile(io.BytesIO(data + filler + end)) as reading:
            reading.load()
            readings.append(reading.copy())
            readings[-1].info = dict(image.info)
    first, *others = (reading.tobytes() for reading in readings)
    return readings[0] if all(other == first for other in others) else None


def _all_scans(data: bytes) -> bool:
    """Return whether a JPEG's scans bring each coefficient of each component to its last bit.

    Source: ITU-T T.81, B.2.2, B.2.3 and G.1.1.1.
    """
    place, wanted, found = 2, set[int](), dict[tuple[int, int], int]()
    progressive = False
    while place + 4 <= len(data):
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        segment = data[place + 4 : place + 2 + length]
        if data[place] != 0xFF or length < 2:
            return False
        place += 2 + length
        if marker in (0xC0, 0xC1, 0xC2) and len(segment) >= 6 + 3 * segment[5]:
            progressive = marker == 0xC2
            wanted = {segment[6 + 3 * i] for i in range(segment[5])}
        elif marker == 0xDA and segment and len(segment) >= 4 + 2 * segment[0]:
            first, last, bits = segment[-3:]
            for i in range(segment[0]):
                for coefficient in range(first, min(last, 63) + 1) if progressive else range(64):
                    found[segment[1 + 2 * i], coefficient] = bits & 15 if progressive else 0
            # The scan's data end at the next marker.
            following = _JPEG_MARKER.search(data, place)
            place = following.start() if following else len(data)
    return bool(wanted) and all(found.get((c, k)) == 0 for c in wanted for k in range(64))
