"""JPEG files without an end marker: which of them still hold the whole picture."""

import io
import re

from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

# Bytes; such a file is read again as a whole, and larger ones are refused.
MAX_JPEG = 2**28


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
            following = _MARKER.search(data, place)
            place = following.start() if following else len(data)
    return bool(wanted) and all(found.get((c, k)) == 0 for c in wanted for k in range(64))


_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
