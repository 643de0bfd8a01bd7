"""Perceptual losses: how different two images look to a frozen network.

Shapes: B batch, C channels, H × W pixels, h × w a feature map.
Source: official configs/vqgan_config.py compares the features of a pretrained image model (weight 0.1, not on
logits); that code was not released. LPIPS is Zhang et al., CVPR 2018, version 0.1.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgit.errors import ConfigError, ImageError, unknown_name
from maskgit.evaluation.networks.features import load_effnet_lite0
from maskgit.evaluation.networks.lpips import LPIPS, LPIPS_NETS, unit_length
from maskgit.evaluation.networks.weights import load_strictly, local_file, read_state_dict
from maskgit.foundation.checks import check_count

# The means and deviations of ImageNet that torchvision's networks were trained with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class PerceptualLoss(nn.Module):
    """The base of all perceptual losses: a frozen network whose features of two images are compared.

    Gradients flow to the reconstruction only, and `train()` leaves the network in eval mode.
    """

    def __init__(self, min_size: int) -> None:
        """Make the loss.

        Args:
            min_size: images whose shorter side has fewer pixels are enlarged (bilinear) until it has as many.
        """
        super().__init__()
        self.min_size = min_size

    def features(self, images: Tensor) -> list[Tensor]:
        """Return what is compared of images: float (B, 3, H, W) in [0, 1] → tensors of B entries."""
        raise NotImplementedError

    def distance(self, features: list[Tensor], expected: list[Tensor]) -> Tensor:
        """Return the mean difference of two results of `features`, a float32 scalar."""
        raise NotImplementedError

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        """Return the loss.

        Args:
            reconstruction: float (B, 3, H, W), RGB, nominally in [0, 1]; not clamped.
            target: the same shape, in [0, 1]; no gradient flows to it.

        Returns:
            A float32 scalar, at least 0: the mean over the batch.

        Raises:
            ImageError: the shapes do not fit.
        """
        if reconstruction.shape != target.shape or reconstruction.ndim != 4 or reconstruction.shape[1] != 3:
            raise ImageError(
                "A perceptual loss compares two batches of one shape (B, 3, H, W), "
                f"not {tuple(reconstruction.shape)} with {tuple(target.shape)}."
            )
        with torch.no_grad():
            expected = self.features(self._enlarge(target))
        return self.distance(self.features(self._enlarge(reconstruction)), expected)

    def train(self, mode: bool = True) -> "PerceptualLoss":
        return super().train(False)

    def _enlarge(self, images: Tensor) -> Tensor:
        height, width = images.shape[2:]
        if min(height, width) >= self.min_size:
            return images
        scale = self.min_size / min(height, width)
        size = (round(height * scale), round(width * scale))
        return F.interpolate(images, size, mode="bilinear", align_corners=False)


class NoPerceptualLoss(PerceptualLoss):
    """Always 0 (`none`)."""

    def features(self, images: Tensor) -> list[Tensor]:
        return []

    def distance(self, features: list[Tensor], expected: list[Tensor]) -> Tensor:
        return torch.zeros(())

    def forward(self, reconstruction: Tensor, target: Tensor) -> Tensor:
        return reconstruction.new_zeros((), dtype=torch.float32)


class EffNetLoss(PerceptualLoss):
    """Mean squared distance of EfficientNet-Lite0's unit-length features at several depths (`effnet-lite0`).

    Each tap's share is the squared distance of the two channel vectors, in [0, 4], averaged over pixels and
    batch; the loss is the mean of the taps.
    """

    # The last block at strides 2, 4, 8, 16 and 32, of 16, 24, 40, 112 and 320 channels.
    TAPS = (0, 2, 4, 10, 15)

    def __init__(self, net: Any, min_size: int, depth: int = len(TAPS)) -> None:
        """Make the loss.

        Args:
            net: EfficientNet-Lite0, as `load_effnet_lite0` returns it.
            min_size: see `PerceptualLoss`.
            depth: how many taps are compared, from the shallowest on; the layers below the last are not run.
        """
        super().__init__(min_size)
        self.taps = self.TAPS[:depth]
        self.stem, self.norm, self.activation = net._conv_stem, net._bn0, net._swish
        self.blocks = net._blocks[: self.taps[-1] + 1]

    def features(self, images: Tensor) -> list[Tensor]:
        # Depthwise convolutions are slower in bfloat16 than in float32 on a CPU, backwards above all.
        on_cpu = images.device.type == "cpu"
        with torch.autocast("cpu", enabled=False) if on_cpu else nullcontext():
            x = (2 * images - 1).to(self.stem.weight.dtype).contiguous(memory_format=torch.channels_last)
            x = self.activation(self.norm(self.stem(x)))
            taps = []
            for index, block in enumerate(self.blocks):
                x = block(x)
                if index in self.taps:
                    taps.append(x)
        return taps

    def distance(self, features: list[Tensor], expected: list[Tensor]) -> Tensor:
        shares = [
            (unit_length(a) - unit_length(b)).square().sum(1).mean()
            for a, b in zip(features, expected, strict=True)
        ]
        return torch.stack(shares).mean()


class LPIPSLoss(PerceptualLoss):
    """LPIPS, version 0.1, with the VGG16 network (`lpips-vgg`); see `maskgit.evaluation.networks.lpips`."""

    def __init__(self, min_size: int) -> None:
        super().__init__(min_size)
        self.net = LPIPS("vgg")

    def features(self, images: Tensor) -> list[Tensor]:
        return self.net.features(images)

    def distance(self, features: list[Tensor], expected: list[Tensor]) -> Tensor:
        return torch.stack([x.mean() for x in self.net.differences(features, expected)]).sum()


class Bottleneck(nn.Module):
    """A residual block of ResNet-50: 1×1, 3×3 and 1×1 convolutions beside a shortcut."""

    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        channels = 4 * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        return (self.bn3(self.conv3(y)) + self.downsample(x)).relu()


class ResNet50Loss(PerceptualLoss):
    """Mean squared difference of ResNet-50's pooled features (`resnet50`).

    Source: He et al., CVPR 2016, with the stride in the 3×3 convolution and parameters named as torchvision
    does; that pooled features are compared and not logits: official configs/vqgan_config.py.
    """

    def __init__(self, min_size: int) -> None:
        super().__init__(min_size)
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = 64
        for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
            layers = []
            for block in range(blocks):
                layers.append(Bottleneck(channels, width, 2 if stage and not block else 1))
                channels = 4 * width
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layers))
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)

    def features(self, images: Tensor) -> list[Tensor]:
        x = self.maxpool(self.bn1(self.conv1((images - self.mean) / self.std)).relu())
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        return [x.float().mean((2, 3))]

    def distance(self, features: list[Tensor], expected: list[Tensor]) -> Tensor:
        return F.mse_loss(features[0], expected[0])


def _make_none(paths: list[Path], min_size: int, depth: int) -> PerceptualLoss:
    return NoPerceptualLoss(min_size)


def _make_effnet(paths: list[Path], min_size: int, depth: int) -> PerceptualLoss:
    return EffNetLoss(load_effnet_lite0()[0], min_size, depth)


def _make_lpips(paths: list[Path], min_size: int, depth: int) -> PerceptualLoss:
    loss = LPIPSLoss(min_size)
    backbone, lins = paths
    load_strictly(loss.net.backbone, read_state_dict(backbone), backbone, unused=("classifier.",))
    load_strictly(loss.net.lins, read_state_dict(lins), lins)
    return loss


def _make_resnet50(paths: list[Path], min_size: int, depth: int) -> PerceptualLoss:
    loss = ResNet50Loss(min_size)
    load_strictly(loss, read_state_dict(paths[0]), paths[0], unused=("fc.",))
    return loss


@dataclass(frozen=True)
class PerceptualEntry:
    """A row of the table of perceptual losses.

    Attributes:
        make: makes the loss from its files' paths, the minimal image size and the depth.
        min_size: the default for images' shorter side, in pixels.
        depth: the largest depth, which is the default; 0 where there is no choice.
        urls: where its weights files are published; empty where they come with a package.
    """

    make: Callable[[list[Path], int, int], PerceptualLoss]
    min_size: int = 32
    depth: int = 0
    urls: tuple[str, ...] = ()


PERCEPTUAL = {
    # At 32 pixels the deepest map is a single pixel and sees little but padding, hence 64.
    "effnet-lite0": PerceptualEntry(_make_effnet, min_size=64, depth=len(EffNetLoss.TAPS)),
    "lpips-vgg": PerceptualEntry(_make_lpips, urls=LPIPS_NETS["vgg"].urls),
    "resnet50": PerceptualEntry(
        _make_resnet50, urls=("https://download.pytorch.org/models/resnet50-0676ba61.pth",)
    ),
    "none": PerceptualEntry(_make_none),
}


def make_perceptual(
    name: str,
    *,
    weights: str | Path | Sequence[str | Path] | None = None,
    depth: int | None = None,
    min_size: int | None = None,
    device: str | torch.device = "cpu",
) -> PerceptualLoss:
    """Return a perceptual loss by name: frozen, in eval mode, on the device.

    Args:
        name: a name from `PERCEPTUAL`.
        weights: a path or https URL for each file the loss needs, in the order of its entry's `urls`: nothing
            for effnet-lite0 and none; VGG16's and LPIPS's for lpips-vgg; ResNet-50's for resnet50.
        depth: for effnet-lite0, how many taps are compared, 1 to 5; all when None.
        min_size: images with a shorter side, in pixels, are enlarged to it, 1 to 1024; when None, 64 for
            effnet-lite0 and 32 for the others.
        device: where it computes.

    Raises:
        ConfigError: a name or setting is not allowed, or weights are missing.
        CheckpointError: a weights file is not what it should be.
        MaskGITError: a package that effnet-lite0 needs is missing.
    """
    if name not in PERCEPTUAL:
        raise unknown_name("perceptual loss", name, PERCEPTUAL)
    entry = PERCEPTUAL[name]
    if depth is None:
        depth = entry.depth
    elif not entry.depth:
        raise ConfigError(f"depth belongs to effnet-lite0: leave it out for {name}.")
    else:
        depth = check_count("depth", depth, 1, entry.depth)
    min_size = entry.min_size if min_size is None else min_size
    min_size = check_count("min_size", min_size, 1, 1024)
    paths = _weights_paths(name, weights, entry.urls)
    # Initial weights are drawn from the global generator, which the caller's training may depend on.
    with torch.random.fork_rng(devices=[]):
        loss = entry.make(paths, min_size, depth)
    return loss.requires_grad_(False).eval().to(device)


def _weights_paths(
    name: str, weights: str | Path | Sequence[str | Path] | None, urls: tuple[str, ...]
) -> list[Path]:
    places = [weights] if isinstance(weights, str | Path) else list(weights or ())
    if len(places) != len(urls):
        if not urls:
            raise ConfigError(f"The perceptual loss {name} takes no weights: leave them out.")
        raise ConfigError(
            f"The perceptual loss {name} needs {len(urls)} weights file(s), but {len(places)} were given: "
            f"name a path or URL for each; they are published at {' and '.join(urls)}."
        )
    return [local_file(place) for place in places]
