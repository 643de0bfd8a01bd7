"""Iterative parallel decoding: the loop that every policy shares.

Shapes: B batch, N image tokens, S = N + 1 the sequence with its class token, K codes, T steps.
Source: paper §3.2; official libml/parallel_decode.py.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from maskgit.config import SamplerConfig, StepTables
from maskgit.errors import ConfigError
from maskgit.guidance import PredictLogits, guided
from maskgit.noise import Noise
from maskgit.policies import Memory, Policy, Start, Step, make_policy
from maskgit.schedules import curve, mask_counts, mask_ratios

StepCallback = Callable[[int, Tensor], None]


class State(NamedTuple):
    """Where decoding stands between two steps; it can be kept and gone on from.

    Attributes:
        step: the number of the next step.
        sequence: int64 (B, S), `mask_token` where a token is to be predicted.
        free: bool (B, S), what was to be predicted at the start.
        memory: what the policy remembers.
    """

    step: int
    sequence: Tensor
    free: Tensor
    memory: Memory


class Decoded(NamedTuple):
    """What a step made.

    Attributes:
        step: its number.
        logits: (B, S, K), what the tokens were sampled from, before the temperature.
        tokens: int64 (B, S), all filled in.
        unknown: bool (B, S), what was masked before the step.
        again: bool (B, S), what is masked again after it.
        state: to go on from; None after the last step.
    """

    step: int
    logits: Tensor
    tokens: Tensor
    unknown: Tensor
    again: Tensor
    state: State | None


class Plan(NamedTuple):
    """The numbers of every step, worked out before the first; N₀ is the number of tokens masked at the start.

    Attributes:
        ratios_TN: float32 (T, N + 1), the share still masked after each step, by N₀.
        counts_TN: int64 (T, N + 1), their number.
        temperatures, choice_temperatures, guidance_scales: T numbers each.
    """

    ratios_TN: Tensor
    counts_TN: Tensor
    temperatures: list[float]
    choice_temperatures: list[float]
    guidance_scales: list[float]

    @property
    def steps(self) -> int:
        """T."""
        return len(self.temperatures)


def plan_steps(config: SamplerConfig, num_tokens: int, *, remasks: bool) -> Plan:
    """Work out the numbers of every step.

    Args:
        config: the settings.
        num_tokens: N, of a whole image.
        remasks: whether more steps than tokens are of use; if not, N steps are planned at most (unless tables
            fix them), for each keeps a token.
    """
    tables = config.tables
    steps = config.steps
    if not remasks and tables == StepTables():
        steps = min(steps, num_tokens)
    # In float32, as the official code has it.
    progress = (torch.arange(1, steps + 1, dtype=torch.float32) / steps).tolist()
    if tables.mask_ratio is None:
        ratios_TN = mask_ratios(config.mask_schedule, steps, num_tokens)
    else:
        ratios_TN = torch.tensor(tables.mask_ratio)[:, None].expand(-1, num_tokens + 1)

    def values(table: tuple[float, ...] | None, schedule: str, falls: bool) -> list[float]:
        if table is not None:
            return list(table)
        weight = curve(schedule, start=1, end=0) if falls else curve(schedule, start=0, end=1)
        return [weight(r) for r in progress]

    temperature, choice = config.temperature, config.choice_temperature
    scaled = [1 if tables.temperature else temperature, 1 if tables.choice_temperature else choice]
    guidance = values(tables.guidance_scale, config.guidance_schedule, falls=False)
    if tables.guidance_scale is None:
        guidance = [1 + (config.guidance_scale - 1) * weight for weight in guidance]
    return Plan(
        ratios_TN,
        mask_counts(ratios_TN),
        [scaled[0] * value for value in values(tables.temperature, config.temperature_schedule, falls=True)],
        [
            scaled[1] * value
            for value in values(tables.choice_temperature, config.choice_schedule, falls=True)
        ],
        guidance,
    )


def decode(
    predict_logits: PredictLogits,
    sequence: Tensor,
    config: SamplerConfig,
    *,
    mask_token: int,
    noise: Noise,
    start_step: int = 0,
    policy: Policy | None = None,
    callback: StepCallback | None = None,
) -> Tensor:
    """Fill in the masked tokens of sequences, a part of them at each step.

    Known tokens are never touched, and neither is position 0, the class, even where it is masked.

    Args:
        predict_logits: int64 (B, S) → float (B, S, K).
        sequence: int64 (B, S), class token first, `mask_token` where a token is to be predicted.
        config: how; `steps` counts the whole schedule.
        mask_token: the number that stands for "masked".
        noise: the randomness; asked for steps 0 … T − start_step − 1.
        start_step: the step to begin at; an edit that keeps most tokens begins later (official: 2 of 12).
        policy: in place of the one that the config names.
        callback: called after each step with its number and the tokens int64 (B, S), all filled in; the
            tensor must not be changed.

    Returns:
        int64 (B, steps made, S): what was sampled at each step before part of it was masked again; the last
        step is the result.

    Raises:
        ConfigError: the start step is beyond the last.

    Source: official `decode`.
    """
    history = []
    steps = decode_steps(
        predict_logits,
        sequence,
        config,
        mask_token=mask_token,
        noise=noise,
        start_step=start_step,
        policy=policy,
    )
    for made in steps:
        history.append(made.tokens)
        if callback is not None:
            callback(made.step, made.tokens)
    return torch.stack(history, dim=1)


def decode_steps(
    predict_logits: PredictLogits,
    sequence: Tensor,
    config: SamplerConfig,
    *,
    mask_token: int,
    noise: Noise,
    start_step: int = 0,
    policy: Policy | None = None,
    state: State | None = None,
) -> Iterator[Decoded]:
    """Give each step of decoding as it is made; see `decode` for what is not said here.

    Nothing waits for the device, except where the policy adapts, which asks after each step whether it was the
    last.

    Args:
        state: where a former decoding stood, to go on from with the same arguments; the sequence is then not
            read.

    Returns:
        An iterator over the steps.

    Raises:
        ConfigError: the start step is beyond the last.
    """
    if not 0 <= start_step < config.steps:
        raise ConfigError(
            f"start_step must be from 0 to {config.steps - 1} for {config.steps} steps, but is {start_step}."
        )
    return _decode_steps(
        predict_logits,
        config,
        policy or make_policy(config.policy, config.policy_options),
        mask_token,
        noise,
        start_step,
        state or State(-1, sequence, _free(sequence, mask_token), ()),
    )


@torch.no_grad()
def _decode_steps(
    predict_logits: PredictLogits,
    config: SamplerConfig,
    policy: Policy,
    mask_token: int,
    noise: Noise,
    start_step: int,
    state: State,
) -> Iterator[Decoded]:
    step, sequence, free, memory = state
    device = sequence.device
    plan = plan_steps(config, sequence.shape[1] - 1, remasks=policy.remasks)
    start_step = min(start_step, plan.steps - 1)
    num_free_B1 = free.sum(-1, keepdim=True)
    ratios_TN, counts_TN = plan.ratios_TN.to(device), plan.counts_TN.to(device)
    if step < 0:
        step = start_step
        memory = policy.begin(Start(free, lambda stream: noise.uniform(0, stream)))

    for number in range(step, plan.steps):
        drawn = number - start_step
        predict = guided(predict_logits, mask_token, plan.guidance_scales[number])
        unknown = (sequence == mask_token) & free
        logits = predict(sequence)
        # argmax(logits + τ·Gumbel) samples from softmax(logits / τ), and needs no division at τ = 0.
        temperature = plan.temperatures[number]
        heat = policy.token_temperature(temperature, plan.choice_temperatures[number])
        sampled = (logits + heat * noise.tokens(drawn)).argmax(-1)
        tokens = torch.where(unknown, sampled, sequence)
        if number == plan.steps - 1:
            yield Decoded(number, logits, tokens, unknown, torch.zeros_like(free), None)
            return
        ratio_after = ratios_TN[number][num_free_B1]
        again, memory = policy.choose(
            Step(
                number=number,
                steps=plan.steps,
                logits_BSK=logits,
                tokens_BS=tokens,
                unknown_BS=unknown,
                free_BS=free,
                num_masked_B1=counts_TN[number][num_free_B1],
                ratio_before_B1=(
                    torch.ones_like(ratio_after) if drawn == 0 else ratios_TN[number - 1][num_free_B1]
                ),
                ratio_after_B1=ratio_after,
                temperature=temperature,
                choice_temperature=plan.choice_temperatures[number],
                mask_token=mask_token,
                predict=predict,
                gumbel=lambda drawn=drawn: noise.choice(drawn),  # type: ignore[misc]
                uniform=lambda stream, drawn=drawn: noise.uniform(drawn, stream),  # type: ignore[misc]
            ),
            memory,
        )
        sequence = tokens.masked_fill(again, mask_token)
        last = policy.adapts and not bool(again.any())
        yield Decoded(
            number,
            logits,
            tokens,
            unknown,
            again,
            None if last else State(number + 1, sequence, free, memory),
        )
        if last:
            return


def _free(sequence: Tensor, mask_token: int) -> Tensor:
    """Return where tokens are to be predicted, bool (B, S)."""
    first = torch.arange(sequence.shape[1], device=sequence.device) == 0
    return (sequence == mask_token) & ~first
