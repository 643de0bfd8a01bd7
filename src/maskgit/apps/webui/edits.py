"""The edits of the page: what each takes from the form, what it records, and how it is made.

Positions are pixels of the photo as it is seen, from its top left corner.
"""

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from maskgit import images
from maskgit.apps.webui.pictures import enlarged
from maskgit.apps.webui.session import Label
from maskgit.editing import photos
from maskgit.errors import ConfigError, ImageError, RegionError
from maskgit.foundation.checks import check_count, check_range
from maskgit.foundation.download import sha256
from maskgit.pipeline import MaskGIT
from maskgit.results import Output

# What is painted, and the size that a photo is painted on.
PAINT_COLOUR = "#e5484d"
PAINTED_SIDE = 640
SIDES = ("left", "right", "top", "bottom")
# What a mask may take in a picture's settings, and on the screen.
MAX_MASK_CHARS, MAX_MASK_PIXELS = 2**19, PAINTED_SIDE**2


class Photo(NamedTuple):
    """A photo that somebody uploaded.

    Attributes:
        path: its file.
        sha256: of the file.
        size: (W, H), as it is seen.
        shown: the photo at the size that it is painted on.
    """

    path: Path
    sha256: str
    size: tuple[int, int]
    shown: Image.Image

    def read(self) -> Image.Image:
        """Return the photo as it is seen, RGB or RGBA.

        Raises:
            ImageError: it cannot be read, is no picture, or is too large.
        """
        try:
            return photos.open_picture(self.path, "photo")
        except ImageError as error:
            # The folder is ours and means nothing to whoever sent the photo.
            raise ImageError(str(error).replace(str(self.path), self.path.name)) from error


def read_photo(path: str) -> Photo:
    """Look at an uploaded photo.

    Raises:
        ImageError: it cannot be read, is no picture, or is too large.
    """
    photo = Photo(Path(path), sha256(Path(path)), (0, 0), Image.new("RGB", (1, 1)))
    picture = photo.read()
    return photo._replace(size=picture.size, shown=enlarged(picture, PAINTED_SIDE))


def painted(layers: list[Image.Image]) -> Image.Image:
    """Return what was painted on any layer, white on black (mode L).

    Raises:
        RegionError: nothing was.
    """
    masks = [np.asarray(layer.convert("RGBA"))[..., 3] > 0 for layer in layers]
    mask = np.any(masks, axis=0) if masks else np.zeros(1, np.bool_)
    if not mask.any():
        raise RegionError("Nothing is painted: paint over what to replace.")
    return Image.fromarray(np.where(mask, 255, 0).astype(np.uint8))


def pack_mask(mask: Image.Image) -> str:
    """Return a mask as text for a picture's settings."""
    data = io.BytesIO()
    mask.convert("1").save(data, "PNG", optimize=True)
    return base64.b64encode(data.getvalue()).decode()


def unpack_mask(text: Any) -> Image.Image:
    """Return the mask in a picture's settings, white on black (mode L).

    Raises:
        ImageError: it is none.
    """
    if not isinstance(text, str) or len(text) > MAX_MASK_CHARS:
        raise ImageError("The image's settings hold no painted mask; only images made on this page have one.")
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ImageError("The painted mask in the image's settings is damaged.") from error
    return images.read_image(data, max_pixels=MAX_MASK_PIXELS).convert("L")


def _inpaint(pipe: MaskGIT, photo: Photo, chosen: dict[str, Any], label: Label, **options: Any) -> Output:
    mask = unpack_mask(chosen["mask_png"]).resize(photo.size, Image.Resampling.NEAREST)
    return pipe.inpaint(photo.path, mask, label, dilate=chosen["dilate"], **options)


def _edit(pipe: MaskGIT, photo: Photo, chosen: dict[str, Any], label: Label, **options: Any) -> Output:
    return pipe.edit(photo.path, chosen["box"], label, **options)


def _outpaint(pipe: MaskGIT, photo: Photo, chosen: dict[str, Any], label: Label, **options: Any) -> Output:
    if not any(chosen[side] for side in SIDES):
        raise RegionError("Choose at least one side to extend.")
    return pipe.outpaint(photo.path, label=label, **{side: chosen[side] for side in SIDES}, **options)


def _vary(pipe: MaskGIT, photo: Photo, chosen: dict[str, Any], label: Label, **options: Any) -> Output:
    return pipe.vary(photo.path, chosen["strength"], label, **options)


class Operation(NamedTuple):
    """A way to edit.

    Attributes:
        title: what the form calls it.
        guesses: whether the class may be guessed.
        make: (model, photo, what is recorded of the edit, label, **the pipeline's arguments) → `Output`.
    """

    title: str
    guesses: bool
    make: Callable[..., Output]


# By the name of the command that does the same.
OPERATIONS = {
    "inpaint": Operation("Fill a painted area", True, _inpaint),
    "edit": Operation("Replace a box", False, _edit),
    "outpaint": Operation("Extend beyond the edges", False, _outpaint),
    "vary": Operation("Vary the whole image", True, _vary),
}


# What the command line can set and the page cannot.
UNSET = {"rule": "cover", "invert": False, "start_step": None, "canvas": None, "position": None}


def chosen_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Return what a picture's settings say of its edit, checked.

    Raises:
        ConfigError, ImageError: something is missing or not allowed.
    """
    command = settings["command"]
    for name, value in UNSET.items():
        if settings.get(name, value) != value:
            raise ConfigError(
                f"The image was made with {name} {settings[name]!r:.80}, for which this form has no field; "
                f"use `maskgit {command}`."
            )
    try:
        if command == "inpaint":
            pack = pack_mask(unpack_mask(settings.get("mask_png")))
            return {"mask_png": pack, "dilate": check_count("dilate", settings["dilate"], 0, 64)}
        if command == "edit":
            (box,) = settings["box"]
            left, top, width, height = (check_count("box", side, 0, 2**31) for side in box)
            return {"box": [[left, top, width, height]]}
        if command == "outpaint":
            return {side: check_count(side, settings[side], 0, 2**31) for side in SIDES}
        check_range("strength", settings["strength"], 0, 1)
        return {"strength": settings["strength"]}
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError | ImageError):
            raise
        raise ConfigError(
            f"The image's settings are incomplete or invalid for `maskgit {command}`."
        ) from error


def pairs(photo: Photo, made: Output) -> list[tuple[Image.Image, Image.Image]]:
    """Return each result beside what it was made from, in pictures of one size."""
    if made.photos is not None and made.photos[0].size == photo.size:
        picture = photo.read()
        return [(picture, after) for after in made.photos]
    assert made.before is not None, "an edit says what it began with"
    (before,) = images.to_pil(made.before)
    return [(before, after) for after in made.to_pil()]


def repainted(photo: Photo, chosen: dict[str, Any]) -> dict[str, Any]:
    """Return what the mask editor shows of a photo and a recorded mask.

    Raises:
        ImageError: the mask is damaged, or of another photo.
    """
    mask = unpack_mask(chosen["mask_png"])
    if mask.size != photo.shown.size:
        raise ImageError(f"The mask was painted on a photo of a different size from {photo.path.name}.")
    layer = Image.new("RGBA", mask.size, PAINT_COLOUR)
    layer.putalpha(mask)
    return {"background": photo.shown, "layers": [layer], "composite": None}
