"""LPIPS: how different two images look to a network that was taught to judge as people do.

Shapes: B batch, C channels, H × W pixels, h × w a feature map.
Source: Zhang, Isola, Efros, Shechtman, Wang: The Unreasonable Effectiveness of Deep Features as a Perceptual
Metric, CVPR 2018, eq. 1; version 0.1. Parameters bear the names of the published files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgit.errors import ConfigError, ImageError, unknown_name
from maskgit.evaluation.metrics.fidelity import batch_mask, masked_mean
from maskgit.evaluation.networks.weights import load_strictly, local_file, read_state_dict


def unit_length(x: Tensor) -> Tensor:
    """Scale the channels of each pixel to length 1, in float32: (B, C, h, w) → the same."""
    x = x.float()
    # vector_norm, unlike the square root of a sum of squares, has a finite gradient at 0.
    return x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)


def _vgg16() -> tuple[list[nn.Module], list[int]]:
    """Return VGG16's convolutional layers, and the channels of its five stages."""
    layers: list[nn.Module] = []
    stages = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
    channels = 3
    for stage, widths in enumerate(stages):
        if stage:
            layers.append(nn.MaxPool2d(2))
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return layers, [widths[-1] for widths in stages]


def _alexnet() -> tuple[list[nn.Module], list[int]]:
    """Return AlexNet's convolutional layers, and the channels of its five."""
    first, second, third, fourth, fifth = widths = [64, 192, 384, 256, 256]
    layers = [
        *(nn.Conv2d(3, first, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(first, second, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(second, third, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(third, fourth, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(fourth, fifth, 3, padding=1), nn.ReLU()),
    ]
    return layers, widths


@dataclass(frozen=True)
class LPIPSEntry:
    """A row of the table of LPIPS networks.

    Attributes:
        taps: the layers after which features are compared.
        urls: where the network's weights and those of its comparison are published.
    """

    taps: tuple[int, ...]
    urls: tuple[str, str]


_LINEAR = "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/v0.1"
LPIPS_NETS = {
    "vgg": LPIPSEntry(
        (3, 8, 15, 22, 29),
        ("https://download.pytorch.org/models/vgg16-397923af.pth", f"{_LINEAR}/vgg.pth"),
    ),
    "alex": LPIPSEntry(
        (1, 4, 7, 9, 11),
        ("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", f"{_LINEAR}/alex.pth"),
    ),
}
_LAYERS = {"vgg": _vgg16, "alex": _alexnet}


class LPIPS(nn.Module):
    """The network, its five comparisons and their weights."""

    def __init__(self, name: str = "vgg") -> None:
        """Make a network with weights that are still to be loaded.

        Args:
            name: a name from `LPIPS_NETS`.
        """
        super().__init__()
        if name not in LPIPS_NETS:
            raise unknown_name("LPIPS network", name, LPIPS_NETS)
        self.taps = LPIPS_NETS[name].taps
        layers, widths = _LAYERS[name]()
        # Modules of their own, so that each file's names are the names of one module's parameters.
        self.backbone, self.lins = nn.Module(), nn.Module()
        self.backbone.features = nn.Sequential(*layers)
        for stage, width in enumerate(widths):
            # The published layer is a dropout, which is off here, and a convolution.
            lin = nn.Module()
            lin.model = nn.Sequential(nn.Identity(), nn.Conv2d(width, 1, 1, bias=False))
            self.lins.add_module(f"lin{stage}", lin)
        # ImageNet's mean and deviation for inputs in [−1, 1], rounded as LPIPS rounds them.
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer(
            "shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False
        )
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)

    def features(self, images: Tensor) -> list[Tensor]:
        """Return what is compared: float (B, 3, H, W) in [0, 1] → five float32 (B, C, h, w), unit length."""
        x = (2 * images - 1 - self.shift) / self.scale
        taps = []
        for index, layer in enumerate(self.backbone.features):  # type: ignore[arg-type]
            x = layer(x)
            if index in self.taps:
                taps.append(unit_length(x))
        return taps

    def differences(self, a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
        """Return the weighted squared differences of two results of `features`: five float32 (B, 1, h, w)."""
        return [
            F.conv2d((x - y).square(), getattr(self.lins, f"lin{stage}").model[1].weight.float()).float()
            for stage, (x, y) in enumerate(zip(a, b, strict=True))
        ]

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the distance of each pair of images.

        Args:
            a, b: float (B, 3, H, W) in [0, 1], at least 32 pixels a side.

        Returns:
            float32 (B,), at least 0.

        Raises:
            ImageError: the shapes do not fit.
        """
        _check_images(a, b)
        parts = [x.mean((1, 2, 3)) for x in self.differences(self.features(a), self.features(b))]
        return torch.stack(parts).sum(0)

    def maps(self, a: Tensor, b: Tensor) -> Tensor:
        """Return where two images differ: each stage's differences, enlarged (bilinear) and added.

        Args:
            a, b: float (B, 3, H, W) in [0, 1], at least 32 pixels a side.

        Returns:
            float32 (B, H, W), at least 0.

        Raises:
            ImageError: the shapes do not fit.

        Source: the option `spatial` of the authors' code.
        """
        _check_images(a, b)
        size = tuple(a.shape[2:])
        parts = [
            F.interpolate(x, size, mode="bilinear", align_corners=False)
            for x in self.differences(self.features(a), self.features(b))
        ]
        return torch.stack(parts).sum(0).squeeze(1)


def masked_lpips(net: LPIPS, a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of each pair's LPIPS map within a mask.

    A pixel's value depends on its surroundings too, so that what lies around the mask is not without effect.

    Args:
        net: the network, on the images' device.
        a, b: float (B, 3, H, W) in [0, 1], at least 32 pixels a side.
        mask: bool (B, H, W) or (H, W), True where images are compared.

    Returns:
        float64 (B,), at least 0.

    Raises:
        ImageError: the shapes do not fit.
        RegionError: the mask is not bool, does not fit, or is empty for an image.
    """
    return masked_mean(net.maps(a, b), batch_mask(mask, a))


def load_lpips(
    name: str = "vgg", *, weights: Sequence[str | Path] | None = None, device: str | torch.device = "cpu"
) -> LPIPS:
    """Return an LPIPS network: frozen, in eval mode, on the device.

    Args:
        name: a name from `LPIPS_NETS`; papers mostly report "alex" for evaluation and train with "vgg".
        weights: a path or https URL for the network's weights, and one for LPIPS's own.
        device: where it computes.

    Raises:
        ConfigError: the name is not in the table, or weights are missing.
        CheckpointError: a weights file is not what it should be.
        DownloadError: a URL cannot be reached.
    """
    if name not in LPIPS_NETS:
        raise unknown_name("LPIPS network", name, LPIPS_NETS)
    if weights is None or isinstance(weights, str) or len(weights) != 2:
        raise ConfigError(
            f"LPIPS with {name} needs 2 weights files: name a path or URL for each; they are published at "
            f"{' and '.join(LPIPS_NETS[name].urls)}."
        )
    # Initial weights are drawn from the global generator, which the caller's training may depend on.
    with torch.random.fork_rng(devices=[]):
        net = LPIPS(name)
    backbone, lins = (local_file(place) for place in weights)
    load_strictly(net.backbone, read_state_dict(backbone), backbone, unused=("classifier.",))
    load_strictly(net.lins, read_state_dict(lins), lins)
    return net.requires_grad_(False).eval().to(device)


def _check_images(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or a.ndim != 4 or a.shape[1] != 3 or min(a.shape[2:]) < 32:
        raise ImageError(
            "LPIPS compares two batches of one shape (B, 3, H, W), of at least 32 pixels a side, "
            f"not {tuple(a.shape)} with {tuple(b.shape)}."
        )
