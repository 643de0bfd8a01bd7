"""Policies that look at the distributions to decide how many tokens can be kept at once.

`steps` is their limit: each step keeps at least as many tokens as an even pace needs to finish in time. With as
many steps as tokens that is one token, as in their papers.

Shapes: as in `policies.base`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from maskgit.foundation.checks import check_range
from maskgit.sampler.policies.base import Memory, Policy, Start, Step, lowest


@dataclass(frozen=True)
class EntropyBounded(Policy):
    """Keep as many tokens as the entropy bound allows: the longest prefix, by entropy H, with ΣH − max H ≤ γ.

    The bound limits how far tokens sampled at once can be from tokens sampled in turn.

    Attributes:
        gamma: the bound, in nats.
    """

    gamma: float = 4.0
    source = "Ben-Hamu et al. (arXiv 2505.24857)"
    adapts = True

    def validate(self) -> None:
        check_range("gamma", self.gamma, 0, 1e9)

    def choose(self, step: Step, memory: Memory) -> tuple[Tensor, Memory]:
        log_probs = step.logits_BSK.float().log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        ordered = entropy.masked_fill(~step.unknown_BS, torch.inf).sort(-1).values
        # ΣH − max H of a prefix in rising order is the sum of all but its last.
        others = ordered.cumsum(-1) - ordered
        kept = (others <= self.gamma).sum(-1, keepdim=True)
        num_unknown = step.unknown_BS.sum(-1, keepdim=True)
        kept = torch.minimum(torch.maximum(kept, step.even_pace()), num_unknown)
        return lowest(-entropy, step.unknown_BS, num_unknown - kept), memory


@dataclass(frozen=True)
class Stable(Policy):
    """Keep the tokens whose distribution is confident and has stopped changing.

    A token is kept when its highest probability is at least `confidence` and the KL divergence of its
    distribution from that of the step before has been below `kl` for `history` steps.

    Differs: KLASS keeps the one surest token when none is stable; here an even pace is kept up, which is the
    same when there are as many steps as tokens.

    Attributes:
        confidence: in [0, 1].
        kl: in nats.
        history: steps.
    """

    confidence: float = 0.3
    kl: float = 0.05
    history: int = 1
    source = "KLASS, Kim et al. (arXiv 2511.05664)"
    adapts = True

    def validate(self) -> None:
        check_range("confidence", self.confidence, 0, 1)
        check_range("kl", self.kl, 0, 1e9)
        check_range("history", self.history, 1, 1000)

    def begin(self, start: Start) -> Memory:
        nothing_BS = start.free_BS.new_zeros(start.free_BS.shape, dtype=torch.int64)
        # A streak of −1 says that there is no step before.
        return nothing_BS.new_zeros(*nothing_BS.shape, start.num_codes, dtype=torch.float32), nothing_BS - 1

    def choose(self, step: Step, memory: Memory) -> tuple[Tensor, Memory]:
        before, streak = memory
        log_probs = step.logits_BSK.float().log_softmax(-1)
        highest = log_probs.amax(-1)
        divergence = (log_probs.exp() * (log_probs - before)).sum(-1)
        streak = torch.where((divergence < self.kl) & (streak >= 0), streak + 1, 0)
        ready = (streak >= self.history) & (highest.exp() >= self.confidence) & step.unknown_BS
        num_unknown = step.unknown_BS.sum(-1, keepdim=True)
        # Those that are ready come first, then the surest.
        sureness = highest + ready * 1e6
        kept = torch.minimum(torch.maximum(ready.sum(-1, keepdim=True), step.even_pace()), num_unknown)
        return lowest(sureness, step.unknown_BS, num_unknown - kept), (log_probs, streak)
