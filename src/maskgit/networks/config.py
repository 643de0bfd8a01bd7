"""The shapes of the networks, as typed descriptions validated when made."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from maskgit.errors import ConfigError
from maskgit.foundation.checks import Config, check_choice, check_range

ACTIVATIONS = ("swish", "relu")


NORMS = ("GN", "LN", "BN")


BLOCKS = ("official", "pre_norm", "modern")


GELUS = ("gelu_tanh", "gelu")


# Far above any real model, so that a hostile config cannot ask for absurd memory.
MAX_WIDTH = 65_536


MAX_LAYERS = 512


MAX_CODES = 2**18


MAX_GRID = 256


@dataclass(frozen=True)
class NetworkConfig(Config):
    """A network's shape: what official networks have, then choices that came later, which are stored where made."""

    LATER: ClassVar[str]

    def later_choices(self) -> dict[str, Any]:
        """Return the fields from `LATER` on that are not their defaults, by name."""
        fields = dataclasses.fields(self)
        first = [f.name for f in fields].index(self.LATER)
        return {f.name: getattr(self, f.name) for f in fields[first:] if getattr(self, f.name) != f.default}

    def to_dict(self) -> dict[str, Any]:
        """Return the config as plain JSON values, without later choices that were not made."""
        values, later = super().to_dict(), self.later_choices()
        names = [f.name for f in dataclasses.fields(self)]
        official = names[: names.index(self.LATER)]
        return {name: value for name, value in values.items() if name in official or name in later}


@dataclass(frozen=True)
class TokenizerConfig(NetworkConfig):
    """The shape of a VQGAN tokenizer; the defaults are the released ImageNet ones.

    Attributes:
        filters: channels at the finest level.
        num_res_blocks: residual blocks a level.
        channel_multipliers: channels of each level over `filters`; each level but the last halves the sides.
        embedding_dim: numbers in a code's vector.
        codebook_size: codes.
        conv_downsample: halve by a convolution instead of by averaging.
        activation: "swish" or "relu".
        norm: "GN", "LN" or "BN".
        quantizer: from vectors to codes; see `maskgit.networks.quantizer`.
        normalize_codes: compare and decode vectors of length 1 (arXiv 2110.04627).
        downsample_kernel: of the convolutions that halve: 4, or 3 padded at the right and below.
        block: "official", without biases, whose shortcuts read what the block made; or "taming", with them, whose
            shortcuts read what the block read, and which has two blocks in the middle.
        attention: one-head attention after each block of the coarsest level and in the middle.
        decoder_res_blocks: residual blocks a level of the decoder, 0 for `num_res_blocks`.
        latent_channels: channels between the networks and 1×1 convolutions to and from `embedding_dim`; 0 for none.
        symmetric_pixels: whether the networks compute with pixels in [−1, 1]; images are in [0, 1] all the same.
        stem: sides of the blocks of pixels that are folded into channels before the first convolution and unfolded
            after the last, 1 for none.

        levels: of quantizer fsq, the numbers that each dimension of a code is rounded to, such as (8, 5, 5, 5).

    Source: official configs/vqgan_config.py.
    """

    LATER: ClassVar[str] = "normalize_codes"

    filters: int = 128
    num_res_blocks: int = 2
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    embedding_dim: int = 256
    codebook_size: int = 1024
    conv_downsample: bool = False
    activation: str = "swish"
    norm: str = "GN"
    quantizer: str = "vq"
    normalize_codes: bool = False
    downsample_kernel: int = 4
    block: str = "official"
    attention: bool = False
    decoder_res_blocks: int = 0
    latent_channels: int = 0
    symmetric_pixels: bool = False
    stem: int = 1
    levels: tuple[int, ...] = ()

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
        check_choice("quantizer", self.quantizer, QUANTIZER_CHECKS)
        check_choice("block", self.block, ("official", "taming"))
        check_range("decoder_res_blocks", self.decoder_res_blocks, 0, 16)
        check_range("latent_channels", self.latent_channels, 0, MAX_WIDTH)
        if self.levels and self.quantizer != "fsq":
            raise ConfigError(f"levels are for quantizer fsq, but the quantizer is {self.quantizer}.")
        QUANTIZER_CHECKS[self.quantizer](self)
        for name, allowed in (("downsample_kernel", (3, 4)), ("stem", (1, 2, 4, 8))):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name} must be one of {allowed}, but is {getattr(self, name)}.")
        if self.norm == "GN" and self.filters % 32:
            raise ConfigError(f"filters must be a multiple of 32 for GroupNorm, but is {self.filters}.")

    @property
    def patch_size(self) -> int:
        """Pixels a token covers, in each direction."""
        return self.stem * 2 ** (len(self.channel_multipliers) - 1)

    @property
    def middle_blocks(self) -> int:
        """Residual blocks in the middle of each network."""
        return 2 if self.block == "taming" else self.num_res_blocks


