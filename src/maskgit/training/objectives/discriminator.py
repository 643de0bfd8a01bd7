"""The discriminators that judge reconstructions: StyleGAN's, which is the official one, and PatchGAN's.

Shapes: B batch, C channels, S × S pixels.
Source: official nets/discriminator.py; Isola et al. (arXiv 1611.07004), §3.2.2, as VQGAN has it.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgit.errors import ConfigError
from maskgit.foundation.checks import check_count


def num_filters(size: int, channel_multiplier: int = 1, max_filters: int = 512) -> int:
    """Return the number of filters at a resolution, at most `max_filters`.

    The official numbers, 512 up to 32 pixels and 256, 128, … 16 at 64, 128, … 1024.

    Differs: the official code knows powers of two alone; any other size has the filters of the next one.
    """
    size = _next_power_of_two(size)
    return min(512 if size <= 32 else max(16, 2**14 // size * channel_multiplier), max_filters)


def _next_power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()


def blur_downsample(x: Tensor) -> Tensor:
    """Blur each channel with [1, 3, 3, 1] in both directions and keep every second pixel.

    Args:
        x: float (B, C, S, S).

    Returns:
        float (B, C, ⌊S / 2⌋, ⌊S / 2⌋).

    Source: official `BlurPool2D` (Zhang, Making Convolutional Networks Shift-Invariant Again, 2019).
    """
    # In float32 even under autocast, as the official code computes it; it is much the faster so on a CPU.
    with torch.autocast(x.device.type, enabled=False):
        precise = x.float()
        kernel = _blur_kernel(precise.dtype, x.device).expand(x.shape[1], 1, 4, 4)
        return F.conv2d(precise, kernel, stride=2, padding=1, groups=x.shape[1]).to(x.dtype)


@functools.cache
def _blur_kernel(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the kernel of the blur, (4, 4), which is kept on the device: made anew, it would be copied each time."""
    # Else one that is first made for an evaluation could not be used in training.
    with torch.inference_mode(False):
        line = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=dtype, device=device) / 8
        return line[:, None] * line


def check_discriminator_size(size: int) -> None:
    """Raise a `ConfigError` if images of `size` pixels a side are too small to judge."""
    if size < 4:
        raise ConfigError(
            f"The discriminator reads images of 4 pixels a side or more, but image_size is {size}: "
            "take larger images, or set adversarial_weight to 0."
        )


class DiscriminatorBlock(nn.Module):
    """Two convolutions with a down-sampling between them, beside a linear shortcut."""

    def __init__(self, in_channels: int, channels: int, blur_resample: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.conv2 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.blur_resample = blur_resample

    def _downsample(self, x: Tensor) -> Tensor:
        return blur_downsample(x) if self.blur_resample else F.avg_pool2d(x, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self._downsample(F.leaky_relu(self.conv1(x), 0.2))
        y = F.leaky_relu(self.conv2(y), 0.2)
        return (self.shortcut(self._downsample(x)) + y) / math.sqrt(2)


class Discriminator(nn.Module):
    """Images to logits, positive where they look real: float (B, 3, S, S) in [0, 1] → (B, 1)."""

    def __init__(
        self, image_size: int, channel_multiplier: int = 1, blur_resample: bool = True, max_filters: int = 512
    ) -> None:
        """Make the network with fresh weights.

        Images are halved to 4 pixels a side, as in the official network, or to 2 or 3 where S is no power of two.

        Args:
            image_size: S ≥ 4.
            channel_multiplier: scales the filters at 64 pixels and above.
            blur_resample: blur before down-sampling; plain averages otherwise.
            max_filters: a bound on the filters of every layer; 512 is the official network.

        Raises:
            ConfigError: a setting is out of range.
        """
        super().__init__()
        check_discriminator_size(image_size)
        channel_multiplier = check_count("channel_multiplier", channel_multiplier, 1, 64)
        max_filters = check_count("max_filters", max_filters, 1, 65_536)
        channels = num_filters(image_size, channel_multiplier, max_filters)
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        blocks = []
        for _ in range(_next_power_of_two(image_size).bit_length() - 3):
            image_size //= 2
            width = num_filters(image_size, channel_multiplier, max_filters)
            blocks.append(DiscriminatorBlock(channels, width, blur_resample))
            channels = width
        self.blocks = nn.ModuleList(blocks)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)
        self.dense1 = nn.Linear(channels * image_size**2, channels)
        self.dense2 = nn.Linear(channels, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        x = F.leaky_relu(self.conv_in(images), 0.2)
        for block in self.blocks:
            x = block(x)
        x = F.leaky_relu(self.conv_out(x), 0.2)
        # Contiguous first: the order of a channels-last tensor's memory must not reach the dense layer.
        x = F.leaky_relu(self.dense1(x.contiguous().flatten(1)), 0.2)
        return self.dense2(x)


class PatchDiscriminator(nn.Module):
    """Images to logits of overlapping patches: float (B, 3, S, S) in [0, 1] → (B, 1, s, s).

    Differs: GroupNorm in place of BatchNorm, so that a logit depends on its own image alone, as R1 needs it.
    """

    def __init__(
        self, image_size: int, channel_multiplier: int = 1, blur_resample: bool = True, max_filters: int = 512
    ) -> None:
        """Make the network with fresh weights: patches of 70 pixels, or fewer halvings where images are small.

        Args:
            image_size: S ≥ 4.
            channel_multiplier: scales the filters, 64 in the first layer.
            blur_resample: of no effect; convolutions of stride 2 halve.
            max_filters: a bound on the filters of every layer.

        Raises:
            ConfigError: a setting is out of range.
        """
        super().__init__()
        check_discriminator_size(image_size)
        channel_multiplier = check_count("channel_multiplier", channel_multiplier, 1, 64)
        max_filters = check_count("max_filters", max_filters, 1, 65_536)
        # The last two convolutions take a pixel off each.
        halvings = next(n for n in (3, 2, 1, 0) if image_size >> n >= 3)
        widths = [min(64 * channel_multiplier * 2**i, max_filters) for i in range(halvings + 1)]
        layers: list[nn.Module] = []
        for i, (before, width) in enumerate(zip([3, *widths], widths, strict=False)):
            layers.append(nn.Conv2d(before, width, 4, stride=2 if i < halvings else 1, padding=1))
            if i:
                layers.append(nn.GroupNorm(math.gcd(32, width), width))
            layers.append(nn.LeakyReLU(0.2))
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


DISCRIMINATORS: dict[str, type[Discriminator] | type[PatchDiscriminator]] = {
    "stylegan": Discriminator,
    "patchgan": PatchDiscriminator,
}
