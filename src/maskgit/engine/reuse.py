"""Decoding that computes known tokens only now and then, which is faster and approximate.

The features of a token that is known change little from step to step. So between full evaluations of the network
there are local ones, of the other tokens only, which see the known ones as they were.

Shapes: B batch, S the sequence with its class token, P the positions computed, K codes, H heads, D a head's width.
Source: Liu et al., ReCAP, arXiv 2505.19089.
"""

import torch
from torch import Tensor

from maskgit.foundation.precision import whole_float32
from maskgit.networks.transformer import Layer, Transformer

# Where more would have to be computed, it is all computed: little time is lost, and nothing is approximate.
LARGEST_SHARE = 0.75


class ContextReuse:
    """Predicts logits through one decoding, keeping the keys and values of what need not be computed again.

    In a local evaluation a position is computed if it is masked, or its token is another than when it was last
    computed; the logits of the others are those they had. Whether a row's evaluation is full is decided by that
    row alone, so an image does not depend on its companions.

    Differs: ReCAP lets a full evaluation choose the tokens that the local ones after it fill in, and computes
    only these. Here it is every masked token, so that any policy may choose any; less time is saved. And it
    counts the full steps at the start, where we look at how much is known, which suits edits, too.
    """

    def __init__(
        self, transformer: Transformer, local: Transformer, *, codes: int, mask_token: int, reuse: int
    ) -> None:
        """Prepare for one decoding; nothing is computed yet.

        Args:
            transformer: the network for full evaluations; its layers are called, not itself.
            local: the same for local ones, whose number of positions keeps changing.
            codes: K, how many of the vocabulary's logits are wanted.
            mask_token: the number that stands for "masked".
            reuse: of so many evaluations at least one is full; 1 makes all of them full.
        """
        self.transformer = transformer
        self.local = local
        self.codes = codes
        self.mask_token = mask_token
        self.reuse = reuse
        self._sequence: Tensor | None = None
        self._logits = self._locals = torch.empty(0)
        # One for each layer, (2, B, S, H, D).
        self._keys_and_values: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, sequence: Tensor) -> Tensor:
        """Return the logits of the image codes: int64 (B, S) → float (B, S, K).

        A batch of another shape than the last is evaluated in full.
        """
        wanted = self._wanted(sequence)
        counts_B1 = wanted.sum(1, keepdim=True)
        least, most = torch.stack(counts_B1.aminmax()).tolist()
        if least == sequence.shape[1]:
            self._logits = self._evaluate(sequence, None)
            self._locals = torch.zeros_like(counts_B1)
        else:
            positions = wanted.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
            # Rows with fewer repeat position 0, which is computed anyway, so padding changes nothing.
            positions = positions.where(torch.arange(most, device=positions.device) < counts_B1, 0)
            made = self._evaluate(sequence, positions)
            # What was returned before may still be in use.
            self._logits = self._logits.index_put(_at(positions), made)
            self._locals = (self._locals + 1).where(counts_B1 < sequence.shape[1], 0)
        self._sequence = sequence.clone()
        return self._logits

    def _wanted(self, sequence: Tensor) -> Tensor:
        """Return which positions are to be computed, bool (B, S)."""
        if self._sequence is None or self._sequence.shape != sequence.shape:
            return torch.ones_like(sequence, dtype=torch.bool)
        wanted = (sequence == self.mask_token) | (sequence != self._sequence)
        wanted[:, 0] = True
        full = wanted.sum(1, keepdim=True) > LARGEST_SHARE * sequence.shape[1]
        return wanted | full | (self._locals + 1 >= self.reuse)

    def _evaluate(self, sequence: Tensor, positions: Tensor | None) -> Tensor:
        """Return the logits (B, P, K) of positions int64 (B, P), None for all, and keep keys and values."""
        transformer = self.transformer if positions is None else self.local
        with whole_float32(sequence.device):
            return self._run(transformer, sequence, positions)

    def _run(self, transformer: Transformer, sequence: Tensor, positions: Tensor | None) -> Tensor:
        x = transformer.embed(sequence)
        if positions is None:
            self._keys_and_values = []
        else:
            x = x[_at(positions)]
        for number, layer in enumerate(transformer.layers):
            assert isinstance(layer, Layer), "not replaced"
            q, k, v = layer.attention.project(x)
            made = torch.stack((k, v)).transpose(2, 3)
            if positions is None:
                self._keys_and_values.append(made)
            else:
                self._keys_and_values[number][:, *_at(positions)] = made
            k, v = self._keys_and_values[number].transpose(2, 3)
            x = layer.mlp(layer.attention.attend(x, q, k, v))
        return transformer.head(x, transformer.token_embedding.weight, self.codes)


def _at(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Return the indices of positions int64 (B, P) in a tensor (B, S, …)."""
    return torch.arange(len(positions), device=positions.device)[:, None], positions
