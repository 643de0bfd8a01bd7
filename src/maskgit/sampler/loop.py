"""Iterative parallel decoding: the loop that every policy shares.

Shapes: B batch, N image tokens, S = N + 1 the sequence with its class token, K codes.
Source: paper §3.2; official libml/parallel_decode.py.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from maskgit.errors import ConfigError
from maskgit.foundation.checks import check_whole
from maskgit.foundation.devices import Landing
from maskgit.sampler.config import SamplerConfig
from maskgit.sampler.guidance import PredictLogits, guided, truncated
from maskgit.sampler.noise import ImageNoise, Noise
from maskgit.sampler.plans import Numbers, plan_steps
from maskgit.sampler.policies import Memory, Policy, Start, Step, make_policy

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


class Made(NamedTuple):
    """What a step made of every row.

    Attributes:
        logits: (B, S, K), what the tokens were sampled from, before the temperature; those of tokens that were
            known may be 0 (`MaskGIT.predictor`).
        tokens: int64 (B, S), all filled in.
        unknown: bool (B, S), what was masked before the step.
        again: bool (B, S), what is masked again after it.
        sequence: int64 (B, S), the tokens with that masked: what the next step reads.
        memory: what the policy remembers.
    """

    logits: Tensor
    tokens: Tensor
    unknown: Tensor
    again: Tensor
    sequence: Tensor
    memory: Memory


class StepFunction(Protocol):
    """What makes a step; see `decode_step`, which is one."""

    def __call__(
        self,
        predict_logits: PredictLogits,
        sequence: Tensor,
        free: Tensor,
        memory: Memory | None,
        numbers: Numbers,
        *,
        policy: Policy,
        mask_token: int,
        noise: Noise,
        guides: bool,
        truncates: bool = False,
        last: bool = False,
        groups: int = 1,
        drafts: bool = True,
    ) -> Made: ...


@runtime_checkable
class Selective(Protocol):
    """A prediction that can leave out what no one reads."""

    def at(self, sequence: Tensor, *, wanted: Tensor) -> Tensor:
        """Return logits, int64 (B, S) → float (B, S, K), of which those where bool (B, S) is False may be 0."""
        ...


@runtime_checkable
class Forgetful(Protocol):
    """A step function that keeps memory for speed, such as captured steps."""

    def forget(self) -> None:
        """Drop it; what is needed is made anew."""
        ...


class Decoded(NamedTuple):
    """What a step of one decoding made.

    Attributes:
        step: its number.
        logits: (B, S, K), what the tokens were sampled from, before the temperature; those of tokens that were
            known may be 0 (`MaskGIT.predictor`).
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
    groups: int = 1,
) -> Tensor:
    """Fill in the masked tokens of sequences, a part of them at each step.

    Tokens that are known at the start are never touched, and neither is position 0, the class, even where it is masked.

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
        groups: tokens of the sequence that one position of the image consists of (`Vocabulary.groups`).

    Returns:
        int64 (B, steps made, S): what was sampled at each step before part of it was masked again; the last
        step is the result.

    Raises:
        ConfigError: the start step exceeds the last step.

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
        groups=groups,
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
    step_function: StepFunction | None = None,
    groups: int = 1,
    drafts: bool = True,
) -> Iterator[Decoded]:
    """Give each step of decoding as it is made; see `decode` for what is not said here.

    Nothing is read from the device or copied to it, but for tables that are copied once. Where the policy adapts,
    whether a step was the last is asked while the device makes the next, which is then dropped if it was.

    Args:
        state: where a former decoding stood, to go on from with the same arguments; the sequence is then not
            read.
        step_function: what makes a step, in place of `decode_step`.
        drafts: whether the tokens that a step masks again are read; see `decode_step`.

    Returns:
        An iterator over the steps.

    Raises:
        ConfigError: the start step exceeds the last step.
    """
    start_step = check_whole("start_step", start_step)
    if not 0 <= start_step < config.steps:
        raise ConfigError(
            f"start_step must be from 0 to {config.steps - 1} for {config.steps} steps, but is {start_step}."
        )
    policy = policy or make_policy(config.policy, config.policy_options)
    steps = _decode_steps(
        predict_logits,
        config,
        policy,
        mask_token,
        noise,
        start_step,
        state or State(-1, sequence, free_tokens(sequence, mask_token), ()),
        step_function or decode_step,
        groups,
        drafts,
    )
    return _until_done(steps) if policy.adapts else steps


def _until_done(steps: Iterator[Decoded]) -> Iterator[Decoded]:
    """Give steps until nothing is masked again; the state after that one is None."""
    asked: list[tuple[Decoded, Landing]] = []
    for made in steps:
        asked.append((made, Landing(made.again.any())))
        while asked and (len(asked) > 1 or asked[0][1].landed):
            oldest, masked = asked.pop(0)
            if not bool(masked.wait()[0]):
                yield oldest._replace(state=None)
                return
            yield oldest
    yield from (made for made, _ in asked)


@torch.no_grad()
def _decode_steps(
    predict_logits: PredictLogits,
    config: SamplerConfig,
    policy: Policy,
    mask_token: int,
    noise: Noise,
    start_step: int,
    state: State,
    step_function: StepFunction,
    groups: int,
    drafts: bool,
) -> Iterator[Decoded]:
    first, sequence, free, memory = state
    plan = plan_steps(config, sequence.shape[1] - 1, remasks=policy.remasks, device=sequence.device)
    start_step = min(start_step, plan.steps - 1)
    num_free_B1 = free.sum(-1, keepdim=True)
    for number in range(max(first, start_step), plan.steps):
        last = number == plan.steps - 1
        made = step_function(
            predict_logits,
            sequence,
            free,
            None if first < 0 and number == start_step else memory,
            plan.numbers(number, start_step, num_free_B1),
            policy=policy,
            mask_token=mask_token,
            noise=noise,
            guides=plan.guides(number),
            truncates=plan.truncates,
            last=last,
            groups=groups,
            drafts=drafts,
        )
        sequence, memory = made.sequence, made.memory
        yield Decoded(
            number,
            made.logits,
            made.tokens,
            made.unknown,
            made.again,
            None if last else State(number + 1, sequence, free, memory),
        )


@torch.no_grad()
def decode_step(
    predict_logits: PredictLogits,
    sequence: Tensor,
    free: Tensor,
    memory: Memory | None,
    numbers: Numbers,
    *,
    policy: Policy,
    mask_token: int,
    noise: Noise,
    guides: bool,
    truncates: bool = False,
    last: bool = False,
    groups: int = 1,
    drafts: bool = True,
) -> Made:
    """Make one step of decoding, in which every row follows its own plan.

    It is a function of tensors alone and never waits for the device.

    Args:
        predict_logits: int64 (B, S) → float (B, S, K).
        sequence: int64 (B, S), `mask_token` where a token is to be predicted.
        free: bool (B, S), what was to be predicted at each row's start.
        memory: what the policy remembers; None begins.
        numbers: each row's.
        policy: which tokens stay.
        mask_token: the number that stands for "masked".
        noise: the randomness.
        guides: whether any row's guidance scale is another than 1; if not, the scales are not read.
        truncates: whether any row samples from some codes alone; if not, top_k and top_p are not read.
        last: whether every row is at its last step, so that nothing needs to be chosen.
        groups: tokens of each position of the image; read where memory is None.
        drafts: whether the tokens that are masked again are read, as callbacks do; without them they may stay masked in
            `tokens`, and their logits 0.

    Returns:
        `Made`; a row at its last step masks nothing again.
    """
    unknown = (sequence == mask_token) & free
    drawn = free if policy.redraws else unknown
    # A policy of a fixed order is asked first, and what it masks again is not predicted.
    early = policy.orders and not drafts
    again = torch.zeros_like(free)
    predict = guided(predict_logits, mask_token, numbers.guidance_scale) if guides else predict_logits

    def choose(logits: Tensor, tokens: Tensor) -> None:
        nonlocal again, memory
        if memory is None:
            memory = begin(policy, free, logits.shape[-1], noise, groups)
        if last:
            return
        again, memory = policy.choose(
            Step(
                number_B1=numbers.number,
                steps_B1=numbers.steps,
                logits_BSK=logits,
                tokens_BS=tokens,
                unknown_BS=unknown,
                free_BS=free,
                num_masked_B1=numbers.num_masked,
                ratio_before_B1=numbers.ratio_before,
                ratio_after_B1=numbers.ratio_after,
                temperature_B1=numbers.temperature,
                choice_temperature_B1=numbers.choice_temperature,
                mask_token=mask_token,
                predict=predict,
                noise=noise,
                drawn_B1=numbers.drawn,
            ),
            memory,
        )
        again = again & (numbers.number < numbers.steps - 1)

    if early:
        choose(sequence.new_empty(*sequence.shape, 0, dtype=torch.float32), sequence)
        drawn = drawn & ~again
        if isinstance(predict_logits, Selective):
            wanted = partial(predict_logits.at, wanted=torch.cat([drawn, drawn]) if guides else drawn)
            predict = guided(wanted, mask_token, numbers.guidance_scale) if guides else wanted
    logits = predict(sequence)
    heat = policy.token_temperature(numbers.temperature, numbers.choice_temperature)
    drawn_from = truncated(logits, heat, numbers.top_k, numbers.top_p) if truncates else logits
    tokens = _sampled(drawn_from, sequence, drawn, heat, noise, numbers.drawn)
    if not early:
        choose(logits, tokens)
    assert memory is not None, "begun"
    return Made(logits, tokens, unknown, again, tokens.masked_fill(again, mask_token), memory)


def _sampled(
    logits: Tensor, sequence: Tensor, drawn: Tensor, heat_B1: Tensor, noise: Noise, step_B1: Tensor
) -> Tensor:
    """Return the sequence with new tokens where bool (B, S) says."""
    # argmax(logits + τ·Gumbel) samples from softmax(logits / τ), and needs no division at τ = 0.
    if sequence.device.type == "cpu" and isinstance(noise, ImageNoise):
        # The noise of thousands of codes takes as long as a small network: on a CPU only what is read is drawn.
        heat = heat_B1.expand_as(sequence)[drawn][:, None]
        tokens = sequence.clone()
        tokens[drawn] = (logits[drawn] + heat * noise.tokens_at(step_B1, drawn)).argmax(-1)
        return tokens
    sampled = (logits + heat_B1[..., None] * noise.tokens(step_B1)).argmax(-1)
    return torch.where(drawn, sampled, sequence)


def begin(policy: Policy, free: Tensor, num_codes: int, noise: Noise, groups: int = 1) -> Memory:
    """Return what a policy remembers before the first step of some rows.

    Args:
        policy: which.
        free: bool (B, S), what is to be predicted.
        num_codes: K.
        noise: of the rows.
        groups: tokens of each position.
    """
    return policy.begin(Start(free, num_codes, noise, groups))


def free_tokens(sequence: Tensor, mask_token: int) -> Tensor:
    """Return where tokens are to be predicted, bool (B, S)."""
    first = torch.arange(sequence.shape[1], device=sequence.device) == 0
    return (sequence == mask_token) & ~first
