"""The VQGAN tokenizer: image → tokens → image.

Shapes: B batch, C channels, H × W pixels, h × w tokens, D embedding_dim.
Source: official nets/vqgan_tokenizer.py (no attention layers) and nets/layers.py; with `block = "taming"` the network of
taming transformers (arXiv 2012.09841), as LlamaGen (arXiv 2406.06525) publishes it.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgit.errors import ImageError
from maskgit.foundation.devices import whole_float32
from maskgit.networks.config import TokenizerConfig
from maskgit.networks.quantizer import make_quantizer


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel, (B, C, H, W) → the same (Flax normalizes the last axis)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.movedim(1, -1)).movedim(-1, 1)


# Flax's defaults: ε 1e-6 for GroupNorm and LayerNorm; BatchNorm is made with ε 1e-5 and momentum 0.9, which
# PyTorch counts from the other end.
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "GN": lambda channels: nn.GroupNorm(32, channels, eps=1e-6),
    "LN": lambda channels: ChannelLayerNorm(channels, eps=1e-6),
    "BN": lambda channels: nn.BatchNorm2d(channels, eps=1e-5, momentum=0.1),
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"swish": nn.SiLU, "relu": nn.ReLU}


class ResBlock(nn.Module):
    """Norm, activation, 3×3 convolution, twice, beside a shortcut."""

    def __init__(self, in_channels: int, channels: int, config: TokenizerConfig) -> None:
        super().__init__()
        self.taming = config.block == "taming"
        self.norm1 = NORMS[config.norm](in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=self.taming)
        self.norm2 = NORMS[config.norm](channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=self.taming)
        self.activation = ACTIVATIONS[config.activation]()
        self.shortcut = None
        if in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels if self.taming else channels, channels, 1, bias=self.taming)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.activation(self.norm1(x)))
        y = self.conv2(self.activation(self.norm2(y)))
        # The official shortcut of a block that changes width reads the processed features, not the block's
        # input; the released weights were trained that way.
        return y + (x if self.shortcut is None else self.shortcut(x if self.taming else y))


class SelfAttention(nn.Module):
    """One head that looks at every pixel, added to its input: (B, C, H, W) → the same (arXiv 2012.09841)."""

    def __init__(self, channels: int, config: TokenizerConfig) -> None:
        super().__init__()
        self.norm = NORMS[config.norm](channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None].chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return x + self.out(y.unflatten(2, x.shape[2:]))


class Downsample(nn.Conv2d):
    """A convolution of stride 2; an even kernel is padded alike on all sides, one of 3 at the right and below."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__(channels, channels, kernel, stride=2, padding=1 if kernel == 4 else 0)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input if self.padding[0] else F.pad(input, (0, 1, 0, 1)))


class Encoder(nn.Module):
    """Image to features: float (B, 3, H, W) in [0, 1] → (B, D, h, w)."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.filters * m for m in config.channel_multipliers]
        self.num_res_blocks = config.num_res_blocks
        taming = config.block == "taming"
        self.conv_in = nn.Conv2d(3 * config.stem**2, config.filters, 3, padding=1, bias=taming)
        blocks, downs, channels = [], [], config.filters
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                blocks.append(ResBlock(channels, width, config))
                channels = width
            if level < len(widths) - 1:
                downs.append(
                    Downsample(width, config.downsample_kernel) if config.conv_downsample else nn.AvgPool2d(2)
                )
        before = len(blocks)
        blocks += [ResBlock(channels, channels, config) for _ in range(config.middle_blocks)]
        self.blocks = nn.ModuleList(blocks)
        self.downs = nn.ModuleList(downs)
        if config.attention:
            # After each block of the last level, and after the first in the middle.
            places = range(before - config.num_res_blocks, before + 1)
            self.attentions = nn.ModuleDict({str(i): SelfAttention(channels, config) for i in places})
        self.norm_out = NORMS[config.norm](channels)
        self.activation = ACTIVATIONS[config.activation]()
        if config.latent_channels:
            self.conv_out: nn.Module = nn.Conv2d(channels, config.latent_channels, 3, padding=1)
            self.projection: nn.Module = nn.Conv2d(config.latent_channels, config.embedding_dim, 1)
        else:
            self.conv_out = nn.Conv2d(channels, config.embedding_dim, 1)

    def forward(self, images: Tensor) -> Tensor:
        config = self.config
        if config.symmetric_pixels:
            images = 2 * images - 1
        x = self.conv_in(F.pixel_unshuffle(images, config.stem) if config.stem > 1 else images)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if config.attention and str(i) in self.attentions:
                x = self.attentions[str(i)](x)
            level, last = divmod(i + 1, self.num_res_blocks)
            if last == 0 and level <= len(self.downs):
                x = self.downs[level - 1](x)
        x = self.conv_out(self.activation(self.norm_out(x)))
        return self.projection(x) if config.latent_channels else x


class Upsample(nn.Conv2d):
    """Each pixel made four, then a 3×3 convolution: (B, C, H, W) → (B, C, 2H, 2W)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.interpolate(input, scale_factor=2.0, mode="nearest"))


