"""What a policy is: it says after each step which tokens are masked again.

Shapes: B batch, N image tokens, S = N + 1 the sequence with its class token, K codes. Position 0 is the class:
always known, never masked again.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from maskgit.foundation.checks import Config
from maskgit.sampler.guidance import PredictLogits
from maskgit.sampler.noise import Noise

# What a policy remembers from step to step: tensors whose first dimension is the batch.
Memory = tuple[Tensor, ...]


class Start(NamedTuple):
    """What there is before the first step.

    Attributes:
        free_BS: bool, True where a token is to be predicted; never at position 0.
        num_codes: K.
        noise: the randomness.
        groups: tokens of the sequence that one position of the image consists of, one after the other.
    """

    free_BS: Tensor
    num_codes: int
    noise: Noise
    groups: int = 1

    def uniform(self, stream: int) -> Tensor:
        """Return uniform numbers of a stream in `sampler.noise`, float32 (B, S) in (0, 1)."""
        return self.noise.uniform(self.free_BS.new_zeros(len(self.free_BS), 1, dtype=torch.int64), stream)


class Step(NamedTuple):
    """What a policy may look at. Only `free` tokens may be masked again.

    Rows may be at different steps of different plans, so a step's numbers are tensors.

    Attributes:
        number_B1: t, int64, counted from 0.
        steps_B1: T, int64.
        logits_BSK: the model's (guided) logits for the sequence as it was; those of tokens that were known may be
            0, unless the policy says that it `reads_known`.
        tokens_BS: the sequence with every masked token sampled.
        unknown_BS: True where a token was masked before this step.
        free_BS: True where a token was to be predicted at the start.
        num_masked_B1: how many tokens the schedule wants masked after this step.
        ratio_before_B1, ratio_after_B1: γ, the share of free tokens that it wants masked before and after.
        temperature_B1, choice_temperature_B1: of this step, float32.
        mask_token: the number that stands for "masked".
        predict: another evaluation: int64 (B, S) → guided logits (B, S, K), likewise.
        noise: the randomness.
        drawn_B1: int64, steps that the row has made before, which is what its noise counts by.
    """

    number_B1: Tensor
    steps_B1: Tensor
    logits_BSK: Tensor
    tokens_BS: Tensor
    unknown_BS: Tensor
    free_BS: Tensor
    num_masked_B1: Tensor
    ratio_before_B1: Tensor
    ratio_after_B1: Tensor
    temperature_B1: Tensor
    choice_temperature_B1: Tensor
    mask_token: int
    predict: PredictLogits
    noise: Noise
    drawn_B1: Tensor

    def gumbel(self) -> Tensor:
        """Return Gumbel noise, float32 (B, S)."""
        return self.noise.choice(self.drawn_B1)

    def uniform(self, stream: int) -> Tensor:
        """Return uniform numbers of a stream in `sampler.noise`, float32 (B, S) in (0, 1)."""
        return self.noise.uniform(self.drawn_B1, stream)

    def at_most(self) -> Tensor:
        """Return how many tokens may stay masked, int64 (B, 1): the schedule's number, but one fewer than now."""
        return torch.minimum(self.num_masked_B1, self.unknown_BS.sum(-1, keepdim=True) - 1).clamp(min=0)

    def even_pace(self) -> Tensor:
        """Return how many tokens must stay now for all to be done in time, int64 (B, 1), at least 1."""
        left = self.steps_B1 - self.number_B1
        return ((self.unknown_BS.sum(-1, keepdim=True) + left - 1) // left).clamp(min=1)


@dataclass(frozen=True)
class Policy(Config):
    """Which tokens stay. Fields are the policy's parameters; one subclass is one policy.

    Class attributes:
        source: where it is from.
        defaults: settings of `SamplerConfig` that come with it unless they are given.
        remasks: whether a step may keep no token, or mask kept ones again; if not, no more steps than tokens are made.
        reads_known: whether it reads the logits of known tokens, which then are always computed.
        orders: whether `choose` reads neither logits nor tokens; then it can be asked before any are predicted.
        redraws: whether each step draws the free tokens that are known anew, too; such a policy reads their logits.
        adapts: whether the number of steps depends on the model's predictions; then the loop stops as soon as
            nothing is masked.
    """

    source: ClassVar[str]
    defaults: ClassVar[dict[str, str]] = {}
    remasks: ClassVar[bool] = False
    reads_known: ClassVar[bool] = False
    orders: ClassVar[bool] = False
    redraws: ClassVar[bool] = False
    adapts: ClassVar[bool] = False

    def begin(self, start: Start) -> Memory:
        """Return what to remember before the first step, in the form that `choose` returns it in."""
        return ()

    def token_temperature(self, temperature_B1: Tensor, choice_temperature_B1: Tensor) -> Tensor:
        """Return the temperature that tokens are sampled at, float32 (B, 1)."""
        return temperature_B1

    def choose(self, step: Step, memory: Memory) -> tuple[Tensor, Memory]:
        """Choose the tokens that are masked again.

        Args:
            step: see `Step`.
            memory: what `begin` or the step before returned; it must not be changed in place.

        Returns:
            bool (B, S), True = masked again, only where `step.free_BS` is; and what to remember. It is not called
            after the last step.
        """
        raise NotImplementedError


def lowest(scores_BS: Tensor, candidates_BS: Tensor, count_B1: Tensor) -> Tensor:
    """Return where the `count` lowest scores among the candidates are, bool (B, S).

    Args:
        scores_BS: float; ties are settled by position.
        candidates_BS: bool.
        count_B1: int64, at most the number of candidates.
    """
    order = scores_BS.masked_fill(~candidates_BS, torch.inf).sort(dim=-1, stable=True).indices
    ranks = order.argsort(-1)
    return (ranks < count_B1) & candidates_BS


def log_probs_of(logits_BSK: Tensor, tokens_BS: Tensor) -> Tensor:
    """Return the log-probability of each token, float32 (B, S); undefined where the token is not a code."""
    log_probs = logits_BSK.float().log_softmax(-1)
    return log_probs.gather(-1, tokens_BS.clamp(max=log_probs.shape[-1] - 1)[..., None])[..., 0]
