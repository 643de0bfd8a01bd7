"""Encoding pictures as files with their settings, metadata and provenance."""

import io
import json
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from maskgit.errors import ConfigError, OutputError
from maskgit.foundation.notes import note
from maskgit.images.provenance import KEY, Sign, packet
from maskgit.images.reading import METADATA, keep_alpha, over_white, to_rgb

MAX_SETTINGS_CHARS = 2**20
SETTINGS_KEY = "maskgit"


def encode(
    image: Image.Image,
    form: str = "png",
    *,
    settings: dict[str, Any] | None = None,
    mark: bool = True,
    sign: Sign | None = None,
) -> bytes:
    """Return a picture as the bytes of a file, with its metadata.

    Its `info` may hold an "icc_profile", "exif" and "xmp", as an edited photo's does, and its source type
    (`maskgit.images.provenance.KEY`), as the images from `Output.to_pil` do.

    Args:
        image: a PIL image of any mode, written as RGB, or as RGBA if its mode is RGBA; in a JPEG, transparency is
            composited over white.
        form: png, jpeg or webp.
        settings: JSON values, stored in a PNG as by `save_png`.
        mark: whether to write the source type and this tool's name to XMP.
        sign: signs the file, if the picture has a source type.

    Raises:
        ConfigError: the settings are not JSON values, or are too long.
        OutputError: the picture is too large for this format, or the file cannot be signed.
    """
    if max(image.size) > _SIDES[form]:
        raise OutputError(
            f"The picture has {image.width} × {image.height} pixels, but {form} allows at most {_SIDES[form]:,} per "
            "side; use png."
        )
    source = image.info.get(KEY)
    picture = keep_alpha(image)
    if picture.mode == "RGBA" and image.mode != "RGBA":
        picture = to_rgb(image)
    if picture.mode == "RGBA" and form == "jpeg":
        info = picture.info
        picture = over_white(picture)
        picture.info = info
    known = {key: picture.info[key] for key in METADATA if key in picture.info}
    if mark and source is not None:
        known["xmp"] = packet(source, known.get("xmp"))
    if form == "jpeg":
        _fit_segments(known, source if mark else None)
    picture.info = {}
    options = {"icc_profile": known.get("icc_profile"), "exif": known.get("exif", b"")}
    if form == "png":
        options["pnginfo"] = _chunks(settings, known.get("xmp"))
    else:
        options |= {"xmp": known.get("xmp", b""), "quality": _QUALITY[form]}
    data = io.BytesIO()
    picture.save(data, form.upper(), **options)
    if sign is None or source is None:
        return data.getvalue()
    return sign(data.getvalue(), f"image/{form}", source)


_QUALITY = {"jpeg": 95, "webp": 90}
# Pixels per side that libjpeg and libwebp can write.
_SIDES = {"png": 2**31 - 1, "jpeg": 65_500, "webp": 16_383}
# Bytes in one segment of a JPEG, without its length and the XMP identifier.
_SEGMENT, _XMP_SEGMENT = 65_533, 65_533 - 29


def _fit_segments(known: dict[str, bytes], source: str | None) -> None:
    """Drop metadata that do not fit into a segment of a JPEG."""
    if len(known.get("exif", b"")) > _SEGMENT:
        note("The picture's EXIF metadata are too long for a JPEG and are left out.")
        del known["exif"]
    if len(known.get("xmp", b"")) > _XMP_SEGMENT:
        note("The picture's XMP metadata are too long for a JPEG and are left out.")
        known["xmp"] = b"" if source is None else packet(source)


def _chunks(settings: dict[str, Any] | None, xmp: bytes | None) -> PngInfo:
    chunks = PngInfo()
    if settings is not None:
        chunks.add_text(SETTINGS_KEY, _dump(settings))
    if xmp:
        text = xmp.decode("utf-8", "replace")
        chunks.add_itxt("XML:com.adobe.xmp", text)
    return chunks


def _dump(settings: dict[str, Any]) -> str:
    try:
        text = json.dumps(settings, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"The settings cannot be stored as JSON: {error}.") from error
    if len(text) > MAX_SETTINGS_CHARS:
        raise ConfigError(
            f"The settings take {len(text):,} characters; at most {MAX_SETTINGS_CHARS:,} are stored."
        )
    return text