class Decoder(nn.Module):
    """Features to image: float (B, D, h, w) → (B, 3, H, W), nominally in [0, 1]."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.filters * m for m in reversed(config.channel_multipliers)]
        self.num_res_blocks = config.decoder_res_blocks or config.num_res_blocks
        self.middle_blocks = config.middle_blocks if config.block == "taming" else self.num_res_blocks
        channels = widths[0]
        if config.latent_channels:
            self.projection = nn.Conv2d(config.embedding_dim, config.latent_channels, 1)
        self.conv_in = nn.Conv2d(config.latent_channels or config.embedding_dim, channels, 3, padding=1)
        blocks = [ResBlock(channels, channels, config) for _ in range(self.middle_blocks)]
        if config.attention:
            # After the first block in the middle, and after each of the first level.
            places = (0, *range(self.middle_blocks, self.middle_blocks + self.num_res_blocks))
            self.attentions = nn.ModuleDict({str(i): SelfAttention(channels, config) for i in places})
        ups: list[nn.Module] = []
        for level, width in enumerate(widths):
            for _ in range(self.num_res_blocks):
                blocks.append(ResBlock(channels, width, config))
                channels = width
            if level < len(widths) - 1:
                ups.append(Upsample(width))
        self.blocks = nn.ModuleList(blocks)
        self.ups = nn.ModuleList(ups)
        self.norm_out = NORMS[config.norm](channels)
        self.activation = ACTIVATIONS[config.activation]()
        self.conv_out = nn.Conv2d(channels, 3 * config.stem**2, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        config = self.config
        x = self.conv_in(self.projection(features) if config.latent_channels else features)
        for i, block in enumerate(self.blocks):
            x = block(x)
            if config.attention and str(i) in self.attentions:
                x = self.attentions[str(i)](x)
            level, last = divmod(i + 1 - self.middle_blocks, self.num_res_blocks)
            if last == 0 and 1 <= level <= len(self.ups):
                x = self.ups[level - 1](x)
        x = self.conv_out(self.activation(self.norm_out(x)))
        if config.stem > 1:
            x = F.pixel_shuffle(x, config.stem)
        return (x + 1) / 2 if config.symmetric_pixels else x


class Tokenizer(nn.Module):
    """The first stage: images to a grid of discrete tokens and back."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quantizer = make_quantizer(config)
        self.decoder = Decoder(config)

    @property
    def patch_size(self) -> int:
        """Pixels a token covers, in each direction."""
        return self.config.patch_size

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the tokens of images.

        Args:
            images: float (B, 3, H, W) in [0, 1], RGB; H and W multiples of `patch_size`.

        Returns:
            int64 (B, H / patch_size, W / patch_size), each in [0, codebook_size).

        Raises:
            ImageError: the shape does not fit.

        Source: official `encode_to_indices`.
        """
        patch = self.patch_size
        if images.ndim != 4 or images.shape[1] != 3:
            raise ImageError(f"Images must be of shape (B, 3, H, W), but are {tuple(images.shape)}.")
        if images.shape[2] % patch or images.shape[3] % patch or 0 in images.shape:
            raise ImageError(
                f"Image sides must be multiples of {patch}, but are {images.shape[3]} × {images.shape[2]} pixels."
            )
        with whole_float32(images.device, self.encoder):
            features = self.encoder(images.to(self.dtype))
        with whole_float32(images.device):
            return self.quantizer.tokens(features)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Return the images of tokens.

        Args:
            tokens: int64 (B, h, w), each in [0, codebook_size).

        Returns:
            float (B, 3, h · patch_size, w · patch_size), RGB, nominally in [0, 1] and not clamped.

        Raises:
            ImageError: the shape does not fit, or, on the CPU, a token is out of range.

        Source: official `decode_from_indices`.
        """
        if tokens.ndim != 3:
            raise ImageError(f"Tokens must be of shape (B, h, w), but are {tuple(tokens.shape)}.")
        # On a GPU the look would make the host wait.
        codes = self.config.codebook_size
        if tokens.device.type == "cpu" and not (int(tokens.min()) >= 0 and int(tokens.max()) < codes):
            raise ImageError(
                f"Tokens must be in [0, {codes}), but run from {tokens.min()} to {tokens.max()}."
            )
        with whole_float32(tokens.device, self.decoder):
            return self.decoder(self.quantizer.embed(tokens).to(self.dtype))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.decoder.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights, which is the type that the networks compute in."""
        return self.decoder.conv_in.weight.dtype
