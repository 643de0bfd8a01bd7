"""Regions of an image as token masks, and the blending of a new region into an image.

Shapes: B batch, H × W pixels, h × w tokens, each of patch × patch pixels. A box is (left, top, width, height)
in pixels; a mask is True where a token is to be predicted.
Source: official inference.py.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from maskgit.errors import ConfigError, RegionError, unknown_name
from maskgit.foundation.checks import check_count, check_range, check_whole, plain
from maskgit.networks.config import MAX_GRID

Box = Sequence[int]
# A rule works on one axis: (first pixel, pixels, patch) → (first token, the one after the last), which may
# lie outside the grid.
Rule = Callable[[int, int, int], tuple[int, int]]


def cover(start: int, length: int, patch: int) -> tuple[int, int]:
    """Return the tokens that the box touches."""
    return start // patch, -(-(start + length) // patch)


def official(start: int, length: int, patch: int) -> tuple[int, int]:
    """Return the tokens that the official code masks: of an aligned box, one more on each side.

    Where the remainders of start and length add up to more than a patch, the box's end stays unmasked.

    Source: official `create_latent_mask_and_input_tokens_for_image_editing`.
    """
    return start // patch - 1, start // patch + length // patch + 1


# Differs: the official rule is not the default, since it can leave a part of the box as it was.
RULES: dict[str, Rule] = {"cover": cover, "official": official}


def box_to_token_mask(
    box: Box, image_size: int | tuple[int, int], patch: int = 16, rule: str = "cover"
) -> Tensor:
    """Return the tokens that a box in the image masks.

    Args:
        box: (left, top, width, height) in pixels, whole numbers; it lies inside the image and is not empty.
        image_size: pixels a side, or (width, height); multiples of `patch`.
        patch: pixels a token covers, in each direction.
        rule: `cover` masks every token that the box touches; `official` is the released code's choice, which
            adds tokens around an aligned box and may leave the end of another one unmasked.

    Returns:
        bool (h, w), True = to be predicted.

    Raises:
        ConfigError: there is no such rule.
        RegionError: the box or the image size is not allowed.

    Source: official `create_latent_mask_and_input_tokens_for_image_editing`, for the rule `official`.
    """
    if rule not in RULES:
        raise unknown_name("rule", rule, RULES)
    image_width, image_height = _check_size(image_size, patch)
    left, top, width, height = check_box(box, image_width, image_height)
    mask = torch.zeros(image_height // patch, image_width // patch, dtype=torch.bool)
    first_row, end_row = RULES[rule](top, height, patch)
    first_column, end_column = RULES[rule](left, width, patch)
    mask[max(0, first_row) : end_row, max(0, first_column) : end_column] = True
    return mask


def boxes_to_token_mask(
    boxes: Sequence[Box], image_size: int | tuple[int, int], patch: int = 16, rule: str = "cover"
) -> Tensor:
    """Return the tokens that any of several boxes masks.

    Args:
        boxes: at least one box; it and the rest are as in `box_to_token_mask`.

    Returns:
        bool (h, w), True = to be predicted.

    Raises:
        ConfigError, RegionError: as in `box_to_token_mask`, or there is no box.
    """
    if not boxes:
        raise RegionError("There are no boxes; give at least one (left, top, width, height).")
    return torch.stack([box_to_token_mask(box, image_size, patch, rule) for box in boxes]).any(0)


def pixels_to_token_mask(pixels: Tensor, patch: int = 16, *, share: float = 0.0, dilate: int = 0) -> Tensor:
    """Return the tokens that hold masked pixels.

    Args:
        pixels: bool (H, W), True = to be replaced; H and W are multiples of `patch`.
        patch: pixels a token covers, in each direction.
        share: what share of a token's pixels masks it, above 0 and up to 1; 0 means that any pixel does.
        dilate: tokens by which the mask then grows in every direction, diagonals included.

    Returns:
        bool (h, w), True = to be predicted.

    Raises:
        ConfigError: share or dilate is out of range.
        RegionError: the type or shape is another one.
    """
    if pixels.ndim != 2 or pixels.dtype != torch.bool:
        raise RegionError(
            f"A mask must be bool of shape (H, W), but is {pixels.dtype} of {tuple(pixels.shape)}."
        )
    width, height = _check_size((pixels.shape[1], pixels.shape[0]), patch)
    return shares_to_token_mask(cell_shares(pixels.numpy(), (height // patch, width // patch)), share, dilate)


def cell_shares(pixels: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """Return what share of each cell's pixels is masked, the pixels being dealt out evenly.

    Args:
        pixels: bool (H, W) of any size that is at least the grid's.
        grid: (rows, columns) of cells; a pixel belongs to the one that its middle lies in.

    Returns:
        float64 (rows, columns) in [0, 1].
    """
    counts: np.ndarray = pixels
    area = np.ones(())
    for axis, cells in enumerate(grid):
        # Pixel i has its middle in cell c where i + 1/2 ≥ c · length / cells.
        length = pixels.shape[axis]
        starts = (2 * np.arange(cells) * length + cells - 1) // (2 * cells)
        counts = np.add.reduceat(counts, starts, axis=axis, dtype=np.int64)
        area = np.multiply.outer(area, np.diff(starts, append=length))
    return torch.from_numpy(counts / area)


def shares_to_token_mask(shares: Tensor, share: float = 0.0, dilate: int = 0) -> Tensor:
    """Return the tokens that shares of masked pixels mask: float64 (h, w) → bool (h, w).

    Args:
        shares: as `cell_shares` returns them, a cell a token.
        share, dilate: as for `pixels_to_token_mask`.

    Raises:
        ConfigError: share or dilate is out of range.
    """
    share = check_range("share", share, 0, 1)
    dilate = check_count("dilate", dilate, 0, MAX_GRID)
    # A share such as 0.3 is not exact in binary, and no count of pixels comes near to it by chance.
    mask = (shares > 0) & (shares >= share - 1e-9)
    if not dilate:
        return mask
    down = F.max_pool2d(mask.float()[None], (2 * dilate + 1, 1), 1, (dilate, 0))
    return F.max_pool2d(down, (1, 2 * dilate + 1), 1, (0, dilate))[0] > 0


def composite(
    image: Tensor, generated: Tensor, token_mask: Tensor, patch: int = 16, feather: float | None = None
) -> Tensor:
    """Blend generated images into an image where tokens were masked, with a soft edge.

    The mask is enlarged to the image with Pillow's bicubic filter and blurred; with weight m of a pixel the
    result is m · generated + (1 − m) · image, so that a pixel of weight 0 stays exactly as it was.

    Args:
        image: float (3, H, W) or (B, 3, H, W) in [0, 1]; a batch of one serves all generated images.
        generated: float (3, H, W) or (B, 3, H, W) in [0, 1].
        token_mask: bool (h, w) or (B, h, w), True = was predicted; h = H / patch, w = W / patch.
        patch: pixels a token covers, in each direction.
        feather: radius of the Gaussian blur in pixels; 0 leaves only the soft edge of the enlarged mask. None
            is the official radius, a sixteenth of the image's shorter side less one, whatever the patch: the
            edge then looks the same for every tokenizer.

    Returns:
        float32 of the larger of the shapes, on the device of `generated`.

    Raises:
        ConfigError: the radius is out of range.
        RegionError: the shapes or types do not fit together.

    Source: official `composite_outputs`.
    """
    height, width = _check_composite(image, generated, token_mask, patch)
    # The official 16 is a constant, not the patch of its tokenizer, which happens to be 16 too.
    radius = max(0, min(height, width) // 16 - 1) if feather is None else feather
    radius = check_range("feather", radius, 0, max(height, width))
    masks = token_mask.reshape(-1, *token_mask.shape[-2:]).cpu().numpy()
    stacked = np.stack([np.asarray(soft_mask(mask, (width, height), radius)) for mask in masks])
    weights = torch.from_numpy(stacked)[:, None].to(generated.device)
    return blend(image, generated, weights[0] if token_mask.ndim == 2 else weights)


def blend(image: Tensor, generated: Tensor, weights: Tensor) -> Tensor:
    """Return w · generated + (1 − w) · image, in which a pixel of weight 0 stays exactly as it was.

    Args:
        image, generated: as for `composite`.
        weights: uint8, 255 for w = 1, of a shape that broadcasts with theirs.

    Returns:
        float32, on the device of `generated`.
    """
    weight = weights.float() / 255
    return weight * generated.float() + (1 - weight) * image.to(generated.device).float()


def soft_mask(mask: np.ndarray, size: tuple[int, int], radius: float) -> Image.Image:
    """Return a token mask as weights with a soft edge: bool (h, w) → mode L, 255 for a weight of 1.

    Args:
        size: (width, height) of the result.
        radius: of the Gaussian blur, in pixels.

    Source: official `composite_outputs`.
    """
    soft = Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BICUBIC)
    return soft.filter(ImageFilter.GaussianBlur(radius)) if radius else soft


def _whole_numbers(values: object, count: int) -> tuple[int, ...] | None:
    """Return `values` as that many ints, or None if they are something else."""
    values = plain(values)
    if not isinstance(values, list | tuple) or len(values) != count:
        return None
    try:
        return tuple(check_whole("value", value) for value in values)
    except ConfigError:
        return None


def _check_size(image_size: int | tuple[int, int], patch: int) -> tuple[int, int]:
    image_size, patch = plain(image_size), check_count("patch", patch, 1, 65_536)
    sides = _whole_numbers(
        image_size if isinstance(image_size, list | tuple) else (image_size, image_size), 2
    )
    if sides is None or any(side < patch or side % patch or side // patch > MAX_GRID for side in sides):
        raise RegionError(
            f"Image sides must be multiples of {patch} pixels, from {patch} to {MAX_GRID * patch}, "
            f"but the size is {image_size!r}."
        )
    return sides[0], sides[1]


def check_box(box: Box, image_width: int, image_height: int) -> tuple[int, int, int, int]:
    """Return a box as four ints.

    Raises:
        RegionError: it is no box inside the image.
    """
    sides = _whole_numbers(box, 4)
    if sides is not None:
        left, top, width, height = sides
        inside = left >= 0 and top >= 0 and left + width <= image_width and top + height <= image_height
        if inside and width > 0 and height > 0:
            return left, top, width, height
    raise RegionError(
        f"A box must be four whole numbers (left, top, width, height) with width and height above 0, "
        f"inside the {image_width} × {image_height} image, but is {box!r}."
    )


def _check_composite(image: Tensor, generated: Tensor, token_mask: Tensor, patch: int) -> tuple[int, int]:
    for name, tensor in (("image", image), ("generated", generated)):
        if tensor.ndim not in (3, 4) or tensor.shape[-3] != 3 or not tensor.is_floating_point():
            raise RegionError(
                f"{name} must be float of shape (3, H, W) or (B, 3, H, W), "
                f"but is {tensor.dtype} of {tuple(tensor.shape)}."
            )
    if token_mask.ndim not in (2, 3) or token_mask.dtype != torch.bool:
        raise RegionError(
            f"token_mask must be bool of shape (h, w) or (B, h, w), "
            f"but is {token_mask.dtype} of {tuple(token_mask.shape)}."
        )
    height, width = generated.shape[-2:]
    _check_size((width, height), patch)
    batches = {tensor.shape[0] for tensor in (image, generated) if tensor.ndim == 4}
    batches |= {token_mask.shape[0]} if token_mask.ndim == 3 else set()
    grid = (height // patch, width // patch)
    if image.shape[-2:] != (height, width) or token_mask.shape[-2:] != grid or len(batches - {1}) > 1:
        raise RegionError(
            f"image {tuple(image.shape)}, generated {tuple(generated.shape)} and token_mask "
            f"{tuple(token_mask.shape)} do not fit together at {patch} pixels a token."
        )
    return height, width
