"""From feature vectors to codes and back: one row of `QUANTIZERS` is one way.

| `quantizer` | a code is | source |
|---|---|---|
| "vq" | the nearest row of a codebook | official nets/vqgan_tokenizer.py, VectorQuantizer |
| "gumbel" | the same; in training a mixture of rows | the same file, GumbelVQ |
| "simvq" | the nearest row of a fixed random codebook times a learned matrix | SimVQ (arXiv 2411.02038) |
| "ibq" | the row with the largest dot product; gradients reach all rows | IBQ (arXiv 2412.02692) |
| "lfq" | a bit a dimension, its sign | MAGVIT-v2 (arXiv 2310.05737) |
| "bsq" | the same of vectors of length 1 | BSQ-ViT (arXiv 2406.07548) |
| "fsq" | a level a dimension, the nearest | FSQ (arXiv 2309.15505) |

Shapes: B batch, D embedding_dim, K codebook_size, h × w the token grid.
"""

from collections.abc import Callable
from math import atanh, prod
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgit.errors import ConfigError
from maskgit.networks.config import QUANTIZER_CHECKS, TokenizerConfig

# Distances that are held at once when codes are looked up, so that 2^18 codes take no more memory than 2^10.
MAX_DISTANCES = 2**26


class Quantized(NamedTuple):
    """What a quantizer returns in training.

    Attributes:
        features: float (B, D, h, w), what the decoder reads; gradients flow to the encoder.
        codes: float (B, D, h, w), the chosen codes' vectors themselves; gradients flow to the codebook.
        tokens: int64 (B, h, w).
        inputs: float (B, D, h, w), the encoder's features as they were compared with the codes.
        distances: float32 (B, h, w, K), to every code; of bits, one such for each group of dimensions. Empty where
            nothing needs them.
    """

    features: Tensor
    codes: Tensor
    tokens: Tensor
    inputs: Tensor
    distances: tuple[Tensor, ...]


