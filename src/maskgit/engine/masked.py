"""Decoding on a CPU that leaves out what no step reads, without changing what is sampled.

- Only masked tokens are predicted: the last layer and the head skip the others.
- What the first layer reads of a masked token depends on its position alone, and is made once.
- At the first step of a generation nothing is known but the class, so images of a class share one evaluation.

Shapes: B batch, S the sequence with its class token, P the positions predicted, K codes.
"""

import threading
from collections import OrderedDict
from typing import cast

import torch
from torch import Tensor

from maskgit.foundation.forks import resets
from maskgit.networks.transformer import Layer, Transformer

# Above this share of masked tokens all are predicted: the packed weights of full evaluations are worth more.
LARGEST_SHARE = 0.75
# Of the logits of first steps that are kept, a few dozen classes' at 256×256.
KEPT_BYTES = 2**26


class MaskedPredictor:
    """Predicts the logits of masked tokens; those of known ones are 0 where that saves time.

    The weights must not change. It may be called from several threads.
    """

    def __init__(
        self, transformer: Transformer, local: Transformer, *, codes: int, mask_token: int, remember: bool
    ) -> None:
        """Wrap a network of two layers or more; of those that are not official, the head alone leaves out known tokens.

        Args:
            transformer: the network, whose calls are of one batch's size.
            local: the same, for calls whose batch size varies.
            codes: K, how many of the vocabulary's logits are wanted.
            mask_token: the number that stands for "masked".
            remember: whether first steps are kept for later calls. What is kept was rounded as in the batch that
                asked first, so this is for types in which that does not matter.
        """
        self.transformer = transformer
        self.local = local
        self.codes = codes
        self.mask_token = mask_token
        self.remember = remember
        config = transformer.config
        self._splits_layers = config.block == "official" and not config.owns_classes
        self._mask_qkv: Tensor | None = None
        self._first: OrderedDict[int, Tensor] = OrderedDict()
        self._lock = threading.Lock()
        resets(self)

    def after_fork(self) -> None:
        """Take a new lock: another thread may have held the old one."""
        self._lock = threading.Lock()

    @torch.no_grad()
    def __call__(self, sequence: Tensor) -> Tensor:
        """Return the logits of the image codes: int64 (B, S) → float (B, S, K)."""
        masked = self._masked(sequence)
        least, most = torch.stack(masked.sum(1).aminmax()).tolist()
        if least == sequence.shape[1] - 1:
            return self._predict_first(sequence, masked)
        if most > LARGEST_SHARE * sequence.shape[1]:
            return self._predict_all(sequence, masked)
        return self._predict_some(sequence, masked, masked, most)

    @torch.no_grad()
    def at(self, sequence: Tensor, *, wanted: Tensor) -> Tensor:
        """Return the logits of the tokens that are asked for, bool (B, S); those of others may be 0."""
        masked, most = self._masked(sequence), int(wanted.sum(1).max())
        if most > LARGEST_SHARE * sequence.shape[1]:
            return self._predict_all(sequence, masked)
        return self._predict_some(sequence, masked, wanted, most)

    def _masked(self, sequence: Tensor) -> Tensor:
        masked = sequence == self.mask_token
        masked[:, 0] = False
        return masked

    def _predict_some(self, sequence: Tensor, masked: Tensor, wanted: Tensor, most: int) -> Tensor:
        """Return the logits where `wanted`, bool (B, S), is True, at most `most` per row; others are 0."""
        # At least one, so that no tensor is empty.
        positions = wanted.byte().argsort(dim=1, descending=True, stable=True)[:, : max(1, most)]
        if self._splits_layers:
            return self._last_layer(self._inner_layers(sequence, masked), positions)
        # The weights of the layers are packed for whole sequences, those of the head for any number of rows.
        made = self.local.score(*self.transformer.features(sequence), positions=positions, codes=self.codes)
        at = torch.arange(len(sequence), device=sequence.device)[:, None], positions
        return made.new_zeros(*sequence.shape, self.codes).index_put_(at, made)

    def _predict_first(self, sequence: Tensor, masked: Tensor) -> Tensor:
        """Return the logits where all but the class is masked, evaluating each class once."""
        classes = sequence[:, 0].tolist()
        with self._lock:
            known = {number: self._first[number] for number in classes if number in self._first}
        missing = [number for number in dict.fromkeys(classes) if number not in known]
        if len(missing) > LARGEST_SHARE * len(classes):
            known = dict(zip(classes, self._predict_all(sequence, masked), strict=True)) | known
        elif missing:
            made = self.local(sequence[[classes.index(number) for number in missing]], codes=self.codes)
            known |= dict(zip(missing, made, strict=True))
        if self.remember:
            self._keep(known)
        return torch.stack([known[number] for number in classes])

    def _keep(self, first: dict[int, Tensor]) -> None:
        """Remember the first steps' logits of some classes, and forget those that were not asked for the longest."""
        with self._lock:
            for number, logits in first.items():
                kept = self._first.pop(number, None)
                # A copy, or a row would keep its batch.
                self._first[number] = logits.clone() if kept is None else kept
            while len(self._first) * logits.nbytes > KEPT_BYTES:
                self._first.popitem(last=False)

    def _predict_all(self, sequence: Tensor, masked: Tensor) -> Tensor:
        """Return the logits of all tokens."""
        if not self._splits_layers:
            return self.transformer(sequence, codes=self.codes)
        x = _layers(self.transformer)[-1](self._inner_layers(sequence, masked))
        return self.transformer.head(x, self.transformer.token_embedding.weight, self.codes)

    def _inner_layers(self, sequence: Tensor, masked: Tensor) -> Tensor:
        """Return what the last layer reads, (B, S, E), of sequences masked where bool (B, S) says."""
        first, *others = _layers(self.transformer)[:-1]
        local = _layers(self.local)[0].attention
        if self._mask_qkv is None:
            alone = self.transformer.embed(torch.full_like(sequence[:1], self.mask_token))
            self._mask_qkv = local.qkv(alone)
        x = self.transformer.embed(sequence)
        qkv = self._mask_qkv.repeat(len(x), 1, 1)
        qkv[~masked] = local.qkv(x[~masked])
        x = first.mlp(first.attention.attend(x, *first.attention.split(qkv)))
        for layer in others:
            x = layer(x)
        return x

    def _last_layer(self, x: Tensor, positions: Tensor) -> Tensor:
        """Return logits (B, S, K), 0 but at positions int64 (B, P), of what the last layer reads."""
        last, local = _layers(self.transformer)[-1], _layers(self.local)[-1]
        q, k, v = last.attention.project(x)
        at = torch.arange(len(x), device=x.device)[:, None], positions
        q = q.transpose(1, 2)[at].transpose(1, 2)
        chosen = local.mlp(local.attention.attend(x[at], q, k, v))
        made = self.local.head(chosen, self.local.token_embedding.weight, self.codes)
        return made.new_zeros(*x.shape[:2], self.codes).index_put_(at, made)


def _layers(transformer: Transformer) -> list[Layer]:
    return cast(list[Layer], list(transformer.layers))
