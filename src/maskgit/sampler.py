"""Iterative parallel decoding: the loop, and the policies that choose which tokens to keep.

Shapes: B batch, N image tokens, S = N + 1 the sequence with its class token, K codes.
Source: paper §3.2; official libml/parallel_decode.py.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from maskgit.config import check_range
from maskgit.errors import ConfigError, unknown_name
from maskgit.guidance import PredictLogits
from maskgit.noise import Noise
from maskgit.schedules import mask_counts

StepCallback = Callable[[int, Tensor], None]


class Step(NamedTuple):
    """What a policy may look at.

    Attributes:
        logits_BSK: the model's logits for the sequence as it was.
        tokens_BS: the sequence with every masked token sampled.
        unknown_BS: True where a token was masked before this step; never at position 0.
        num_masked_B1: how many tokens the schedule wants masked after this step.
        choice_temperature: of this step.
        choice_noise: returns Gumbel noise (B, S).
    """

    logits_BSK: Tensor
    tokens_BS: Tensor
    unknown_BS: Tensor
    num_masked_B1: Tensor
    choice_temperature: float
    choice_noise: Callable[[], Tensor]


Policy = Callable[[Step], Tensor]


def confidence(step: Step) -> Tensor:
    """Mask again the tokens of which the model is least sure (the official policy).

    Confidence is the sampled token's log-probability plus choice_temperature · Gumbel noise. Between one and
    all but one of the masked tokens go back.

    Returns:
        bool (B, S), True = masked again.

    Source: official `mask_by_random_topk`; paper §3.2, steps 3 and 4.
    """
    log_probs = step.logits_BSK.float().log_softmax(-1)
    # A token that is known, above all the class, may lie outside the codes; its confidence is infinite anyway.
    inside = step.tokens_BS.clamp(max=log_probs.shape[-1] - 1)
    sureness = log_probs.gather(-1, inside[..., None])[..., 0]
    sureness = sureness + step.choice_temperature * step.choice_noise()
    sureness = sureness.masked_fill(~step.unknown_BS, math.inf)
    most = step.unknown_BS.sum(-1, keepdim=True) - 1
    count = torch.minimum(step.num_masked_B1, most).clamp(min=1)
    threshold = sureness.sort(-1).values.gather(-1, count)
    return sureness < threshold


POLICIES: dict[str, Policy] = {"confidence": confidence}


@torch.no_grad()
def decode(
    predict_logits: PredictLogits,
    sequence: Tensor,
    *,
    mask_token: int,
    steps: int,
    noise: Noise,
    start_step: int = 0,
    choice_temperature: float = 4.5,
    temperature: float = 1.0,
    mask_schedule: str = "cosine",
    policy: str = "confidence",
    callback: StepCallback | None = None,
) -> Tensor:
    """Fill in the masked tokens of sequences, a part of them at each step.

    Known tokens are never touched, and neither is position 0, the class, even where it is masked. Nothing in
    the loop waits for the device.

    Args:
        predict_logits: int64 (B, S) → float (B, S, K).
        sequence: int64 (B, S), class token first, `mask_token` where a token is to be predicted.
        mask_token: the number that stands for "masked".
        steps: T, the steps of the whole schedule.
        noise: the randomness; asked for steps 0 … T − start_step − 1.
        start_step: the step to begin at; an edit that keeps most tokens begins later (official: 2 of 12).
        choice_temperature: of the noise on confidence; falls linearly to 0 at the last step.
        temperature: divides the logits before a token is sampled (0 takes the likeliest); confidence is the
            model's own.
        mask_schedule: a name in `schedules`.
        policy: a name in `POLICIES`.
        callback: called after each step with its number and the tokens int64 (B, S), all filled in; the
            tensor must not be changed.

    Returns:
        int64 (B, T − start_step, S): what was sampled at each step before part of it was masked again; the
        last step is the result.

    Raises:
        ConfigError: a setting is out of range or unknown.

    Source: official `decode`.
    """
    _check(steps, start_step, choice_temperature, temperature, policy)
    choose = POLICIES[policy]
    progress = torch.arange(1, steps + 1, dtype=torch.float32) / steps
    choice_temperatures = (choice_temperature * (1 - progress)).tolist()
    counts_TN = mask_counts(mask_schedule, steps, sequence.shape[1] - 1).to(sequence.device)
    first = torch.arange(sequence.shape[1], device=sequence.device) == 0
    num_start_B1 = ((sequence == mask_token) & ~first).sum(-1, keepdim=True)

    history = []
    for step in range(start_step, steps):
        unknown = (sequence == mask_token) & ~first
        logits = predict_logits(sequence)
        drawn = step - start_step
        # argmax(logits + τ·Gumbel) samples from softmax(logits / τ), and needs no division at τ = 0.
        sampled = (logits + temperature * noise.tokens(drawn)).argmax(-1)
        tokens = torch.where(unknown, sampled, sequence)
        history.append(tokens)
        if callback is not None:
            callback(step, tokens)
        again = choose(
            Step(
                logits_BSK=logits,
                tokens_BS=tokens,
                unknown_BS=unknown,
                num_masked_B1=counts_TN[step][num_start_B1],
                choice_temperature=choice_temperatures[step],
                choice_noise=lambda drawn=drawn: noise.choice(drawn),  # type: ignore[misc]
            )
        )
        sequence = tokens.masked_fill(again, mask_token)
    return torch.stack(history, dim=1)


def _check(steps: int, start_step: int, choice_temperature: float, temperature: float, policy: str) -> None:
    check_range("steps", steps, 1, 10_000)
    if not 0 <= start_step < steps:
        raise ConfigError(f"start_step must be from 0 to {steps - 1} for {steps} steps, but is {start_step}.")
    check_range("choice_temperature", choice_temperature, 0, 1e6)
    check_range("temperature", temperature, 0, 1e6)
    if policy not in POLICIES:
        raise unknown_name("policy", policy, POLICIES)