class Quantizer(nn.Module):
    """The nearest code, with the straight-through gradient; a subclass says what codes are.

    Attributes:
        losses: the parts of its loss in training, names in `training.objectives.losses.QUANTIZER_LOSSES`.
    """

    losses: ClassVar[tuple[str, ...]] = ("commitment", "codebook", "entropy")

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.codebook_size, self.embedding_dim = config.codebook_size, config.embedding_dim

    @property
    def codes(self) -> Tensor:
        """The vectors of all codes, float (K, D)."""
        raise NotImplementedError

    def inputs(self, features: Tensor) -> Tensor:
        """Return features as they are compared with codes: float (B, D, h, w) → the same."""
        return features

    def distances(self, features: Tensor) -> Tensor:
        """Return what the chosen code has least of, in float32: (B, D, h, w) → (B, h, w, K).

        It is the squared Euclidean distance unless the class says otherwise.
        """
        # Float32 whatever the features' type: near ties would otherwise change tokens.
        return _squared_distances(self.inputs(features.float()).movedim(1, -1), self.codes.float())

    def tokens(self, features: Tensor) -> Tensor:
        """Return the code of each vector: float (B, D, h, w) → int64 (B, h, w)."""
        rows = max(1, MAX_DISTANCES // self.codebook_size)
        if torch.compiler.is_compiling() or features[:, 0].numel() <= rows:
            return self.distances(features).argmin(-1)
        vectors = features.movedim(1, -1).flatten(0, -2).split(rows)
        found = torch.cat([self.distances(part.T[None, :, :, None]).argmin(-1).flatten() for part in vectors])
        return found.view(len(features), *features.shape[2:])

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the vectors of tokens: int64 (B, h, w) → float (B, D, h, w)."""
        return self.codes[tokens].movedim(-1, 1)

    def forward(self, features: Tensor, *, entropy_groups: int = 1) -> Quantized:
        """Quantize with gradients, as training needs it.

        Args:
            features: float (B, D, h, w).
            entropy_groups: of bits, the groups of dimensions whose distances are returned; 0 for none.
        """
        distances = self.distances(features)
        tokens = distances.argmin(-1)
        inputs, codes = self.inputs(features), self.embed(tokens)
        return Quantized(inputs + (codes - inputs).detach(), codes, tokens, inputs, (distances,))


def _squared_distances(x_BhwD: Tensor, codes_KD: Tensor) -> Tensor:
    cross = x_BhwD @ codes_KD.T
    return x_BhwD.square().sum(-1, keepdim=True) - 2 * cross + codes_KD.square().sum(-1)


class VectorQuantizer(Quantizer):
    """The nearest row of a codebook (`vq`); with `normalize_codes`, of vectors of length 1."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__(config)
        self.normalize = config.normalize_codes
        self.codebook = nn.Parameter(torch.empty(self.codebook_size, self.embedding_dim))
        # The official initialiser: uniform variance scaling with fan-in, whose fan-in here is the number of codes.
        bound = (3 / self.codebook_size) ** 0.5
        nn.init.uniform_(self.codebook, -bound, bound)

    @property
    def codes(self) -> Tensor:
        return F.normalize(self.codebook, dim=-1) if self.normalize else self.codebook

    def inputs(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=1) if self.normalize else features


class GumbelQuantizer(VectorQuantizer):
    """A soft mixture of codes in training, the nearest code otherwise (`gumbel`)."""

    losses: ClassVar[tuple[str, ...]] = ()

    def forward(
        self, features: Tensor, noise: Tensor | None = None, tau: float = 1.0, *, entropy_groups: int = 0
    ) -> Quantized:
        """Quantize with gradients.

        Args:
            features: float (B, D, h, w).
            noise: Gumbel noise, float (B, h, w, K); drawn from torch's global generator when None.
            tau: the softmax's temperature.
            entropy_groups: of no effect.

        Returns:
            `Quantized`, whose `features` and `codes` are the mixture.
        """
        distances = self.distances(features)
        if noise is None:
            noise = -torch.empty_like(distances).exponential_().log()
        weights = ((noise - distances) / tau).softmax(-1)
        mixture = (weights @ self.codes.float()).movedim(-1, 1).to(features.dtype)
        return Quantized(mixture, mixture, distances.argmin(-1), self.inputs(features), (distances,))


class SimVectorQuantizer(Quantizer):
    """The nearest row of a codebook that is fixed numbers times a learned matrix, so that all rows move (`simvq`)."""

    losses: ClassVar[tuple[str, ...]] = ("commitment", "codebook")

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__(config)
        dim = self.embedding_dim
        self.register_buffer("fixed", torch.randn(self.codebook_size, dim) * dim**-0.5)
        self.transform = nn.Linear(dim, dim, bias=False)

    @property
    def codes(self) -> Tensor:
        return self.transform(self.fixed)


class IndexBackpropagationQuantizer(VectorQuantizer):
    """The row with the largest dot product; gradients flow as if the softmax of all products had chosen (`ibq`)."""

    losses: ClassVar[tuple[str, ...]] = ("index", "entropy")

    def distances(self, features: Tensor) -> Tensor:
        """Return the negative dot product with every code."""
        return -(self.inputs(features.float()).movedim(1, -1) @ self.codes.float().T)

    def forward(self, features: Tensor, *, entropy_groups: int = 1) -> Quantized:
        distances = self.distances(features)
        tokens, soft = distances.argmin(-1), (-distances).softmax(-1)
        hard = torch.zeros_like(soft).scatter_(-1, tokens[..., None], 1.0)
        made = ((hard + (soft - soft.detach())) @ self.codes.float()).movedim(-1, 1).to(features.dtype)
        return Quantized(made, self.embed(tokens), tokens, self.inputs(features), (distances,))


class FiniteScalarQuantizer(Quantizer):
    """Each dimension, bounded by a tanh, is rounded to one of its levels, the first the code's lowest digit (`fsq`).

    Codes run from −1 to 1; a dimension with an even number of levels has one more of them below zero.
    """

    losses: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__(config)
        self.levels = config.levels or (2,) * self.embedding_dim

    def inputs(self, features: Tensor) -> Tensor:
        made = []
        for x, levels in zip(features.unbind(1), self.levels, strict=True):
            # A little more than the levels' width, so that the outermost can be reached.
            half, offset = (levels - 1) * 1.001 / 2, 0.0 if levels % 2 else 0.5
            shift = atanh(offset / half)
            made.append(((x + shift).tanh() * half - offset) / (levels // 2))
        return torch.stack(made, 1)

    @property
    def codes(self) -> Tensor:
        return self.embed(torch.arange(self.codebook_size)[None, None])[0, :, 0].T

    def digits(self, inputs: Tensor) -> list[Tensor]:
        """Return each dimension's digit: float (B, D, h, w) → D times int64 (B, h, w)."""
        columns = zip(inputs.unbind(1), self.levels, strict=True)
        return [((x * (n // 2)).round() + n // 2).long() for x, n in columns]

    def value(self, digit: Tensor, levels: int) -> Tensor:
        """Return what the decoder reads for a digit, float32."""
        return (digit - levels // 2).float() / (levels // 2)

    def tokens(self, features: Tensor) -> Tensor:
        digits = self.digits(self.inputs(features.float()))
        return torch.stack([digit * prod(self.levels[:i]) for i, digit in enumerate(digits)]).sum(0)

    def embed(self, tokens: Tensor) -> Tensor:
        columns = enumerate(self.levels)
        return torch.stack([self.value(tokens // prod(self.levels[:i]) % n, n) for i, n in columns], 1)

    def forward(self, features: Tensor, *, entropy_groups: int = 1) -> Quantized:
        tokens, inputs = self.tokens(features), self.inputs(features)
        codes = self.embed(tokens).to(features.dtype)
        distances: tuple[Tensor, ...] = ()
        if entropy_groups and "entropy" in self.losses:
            distances = self._distances_by_group(inputs.float().movedim(1, -1), entropy_groups)
        return Quantized(inputs + (codes - inputs).detach(), codes, tokens, inputs, distances)

    def _distances_by_group(self, x_BhwD: Tensor, groups: int) -> tuple[Tensor, ...]:
        size = self.embedding_dim // groups
        numbers = torch.arange(2**size, device=x_BhwD.device)[None, None]
        codes_KG = self.embed(numbers)[0, :size, 0].T
        return tuple(_squared_distances(part, codes_KG) for part in x_BhwD.split(size, dim=-1))


class LookupFreeQuantizer(FiniteScalarQuantizer):
    """Each dimension's sign is a bit of the code, the first the lowest, and ±1 is what the decoder reads (`lfq`)."""

    losses: ClassVar[tuple[str, ...]] = ("commitment", "entropy")

    def inputs(self, features: Tensor) -> Tensor:
        return features

    def digits(self, inputs: Tensor) -> list[Tensor]:
        return [(x > 0).long() for x in inputs.unbind(1)]

    def value(self, digit: Tensor, levels: int) -> Tensor:
        return (2 * digit - 1).float()


class BinarySphericalQuantizer(LookupFreeQuantizer):
    """The same of features of length 1, so that the decoder reads ±1/√D (`bsq`)."""

    def inputs(self, features: Tensor) -> Tensor:
        return F.normalize(features, dim=1)

    def value(self, digit: Tensor, levels: int) -> Tensor:
        return super().value(digit, levels) * self.embedding_dim**-0.5


QUANTIZERS: dict[str, type[Quantizer]] = {
    "vq": VectorQuantizer,
    "gumbel": GumbelQuantizer,
    "simvq": SimVectorQuantizer,
    "ibq": IndexBackpropagationQuantizer,
    "lfq": LookupFreeQuantizer,
    "bsq": BinarySphericalQuantizer,
    "fsq": FiniteScalarQuantizer,
}
if QUANTIZERS.keys() != QUANTIZER_CHECKS.keys():
    raise AssertionError("The quantizers here and in networks.config differ.")


def register_quantizer(
    name: str, kind: type[Quantizer], check: Callable[[TokenizerConfig], None] = lambda config: None
) -> None:
    """Add a quantizer of one's own, so that configs can name it.

    Args:
        name: its name.
        kind: its class, made from a `TokenizerConfig`.
        check: raises a `ConfigError` for a config that it cannot serve.

    Raises:
        ConfigError: the name is taken.
    """
    if name in QUANTIZERS:
        raise ConfigError(f"There is a quantizer {name} already. Choose another name.")
    QUANTIZERS[name], QUANTIZER_CHECKS[name] = kind, check


def make_quantizer(config: TokenizerConfig) -> Quantizer:
    """Return the quantizer that a tokenizer's config names."""
    return QUANTIZERS[config.quantizer](config)