def _check_codebook(config: TokenizerConfig) -> None:
    """Raise nothing: a codebook can have any number of rows of any width."""


def _check_unnormalized(config: TokenizerConfig) -> None:
    if config.normalize_codes:
        raise ConfigError(
            f"normalize_codes is for quantizers vq, gumbel and ibq, but the quantizer is {config.quantizer}."
        )


def _check_bits(config: TokenizerConfig) -> None:
    _check_unnormalized(config)
    if 2**config.embedding_dim != config.codebook_size:
        raise ConfigError(
            f"A code of quantizer {config.quantizer} is a bit a dimension: embedding_dim {config.embedding_dim} makes "
            f"{2 ** min(config.embedding_dim, 63):,} codes, but codebook_size is {config.codebook_size:,}."
        )


def _check_levels(config: TokenizerConfig) -> None:
    _check_unnormalized(config)
    levels = " × ".join(map(str, config.levels)) or "nothing"
    for count in config.levels:
        check_range("levels", count, 2, MAX_CODES)
    if len(config.levels) != config.embedding_dim:
        raise ConfigError(
            f"levels must have a number for each dimension, {config.embedding_dim} (embedding_dim), but are {levels}."
        )
    if math.prod(config.levels) != config.codebook_size:
        raise ConfigError(
            f"levels {levels} make {math.prod(config.levels):,} codes, but codebook_size is {config.codebook_size:,}."
        )


# By the quantizer's name, what it asks of a config. `networks.quantizer.QUANTIZERS` has their classes.
QUANTIZER_CHECKS: dict[str, Callable[[TokenizerConfig], None]] = {
    "vq": _check_codebook,
    "gumbel": _check_codebook,
    "simvq": _check_unnormalized,
    "ibq": _check_codebook,
    "lfq": _check_bits,
    "bsq": _check_bits,
    "fsq": _check_levels,
}


