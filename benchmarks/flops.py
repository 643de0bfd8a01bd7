"""Floating point operations of the networks' products and convolutions, counted from the configs.

A multiplication and an addition are two. Norms, activations and softmax are left out, as is usual: they are
less than a hundredth. Shapes: B images, S = N + 1 sequence, E hidden_size.
"""

from maskgit.config import ModelConfig
from maskgit.networks.config import TokenizerConfig, TransformerConfig


def forward(config: TransformerConfig, batch: int = 1) -> int:
    """Return those of the logits of all image codes at all positions."""
    size, length = config.hidden_size, config.num_tokens + 1
    linear = 4 * size * size + 2 * size * config.intermediate_size
    attention = 2 * length * size
    head = size * size + size * config.num_codes
    return 2 * batch * length * (config.num_layers * (linear + attention) + head)


def encode(config: TokenizerConfig, image_size: int, batch: int = 1) -> int:
    """Return those of turning images into tokens, the distances to all codes included."""
    widths = [config.filters * m for m in config.channel_multipliers]
    side, channels = image_size, config.filters
    total = _conv(3, channels, 3, side)
    for level, width in enumerate(widths):
        total += _blocks(channels, width, side, config)
        channels = width
        if level < len(widths) - 1:
            side //= 2
            total += _conv(width, width, 4, side) if config.conv_downsample else 0
    total += _blocks(channels, channels, side, config)
    total += _conv(channels, config.embedding_dim, 1, side)
    total += _conv(config.embedding_dim, config.codebook_size, 1, side)
    return batch * total


def decode(config: TokenizerConfig, image_size: int, batch: int = 1) -> int:
    """Return those of turning tokens into images."""
    widths = [config.filters * m for m in reversed(config.channel_multipliers)]
    side, channels = image_size // config.patch_size, widths[0]
    total = _conv(config.embedding_dim, channels, 3, side) + _blocks(channels, channels, side, config)
    for level, width in enumerate(widths):
        total += _blocks(channels, width, side, config)
        channels = width
        if level < len(widths) - 1:
            side *= 2
            total += _conv(width, width, 3, side)
    return batch * (total + _conv(channels, 3, 3, side))


def generate(config: ModelConfig, steps: int, batch: int = 1) -> int:
    """Return those of images made in some steps without guidance."""
    return steps * forward(config.transformer, batch) + decode(config.tokenizer, config.image_size, batch)


def _conv(inputs: int, outputs: int, kernel: int, side: int) -> int:
    """Return those of a convolution whose result is of side × side pixels."""
    return 2 * kernel * kernel * inputs * outputs * side * side


def _blocks(inputs: int, width: int, side: int, config: TokenizerConfig) -> int:
    """Return those of a level's residual blocks, of which the first may change the width."""
    shortcut = _conv(width, width, 1, side) if inputs != width else 0
    convs = _conv(inputs, width, 3, side) + (2 * config.num_res_blocks - 1) * _conv(width, width, 3, side)
    return convs + shortcut
