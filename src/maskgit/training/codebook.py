"""The codebook's upkeep in training: how much of it is used, and new vectors for codes that nothing chooses.

Shapes: B images of a step over all processes, b those of one process, K codes, D embedding_dim, h × w the
token grid.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from maskgit.errors import CheckpointError
from maskgit.evaluation.metrics import codebook_usage, perplexity
from maskgit.sampler.noise import uniform
from maskgit.training.distributed import Distributed

# The streams of `noise.uniform` that tokenizer training draws from.
GUMBEL, REVIVE = 72, 73


def count_codes(counts: Tensor, tokens: Tensor) -> None:
    """Add to counts, int64 (K,), how often each code is among tokens, int64 of any shape."""
    codes = tokens.flatten()
    # `bincount` would make a GPU's host wait, for it reads the largest code.
    counts.scatter_add_(0, codes, torch.ones_like(codes))


class CodeUsage:
    """How often each code was chosen over a window of steps, in all processes together."""

    def __init__(self, codebook_size: int, window: int, distributed: Distributed) -> None:
        """Start an empty window.

        Args:
            codebook_size: K.
            window: steps of one window.
            distributed: the processes.
        """
        self.window = window
        self.counts = torch.zeros(codebook_size, dtype=torch.int64, device=distributed.device)
        self._distributed = distributed

    def update(self, tokens: Tensor) -> None:
        """Count the tokens of this process's share of a step, int64 (b, h, w)."""
        count_codes(self.counts, tokens)

    def totals(self) -> Tensor:
        """Return the counts over all processes, int64 (K,); all must call it."""
        totals = self.counts.clone()
        if self._distributed.world > 1:
            dist.all_reduce(totals)
        return totals

    def read(self) -> dict[str, float]:
        """Return the share of codes used in the window so far and their perplexity; all processes call it."""
        totals = self.totals().cpu().numpy()
        if not totals.any():
            return {}
        return {"code_usage": codebook_usage(totals), "code_perplexity": perplexity(totals)}

    def unused(self) -> Tensor:
        """Return which codes nothing chose, bool (K,), none if nothing was counted; all processes call it."""
        totals = self.totals()
        return (totals == 0) & (totals.sum() > 0)

    def restart(self) -> None:
        """Begin a new window."""
        self.counts.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Return the counts over all processes."""
        return {"counts": self.totals()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with counts that were saved, whatever the number of processes then."""
        if state["counts"].shape != self.counts.shape:
            raise CheckpointError(
                f"The checkpoint counts {len(state['counts'])} codes, but the codebook has {len(self.counts)}."
            )
        # One process holds them, so that the sum over all is right.
        self.counts.copy_(state["counts"] if self._distributed.is_main else torch.zeros_like(self.counts))


@torch.no_grad()
def revive_codes(
    codebooks: list[Tensor],
    dead: Tensor,
    features: Tensor,
    moments: Iterable[Tensor] = (),
    *,
    seed: int,
    step: int,
    distributed: Distributed,
) -> int:
    """Give codes that are not in use the encoder's features at random places of the present batch.

    The places depend on (seed, step, code) and the whole batch alone, so every process writes the same.

    Args:
        codebooks: float (K, D) each, changed in place: the codebook and its average.
        dead: bool (K,), the codes to be replaced.
        features: float (b, D, h, w), this process's share of the batch.
        moments: float (K, D) each, the optimizer's averages of the codebook's gradients; the rows of codes that
            are replaced become 0, for they are of the vectors that were there.
        seed: the run's.
        step: the present one.
        distributed: the processes.

    Returns:
        How many codes were replaced.
    """
    codes = dead.nonzero().flatten()
    if len(codes) == 0:
        return 0
    vectors = features.detach().float().movedim(1, -1).flatten(0, -2)
    count = len(vectors) * distributed.world
    # In float32 the product could round up to the count.
    places = (uniform(seed, codes, step, REVIVE, 1).flatten() * count).long().clamp(max=count - 1)
    places = places - distributed.rank * len(vectors)
    mine = (places >= 0) & (places < len(vectors))
    rows = torch.where(mine[:, None], vectors[places.clamp(0, len(vectors) - 1)], 0.0)
    if distributed.world > 1:
        dist.all_reduce(rows)
    for codebook in codebooks:
        codebook[codes] = rows.to(codebook.dtype)
    for moment in moments:
        moment[codes] = 0
    return len(codes)
