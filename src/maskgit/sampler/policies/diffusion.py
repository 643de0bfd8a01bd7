"""Masked diffusion: each token is kept or masked again independently, with its own probability.

With α = 1 − γ the share of tokens known, a step goes from α_t to α_s > α_t.

Shapes: as in `policies.base`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from maskgit.foundation.checks import check_choice, check_range
from maskgit.foundation.devices import widest_float
from maskgit.sampler.noise import REMASK, UNMASK
from maskgit.sampler.policies.base import Memory, Policy, Start, Step, log_probs_of


@dataclass(frozen=True)
class MDLM(Policy):
    """Keep each token with probability (α_s − α_t) / (1 − α_t): plain ancestral masked diffusion."""

    source = "Sahoo et al. (arXiv 2406.07524); Shi et al. (arXiv 2406.04329)"
    # By chance, tokens may stay masked for long: every step is needed.
    remasks = True

    def choose(self, step: Step, memory: Memory) -> tuple[Tensor, Memory]:
        stay = step.ratio_after_B1 / step.ratio_before_B1.clamp(min=1e-12)
        return step.unknown_BS & (step.uniform(UNMASK) < stay), memory


REMDM_FORMS = ("rescale", "cap", "confidence")


@dataclass(frozen=True)
class ReMDM(Policy):
    """Masked diffusion that also masks kept tokens again, with probability σ, so that errors can be mended.

    A masked token stays masked with probability (1 − α_s − σ·α_t) / (1 − α_t). With
    σ_max = min(1, (1 − α_s) / α_t), σ is eta · σ_max (form `rescale`), min(eta, σ_max) (`cap`), or σ_max times
    the softmax, over the kept tokens, of minus the probability that each was kept with (`confidence`, which
    has no eta).

    Attributes:
        form: "rescale", "cap" or "confidence".
        eta: how much is masked again; 0 is `mdlm`.
        begin_at: tokens are masked again from this progress on, in [0, 1].
        end_at: and up to this one.
    """

    form: str = "rescale"
    eta: float = 0.05
    begin_at: float = 0.0
    end_at: float = 1.0
    source = "Wang et al. (arXiv 2503.00307) §4"
    remasks = True

    def validate(self) -> None:
        check_choice("form", self.form, REMDM_FORMS)
        check_range("eta", self.eta, 0, 1)
        check_range("begin_at", self.begin_at, 0, 1)
        check_range("end_at", self.end_at, self.begin_at, 1)

    def begin(self, start: Start) -> Memory:
        # The probability that each token was kept with.
        return (start.free_BS.new_zeros(start.free_BS.shape, dtype=torch.float32),)

    def choose(self, step: Step, memory: Memory) -> tuple[Tensor, Memory]:
        (kept_with,) = memory
        kept = step.free_BS & ~step.unknown_BS
        after, known_before = step.ratio_after_B1, 1 - step.ratio_before_B1
        highest = (after / known_before.clamp(min=1e-12)).clamp(max=1)
        sigma = self._sigma(highest, kept_with, kept)
        progress = step.number_B1.to(widest_float(step.number_B1.device)) / step.steps_B1
        sigma = sigma * ((progress >= self.begin_at) & (progress <= self.end_at))
        stay = (after - sigma * known_before) / step.ratio_before_B1.clamp(min=1e-12)
        masked = step.unknown_BS & (step.uniform(UNMASK) < stay)
        again = kept & (step.uniform(REMASK) < sigma)
        fresh = step.unknown_BS & ~masked
        probability = log_probs_of(step.logits_BSK, step.tokens_BS).exp()
        return masked | again, (torch.where(fresh, probability, kept_with),)

    def _sigma(self, highest_B1: Tensor, kept_with_BS: Tensor, kept_BS: Tensor) -> Tensor:
        if self.form == "cap":
            return highest_B1.clamp(max=self.eta).expand_as(kept_with_BS)
        if self.form == "rescale":
            return (self.eta * highest_B1).expand_as(kept_with_BS)
        weights = (-kept_with_BS).masked_fill(~kept_BS, -torch.inf).softmax(-1)
        # Where nothing is kept yet the softmax has no meaning.
        return highest_B1 * weights.masked_fill(~kept_BS, 0)
