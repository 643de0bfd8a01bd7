"""What a user marks on a photo, as pixels: painted masks, the photo's own transparency, boxes.

Shapes: W × H pixels of the photo as it is seen; a mask is True where something new is to be made.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from maskgit.editing.photos import Photo, open_picture
from maskgit.editing.regions import Box, check_box
from maskgit.errors import RegionError
from maskgit.foundation.notes import note

# Grey; red, green and blue; and with alpha.
_CHANNELS = (1, 3, 4)

# A mask of more than this share of a photo is likelier an inverted one.
MOST = 0.9


def read_mask(mask: Any, photo: Photo, *, invert: bool = False) -> np.ndarray:
    """Read a painted mask.

    Args:
        mask: a path, a PIL image, an array or a tensor of the photo's size: bool; uint8, whose
            values are 0 and 1 or from 0 to 255; or float in [0, 1]. It is of shape (H, W), or has 1, 3 (RGB) or
            4 (RGB and alpha) channels, last or first, and may be a batch of one. A pixel is masked
            where its brightest channel is at least half; transparent parts count as black. The word "alpha" is the
            photo's own transparency: all pixels that are not opaque.
        photo: what it belongs to.
        invert: replace what is not masked, for masks that paint it black. A note suggests it where almost
            nothing would be kept, or nothing replaced.

    Returns:
        bool (H, W).

    Raises:
        ImageError: the mask cannot be read.
        RegionError: the mask has the wrong size, type or range; or it is "alpha" and the photo has no
            transparent pixels.
    """
    painted = _read(mask, photo)
    if painted.shape != photo.size[::-1]:
        size = " × ".join(str(side) for side in painted.shape[::-1])
        raise RegionError(
            f"The mask has {size} pixels, but the photo, as it is seen, has {photo.size[0]} × "
            f"{photo.size[1]}; paint the mask on the photo itself."
        )
    painted = ~painted if invert else painted
    _hint(float(painted.mean()), invert)
    return painted


def read_painted(mask: Any) -> np.ndarray:
    """Return where a mask of any size is painted, bool (H, W); see `read_mask`.

    Raises:
        ImageError: it cannot be read.
    """
    picture = open_picture(mask, "mask")
    if picture.mode == "RGBA":
        black = Image.new("RGB", picture.size)
        black.paste(picture, mask=picture)
        picture = black
    return _threshold(np.asarray(picture).max(2))


def _painted(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return where an array of any allowed shape is painted, bool (H, W)."""
    values = mask[0] if mask.ndim == 4 and len(mask) == 1 else mask
    if values.ndim == 2:
        return _threshold(values)
    if values.ndim == 3:
        last, first = (values.shape[axis] in _CHANNELS for axis in (2, 0))
        # A photo of a few pixels could be read both ways; its size says which.
        if last and (not first or values.shape[:2] == size[::-1]):
            first = False
        if last or first:
            values = np.moveaxis(values, 0, 2) if first else values
            painted = _threshold(values[..., :3].max(2))
            return painted & _threshold(values[..., 3]) if values.shape[2] == 4 else painted
    raise RegionError(
        f"A mask must be of shape (H, W), (H, W, C) or (C, H, W) with C = 1, 3 or 4, or a batch of one such, but is "
        f"{mask.shape}."
    )


def _read(mask: Any, photo: Photo) -> np.ndarray:
    if isinstance(mask, str) and mask == "alpha":
        if photo.alpha is None:
            raise RegionError("The photo has no transparency that could be filled in; give a painted mask.")
        if photo.alpha.getextrema()[0] == 255:
            raise RegionError(
                "The photo has an alpha channel, but is opaque everywhere, so that there is nothing to fill in; "
                "erase what is to be made new, or give a painted mask."
            )
        return np.asarray(photo.alpha) < 255
    if isinstance(mask, Tensor):
        mask = mask.detach().cpu()
        mask = (mask.float() if mask.is_floating_point() else mask).numpy()
    if isinstance(mask, np.ndarray):
        return _painted(mask, photo.size)
    return read_painted(mask)


def _hint(share: float, inverted: bool) -> None:
    """Ask whether a mask is meant the other way round, where its share of the photo makes that likely."""
    cure = "leave out invert" if inverted else "ask for invert (--invert)"
    made = "black" if inverted else "white"
    if share == 0:
        note(f"The mask marks nothing: {made} is made new, and there is none. If the rest is meant, {cure}.")
    elif share > MOST:
        note(
            f"The mask marks {share:.0%} of the photo: {made} is made new, the rest is kept. If it is meant the "
            f"other way round, {cure}."
        )


def _threshold(values: np.ndarray) -> np.ndarray:
    """Return where a mask's numbers are at least half."""
    if values.dtype == np.bool_:
        return values
    if values.dtype == np.uint8:
        return values >= (128 if values.size and values.max() > 1 else 1)
    if not np.issubdtype(values.dtype, np.floating):
        raise RegionError(f"A mask must be of type bool, uint8 or float, but is {values.dtype}.")
    low, high = (values.min(), values.max()) if values.size else (0, 0)
    if not (low >= 0 and high <= 1):
        raise RegionError(f"A float mask must be within [0, 1], but runs from {low} to {high}.")
    return values >= 0.5


def paint_boxes(boxes: Sequence[Box], size: tuple[int, int]) -> np.ndarray:
    """Return boxes (left, top, width, height) in a photo of size (W, H) as a mask, bool (H, W).

    Raises:
        RegionError: there are none, or one does not lie inside the photo.
    """
    painted = np.zeros(size[::-1], np.bool_)
    for box in boxes:
        left, top, width, height = check_box(box, *size)
        painted[top : top + height, left : left + width] = True
    return painted
