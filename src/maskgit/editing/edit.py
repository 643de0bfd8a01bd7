"""Editing photos: boxes replaced by a class, and inpainting of masks.

Each function is a method of `MaskGIT`. The tokens that the model sees and keeps are never changed; the new
ones are decoded as in any generation, and the result is blended into the photo (see `photos`).

Shapes: B images, h × w the token grid, S × S pixels of the model's image.
Source: paper §4.3; official inference.py.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskgit.editing import masks, photos
from maskgit.editing.fill import fill
from maskgit.editing.likelihood import guess_class
from maskgit.editing.photos import Photo, Window
from maskgit.editing.regions import Box, blend
from maskgit.errors import RegionError
from maskgit.foundation.checks import check_count, check_range, plain
from maskgit.images import to_pil
from maskgit.images.provenance import EDITED
from maskgit.model import Label, Model, Picture
from maskgit.results import DEFAULT_BATCH_SIZE, Callback, ClassGuess, Draw, Output
from maskgit.sampler.config import SamplerConfig

# In place of a label: the class that the model finds in what is known of the image.
GUESS = "guess"


def edit(
    model: Model,
    image: Picture,
    boxes: Box | Sequence[Box],
    label: Label,
    *,
    rule: str = "cover",
    start_step: int | None = None,
    feather: float | None = None,
    num_images: int = 1,
    seed: int = 0,
    first_index: int = 0,
    batch_size: int = DEFAULT_BATCH_SIZE,
    return_steps: bool = False,
    callback: Callback | None = None,
    **settings: Any,
) -> Output:
    """Replace what is in one or several boxes by a class, and blend it into the photo.

    Args:
        image: a photo of any size (see `maskgit.editing.photos.read_photo`); of a large one, the model sees a square
            window around the boxes.
        boxes: (left, top, width, height) in pixels of the photo as it is seen, or several of these.
        label: what is to appear there: a class name or number, None for no class.
        rule: which tokens a box masks, a name in `maskgit.editing.regions.RULES`; `official` is the released
            notebook's.
        start_step: the step to begin decoding at; None is a sixth of the steps (official: 2 of 12).
        feather: radius of the soft edge's blur in pixels of the model's image; None is the official one, a
            sixteenth of its size less one.
        num_images: variants to make.
        seed, first_index, batch_size, return_steps, callback, **settings: as for `MaskGIT.generate`.

    Returns:
        `Output`; its photos differ from the given one only in and softly around the masked tokens.

    Raises:
        ConfigError, ImageError, RegionError: an argument is not allowed.

    Source: official inference.py, `p_edit_samples` and `composite_outputs`.
    """
    config = model.sampler_config(**settings)
    draw = Draw(seed, first_index, batch_size, return_steps, callback)
    photo = photos.read_photo(image)
    listed = _list_boxes(boxes)
    painted = masks.paint_boxes(listed, photo.size)
    size = model.config.image_size
    window = photos.window_around(painted, size)
    token_mask = photos.boxed_tokens(listed, painted, window, size, model.tokenizer.patch_size, rule)
    return _renew(
        model,
        photo,
        window,
        token_mask,
        None,
        label,
        config,
        draw,
        feather=feather,
        num_images=num_images,
        start_step=config.steps // 6 if start_step is None else start_step,
    )


def inpaint(
    model: Model,
    image: Picture,
    mask: Any,
    label: Label = GUESS,
    *,
    invert: bool = False,
    share: float = 0.0,
    dilate: int = 0,
    start_step: int = 0,
    feather: float | None = None,
    num_images: int = 1,
    seed: int = 0,
    first_index: int = 0,
    batch_size: int = DEFAULT_BATCH_SIZE,
    return_steps: bool = False,
    callback: Callback | None = None,
    **settings: Any,
) -> Output:
    """Fill in a masked part of a photo (inpainting).

    Args:
        image: as for `edit`.
        mask: what to replace: a path to a black and white image, a PIL image, or an array
            or tensor (H, W), of the photo's size; "alpha" for the photo's own transparent parts. See
            `maskgit.editing.masks.read_mask`.
        label: what the photo is of: a class name or number, None for no class, which takes a model trained
            with label dropout; "guess" is the class that the model finds likeliest given what is known.
        invert: replace what the mask does not mark, for masks that paint it black.
        share: what share of a token's pixels must be painted for it to be masked, up to 1; 0 is any. A pixel
            belongs to the token that its middle lies in.
        dilate: tokens by which the mask then grows in every direction.
        start_step: the step to begin decoding at.
        feather: as for `edit`. Painted pixels are new entirely, unless `share` leaves their token as it is.
        num_images, seed, first_index, batch_size, return_steps, callback, **settings: as for `edit`.

    Returns:
        `Output`; its photos differ from the given one only in and softly around the masked tokens. Its
        class_guess says how likely each class was, if it was to be guessed. Where nothing is painted, the
        photo comes back; where all is, the images are what `MaskGIT.generate` makes of the same label and
        settings.

    Raises:
        ConfigError, ImageError, RegionError: an argument is not allowed, or nothing is known to guess from.
    """
    config = model.sampler_config(**settings)
    draw = Draw(seed, first_index, batch_size, return_steps, callback)
    photo = photos.read_photo(image)
    painted = masks.read_mask(mask, photo, invert=invert)
    window = photos.window_around(painted, model.config.image_size)
    grid = model.vocabulary.grid_size
    token_mask = photos.painted_tokens(painted, window, grid, share, dilate)
    return _renew(
        model,
        photo,
        window,
        token_mask,
        painted,
        label,
        config,
        draw,
        feather=feather,
        num_images=num_images,
        start_step=start_step,
    )


def _renew(
    model: Model,
    photo: Photo,
    window: Window,
    token_mask: Tensor,
    painted: np.ndarray | None,
    label: Label,
    config: SamplerConfig,
    draw: Draw,
    *,
    feather: float | None,
    num_images: int,
    start_step: int,
) -> Output:
    """Make a window's masked tokens new, and put it back into the photo with a soft edge."""
    size = model.config.image_size
    num_images = _check_output(num_images, photo.size)
    # The official 16 is a constant; see `regions.composite`.
    radius = max(0, size // 16 - 1) if feather is None else feather
    radius = check_range("feather", radius, 0, size)

    before = photos.cut(photo, window, size)
    tokens = model.encode_pixels(before)
    number, guess = resolve(model, label, tokens, token_mask)
    sequences = model.vocabulary.sequence(
        torch.full((num_images,), number), tokens.expand(num_images, -1, -1), token_mask
    )
    made = fill(model, sequences, config, draw, start_step=start_step)

    large, small = (
        photos.soft_weights(token_mask, painted, window, photo.size, side, radius * side / size)
        for side in (window.side, size)
    )
    blended = blend(before, made.images, torch.from_numpy(small))
    if window.side == size and photo.alpha is None and photo.profile is None:
        # Nothing is to be resized or converted: the photos show the blended images to the bit.
        layers, large = to_pil(blended), np.where(small > 0, 255, 0).astype(np.uint8)
    else:
        layers = to_pil(made.images)
    whole = [photos.paste(photo, window, layer, large) for layer in layers]
    return replace(
        made,
        images=blended,
        token_mask=token_mask,
        before=before,
        photos=whole,
        class_guess=guess,
        source=EDITED,
    )


def resolve(
    model: Model, label: Label, tokens: Tensor, token_mask: Tensor | None
) -> tuple[int, ClassGuess | None]:
    """Return a class number, −1 for no class, and the guess if the label is to be guessed.

    Args:
        label: a class name or number, None, or "guess".
        tokens: int64 (1, h, w).
        token_mask: bool (h, w), True = unknown, or None.

    Raises:
        ConfigError: there is no such class.
        RegionError: nothing is known to guess from.
    """
    if label != GUESS:
        return model.label(label), None
    found = guess_class(model, tokens, token_mask)
    guess = ClassGuess(int(found.argmax()), found)
    return guess.label, guess


def _check_output(num_images: int, size: tuple[int, int]) -> int:
    num_images = check_count("num_images", num_images, 1, 1_000_000)
    if num_images * size[0] * size[1] > photos.MAX_OUTPUT_PIXELS:
        raise RegionError(
            f"{num_images} photos of {size[0]} × {size[1]} pixels are more than {photos.MAX_OUTPUT_PIXELS:,} "
            "pixels; make fewer at a time, and go on with first_index."
        )
    return num_images


def _list_boxes(boxes: Any) -> list[Box]:
    """Return one or several boxes as a list; what they hold is checked later."""
    boxes = plain(boxes)
    listed = list(boxes) if isinstance(boxes, Sequence) and not isinstance(boxes, str) else [boxes]
    if not listed:
        raise RegionError("There are no boxes; give at least one (left, top, width, height).")
    return listed if all(isinstance(box, Sequence) for box in listed) else [boxes]
