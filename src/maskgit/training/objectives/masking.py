"""Which tokens a training sample shows and hides, as a function of (seed, sample number) alone.

Shapes: B batch, h × w the token grid, N = h · w image tokens.
Source: paper §3.1.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from maskgit.sampler.noise import uniform
from maskgit.sampler.schedules import mask_ratio

# The stream of `noise.uniform` that masks are drawn from; 64 and 65 are the data's.
MASKS = 66
# Those that a step's window, and a sample's place of it, are drawn from.
SHAPES, PLACES = 68, 69


class Masks(NamedTuple):
    """What samples hide.

    Attributes:
        mask: bool (B, h, w), True = to be predicted; at least one in each sample.
        ratio: float32 (B,), the share of tokens that are masked, in (0, 1].
        drop_label: bool (B,), True = the class is hidden too.
    """

    mask: Tensor
    ratio: Tensor
    drop_label: Tensor


def draw_masks(
    seed: int,
    sample_numbers: Tensor,
    grid: tuple[int, int],
    *,
    groups: int = 1,
    mask_schedule: str = "cosine",
    label_dropout: float = 0.0,
) -> Masks:
    """Draw the masks of some samples: r ~ U[0, 1), then ⌈γ(r) · N⌉ tokens, all choices equally likely.

    The paper's ⌈ ⌉ masks at least one token, and masks all of them in a share of the samples, as decoding
    begins; with the ⌊ ⌋ of decoding the model would never see a wholly masked image. Differs: the official config
    holds a min_masking_rate of 0.5, which nothing in the released code reads; like the paper we have none.

    Args:
        seed: in [0, 2⁶⁴).
        sample_numbers: int64 (B,), counted over the whole run; the result lies on their device.
        grid: rows and columns of tokens.
        groups: parts of a token that are masked each for itself.
        mask_schedule: γ, a name in `schedules`.
        label_dropout: the chance that a sample's class is hidden.

    Returns:
        The masks.

    Source: paper §3.1.
    """
    num_tokens = grid[0] * grid[1] * groups
    draws = uniform(seed, sample_numbers, 0, MASKS, num_tokens + 2)
    count = (mask_ratio(mask_schedule, draws[:, 0], num_tokens) * num_tokens).ceil().clamp(1, num_tokens)
    rank = draws[:, 2:].argsort(dim=-1, stable=True).argsort(dim=-1)
    mask = rank < count[:, None]
    shape = grid if groups == 1 else (*grid, groups)
    return Masks(mask.unflatten(1, shape), count / num_tokens, draws[:, 1] < label_dropout)


def draw_shape(seed: int, step: int, shapes: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Return the rows and columns of a step's windows, all shapes equally likely; the same in all processes."""
    place = float(uniform(seed, torch.tensor([step]), 0, SHAPES, 1)) * len(shapes)
    rows, columns = shapes[min(int(place), len(shapes) - 1)]
    return rows, columns


def draw_windows(seed: int, sample_numbers: Tensor, tokens: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return a window of each image's tokens, all places equally likely: int64 (B, H, W) → (B, h, w).

    Args:
        seed: in [0, 2⁶⁴).
        sample_numbers: int64 (B,), on the tokens' device.
        tokens: int64 (B, H, W).
        shape: h ≤ H and w ≤ W.
    """
    draws = uniform(seed, sample_numbers, 0, PLACES, 2)
    at = []
    for i, length in enumerate(shape):
        free = tokens.shape[1 + i] - length + 1
        # In float32 the product could round up to the count.
        first = (draws[:, i] * free).long().clamp(max=free - 1)
        at.append(first[:, None] + torch.arange(length, device=tokens.device))
    images = torch.arange(len(tokens), device=tokens.device)[:, None, None]
    return tokens[images, at[0][:, :, None], at[1][:, None, :]]


def centre_windows(tokens: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the middle of each image's tokens: int64 (B, H, W) → (B, h, w)."""
    top, left = ((tokens.shape[1 + i] - shape[i]) // 2 for i in (0, 1))
    return tokens[:, top : top + shape[0], left : left + shape[1]]


def hide_labels(labels: Tensor, drop_label: Tensor) -> Tensor:
    """Return labels with −1, no class, where they are dropped: int64 (B,), bool (B,) → int64 (B,)."""
    return torch.where(drop_label, -1, labels)
