"""Photos as they are: of any size, turned as they are meant to be seen, transparent or grey.

The model sees a square window around what is to be made new, scaled down to its own size; the result is put
back into the photo with a soft edge, and every pixel outside that edge keeps its bytes. A photo in colours of
its own keeps them: what the model sees is sRGB, and what it makes is brought into the photo's profile.

Shapes: W × H pixels of the photo, S × S of the model's image, h × w its tokens. Positions are pixels of the
photo as seen, from its top left corner; a mask is True where something new is to be made.
"""

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageFilter
from torch import Tensor

from maskgit import images
from maskgit.editing.regions import Box, boxes_to_token_mask, cell_shares, shares_to_token_mask, soft_mask
from maskgit.errors import ImageError, RegionError
from maskgit.images import profiles
from maskgit.images import reading as imagefiles

if TYPE_CHECKING:
    from maskgit.model import Picture

MAX_PIXELS = images.MAX_PIXELS
# The pixels of all photos that one call returns: 1.6 GB at most.
MAX_OUTPUT_PIXELS = 4 * MAX_PIXELS
# A window's side, as a multiple of the part to be replaced: the first where it fits into the photo, the second where
# it fits in at least one direction.
CONTEXT, LEAST_CONTEXT = 2, 1.25
# Pixels blended in one piece: transparency takes some 30 bytes for each.
_STRIP_PIXELS = 1 << 20


class Photo(NamedTuple):
    """A photo in 8 bits.

    Attributes:
        rgb: mode RGB, in the photo's own colours; those under transparency are as in the file. Its `info` holds
            what the photo's file says: "icc_profile" (sRGB if there is none), "exif", "xmp", each as bytes.
        alpha: mode L, 255 for opaque, or None.
        exact: float32 (1, 3, H, W) in [0, 1], the same unrounded, where it was given as an opaque array or
            tensor of another type than uint8; else None.
    """

    rgb: Image.Image
    alpha: Image.Image | None = None
    exact: Tensor | None = None

    @property
    def profile(self) -> bytes | None:
        """The ICC profile of its colours; None is sRGB."""
        return self.rgb.info.get("icc_profile")

    @property
    def size(self) -> tuple[int, int]:
        """(W, H)."""
        return self.rgb.size


class Window(NamedTuple):
    """A square part of a photo; where it reaches past an edge, the photo is mirrored.

    Attributes:
        left, top: its corner.
        side: pixels a side.
    """

    left: int
    top: int
    side: int


def read_photo(image: "Picture") -> Photo:
    """Read a photo.

    Args:
        image: a path to a file, which is turned as its EXIF orientation says; or a PIL image, an array or a
            tensor, taken as its pixels lie (see `maskgit.images.to_tensor`). A file's colours are as its
            profile says, a PIL image's as that in its `info` does, and else sRGB.

    Returns:
        A `Photo` of at most 100 million pixels.

    Raises:
        ImageError: it cannot be read, is animated or too large, or has another shape or range.
    """
    exact = None
    if isinstance(image, Tensor):
        image = images.to_array(image)
    if isinstance(image, np.ndarray):
        _check_pixels(image.shape[1::-1])
        picture, exact = _from_array(image)
    else:
        picture = open_picture(image, "photo")
    if picture.mode == "RGBA":
        return Photo(picture.convert("RGB"), picture.getchannel("A"))
    return Photo(picture, exact=exact)


def open_picture(image: Any, name: str) -> Image.Image:
    """Return a file, turned as it is meant to be seen, or a PIL image, as its pixels lie, as RGB or RGBA.

    It is in its own colours, and its `info` is as `Photo` has it.

    Raises:
        ImageError: it is something else, cannot be read, is animated or too large.
    """
    if isinstance(image, Image.Image):
        _check_pixels(image.size)
        with imagefiles.decoding(f"The {name}"):
            return imagefiles.keep_alpha(image, f"The {name}")
    if isinstance(image, str | bytes | os.PathLike) or hasattr(image, "read"):
        return imagefiles.read(image, MAX_PIXELS, imagefiles.keep_alpha)
    raise ImageError(f"A {name} must be a path, a PIL image, an array or a tensor, but is {image!r:.80}.")


