"""The numbers of every decoding step, worked out before the first.

Shapes: B batch, N image tokens, T steps, N₀ tokens masked at the start.
Source: paper §3.2; official libml/parallel_decode.py.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from maskgit.sampler.config import SamplerConfig, StepTables
from maskgit.sampler.schedules import curve, curve_progress, mask_counts, mask_ratios


class Numbers(NamedTuple):
    """One step's numbers, row by row: rows of a batch may be at different steps of different plans.

    Every field is a tensor (B, 1) on the device of decoding, so that settings change without another program.

    Attributes:
        number: int64, t, counted from 0.
        steps: int64, T.
        drawn: int64, steps that the row has made before, which is what its noise counts by.
        num_masked: int64, how many tokens the schedule wants masked after the step.
        ratio_before, ratio_after: float32, γ, the share of free tokens that it wants masked before and after.
        temperature, choice_temperature, guidance_scale: float32.
        top_k, top_p: float32, as `guidance.truncated` takes them.
    """

    number: Tensor
    steps: Tensor
    drawn: Tensor
    num_masked: Tensor
    ratio_before: Tensor
    ratio_after: Tensor
    temperature: Tensor
    choice_temperature: Tensor
    guidance_scale: Tensor
    top_k: Tensor
    top_p: Tensor

    def pack(self) -> Tensor:
        """Return all of them in one tensor, float32 (B, 11), which holds each exactly: the counts are below 2²⁴."""
        return torch.cat([part.float() for part in self], dim=1)

    @classmethod
    def unpack(cls, packed: Tensor) -> "Numbers":
        """Return what was packed: float32 (B, 11) → eleven tensors (B, 1)."""
        parts = packed.split(1, dim=1)
        return cls(*(part.long() for part in parts[:4]), *parts[4:])


class Plan(NamedTuple):
    """The numbers of every step.

    Attributes:
        ratios_TN: float32 (T, N + 1), the share still masked after each step, by N₀.
        counts_TN: int64 (T, N + 1), their number.
        temperatures, choice_temperatures, guidance_scales: T numbers each.
        top_k, top_p: of all steps; 0 and 1 are all codes.
    """

    ratios_TN: Tensor
    counts_TN: Tensor
    temperatures: Sequence[float]
    choice_temperatures: Sequence[float]
    guidance_scales: Sequence[float]
    top_k: int
    top_p: float

    @property
    def steps(self) -> int:
        """T."""
        return len(self.temperatures)

    @property
    def truncates(self) -> bool:
        """Whether tokens are sampled from some codes alone."""
        return self.top_k > 0 or self.top_p < 1

    def guides(self, number: int) -> bool:
        """Return whether a step needs the prediction without the class."""
        return self.guidance_scales[number] != 1

    def numbers(self, number: int, start_step: int, num_free_B1: Tensor) -> Numbers:
        """Return one step's numbers for rows that are all at it.

        Args:
            number: the step.
            start_step: the one that decoding began at.
            num_free_B1: int64 (B, 1), N₀ of each row, on the device of the tables.
        """
        after = self.ratios_TN[number][num_free_B1]
        before = torch.ones_like(after) if number == start_step else self.ratios_TN[number - 1][num_free_B1]

        def every(value: float) -> Tensor:
            return torch.full_like(after, value)

        def count(value: int) -> Tensor:
            return torch.full_like(num_free_B1, value)

        return Numbers(
            number=count(number),
            steps=count(self.steps),
            drawn=count(number - start_step),
            num_masked=self.counts_TN[number][num_free_B1],
            ratio_before=before,
            ratio_after=after,
            temperature=every(self.temperatures[number]),
            choice_temperature=every(self.choice_temperatures[number]),
            guidance_scale=every(self.guidance_scales[number]),
            top_k=every(self.top_k or math.inf),
            top_p=every(self.top_p),
        )


@lru_cache(maxsize=8)
def _tables(
    mask_schedule: str,
    mask_ratio: tuple[float, ...] | None,
    steps: int,
    num_tokens: int,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return a plan's ratios and counts on a device, kept there, so that decoding again copies nothing."""
    if mask_ratio is None:
        ratios_TN = mask_ratios(mask_schedule, steps, num_tokens)
    else:
        ratios_TN = torch.tensor(mask_ratio)[:, None].expand(-1, num_tokens + 1)
    return ratios_TN.to(device), mask_counts(ratios_TN).to(device)


def num_steps(config: SamplerConfig, num_tokens: int, *, remasks: bool, start_step: int = 0) -> int:
    """Return how many steps are made from `start_step` on, at most; see `plan_steps` for the rest."""
    steps = config.steps
    if not remasks and config.tables == StepTables():
        steps = min(steps, num_tokens)
    return steps - min(start_step, steps - 1)


def plan_steps(
    config: SamplerConfig, num_tokens: int, *, remasks: bool, device: torch.device | str = "cpu"
) -> Plan:
    """Work out the numbers of every step.

    Args:
        config: the settings.
        num_tokens: N, of a whole image.
        remasks: whether more steps than tokens are of use; if not, N steps are planned at most (unless tables
            fix them), for each keeps a token.
        device: where the tables are to lie; they must not be changed.
    """
    tables = config.tables
    steps = num_steps(config, num_tokens, remasks=remasks)

    def values(table: tuple[float, ...] | None, schedule: str, falls: bool) -> list[float]:
        if table is not None:
            return list(table)
        weight = curve(schedule, start=1, end=0) if falls else curve(schedule, start=0, end=1)
        return [weight(r) for r in curve_progress(schedule, steps)]

    temperature, choice = config.temperature, config.choice_temperature
    scaled = [1 if tables.temperature else temperature, 1 if tables.choice_temperature else choice]
    guidance = values(tables.guidance_scale, config.guidance_schedule, falls=False)
    if tables.guidance_scale is None:
        guidance = [1 + (config.guidance_scale - 1) * weight for weight in guidance]
    return Plan(
        *_tables(config.mask_schedule, tables.mask_ratio, steps, num_tokens, torch.device(device)),
        [scaled[0] * value for value in values(tables.temperature, config.temperature_schedule, falls=True)],
        [
            scaled[1] * value
            for value in values(tables.choice_temperature, config.choice_schedule, falls=True)
        ],
        guidance,
        config.top_k,
        config.top_p,
    )
