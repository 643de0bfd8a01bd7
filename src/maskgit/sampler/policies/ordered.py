"""Policies whose order of positions does not depend on the model.

Shapes: as in `policies.base`.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from maskgit.sampler.noise import ORDER
from maskgit.sampler.policies.base import Memory, Policy, Start, Step, lowest


class _Ordered(Policy):
    """Keeps tokens in an order that is fixed before the first step; memory is each position's place in it."""

    orders = True

    def choose(self, step: Step, memory: Memory) -> tuple[Tensor, Memory]:
        (place_BS,) = memory
        return lowest(-place_BS, step.unknown_BS, step.at_most()), memory


@dataclass(frozen=True)
class Random(_Ordered):
    """Keep tokens in uniformly random order."""

    source = "the baseline of MaskGIT's ablations and of autoregression in any order"

    def begin(self, start: Start) -> Memory:
        return (start.uniform(ORDER),)


@dataclass(frozen=True)
class Halton(_Ordered):
    """Keep tokens spread evenly over the image: in the order of a 2-D Halton sequence.

    Bases 2 and 3, mapped to the grid, repeats left out, rolled by a random amount for each image. With the
    arccos schedule, ⌊N(1 − (2/π)·arccos((t + 1) / T))⌋ tokens are kept after step t. A position's groups follow one
    another, the lowest first.

    Attributes:
        roll: whether each image starts at another place of the sequence.
    """

    roll: bool = True
    source = "Besnier et al. (arXiv 2503.17076)"
    defaults: ClassVar[dict[str, str]] = {"mask_schedule": "arccos"}

    def begin(self, start: Start) -> Memory:
        batch, length = start.free_BS.shape
        positions = (length - 1) // start.groups
        place = _places_on(positions, start.free_BS.device)
        offset = torch.zeros(batch, 1, dtype=torch.long, device=place.device)
        if self.roll:
            offset = (start.uniform(ORDER)[:, :1] * positions).long()
        rolled = (place - offset) % positions
        if start.groups > 1:
            group = torch.arange(start.groups, device=place.device)
            rolled = (rolled[..., None] * start.groups + group).flatten(1)
        # The class's place is never read.
        return (torch.nn.functional.pad(rolled, (1, 0)).float(),)

    def choose(self, step: Step, memory: Memory) -> tuple[Tensor, Memory]:
        (place_BS,) = memory
        # The kept number is rounded down here, where other policies round the masked one.
        free = step.free_BS.sum(-1, keepdim=True)
        masked = free - (free * (1 - step.ratio_after_B1)).floor().long()
        most = step.unknown_BS.sum(-1, keepdim=True) - 1
        return lowest(-place_BS, step.unknown_BS, torch.minimum(masked, most).clamp(min=0)), memory


def radical_inverse(number: int, base: int) -> float:
    """Return the digits of a whole number, mirrored at the point: 6 in base 2 is 110, so 0.011, so 3/8."""
    value, scale = 0.0, 1.0
    while number:
        number, digit = divmod(number, base)
        scale /= base
        value += digit * scale
    return value


@lru_cache(maxsize=16)
def _places_on(num_tokens: int, device: torch.device) -> Tensor:
    """Return `halton_places` on a device, int64 (num_tokens,); kept there, so that it is copied but once."""
    return torch.tensor(halton_places(num_tokens), device=device)


@lru_cache(maxsize=64)
def halton_places(num_tokens: int) -> tuple[int, ...]:
    """Return each position's place, from 0, in the Halton order of a square grid (of one row, if it is none)."""
    side = math.isqrt(num_tokens)
    rows, columns = (side, side) if side**2 == num_tokens else (1, num_tokens)
    places: dict[int, int] = {}
    number = 1
    # Every cell is met: the sequence is dense in the square.
    while len(places) < num_tokens:
        row = int(radical_inverse(number, 2 if rows > 1 else 3) * rows)
        column = int(radical_inverse(number, 3 if rows > 1 else 2) * columns)
        places.setdefault(row * columns + column, len(places))
        number += 1
    return tuple(places[position] for position in range(num_tokens))
