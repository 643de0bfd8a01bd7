"""From feature vectors to codes and back: the two official quantizers.

Shapes: B batch, D embedding_dim, K codebook_size, h × w the token grid.
Source: official nets/vqgan_tokenizer.py, VectorQuantizer and GumbelVQ.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from maskgit.networks.config import QUANTIZERS, TokenizerConfig


class Quantized(NamedTuple):
    """What a quantizer returns in training.

    Attributes:
        features: float (B, D, h, w), what the decoder reads; gradients flow to the encoder.
        codes: float (B, D, h, w), the chosen codebook vectors themselves; gradients flow to the codebook.
        tokens: int64 (B, h, w), the nearest codes.
        distances: float32 (B, h, w, K), squared Euclidean distances to every code.
    """

    features: Tensor
    codes: Tensor
    tokens: Tensor
    distances: Tensor


class VectorQuantizer(nn.Module):
    """The nearest code, with the straight-through gradient (`vq`)."""

    def __init__(self, codebook_size: int, embedding_dim: int) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.empty(codebook_size, embedding_dim))
        # The official initialiser: uniform variance scaling with fan-in, whose fan-in here is the number of codes.
        bound = (3 / codebook_size) ** 0.5
        nn.init.uniform_(self.codebook, -bound, bound)

    def distances(self, features: Tensor) -> Tensor:
        """Return squared distances to every code, in float32: (B, D, h, w) → (B, h, w, K)."""
        # Float32 whatever the features' type: near ties would otherwise change tokens.
        x_BhwD = features.movedim(1, -1).float()
        codebook = self.codebook.float()
        cross = x_BhwD @ codebook.T
        return x_BhwD.square().sum(-1, keepdim=True) - 2 * cross + codebook.square().sum(-1)

    def tokens(self, features: Tensor) -> Tensor:
        """Return the nearest code of each vector: float (B, D, h, w) → int64 (B, h, w)."""
        return self.distances(features).argmin(-1)

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the codebook vectors of tokens: int64 (B, h, w) → float (B, D, h, w)."""
        return self.codebook[tokens].movedim(-1, 1)

    def forward(self, features: Tensor) -> Quantized:
        """Quantize with gradients, as training needs it: float (B, D, h, w) → `Quantized`."""
        distances = self.distances(features)
        tokens = distances.argmin(-1)
        codes = self.embed(tokens)
        return Quantized(features + (codes - features).detach(), codes, tokens, distances)


class GumbelQuantizer(VectorQuantizer):
    """A soft mixture of codes in training, the nearest code otherwise (`gumbel`)."""

    def forward(self, features: Tensor, noise: Tensor | None = None, tau: float = 1.0) -> Quantized:
        """Quantize with gradients.

        Args:
            features: float (B, D, h, w).
            noise: Gumbel noise, float (B, h, w, K); drawn from torch's global generator when None.
            tau: the softmax's temperature.

        Returns:
            `Quantized`, whose `features` and `codes` are the mixture.
        """
        distances = self.distances(features)
        if noise is None:
            noise = -torch.empty_like(distances).exponential_().log()
        weights = ((noise - distances) / tau).softmax(-1)
        mixture = (weights @ self.codebook.float()).movedim(-1, 1).to(features.dtype)
        return Quantized(mixture, mixture, distances.argmin(-1), distances)


_TABLE = {"vq": VectorQuantizer, "gumbel": GumbelQuantizer}
if tuple(_TABLE) != QUANTIZERS:
    raise AssertionError("config.QUANTIZERS and the table of quantizers differ")


def make_quantizer(config: TokenizerConfig) -> VectorQuantizer:
    """Return the quantizer that a tokenizer's config names."""
    return _TABLE[config.quantizer](config.codebook_size, config.embedding_dim)
