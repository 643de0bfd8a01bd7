"""Curves of decoding: pure functions of progress in [0, 1].

Source: official libml/mask_schedule.py; paper §3.3, table 3 and figure 8.
"""

import math
import re
from collections.abc import Callable

import torch
from torch import Tensor

from maskgit.errors import ConfigError

MaskSchedule = Callable[[Tensor, Tensor], Tensor]


def _uniform(progress: Tensor, num_unknown: Tensor) -> Tensor:
    return 1 - progress


def _cosine(progress: Tensor, num_unknown: Tensor) -> Tensor:
    return torch.cos(progress * (math.pi / 2))


def _log(progress: Tensor, num_unknown: Tensor) -> Tensor:
    return -torch.log2(progress) / torch.log2(num_unknown)


def _exp(progress: Tensor, num_unknown: Tensor) -> Tensor:
    return 1 - torch.exp2(-torch.log2(num_unknown) * (1 - progress))


def _power(exponent: float) -> MaskSchedule:
    return lambda progress, num_unknown: 1 - progress**exponent


MASK_SCHEDULES: dict[str, MaskSchedule] = {
    "uniform": _uniform,
    "cosine": _cosine,
    "log": _log,
    "exp": _exp,
    "square": _power(2),
    "cubic": _power(3),
    "sqrt": _power(0.5),
}
_POWER = re.compile(r"pow(\d{1,4}(?:\.\d{1,8})?)")


def mask_schedule(name: str) -> MaskSchedule:
    """Return the curve γ of a name: one of `MASK_SCHEDULES`, or `powX` for 1 − rˣ, such as `pow2.5`.

    Raises:
        ConfigError: the name is unknown.
    """
    if name in MASK_SCHEDULES:
        return MASK_SCHEDULES[name]
    power = _POWER.fullmatch(name)
    if power and float(power[1]) > 0:
        return _power(float(power[1]))
    raise ConfigError(
        f"Unknown mask schedule {name!r}. Choose from: {', '.join(MASK_SCHEDULES)}, or powX, X > 0."
    )


def mask_ratio(name: str, progress: Tensor, num_unknown: Tensor | int) -> Tensor:
    """Return the share of tokens that is masked at some progress, γ(r), clamped to [1e-6, 1].

    Args:
        name: a mask schedule.
        progress: float32, in [0, 1]: (step + 1) / steps in decoding, uniform in training.
        num_unknown: the tokens masked at the start (only `log` and `exp` read it), broadcast with `progress`.

    Returns:
        float32, of the broadcast shape.

    Source: official `schedule`.
    """
    progress, count = torch.broadcast_tensors(
        torch.as_tensor(progress, dtype=torch.float32), torch.as_tensor(num_unknown, dtype=torch.float32)
    )
    return mask_schedule(name)(progress, count).clamp(1e-6, 1.0)


def mask_counts(name: str, steps: int, num_tokens: int) -> Tensor:
    """Return how many tokens a schedule leaves masked after each step, ⌊γ((t + 1) / T) · N₀⌋.

    Computed on the CPU in float32, whose rounding decides the floor, so that every device decodes alike.

    Args:
        name: a mask schedule.
        steps: T.
        num_tokens: the largest N₀.

    Returns:
        int64 (steps, num_tokens + 1), by step t and by N₀, the number masked at the start.

    Source: official libml/parallel_decode.py.
    """
    progress = (torch.arange(1, steps + 1, dtype=torch.float32) / steps)[:, None]
    start = torch.arange(num_tokens + 1, dtype=torch.float32)[None]
    # With one token or none the logarithms of `log` and `exp` divide by zero or worse; there is nothing to
    # schedule then, and the sampler keeps its bounds.
    ratio = mask_ratio(name, progress, start.clamp(min=2))
    return (ratio * start).floor().long()


def check_mask_schedule(name: str) -> None:
    """Raise a `ConfigError` unless `name` is a mask schedule."""
    mask_schedule(name)
