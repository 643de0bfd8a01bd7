"""Curves of decoding: pure functions of progress in [0, 1].

A mask schedule γ says what share of the tokens is still masked; a curve says how much of a temperature or of
guidance is in force.

Source: official libml/mask_schedule.py; paper §3.3, table 3 and figure 8.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from maskgit.errors import ConfigError, unknown_name

MaskSchedule = Callable[[Tensor, Tensor], Tensor]


def _uniform(progress: Tensor, num_unknown: Tensor) -> Tensor:
    return 1 - progress


def _cosine(progress: Tensor, num_unknown: Tensor) -> Tensor:
    return torch.cos(progress * (math.pi / 2))


def _log(progress: Tensor, num_unknown: Tensor) -> Tensor:
    return -torch.log2(progress) / torch.log2(num_unknown)


def _exp(progress: Tensor, num_unknown: Tensor) -> Tensor:
    return 1 - torch.exp2(-torch.log2(num_unknown) * (1 - progress))


def _arccos(progress: Tensor, num_unknown: Tensor) -> Tensor:
    return torch.acos(progress) * (2 / math.pi)


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
    "arccos": _arccos,
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


def mask_ratios(name: str, steps: int, num_tokens: int) -> Tensor:
    """Return what share a schedule leaves masked after each step, γ((t + 1) / T).

    Computed on the CPU, so that every device decodes alike.

    Args:
        name: a mask schedule.
        steps: T.
        num_tokens: the largest N₀.

    Returns:
        float32 (steps, num_tokens + 1), by step t and by N₀, the number masked at the start.
    """
    progress = (torch.arange(1, steps + 1, dtype=torch.float32) / steps)[:, None]
    start = torch.arange(num_tokens + 1, dtype=torch.float32)[None]
    # With one token or none the logarithms of `log` and `exp` divide by zero or worse; there is nothing to
    # schedule then, and the sampler keeps its bounds.
    return mask_ratio(name, progress, start.clamp(min=2))


def mask_counts(ratios: Tensor) -> Tensor:
    """Return how many tokens a schedule leaves masked after each step, ⌊γ((t + 1) / T) · N₀⌋.

    The float32 rounding decides the floor, as in the official code.

    Args:
        ratios: float32 (steps, num_tokens + 1), as `mask_ratios` returns them.

    Returns:
        int64 of the same shape.

    Source: official libml/parallel_decode.py.
    """
    return (ratios * torch.arange(ratios.shape[1], dtype=torch.float32)).floor().long()


def check_mask_schedule(name: str) -> None:
    """Raise a `ConfigError` unless `name` is a mask schedule."""
    mask_schedule(name)


class _Curve(NamedTuple):
    """A shape from 0 at the start to 1 at the end, and the numbers that its name takes in front of FROM,TO."""

    shape: Callable[..., float]
    parameters: tuple[str, ...] = ()
    ends: bool = True


CURVES: dict[str, _Curve] = {
    "constant": _Curve(lambda r: 1.0, ends=False),
    "linear": _Curve(lambda r: r),
    "cosine": _Curve(lambda r: (1 - math.cos(math.pi * r)) / 2),
    "power-cosine": _Curve(lambda r, power: (1 - math.cos(math.pi * r**power)) / 2, ("POWER",)),
    "interval": _Curve(lambda r, low, high: float(low <= r <= high), ("LOW", "HIGH"), ends=False),
}


def curve(spec: str, *, start: float, end: float) -> Callable[[float], float]:
    """Return the weight, as a function of progress r in [0, 1], that a curve's name stands for.

    Names are `constant` (1 everywhere), `linear`, `cosine` ((1 − cos πr) / 2), `power-cosine:POWER`
    ((1 − cos πrᵖ) / 2) and `interval:LOW,HIGH` (1 for LOW ≤ r ≤ HIGH, else 0). The middle three lead from
    `start` to `end`, or from and to the two numbers that follow: `linear:1,0.5`, `power-cosine:2,0,1`. What follows
    an @ is for `curve_progress`.

    Args:
        spec: the name, and its numbers after a colon.
        start, end: where a curve begins and ends that does not say so itself.

    Raises:
        ConfigError: the name is unknown, or its numbers are wrong.

    Source: power-cosine: MDTv2 (arXiv 2303.14389); interval: Kynkäänniemi et al. (arXiv 2404.07724).
    """
    before_at, at, when = spec.partition("@")
    name, _, listed = before_at.partition(":")
    if at and when != "before":
        raise ConfigError(f"After @ a schedule's name may say before, but is {spec!r}.")
    if name not in CURVES:
        raise unknown_name("schedule", spec, CURVES)
    shape, parameters, ends = CURVES[name]
    usage = (
        name
        + (":" + ",".join(parameters) if parameters else "")
        + ("[,FROM,TO]" if ends and parameters else "")
    )
    usage = usage if parameters or not ends else f"{name}[:FROM,TO]"
    try:
        numbers = [float(number) for number in listed.split(",")] if listed else []
    except ValueError as error:
        raise ConfigError(
            f"The numbers of a schedule must be written as {usage}, but are {spec!r}."
        ) from error
    counts = {len(parameters), len(parameters) + 2} if ends else {len(parameters)}
    if len(numbers) not in counts or not all(0 <= number <= 1e3 for number in numbers):
        raise ConfigError(f"A schedule {name} is written as {usage}, each from 0 to 1000, but is {spec!r}.")
    own = numbers[: len(parameters)]
    if not ends:
        return lambda r: shape(r, *own)
    first, last = numbers[len(parameters) :] or (start, end)
    return lambda r: first + (last - first) * shape(r, *own)


def curve_progress(spec: str, steps: int) -> list[float]:
    """Return at which progress a curve is read for each step: (t + 1) / T, or t / T if its name ends in @before.

    In float32, as the official code has it.
    """
    first = 0 if spec.endswith("@before") else 1
    return (torch.arange(first, steps + first, dtype=torch.float32) / steps).tolist()
