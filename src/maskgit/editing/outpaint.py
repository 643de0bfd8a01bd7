"""Images larger than the model's: outpainting beyond an image's edges, and panoramas.

The model's window slides over a canvas of tokens, half a window at a time; what is known stays, and the rest
of the window is decoded as in an edit (paper §4.3). All windows of an image draw different noise: that of the
image index  window number · 2⁴⁰ + index,  which is the same in any batch.

Shapes: B images, R × C the canvas's tokens, H × W pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from maskgit import images
from maskgit.editing import photos
from maskgit.editing.fill import fill
from maskgit.editing.photos import Photo
from maskgit.editing.windows import Window, decode_canvas, encode_canvas, plan_windows
from maskgit.errors import ConfigError, RegionError
from maskgit.foundation.checks import check_count, check_range, plain
from maskgit.images import profiles
from maskgit.images.provenance import EDITED
from maskgit.model import Label, Model, Picture
from maskgit.results import DEFAULT_BATCH_SIZE, Callback, Draw, Output
from maskgit.sampler.config import SamplerConfig
from maskgit.sampler.plans import num_steps
from maskgit.sampler.policies import make_policy

MAX_PIXELS = images.MAX_PIXELS
# Windows are no more than tokens, and first_index may go to 2⁶².
MAX_TOKENS = 2**21
WINDOW_STRIDE = 2**40

# What stands where there is no image yet: a grey that no pixel of 8 bits has.
EMPTY = 0.5


def outpaint(
    model: Model,
    image: Picture,
    *,
    left: int = 0,
    right: int = 0,
    top: int = 0,
    bottom: int = 0,
    canvas: Sequence[int] | None = None,
    position: Sequence[int] | None = None,
    label: Label = None,
    num_images: int = 1,
    feather: float | None = None,
    seed: int = 0,
    first_index: int = 0,
    batch_size: int = DEFAULT_BATCH_SIZE,
    callback: Callback | None = None,
    **settings: Any,
) -> Output:
    """Extend an image beyond its edges (outpainting).

    The image is not cut: if its shorter side is longer than the model's, it is first resized to the model's,
    and all pixels count at that scale. Patches that lie wholly inside it are kept as tokens, and all others
    decoded; then the image itself is laid over the result, and its colours are carried a little way out.

    Args:
        image: a path, a PIL image, an array or a tensor (see `maskgit.images`), at least a patch a side.
        left, right, top, bottom: pixels to add at each side, ≥ 0.
        canvas: in their place, (width, height) of the result in pixels.
        position: (x, y) of the image's top left corner in the canvas; None puts it in the middle.
        label: what the new parts are of, a class name or number; None is no class, which takes a model
            trained with label dropout.
        num_images: variants to make.
        feather: pixels inside the image over which it fades into the new pixels, from each edge that is
            extended; None is a sixteenth of the model's image size. Further inside, it is as it was.
        seed, first_index, batch_size, **settings: as for `MaskGIT.generate`; first_index < 2⁴⁰.
        callback: called after each step with its number, counted through all windows, the images' indices
            int64 (B,) and the window's tokens int64 (B, h, w).

    Returns:
        `Output`: images (B, 3, H, W) of exactly the size asked for; photos, where the image has transparency,
        which stays, or a profile or metadata of its own; before (1, 3, H, W), the image in its place and `EMPTY`
        around it; tokens (B, R, C) and token_mask (R, C) of the canvas, which is at least the
        model's grid and holds whole patches, so it may be larger than the image.

    Raises:
        ConfigError, ImageError, RegionError: an argument is not allowed, or the result would be too large.
    """
    num_images = check_count("num_images", num_images, 1, 1_000_000)
    draw = Draw(seed, first_index, batch_size, callback=callback, pixels=False)
    config = model.sampler_config(**settings)
    number = model.label(label)
    whole = _scaled(photos.read_photo(image), model.config.image_size, model.tokenizer.patch_size)
    photo = _seen(whole)
    width, height = whole.size
    added = {"left": left, "right": right, "top": top, "bottom": bottom}
    left, right, top, bottom = _margins(added, canvas, position, width, height)
    new_width, new_height = left + width + right, top + height + bottom
    patch, side = model.tokenizer.patch_size, model.config.transformer.grid_size
    before_x, columns = _axis(left, width, right, patch, side)
    before_y, rows = _axis(top, height, bottom, patch, side)
    _check_size(num_images, new_width, new_height, rows * columns)
    feather = None if feather is None else check_range("feather", feather, 0, MAX_PIXELS)

    known = (before_x, before_y, width // patch, height // patch)
    inside = (slice(before_y, before_y + known[3]), slice(before_x, before_x + known[2]))
    padded = F.pad(photo, (0, -width % patch, 0, -height % patch), mode="replicate")
    tokens = torch.zeros(num_images, rows, columns, dtype=torch.int64)
    tokens[:, *inside] = encode_canvas(model.tokenizer, padded, side)[:, : known[3], : known[2]]
    unknown = torch.ones(rows, columns, dtype=torch.bool)
    unknown[inside] = False
    windows = plan_windows(rows, columns, known, side)
    labels = [number] * len(windows)
    _fill(model, tokens, windows, labels, config, draw)

    x, y = before_x * patch - left, before_y * patch - top
    pixels = decode_canvas(model.tokenizer, tokens, side)[..., y : y + new_height, x : x + new_width].clone()
    margins = (left, right, top, bottom)
    _tint(pixels, photo, margins, model.config.image_size)
    weights = _weights(photo, margins, model.config.image_size / 16 if feather is None else feather)
    kept = None
    if whole.alpha is not None or whole.profile is not None:
        kept = [_laid_into(whole, margins, new, weights) for new in images.to_pil(pixels)]
    part = pixels[..., top : top + height, left : left + width]
    part.copy_(weights * photo + (1 - weights) * part)
    if kept is None and whole.rgb.info:
        kept = images.to_pil(pixels)
        for picture in kept:
            picture.info = dict(whole.rgb.info)
    before = torch.full((1, *pixels.shape[1:]), EMPTY)
    before[..., top : top + height, left : left + width] = photo
    return Output(pixels, tokens, token_mask=unknown, before=before, photos=kept, source=EDITED)


def panorama(
    model: Model,
    labels: Label | Sequence[Label],
    width: int,
    *,
    height: int | None = None,
    loop: bool = False,
    num_images: int = 1,
    seed: int = 0,
    first_index: int = 0,
    batch_size: int = DEFAULT_BATCH_SIZE,
    callback: Callback | None = None,
    **settings: Any,
) -> Output:
    """Make new images of any width and height.

    The first window is what `MaskGIT.generate` makes of the same label, seed and index.

    Args:
        labels: a class name or number, None for no class, or a sequence of these, which follow each other
            from left to right.
        width, height: pixels of the result; height None is the model's image size.
        loop: whether the right edge goes on at the left one; the width is then a multiple of the patch and at
            least one and a half times the model's image size.
        num_images: panoramas to make.
        seed, first_index, batch_size, callback, **settings: as for `outpaint`.

    Returns:
        `Output`: images (B, 3, height, width); tokens (B, R, C) of the canvas, which is at least the model's
        grid and holds whole patches, so it may be larger than the image.

    Raises:
        ConfigError, RegionError: an argument is not allowed, or the result would be too large.
    """
    num_images = check_count("num_images", num_images, 1, 1_000_000)
    draw = Draw(seed, first_index, batch_size, callback=callback, pixels=False)
    config = model.sampler_config(**settings)
    numbers = model.labels(labels)
    width = check_count("width", width, 1, MAX_PIXELS)
    height = check_count("height", model.config.image_size if height is None else height, 1, MAX_PIXELS)
    patch, side = model.tokenizer.patch_size, model.config.transformer.grid_size
    least = (side + side // 2) * patch
    if loop and (width % patch or width < least):
        raise RegionError(
            f"The width of a loop must be a multiple of {patch} pixels, at least {least}, but is {width}."
        )
    rows, columns = max(side, math.ceil(height / patch)), max(side, math.ceil(width / patch))
    _check_size(num_images, width, height, rows * columns)

    windows = plan_windows(rows, columns, (0, 0, 0, 0), side, loop=loop)
    # Windows of one column have the same label, whatever their row.
    ranks = {column: i for i, column in enumerate(sorted({int(window.columns[0]) for window in windows}))}
    if not 1 <= len(numbers) <= len(ranks):
        raise ConfigError(
            f"A panorama {width} pixels wide takes from 1 to {len(ranks)} labels, but {len(numbers)} are "
            "given; each needs about half the model's image size more."
        )
    by_window = [numbers[ranks[int(window.columns[0])] * len(numbers) // len(ranks)] for window in windows]
    tokens = torch.zeros(num_images, rows, columns, dtype=torch.int64)
    _fill(model, tokens, windows, by_window, config, draw)
    pixels = decode_canvas(model.tokenizer, tokens, side, loop=loop)
    return Output(pixels[..., :height, :width].clone(), tokens)


def _fill(
    model: Model, canvas: Tensor, windows: list[Window], labels: list[int], config: SamplerConfig, draw: Draw
) -> None:
    """Decode the windows of canvases int64 (B, R, C) in their order, each going by those before it."""
    check_count("first_index", draw.first_index, 0, WINDOW_STRIDE - len(canvas))
    remasks = make_policy(config.policy, config.policy_options).remasks
    steps = num_steps(config, model.vocabulary.num_tokens, remasks=remasks)
    draw.announce(steps * len(windows) * math.ceil(len(canvas) / draw.batch_size))
    for start in range(0, len(canvas), draw.batch_size):
        batch = canvas[start : start + draw.batch_size]
        for number, (window, label) in enumerate(zip(windows, labels, strict=True)):

            def told(step: int, indices: Tensor, grid: Tensor, number: int = number) -> None:
                assert draw.callback is not None
                draw.callback(number * config.steps + step, indices % WINDOW_STRIDE, grid)

            sequences = model.vocabulary.sequence(
                torch.full((len(batch),), label), window.read(batch), window.unknown
            )
            first = number * WINDOW_STRIDE + draw.first_index + start
            of_window = replace(draw, first_index=first, callback=told if draw.callback else None)
            window.write(batch, fill(model, sequences, config, of_window).tokens)


def _scaled(photo: Photo, size: int, patch: int) -> Photo:
    """Return a photo whose shorter side is no longer than `size`."""
    width, height = photo.size
    shorter = min(width, height)
    if shorter < patch:
        raise RegionError(
            f"An image must be at least {patch} pixels a side, which is one token, but is {width} × {height}."
        )
    scaled = _scaled_size(width, height, size)
    if scaled == (width, height):
        return photo
    # With transparency, so that colours under it count for nothing.
    rgb = photo.rgb.copy()
    if photo.alpha is not None:
        rgb.putalpha(photo.alpha)
    rgb = rgb.resize(scaled, Image.Resampling.BICUBIC)
    if photo.alpha is None:
        return Photo(rgb)
    return Photo(rgb.convert("RGB"), rgb.getchannel("A"))


def _scaled_size(width: int, height: int, size: int) -> tuple[int, int]:
    shorter = min(width, height)
    if shorter <= size:
        return width, height
    return max(size, round(width * size / shorter)), max(size, round(height * size / shorter))


def count_windows(
    model: Model,
    width: int,
    height: int,
    *,
    left: int = 0,
    right: int = 0,
    top: int = 0,
    bottom: int = 0,
    canvas: Sequence[int] | None = None,
    position: Sequence[int] | None = None,
) -> int:
    """Return how many windows `outpaint` decodes one after the other around an image of a width and height in pixels.

    Raises:
        ConfigError, RegionError: an argument is not allowed, or the result would be too large.
    """
    width, height = _scaled_size(width, height, model.config.image_size)
    added = {"left": left, "right": right, "top": top, "bottom": bottom}
    left, right, top, bottom = _margins(added, canvas, position, width, height)
    patch, side = model.tokenizer.patch_size, model.config.transformer.grid_size
    before_x, columns = _axis(left, width, right, patch, side)
    before_y, rows = _axis(top, height, bottom, patch, side)
    _check_size(1, left + width + right, top + height + bottom, rows * columns)
    return len(plan_windows(rows, columns, (before_x, before_y, width // patch, height // patch), side))


def _seen(photo: Photo) -> Tensor:
    """Return what the model sees of a photo, float32 (1, 3, H, W) in [0, 1], sRGB."""
    if photo.exact is not None:
        return photo.exact
    picture = photo.rgb
    if photo.alpha is not None:
        picture = picture.copy()
        picture.putalpha(photo.alpha)
        picture = photos.grown(picture)
    return images.to_tensor(profiles.to_srgb(picture, photo.profile))


def _margins(
    added: dict[str, int],
    canvas: Sequence[int] | None,
    position: Sequence[int] | None,
    width: int,
    height: int,
) -> tuple[int, int, int, int]:
    """Return the pixels (left, right, top, bottom) around an image that is continued or put into a canvas."""
    left, right, top, bottom = (check_count(name, n, 0, MAX_PIXELS) for name, n in added.items())
    if canvas is None:
        if position is not None:
            raise RegionError("A position is that of the image in a canvas; give the canvas, too.")
        if not left + right + top + bottom:
            raise RegionError(
                "Nothing is to be added; give pixels for left, right, top or bottom, or a canvas."
            )
        return left, right, top, bottom
    if left + right + top + bottom:
        raise RegionError("Give either a canvas or pixels for left, right, top and bottom, not both.")
    wide, high = _pair("canvas", "(width, height)", canvas)
    if (wide, high) == (width, height) or wide < width or high < height:
        raise RegionError(
            f"The canvas must be larger than the image, which has {width} × {height} pixels at the model's "
            f"scale, but is {wide} × {high}."
        )
    middle = ((wide - width) // 2, (high - height) // 2)
    x, y = middle if position is None else _pair("position", "(x, y)", position)
    if x < 0 or y < 0 or x + width > wide or y + height > high:
        raise RegionError(
            f"The image of {width} × {height} pixels does not lie inside the canvas of {wide} × {high} at "
            f"({x}, {y}); the position may be from (0, 0) to ({wide - width}, {high - height})."
        )
    return x, wide - width - x, y, high - height - y


def _pair(name: str, meaning: str, values: Sequence[int]) -> tuple[int, int]:
    values = plain(values)
    if not isinstance(values, list | tuple) or len(values) != 2:
        raise ConfigError(f"{name} must be two whole numbers {meaning}, but is {values!r}.")
    first, second = (check_count(name, value, -MAX_PIXELS, MAX_PIXELS) for value in values)
    return first, second


def _axis(before: int, length: int, after: int, patch: int, side: int) -> tuple[int, int]:
    """Return the tokens before an image and all tokens of the canvas, along one axis.

    Tokens begin where the image begins. A canvas shorter than the model's grid is filled up to it, on the
    side that is continued more.
    """
    first = math.ceil(before / patch)
    total = first + math.ceil((length + after) / patch)
    missing = max(0, side - total)
    return first + (missing if before > after else 0), total + missing


def _check_size(num_images: int, width: int, height: int, num_tokens: int) -> None:
    if num_images * width * height > MAX_PIXELS or num_tokens > MAX_TOKENS:
        raise RegionError(
            f"{num_images} images of {width} × {height} pixels are more than {MAX_PIXELS:,} pixels, or one is "
            f"of more than {MAX_TOKENS:,} tokens; make fewer or smaller ones."
        )


def _tint(pixels: Tensor, photo: Tensor, margins: tuple[int, int, int, int], size: int) -> None:
    """Take back around a photo (1, 3, h, w) what the tokenizer changed in it, in canvases (B, 3, H, W), in place.

    The tokenizer changes colours a little, which would show as a step around the photo. What it changed there
    is taken back in the new parts as well, blurred, and the less the farther from the photo.
    """
    left, _, top, _ = margins
    height, width = photo.shape[2:]
    lost = photo - pixels[..., top : top + height, left : left + width]
    radius = size // 16
    for _ in range(2):
        lost = F.avg_pool2d(lost, 2 * radius + 1, 1, radius, count_include_pad=False)
    reach = size // 4
    rows = torch.arange(max(0, top - reach), min(pixels.shape[2], top + height + reach)) - top
    columns = torch.arange(max(0, left - reach), min(pixels.shape[3], left + width + reach)) - left
    near_rows, near_columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    distance = torch.hypot((rows - near_rows)[:, None].float(), (columns - near_columns).float())
    tint = lost[..., near_rows[:, None], near_columns] * _smooth(1 - distance / max(1, reach))
    around = pixels[..., top + int(rows[0]) : top + int(rows[-1]) + 1, left + int(columns[0]) :]
    around = around[..., : len(columns)]
    around.add_(tint).clamp_(0, 1)


def _weights(photo: Tensor, margins: tuple[int, int, int, int], feather: float) -> Tensor:
    """Return the weights of a photo (1, 3, h, w) over what is new, float32 (h, w)."""
    left, right, top, bottom = margins
    height, width = photo.shape[2:]
    return _fade(height, top, bottom, feather)[:, None] * _fade(width, left, right, feather)


def _laid_into(
    photo: Photo, margins: tuple[int, int, int, int], new: Image.Image, weights: Tensor
) -> Image.Image:
    """Return a photo over a new picture of the canvas's size, in the photo's own colours."""
    left, right, top, bottom = margins
    canvas = Image.new("RGB", new.size)
    canvas.paste(photo.rgb, (left, top))
    canvas.info = dict(photo.rgb.info)
    alpha = None
    if photo.alpha is not None:
        alpha = Image.new("L", new.size)
        alpha.paste(photo.alpha, (left, top))
    of_new = np.full(new.size[::-1], 255, np.uint8)
    inside = np.rint(255 * (1 - weights.numpy())).astype(np.uint8)
    of_new[top : new.height - bottom, left : new.width - right] = inside
    return photos.lay(Photo(canvas, alpha), (0, 0), new, of_new)


def _fade(length: int, before: int, after: int, feather: float) -> Tensor:
    """Return the photo's weight along one axis, float32 (length,), rising smoothly from edges continued."""
    place = torch.arange(length) + 0.5
    weight = torch.ones(length)
    for distance, continued in ((place, before), (length - place, after)):
        if continued and feather:
            weight = weight * _smooth(distance / feather)
    return weight


def _smooth(rise: Tensor) -> Tensor:
    """Return a curve from 0 at 0 to 1 at 1, level at both ends and beyond."""
    rise = rise.clamp(0, 1)
    return rise * rise * (3 - 2 * rise)
