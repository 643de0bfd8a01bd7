"""The shapes of the networks, as typed descriptions validated when made."""

from dataclasses import dataclass

from maskgit.errors import ConfigError
from maskgit.foundation.checks import Config, check_choice, check_range

ACTIVATIONS = ("swish", "relu")


NORMS = ("GN", "LN", "BN")


QUANTIZERS = ("vq", "gumbel")


# Far above any real model, so that a hostile config cannot ask for absurd memory.
MAX_WIDTH = 65_536


MAX_LAYERS = 512


MAX_CODES = 65_536  # token caches hold uint16


MAX_GRID = 256


@dataclass(frozen=True)
class TokenizerConfig(Config):
    """The shape of a VQGAN tokenizer; the defaults are the released ImageNet ones.

    Source: official configs/vqgan_config.py.
    """

    filters: int = 128
    num_res_blocks: int = 2
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    embedding_dim: int = 256
    codebook_size: int = 1024
    conv_downsample: bool = False
    activation: str = "swish"
    norm: str = "GN"
    quantizer: str = "vq"

    def validate(self) -> None:
        check_range("filters", self.filters, 1, 4096)
        check_range("num_res_blocks", self.num_res_blocks, 1, 16)
        check_range("len(channel_multipliers)", len(self.channel_multipliers), 1, 8)
        for multiplier in self.channel_multipliers:
            check_range("channel_multipliers", multiplier, 1, 64)
        check_range("embedding_dim", self.embedding_dim, 1, MAX_WIDTH)
        check_range("codebook_size", self.codebook_size, 2, MAX_CODES)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("norm", self.norm, NORMS)
        check_choice("quantizer", self.quantizer, QUANTIZERS)
        if self.norm == "GN" and self.filters % 32:
            raise ConfigError(f"filters must be a multiple of 32 for GroupNorm, but is {self.filters}.")

    @property
    def patch_size(self) -> int:
        """Pixels a token covers, in each direction."""
        return 2 ** (len(self.channel_multipliers) - 1)


@dataclass(frozen=True)
class TransformerConfig(Config):
    """The shape of a masked transformer; the defaults are the released ImageNet 256×256 ones.

    `grid_size` is the number of tokens a side: the sequence holds one class token and grid_size² tokens.

    Source: official configs/maskgit_class_cond_config.py.
    """

    num_codes: int = 1024
    num_classes: int = 1000
    grid_size: int = 16
    hidden_size: int = 768
    num_layers: int = 24
    num_heads: int = 16
    intermediate_size: int = 3072
    dropout: float = 0.1

    def validate(self) -> None:
        check_range("num_codes", self.num_codes, 2, MAX_CODES)
        check_range("num_classes", self.num_classes, 1, 1_000_000)
        check_range("grid_size", self.grid_size, 1, MAX_GRID)
        check_range("hidden_size", self.hidden_size, 1, MAX_WIDTH)
        check_range("num_layers", self.num_layers, 1, MAX_LAYERS)
        check_range("num_heads", self.num_heads, 1, self.hidden_size)
        check_range("intermediate_size", self.intermediate_size, 1, MAX_WIDTH)
        check_range("dropout", self.dropout, 0, 0.99)
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"hidden_size must be a multiple of num_heads, but {self.hidden_size} is not one of {self.num_heads}."
            )

    @property
    def num_tokens(self) -> int:
        """Image tokens in a sequence, the class token not counted."""
        return self.grid_size**2

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: codes, classes, and the mask token."""
        return self.num_codes + self.num_classes + 1
