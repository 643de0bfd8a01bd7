"""Policies that judge the filled-in sequence, and send back what is least plausible, wherever it came from.

Shapes: as in `policies.base`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from maskgit.foundation.checks import check_range
from maskgit.sampler.guidance import PredictLogits
from maskgit.sampler.noise import FOLDS
from maskgit.sampler.policies.base import Memory, Policy, Step, log_probs_of, lowest


class Critic(Policy):
    """The form of a token critic: a subclass says how plausible each token is.

    After a step, the schedule's number of the least plausible free tokens is masked again, those of earlier
    steps included; choice_temperature · Gumbel noise is added to the plausibility.
    """

    remasks = True
    reads_known = True

    def plausibility(self, step: Step) -> Tensor:
        """Return how plausible each token of `step.tokens_BS` is, float32 (B, S), higher is better."""
        raise NotImplementedError

    def choose(self, step: Step, memory: Memory) -> tuple[Tensor, Memory]:
        scores = self.plausibility(step) + step.choice_temperature_B1 * step.gumbel()
        return lowest(scores, step.free_BS, step.num_masked_B1), memory


@dataclass(frozen=True)
class SelfCritic(Critic):
    """Judge each token by the model itself, given the others; needs no training.

    The filled-in free tokens are dealt at random into disjoint folds; each fold is masked in turn, and its
    tokens are scored by their log-probability. A step costs 1 + folds evaluations.

    Attributes:
        folds: how many; more see more context.
    """

    folds: int = 2
    # It reads those of what it masks itself.
    reads_known = False
    source = "after Lezama et al. (arXiv 2209.04439), without the trained critic"

    def validate(self) -> None:
        check_range("folds", self.folds, 2, 64)

    def plausibility(self, step: Step) -> Tensor:
        return scores_by_folds(
            step.predict, step.tokens_BS, step.free_BS, step.uniform(FOLDS), self.folds, step.mask_token
        )


def scores_by_folds(
    predict: PredictLogits,
    tokens_BS: Tensor,
    free_BS: Tensor,
    uniform_BS: Tensor,
    folds: int,
    mask_token: int,
    asked: int | None = None,
) -> Tensor:
    """Return each free token's log-probability given those of the other folds and the known ones.

    Args:
        predict: int64 (B, S) → logits (B, S, K).
        tokens_BS: int64, all filled in.
        free_BS: bool, the tokens to score.
        uniform_BS: decides the folds, which are of equal size to one token.
        folds: how many evaluations are made.
        mask_token: the number that stands for "masked".
        asked: how many of the folds are scored; None is all.

    Returns:
        float32 (B, S), 0 where a token is not free or not asked for.
    """
    rank_BS = uniform_BS.masked_fill(~free_BS, torch.inf).argsort(-1).argsort(-1)
    scores_BS = torch.zeros_like(uniform_BS)
    for fold in range(folds if asked is None else asked):
        asked_BS = free_BS & (rank_BS % folds == fold)
        logits_BSK = predict(tokens_BS.masked_fill(asked_BS, mask_token))
        scores_BS = torch.where(asked_BS, log_probs_of(logits_BSK, tokens_BS), scores_BS)
    return scores_BS
