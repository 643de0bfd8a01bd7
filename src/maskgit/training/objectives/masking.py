"""Which tokens a training sample hides, as a function of (seed, sample number) alone.

Shapes: B batch, h × w the token grid, N = h · w image tokens.
Source: paper §3.1.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from maskgit.sampler.noise import uniform
from maskgit.sampler.schedules import mask_ratio

# The stream of `noise.uniform` that masks are drawn from; 64 and 65 are the data's.
MASKS = 66


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
    grid_size: int,
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
        grid_size: tokens a side.
        groups: parts of a token that are masked each for itself.
        mask_schedule: γ, a name in `schedules`.
        label_dropout: the chance that a sample's class is hidden.

    Returns:
        The masks.

    Source: paper §3.1.
    """
    num_tokens = grid_size**2 * groups
    draws = uniform(seed, sample_numbers, 0, MASKS, num_tokens + 2)
    count = (mask_ratio(mask_schedule, draws[:, 0], num_tokens) * num_tokens).ceil().clamp(1, num_tokens)
    rank = draws[:, 2:].argsort(dim=-1, stable=True).argsort(dim=-1)
    mask = rank < count[:, None]
    shape = (grid_size, grid_size) if groups == 1 else (grid_size, grid_size, groups)
    return Masks(mask.unflatten(1, shape), count / num_tokens, draws[:, 1] < label_dropout)


def hide_labels(labels: Tensor, drop_label: Tensor) -> Tensor:
    """Return labels with −1, no class, where they are dropped: int64 (B,), bool (B,) → int64 (B,)."""
    return torch.where(drop_label, -1, labels)