@dataclass(frozen=True)
class TransformerConfig(NetworkConfig):
    """The shape of a masked transformer; the defaults are the released ImageNet 256×256 ones.

    Attributes:
        num_codes: codes of the tokenizer.
        num_classes: classes.
        grid_size: rows of tokens, and tokens in a row.
        hidden_size: width E of the residual stream.
        num_layers: blocks.
        num_heads: attention heads; each is ⌊hidden_size / num_heads⌋ wide.
        intermediate_size: width between the two halves of a block's MLP.
        dropout: share of activations dropped in training.
        block: "official", BERT's with LayerNorm after each residual sum; "pre_norm", the same with LayerNorm before
            each half; or "modern", RMSNorm before each half, normalized queries and keys, SwiGLU, no biases.
        activation: of the MLP and the head, "gelu_tanh" or "gelu"; a modern block's is SwiGLU.
        positions: "learned", an embedding a position, or "rotary", rotated queries and keys by row and column
            (modern alone).
        conditioning: how the class enters: "token", a position of its own before the image's, or "adaln", scales,
            shifts and gates of every block (modern alone).
        class_embedding: "shared", classes are rows of the token embedding, whose mask row also stands for no class;
            or "own", a table of their own with a row for no class (always so in modern blocks and with groups).
        query_key_norm: of a modern block: "heads", RMSNorm of each head with a learned scale, or "width", of all
            heads together without one.
        registers: positions of a modern model that stand for nothing and that attention may use (arXiv 2309.16588).
        groups: parts that a code's number is split into, each predicted by itself: with g groups there are
            num_codes^(1/g) logits for each of g units a position (MaskBit, arXiv 2409.16211). Group 0 is the lowest.
        tie_embeddings: whether the head's matrix is the token embedding.
        output_bias: "codes", one a code, or "positions", one a position and code.
        predict_mask: whether the head scores the mask itself as one more code, which can be drawn and stays then.
        grid_columns: tokens in a row, where they are not as many as rows; 0 is `grid_size` (rotary positions alone).

    Source: official configs/maskgit_class_cond_config.py; for what is not official, Halton-MaskGIT (arXiv 2503.17076)
    and MaskBit.
    """

    LATER: ClassVar[str] = "block"

    num_codes: int = 1024
    num_classes: int = 1000
    grid_size: int = 16
    hidden_size: int = 768
    num_layers: int = 24
    num_heads: int = 16
    intermediate_size: int = 3072
    dropout: float = 0.1
    block: str = "official"
    activation: str = "gelu_tanh"
    positions: str = "learned"
    conditioning: str = "token"
    class_embedding: str = "shared"
    query_key_norm: str = "heads"
    registers: int = 0
    groups: int = 1
    tie_embeddings: bool = True
    output_bias: str = "codes"
    predict_mask: bool = False
    grid_columns: int = 0

    def validate(self) -> None:
        check_range("num_codes", self.num_codes, 2, MAX_CODES)
        check_range("num_classes", self.num_classes, 1, 1_000_000)
        check_range("grid_size", self.grid_size, 1, MAX_GRID)
        check_range("hidden_size", self.hidden_size, 1, MAX_WIDTH)
        check_range("num_layers", self.num_layers, 1, MAX_LAYERS)
        check_range("num_heads", self.num_heads, 1, self.hidden_size)
        check_range("intermediate_size", self.intermediate_size, 1, MAX_WIDTH)
        check_range("dropout", self.dropout, 0, 0.99)
        check_choice("block", self.block, BLOCKS)
        check_choice("activation", self.activation, GELUS)
        check_choice("positions", self.positions, ("learned", "rotary"))
        check_choice("conditioning", self.conditioning, ("token", "adaln"))
        check_choice("class_embedding", self.class_embedding, ("shared", "own"))
        check_choice("query_key_norm", self.query_key_norm, ("heads", "width"))
        check_choice("output_bias", self.output_bias, ("codes", "positions"))
        check_range("registers", self.registers, 0, 1024)
        check_range("groups", self.groups, 1, 18)
        check_range("grid_columns", self.grid_columns, 0, MAX_GRID)
        if self.grid_columns and self.positions != "rotary":
            raise ConfigError(
                f'grid_columns needs positions = "rotary", but positions are "{self.positions}", an embedding for each '
                "place of one square grid."
            )
        if self.grid_columns and self.output_bias == "positions":
            raise ConfigError(
                'grid_columns needs output_bias = "codes": a bias a position is of one grid alone.'
            )
        if self.block != "modern":
            if self.hidden_size % self.num_heads:
                raise ConfigError(
                    f"hidden_size must be a multiple of num_heads, but {self.hidden_size} is not one of {self.num_heads}."
                )
            for name in ("positions", "conditioning", "query_key_norm", "registers"):
                if getattr(self, name) != getattr(type(self), name):
                    raise ConfigError(
                        f'{name} = {getattr(self, name)!r} needs block = "modern", but block is "{self.block}".'
                    )
        if self.positions == "rotary" and self.head_size % 4:
            raise ConfigError(
                "Rotary positions turn pairs of numbers by row and by column, so a head's width must be a multiple of "
                f"4, but hidden_size {self.hidden_size} / num_heads {self.num_heads} is {self.head_size}."
            )
        if self.unit_codes**self.groups != self.num_codes:
            raise ConfigError(
                f"num_codes must be a whole number to the power of groups, but {self.num_codes:,} is none to the "
                f"power of {self.groups}."
            )

    @property
    def num_tokens(self) -> int:
        """Image tokens in a sequence, the class token not counted: a code each, or its groups one after the other."""
        rows, columns = self.grid
        return rows * columns * self.groups

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.grid_size, self.grid_columns or self.grid_size

    @property
    def unit_codes(self) -> int:
        """Codes that one token of the sequence chooses among: `num_codes`, or its root with groups."""
        return round(self.num_codes ** (1 / self.groups))

    @property
    def head_size(self) -> int:
        """Numbers in a head's query."""
        return self.hidden_size // self.num_heads

    @property
    def owns_classes(self) -> bool:
        """Whether classes have an embedding of their own."""
        return self.class_embedding == "own" or self.block == "modern" or self.groups > 1

    @property
    def vocab_size(self) -> int:
        """Numbers that a sequence may hold: the codes of a token, classes, and the mask token."""
        return self.unit_codes + self.num_classes + 1

    @property
    def num_logits(self) -> int:
        """Logits of a token."""
        return self.unit_codes + self.predict_mask
