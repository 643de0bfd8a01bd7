"""Variations of an image, and images between two classes or two images.

Each function is a method of `MaskGIT`. What is random here, which tokens change, is drawn from the seed and
the image's index, as everything else is.

Shapes: B images, N = h · w tokens.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from maskgit.editing.edit import GUESS, resolve
from maskgit.editing.fill import fill
from maskgit.foundation.checks import check_count, check_range
from maskgit.images.provenance import EDITED
from maskgit.model import Label, Model, Picture
from maskgit.results import DEFAULT_BATCH_SIZE, Callback, Draw, Output
from maskgit.sampler import noise
from maskgit.sampler.config import SamplerConfig
from maskgit.sampler.plans import num_steps, plan_steps
from maskgit.sampler.policies import make_policy


def vary(
    model: Model,
    image: Picture,
    strength: float,
    label: Label = GUESS,
    *,
    num_images: int = 1,
    seed: int = 0,
    first_index: int = 0,
    batch_size: int = DEFAULT_BATCH_SIZE,
    return_steps: bool = False,
    callback: Callback | None = None,
    **settings: Any,
) -> Output:
    """Make variations of an image: a random share of its tokens is masked and decoded anew.

    Decoding goes on from the step at which the schedule leaves that share masked, at the schedule's own pace.

    Args:
        image: a path, a PIL image, an array or a tensor (see `maskgit.images`); cut to a square and resized to
            the model's size if it has another.
        strength: the share, in [0, 1]: 0 is the reconstruction, 1 a new image, the same that
            `MaskGIT.generate` makes.
        label: what the image is of, as for `MaskGIT.inpaint`; "guess" goes by the whole image.
        num_images: variations to make; each masks other tokens.
        seed, first_index, batch_size, return_steps, callback, **settings: as for `MaskGIT.generate`.

    Returns:
        `Output`; token_mask is bool (B, h, w).

    Raises:
        ConfigError, ImageError: an argument is not allowed.
    """
    num_images = check_count("num_images", num_images, 1, 1_000_000)
    draw = Draw(seed, first_index, batch_size, return_steps, callback)
    strength = check_range("strength", strength, 0, 1)
    config, start_step = resumed(model.sampler_config(**settings), strength, model.vocabulary.num_tokens)
    before = model.prepare(image)
    tokens = model.encode_pixels(before)
    number, guess = resolve(model, label, tokens, None)
    drawn = _uniform(model, num_images, draw)
    token_mask = _highest(drawn, round(strength * model.vocabulary.num_tokens))
    sequences = model.vocabulary.sequence(
        torch.full((num_images,), number), tokens.expand(num_images, -1, -1), token_mask
    )
    made = fill(model, sequences, config, draw, start_step=start_step)
    return replace(made, token_mask=token_mask, before=before, class_guess=guess, source=EDITED)


def interpolate_classes(
    model: Model,
    first: Label,
    second: Label,
    *,
    switch: float = 0.5,
    num_images: int = 1,
    seed: int = 0,
    first_index: int = 0,
    batch_size: int = DEFAULT_BATCH_SIZE,
    return_steps: bool = False,
    callback: Callback | None = None,
    **settings: Any,
) -> Output:
    """Make images between two classes: decoding begins with one and goes on with the other.

    Args:
        first, second: class names or numbers, None for no class.
        switch: the share of steps that are the first class's, in [0, 1]; 1 is what `MaskGIT.generate` makes
            of the first, 0 of the second.
        num_images: images to make.
        seed, first_index, batch_size, return_steps, callback, **settings: as for `MaskGIT.generate`.

    Returns:
        `Output`.

    Raises:
        ConfigError: an argument is not allowed.
    """
    num_images = check_count("num_images", num_images, 1, 1_000_000)
    draw = Draw(seed, first_index, batch_size, return_steps, callback)
    switch = check_range("switch", switch, 0, 1)
    config = model.sampler_config(**settings)
    remasks = make_policy(config.policy, config.policy_options).remasks
    steps = num_steps(config, model.vocabulary.num_tokens, remasks=remasks)
    begun, ended = (
        model.vocabulary.sequence(torch.full((num_images,), model.label(label))) for label in (first, second)
    )
    return fill(model, begun, config, draw, switch=(round(switch * steps), ended[:, 0]))


def interpolate_images(
    model: Model,
    first: Picture,
    second: Picture,
    label: Label = None,
    *,
    share: float = 0.5,
    smoothness: int = 2,
    refine: int = 0,
    start_step: int | None = None,
    num_images: int = 1,
    seed: int = 0,
    first_index: int = 0,
    batch_size: int = DEFAULT_BATCH_SIZE,
    return_steps: bool = False,
    callback: Callback | None = None,
    **settings: Any,
) -> Output:
    """Cross two images: each token comes from one or the other, and the border between them may be made new.

    Args:
        first, second: as for `vary`.
        label: what new tokens are of, a class name or number, None for no class; not read if refine is 0.
        share: of tokens that come from the second image, in [0, 1]; 0 and 1 reconstruct one of them.
        smoothness: tokens over which the random field that chooses is averaged, in each direction; 0 mixes
            single tokens, more makes larger patches.
        refine: tokens on each side of a border that are decoded anew; 0 leaves the border as it is.
        start_step: the step to begin that decoding at; None is a sixth of the steps.
        num_images: crossings to make; each has other borders.
        seed, first_index, batch_size, return_steps, callback, **settings: as for `MaskGIT.generate`.

    Returns:
        `Output`; token_mask is bool (B, h, w).

    Raises:
        ConfigError, ImageError: an argument is not allowed.
    """
    num_images = check_count("num_images", num_images, 1, 1_000_000)
    draw = Draw(seed, first_index, batch_size, return_steps, callback)
    side = model.vocabulary.grid_size
    smoothness = check_count("smoothness", smoothness, 0, side)
    refine = check_count("refine", refine, 0, side)
    share = check_range("share", share, 0, 1)
    config = model.sampler_config(**settings)
    number = model.label(label) if refine else 0
    ours, theirs = (model.encode_pixels(model.prepare(image)) for image in (first, second))
    field = _blur(_uniform(model, num_images, draw), smoothness)
    chosen = _highest(field, round(share * model.vocabulary.num_tokens))
    token_mask = _spread(chosen, refine) & _spread(~chosen, refine)
    sequences = model.vocabulary.sequence(
        torch.full((num_images,), number), torch.where(chosen, theirs, ours), token_mask
    )
    made = fill(
        model, sequences, config, draw, start_step=config.steps // 6 if start_step is None else start_step
    )
    return replace(made, token_mask=token_mask, source=EDITED)


def resumed(config: SamplerConfig, share: float, num_tokens: int) -> tuple[SamplerConfig, int]:
    """Return the settings and the first step to decode images of which a share of tokens is masked.

    The sampler's schedule counts in shares of what is masked at the start; here it goes on as if the whole
    image had been, so that each step makes as many tokens as it would have.

    Args:
        config: for whole images.
        share: in [0, 1].
        num_tokens: N.
    """
    if share == 1:
        return config, 0
    remasks = make_policy(config.policy, config.policy_options).remasks
    ratios = plan_steps(config, num_tokens, remasks=remasks).ratios_TN[:, num_tokens].tolist()
    # As many steps lie behind as leave at least this share masked; the last step is always made.
    start = min(sum(ratio >= share for ratio in ratios), len(ratios) - 1)
    tables = replace(config.tables, mask_ratio=tuple(min(1.0, ratio / max(share, 1e-9)) for ratio in ratios))
    return replace(config, steps=len(ratios), tables=tables), start


def _uniform(model: Model, count: int, draw: Draw) -> Tensor:
    """Return uniform numbers for the tokens of some images, float32 (B, h, w)."""
    vocabulary, indices = model.vocabulary, torch.arange(draw.first_index, draw.first_index + count)
    drawn = noise.ImageNoise(draw.seed, indices, vocabulary.num_tokens + 1, vocabulary.num_codes)
    return vocabulary.grid(drawn.uniform(0, noise.VARY))


def _highest(values: Tensor, count: int) -> Tensor:
    """Return where each image's `count` highest numbers are: float (B, h, w) → bool (B, h, w)."""
    order = values.flatten(1).sort(dim=1, descending=True, stable=True).indices
    return (order.argsort(1) < count).reshape(values.shape)


def _blur(values: Tensor, radius: int) -> Tensor:
    """Return means over squares, taken twice: float (B, h, w) → float64 (B, h, w)."""
    values = values.double()[:, None]
    for _ in range(2 if radius else 0):
        values = F.avg_pool2d(values, 2 * radius + 1, 1, radius, count_include_pad=False)
    return values[:, 0]


def _spread(mask: Tensor, distance: int) -> Tensor:
    """Return a mask grown by some tokens in every direction, or none for 0: bool (B, h, w)."""
    if not distance:
        return torch.zeros_like(mask)
    return F.max_pool2d(mask.float(), 2 * distance + 1, 1, distance) > 0