def _check_pixels(size: Sequence[int]) -> None:
    if len(size) == 2 and size[0] * size[1] > MAX_PIXELS:
        raise ImageError(
            f"The photo has {size[0]} × {size[1]} pixels, but {MAX_PIXELS:,} are the limit; "
            "make it smaller first."
        )


def _from_array(array: np.ndarray) -> tuple[Image.Image, Tensor | None]:
    """Return an array as a picture of mode RGB or RGBA, and its exact values."""
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype == np.uint8 and array.ndim in (2, 3) and channels in (1, 3, 4) and 0 not in array.shape:
        return imagefiles.keep_alpha(
            Image.fromarray(array.squeeze(2) if array.shape[2:] == (1,) else array)
        ), None
    exact = images.to_tensor(array)
    if channels != 4:
        return images.to_pil(exact)[0], exact
    picture, alpha = (images.to_pil(images.to_tensor(part))[0] for part in (array[..., :3], array[..., 3]))
    picture.putalpha(alpha.convert("L"))
    return picture, None


def window_around(mask: np.ndarray, image_size: int) -> Window:
    """Choose what part of a photo the model sees.

    The window covers the whole mask, and twice its longer side where the photo is large enough; it is never
    smaller than the model's image, so that the photo is never scaled up, and stays inside the photo if it
    can. Where it ends inside the photo, there is at least a sixteenth of it between its edge and the mask.
    Around an empty mask, it is in the middle.

    Args:
        mask: bool (H, W).
        image_size: S.

    Raises:
        RegionError: the window would have more than 100 million pixels.
    """
    high, wide = mask.shape
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom = (int(rows[0]), int(rows[-1]) + 1) if len(rows) else (high // 2, high // 2)
    left, right = (int(columns[0]), int(columns[-1]) + 1) if len(columns) else (wide // 2, wide // 2)
    longest = max(bottom - top, right - left)
    least = min(max(wide, high), math.ceil(LEAST_CONTEXT * longest))
    side = max(image_size, min(CONTEXT * longest, max(least, min(wide, high))))
    if side**2 > MAX_PIXELS:
        raise RegionError(
            f"The mask is {longest} pixels long, and a square of {side} pixels around it would have more "
            f"than {MAX_PIXELS:,}; make less of the photo new at a time, or cut or shrink the photo first."
        )
    return Window(_place(left, right, side, wide), _place(top, bottom, side, high), side)


def _place(low: int, high: int, side: int, length: int) -> int:
    """Return where a window of `side` begins that is centred on [low, high), moved into [0, length)."""
    if side >= length:
        return (length - side) // 2
    return min(max((low + high - side) // 2, 0), length - side)


def _inside(window: Window, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Return the part of the window inside a photo: left, top, right, bottom."""
    left, top, side = window
    return max(0, left), max(0, top), min(size[0], left + side), min(size[1], top + side)


def _mirror(array: np.ndarray, window: Window) -> np.ndarray:
    """Return what a window shows of (H, W, …): (side, side, …), without a copy if it lies inside."""
    for axis, start in enumerate((window.top, window.left)):
        length = array.shape[axis]
        if start >= 0 and start + window.side <= length:
            array = array.swapaxes(0, axis)[start : start + window.side].swapaxes(0, axis)
        else:
            # Past an edge the photo is mirrored, again and again if need be.
            place = np.arange(start, start + window.side) % (2 * length)
            array = array.take(np.minimum(place, 2 * length - 1 - place), axis)
    return array


def _shown(picture: Image.Image, window: Window) -> np.ndarray:
    """Return what a window shows of a picture: (side, side, …), at no more memory than that."""
    left, top, right, bottom = _inside(window, picture.size)
    part = np.asarray(picture.crop((left, top, right, bottom)))
    return _mirror(part, Window(window.left - left, window.top - top, window.side))


def cut(photo: Photo, window: Window, size: int) -> Tensor:
    """Return what the model sees of a photo: float32 (1, 3, S, S) in [0, 1], sRGB.

    Transparent parts show the colours around them, so that nothing of what lies under them is seen.
    """
    if photo.exact is not None and window == (0, 0, size) and photo.size == (size, size):
        return photo.exact
    part = Image.fromarray(_shown(photo.rgb, window))
    if photo.alpha is not None:
        part.putalpha(Image.fromarray(_shown(photo.alpha, window)))
    if window.side != size:
        part = part.resize((size, size), Image.Resampling.BICUBIC)
    return images.to_tensor(profiles.to_srgb(part if photo.alpha is None else grown(part), photo.profile))


def grown(picture: Image.Image) -> Image.Image:
    """Return an RGBA picture as RGB, its transparent parts filled with the colours near them."""
    # Each half-size copy reaches twice as far; from the coarsest to the finest, each is laid over the last.
    levels = [picture]
    while max(levels[-1].size) > 1:
        half = (max(1, levels[-1].width // 2), max(1, levels[-1].height // 2))
        levels.append(levels[-1].resize(half, Image.Resampling.BOX))
    filled = Image.new("RGBA", levels[-1].size, "grey")
    for level in reversed(levels):
        # Half-transparent means half known in a smaller copy, whose colour is sure all the same.
        known = level if level is picture else level.copy()
        if level is not picture:
            known.putalpha(level.getchannel("A").point(lambda a: min(255, 4 * a)))
        filled = Image.alpha_composite(filled.resize(level.size, Image.Resampling.BILINEAR), known)
    return filled.convert("RGB")


def painted_tokens(mask: np.ndarray, window: Window, grid: int, share: float, dilate: int) -> Tensor:
    """Return the tokens that a painted mask (H, W) masks in a window, bool (h, w), h = w = grid.

    A pixel belongs to the token that its middle lies in; beyond the photo, the mask is mirrored as the photo
    is.
    """
    return shares_to_token_mask(cell_shares(_mirror(mask, window), (grid, grid)), share, dilate)


def boxed_tokens(
    boxes: Sequence[Box], mask: np.ndarray, window: Window, size: int, patch: int, rule: str
) -> Tensor:
    """Return the tokens that boxes of a photo mask in a window by a rule, bool (h, w).

    Args:
        boxes: (left, top, width, height) inside the photo; scaled to the model's image, they are widened to
            whole pixels.
        mask: the same as `paint_boxes` returns it.
        size, patch: S, and pixels that a token covers of it.
        rule: a name in `regions.RULES`.
    """
    scaled = []
    for left, top, width, height in boxes:
        ends = []
        for start, length, origin in ((left, width, window.left), (top, height, window.top)):
            first = (start - origin) * size // window.side
            ends.append((first, -(-(start + length - origin) * size // window.side) - first))
        scaled.append((ends[0][0], ends[1][0], ends[0][1], ends[1][1]))
    tokens = boxes_to_token_mask(scaled, size, patch, rule)
    left, top, right, bottom = _inside(window, mask.shape[::-1])
    if (right - left, bottom - top) != (window.side, window.side):
        mirrored = _mirror(mask, window).copy()
        mirrored[top - window.top : bottom - window.top, left - window.left : right - window.left] = False
        tokens |= shares_to_token_mask(cell_shares(mirrored, (size // patch, size // patch)))
    return tokens


def soft_weights(
    token_mask: Tensor,
    painted: np.ndarray | None,
    window: Window,
    size: tuple[int, int],
    side: int,
    radius: float,
) -> np.ndarray:
    """Return the weights of what is new, uint8 (side, side), 255 for all new.

    Tokens have the official soft edge, of weight one half at their border. Painted pixels of masked tokens
    are new entirely, and fade outwards. Where the window ends inside the photo, nothing new reaches its edge.

    Args:
        token_mask: bool (h, w).
        painted: the photo's mask, bool (H, W), or None.
        window: what the tokens show of the photo.
        size: (W, H) of the photo.
        side: pixels a side of the result, at most the window's.
        radius: of the blur, in the same pixels.
    """
    weights = np.array(soft_mask(token_mask.numpy(), (side, side), radius))
    kept = np.zeros_like(weights)
    if painted is not None:
        shown = _mirror(painted, window)
        if side != window.side:
            shown = cell_shares(shown, (side, side)).numpy() > 0
        cells = (2 * np.arange(side) + 1) * token_mask.shape[0] // (2 * side)
        kept[shown & token_mask.numpy()[cells[:, None], cells]] = 255
        blurred = Image.fromarray(kept).filter(ImageFilter.GaussianBlur(radius))
        # A blurred straight edge is at one half, so that twice the blur is 1 in all of the mask but its
        # points.
        weights = np.maximum(weights, np.asarray(blurred.point(lambda value: min(255, 2 * value))))
    across = _fade(side, window.left > 0, window.left + window.side < size[0])
    down = _fade(side, window.top > 0, window.top + window.side < size[1])
    if min(across.min(), down.min()) < 1:
        weights = np.rint(weights * down[:, None] * across).astype(np.uint8)
    return np.maximum(weights, kept)


def _fade(side: int, at_start: bool, at_end: bool) -> np.ndarray:
    """Return weights along one axis, float32 (side,), that fall to 0 at some of its ends."""
    rise = np.minimum((np.arange(side) + 0.5) * 16 / side, 1).astype(np.float32)
    level = np.ones_like(rise)
    return np.minimum(rise if at_start else level, rise[::-1] if at_end else level)


def paste(photo: Photo, window: Window, new: Image.Image, weights: np.ndarray) -> Image.Image:
    """Paste a window's new image into a copy of a photo.

    Args:
        photo: it is left as it was.
        window: where the new image belongs.
        new: mode RGB, sRGB, S × S.
        weights: uint8 (side, side), of the new image.

    Returns:
        RGB, or RGBA if the photo has transparency: what is new is opaque. It is in the photo's colours, with the
        photo's `info`, and a pixel of weight 0 keeps its bytes.
    """
    left, top, right, bottom = _inside(window, photo.size)
    within = (left - window.left, top - window.top, right - window.left, bottom - window.top)
    weights = weights[within[1] : within[3], within[0] : within[2]]
    if new.size != (window.side, window.side):
        scale = new.width / window.side
        source = (within[0] * scale, within[1] * scale, within[2] * scale, within[3] * scale)
        new = new.resize((right - left, bottom - top), Image.Resampling.BICUBIC, box=source)
    else:
        new = new.crop(within)
    return lay(photo, (left, top), new, weights)


def lay(photo: Photo, place: tuple[int, int], new: Image.Image, weights: np.ndarray) -> Image.Image:
    """Paste an image onto a copy of a photo; see `paste`.

    Args:
        place: (left, top) of the picture, which lies inside the photo.
        new: mode RGB, sRGB, w × h.
        weights: uint8 (h, w), of the new image.
    """
    left, top = place
    box = (left, top, left + new.width, top + new.height)
    result = photo.rgb.copy()
    if weights.any():
        new = profiles.from_srgb(new, photo.profile)
        shown = weights if photo.alpha is None else _over(weights, np.asarray(photo.alpha.crop(box)))
        result.paste(new, place, Image.fromarray(shown))
    if photo.alpha is not None:
        alpha = photo.alpha.copy()
        alpha.paste(255, box, Image.fromarray(weights))
        result.putalpha(alpha)
    result.info = dict(photo.rgb.info)
    return result


def _over(weights: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Return the share of what is new in the colour of a pixel, w / (w + (1 − w) · a), uint8 for uint8."""
    shown = np.empty_like(weights)
    rows = max(1, _STRIP_PIXELS // weights.shape[1])
    for start in range(0, len(weights), rows):
        part = slice(start, start + rows)
        w, a = weights[part].astype(np.float32), alpha[part].astype(np.float32)
        total = w + (255 - w) * a / 255
        shown[part] = np.rint(255 * w / np.maximum(total, 1))
    return shown
