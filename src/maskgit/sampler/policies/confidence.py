"""Policies that keep what the model is surest of, in numbers that the schedule fixes.

Shapes: as in `policies.base`.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from maskgit.foundation.checks import check_range
from maskgit.sampler.policies.base import Memory, Policy, Step, log_probs_of, lowest


@dataclass(frozen=True)
class Confidence(Policy):
    """Keep the sampled tokens of highest log-probability plus noise (the official policy).

    The noise is choice_temperature · Gumbel. Between one and all but one of the masked tokens go back.

    Attributes:
        tempered: whether probabilities are measured after the temperature, as MaskBit (arXiv 2409.16211) does.
    """

    tempered: bool = False
    source = "MaskGIT (arXiv 2202.04200) §3.2; official libml/parallel_decode.py"

    def choose(self, step: Step, memory: Memory) -> tuple[Tensor, Memory]:
        logits = step.logits_BSK
        if self.tempered:
            # At temperature 0 the likeliest token has all the probability, or nearly.
            logits = logits / step.temperature_B1[..., None].clamp(min=1e-6)
        sureness = log_probs_of(logits, step.tokens_BS) + step.choice_temperature_B1 * step.gumbel()
        sureness = sureness.masked_fill(~step.unknown_BS, math.inf)
        most = step.unknown_BS.sum(-1, keepdim=True) - 1
        count = torch.minimum(step.num_masked_B1, most).clamp(min=1)
        threshold = sureness.sort(-1).values.gather(-1, count)
        # As in the official `mask_by_random_topk`, ties go to "kept".
        return sureness < threshold, memory


@dataclass(frozen=True)
class Redraw(Confidence):
    """Keep the surest tokens as `confidence` does, and draw those that are known anew at every step.

    Differs: a model that scores the mask may draw it; the authors' code then counts the position as masked, ours as
    known until the next step draws it anew.

    Attributes:
        tempered: as for `confidence`.
    """

    source = "Halton-MaskGIT's confidence sampler (github.com/valeoai/Halton-MaskGIT)"
    defaults: ClassVar[dict[str, str]] = {"mask_schedule": "arccos"}
    redraws = True
    reads_known = True


@dataclass(frozen=True)
class Moment(Policy):
    """Choose positions first, by Gumbel-top-k on the β-moment Σₓ p(x)^β of their distributions, then sample.

    β = 1 + 1 / choice_temperature, which `confidence` approaches when many tokens are masked; its tokens then
    follow p^β, that is, a temperature of 1 / β. Differs: parameters may be fixed by hand.

    Attributes:
        beta: the exponent; 0 derives it from choice_temperature, step by step.
        temper: whether tokens are sampled from p^β; without it they follow p.
    """

    beta: float = 0.0
    temper: bool = True
    source = "Hayakawa et al. (arXiv 2510.04525)"

    def validate(self) -> None:
        check_range("beta", self.beta, 0, 1e4)

    def exponent(self, choice_temperature_B1: Tensor) -> Tensor:
        """Return β, float32 (B, 1)."""
        if self.beta:
            return torch.full_like(choice_temperature_B1, self.beta)
        return 1 + 1 / choice_temperature_B1.clamp(min=1e-4)

    def token_temperature(self, temperature_B1: Tensor, choice_temperature_B1: Tensor) -> Tensor:
        if not self.temper:
            return temperature_B1
        tempered = temperature_B1 / self.exponent(choice_temperature_B1)
        # Where choice_temperature is 0, as at the end of its curve, `confidence` keeps every token: nothing is chosen
        # by value, so nothing is tempered.
        return tempered if self.beta else tempered.where(choice_temperature_B1 > 0, temperature_B1)

    def choose(self, step: Step, memory: Memory) -> tuple[Tensor, Memory]:
        log_probs = step.logits_BSK.float().log_softmax(-1)
        moment = (self.exponent(step.choice_temperature_B1)[..., None] * log_probs).logsumexp(-1)
        return lowest(moment + step.gumbel(), step.unknown_BS, step.at_most()), memory
