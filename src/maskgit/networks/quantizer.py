"""From feature vectors to codes and back.

| `quantizer` | a code is | source |
|---|---|---|
| "vq" | the nearest row of a codebook | official nets/vqgan_tokenizer.py, VectorQuantizer |
| "gumbel" | the same; in training a mixture of rows | the same file, GumbelVQ |
| "lfq" | a bit a dimension, its sign; there is no codebook | MAGVIT-v2 (arXiv 2310.05737) |

Shapes: B batch, D embedding_dim, K codebook_size, h × w the token grid.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
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


class Quantizer(nn.Module):
    """What a tokenizer asks of its quantizer."""

    @property
    def codes(self) -> Tensor:
        """The vectors of all codes, float (K, D)."""
        raise NotImplementedError

    def distances(self, features: Tensor) -> Tensor:
        """Return squared distances to every code, in float32: (B, D, h, w) → (B, h, w, K)."""
        raise NotImplementedError

    def tokens(self, features: Tensor) -> Tensor:
        """Return the nearest code of each vector: float (B, D, h, w) → int64 (B, h, w)."""
        raise NotImplementedError

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the vectors of tokens: int64 (B, h, w) → float (B, D, h, w)."""
        raise NotImplementedError

    def forward(self, features: Tensor) -> Quantized:
        """Quantize with gradients, as training needs it: float (B, D, h, w) → `Quantized`."""
        raise NotImplementedError


class VectorQuantizer(Quantizer):
    """The nearest code, with the straight-through gradient (`vq`)."""

    def __init__(self, codebook_size: int, embedding_dim: int, *, normalize: bool = False) -> None:
        """Make a codebook; with `normalize`, features and codes are compared and read with length 1."""
        super().__init__()
        self.normalize = normalize
        self.codebook = nn.Parameter(torch.empty(codebook_size, embedding_dim))
        # The official initialiser: uniform variance scaling with fan-in, whose fan-in here is the number of codes.
        bound = (3 / codebook_size) ** 0.5
        nn.init.uniform_(self.codebook, -bound, bound)

    def distances(self, features: Tensor) -> Tensor:
        # Float32 whatever the features' type: near ties would otherwise change tokens.
        x_BhwD = features.movedim(1, -1).float()
        codebook = self.codes.float()
        if self.normalize:
            x_BhwD = F.normalize(x_BhwD, dim=-1)
        cross = x_BhwD @ codebook.T
        return x_BhwD.square().sum(-1, keepdim=True) - 2 * cross + codebook.square().sum(-1)

    def tokens(self, features: Tensor) -> Tensor:
        return self.distances(features).argmin(-1)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.codes[tokens].movedim(-1, 1)

    @property
    def codes(self) -> Tensor:
        return F.normalize(self.codebook, dim=-1) if self.normalize else self.codebook

    def forward(self, features: Tensor) -> Quantized:
        if self.normalize:
            features = F.normalize(features, dim=1)
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
        mixture = (weights @ self.codes.float()).movedim(-1, 1).to(features.dtype)
        return Quantized(mixture, mixture, distances.argmin(-1), distances)


class LookupFreeQuantizer(Quantizer):
    """Each feature's sign is a bit of the code, the first the lowest, and ±1 is what the decoder reads (`lfq`)."""

    def __init__(self, codebook_size: int, embedding_dim: int) -> None:
        super().__init__()
        self.codebook_size, self.embedding_dim = codebook_size, embedding_dim

    @property
    def codes(self) -> Tensor:
        return self.embed(torch.arange(self.codebook_size)[None, None])[0, :, 0].T

    def distances(self, features: Tensor) -> Tensor:
        x_BhwD = features.movedim(1, -1).float()
        # Made on the device: a copy at every step would make the host wait.
        codes_DK = self.embed(torch.arange(self.codebook_size, device=x_BhwD.device)[None, None])[0, :, 0]
        cross = x_BhwD @ codes_DK
        return x_BhwD.square().sum(-1, keepdim=True) - 2 * cross + self.embedding_dim

    def tokens(self, features: Tensor) -> Tensor:
        places = torch.arange(self.embedding_dim, device=features.device)[:, None, None]
        return ((features > 0).long() << places).sum(1)

    def embed(self, tokens: Tensor) -> Tensor:
        places = torch.arange(self.embedding_dim, device=tokens.device)[:, None, None]
        return (2 * ((tokens[:, None] >> places) & 1) - 1).float()

    def forward(self, features: Tensor) -> Quantized:
        tokens = self.tokens(features)
        codes = self.embed(tokens).to(features.dtype)
        return Quantized(features + (codes - features).detach(), codes, tokens, self.distances(features))


if QUANTIZERS != ("vq", "gumbel", "lfq"):
    raise AssertionError("config.QUANTIZERS and the quantizers here differ")


def make_quantizer(config: TokenizerConfig) -> Quantizer:
    """Return the quantizer that a tokenizer's config names."""
    size, dim = config.codebook_size, config.embedding_dim
    if config.quantizer == "lfq":
        return LookupFreeQuantizer(size, dim)
    kind = GumbelQuantizer if config.quantizer == "gumbel" else VectorQuantizer
    return kind(size, dim, normalize=config.normalize_codes)
