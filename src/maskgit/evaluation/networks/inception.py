"""The Inception network that FID, sFID and the Inception Score are defined by.

It is TensorFlow's classify_image graph of 2015-12-05, with the weights as pytorch-fid publishes them.
It differs from torchvision's network in its 1008 classes, in average pools that leave the padding out of the
average, and in its last block, which takes a maximum there.

Shapes: B batch, H × W pixels.
Source: Szegedy et al.: Rethinking the Inception Architecture for Computer Vision, CVPR 2016, with the layer
sizes of that graph; parameters bear the names of the published file.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from maskgit.evaluation.networks.weights import load_strictly, read_state_dict
from maskgit.foundation.devices import shapes_only
from maskgit.foundation.download import sha256

URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
# The published file is named after the beginning of its own SHA-256.
PUBLISHED_SHA256 = "6726825d"
SIZE = 299
POOLED_DIM = 2048
NUM_CLASSES = 1008
# Channels of the layer mixed_6/conv that sFID compares, at 17 × 17 places.
SPATIAL_CHANNELS = 7
SPATIAL_DIM = 17 * 17 * SPATIAL_CHANNELS


class InceptionOutputs(NamedTuple):
    """What the network says of images.

    Attributes:
        pooled: float32 (B, 2048), the layer pool_3, which FID compares.
        spatial: float32 (B, 2023), the first 7 channels of mixed_6/conv in the order row, column, channel,
            which sFID compares.
        logits: float32 (B, 1008), without the last layer's bias, as the Inception Score takes them.
    """

    pooled: Tensor
    spatial: Tensor
    logits: Tensor


def resize_tf1(images: Tensor, size: int) -> Tensor:
    """Resize as TensorFlow 1 does: bilinear, the top left pixels on each other, without antialiasing.

    Pixel i of the result lies at i · (old size / new size), with neither half-pixel centres nor aligned
    corners; beyond the last pixel its value goes on.

    Args:
        images: float (B, C, H, W).
        size: pixels a side of the result.

    Returns:
        (B, C, size, size) of the same type.

    Source: the graph's operation ResizeBilinear with align_corners and half_pixel_centers off. StyleGAN's
    TorchScript network and torch-fidelity do the same.
    """
    top, bottom, down = _places(images.shape[2], size, images)
    left, right, across = _places(images.shape[3], size, images)
    rows = torch.lerp(images[:, :, top], images[:, :, bottom], down[:, None])
    return torch.lerp(rows[:, :, :, left], rows[:, :, :, right], across)


def _places(old: int, new: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return, for each new position, the two old pixels around it and the second's weight."""
    position = torch.arange(new, dtype=torch.float32, device=like.device) * torch.tensor(
        old / new, dtype=torch.float32
    )
    first = position.long().clamp(max=old - 1)
    return first, (first + 1).clamp(max=old - 1), (position - first).to(like.dtype)


def resize_half_pixel(images: Tensor, size: int) -> Tensor:
    """Resize with half-pixel centres, bilinear, without antialiasing, as pytorch-fid does.

    Args:
        images: float (B, C, H, W).
        size: pixels a side of the result.

    Returns:
        (B, C, size, size) of the same type.
    """
    return F.interpolate(images, (size, size), mode="bilinear", align_corners=False)


def prepare_tf1(images: Tensor) -> Tensor:
    """Return the network's input as the graph makes it: resized by `resize_tf1`, (255·x − 128) / 128."""
    return (resize_tf1(255 * images, SIZE) - 128) / 128


def prepare_pytorch_fid(images: Tensor) -> Tensor:
    """Return the network's input as pytorch-fid makes it: resized by `resize_half_pixel`, 2·x − 1."""
    return 2 * resize_half_pixel(images, SIZE) - 1


# How images in [0, 1] become the network's input; scores made in different ways cannot be compared.
PREPARATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tf1": prepare_tf1,
    "half-pixel": prepare_pytorch_fid,
}


class ConvNorm(nn.Module):
    """A convolution without bias, a BatchNorm and a ReLU."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        pad: bool = True,
    ) -> None:
        super().__init__()
        sides = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (sides[0] // 2, sides[1] // 2) if pad else (0, 0)
        self.conv = nn.Conv2d(in_channels, channels, sides, stride, padding, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()

    def fold(self) -> None:
        """Make one convolution of the convolution and the BatchNorm, which must be in eval mode."""
        assert isinstance(self.bn, nn.BatchNorm2d)
        self.conv = fuse_conv_bn_eval(self.conv, self.bn)
        self.bn = nn.Identity()


class Conv(NamedTuple):
    """A convolution of a branch; with stride 2 it is not padded."""

    name: str
    channels: int
    kernel: int | tuple[int, int]
    stride: int = 1


def average_pool(x: Tensor) -> Tensor:
    """Average 3 × 3 places, of which those outside the map do not count."""
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


def max_pool(x: Tensor) -> Tensor:
    """Take the maximum of 3 × 3 places, keeping the size."""
    return F.max_pool2d(x, 3, 1, 1)


def half_pool(x: Tensor) -> Tensor:
    """Take the maximum of 3 × 3 places at every second one."""
    return F.max_pool2d(x, 3, 2)


# One step of a branch: a convolution, two convolutions side by side, or a pool.
Step = Conv | tuple[Conv, Conv] | Callable[[Tensor], Tensor]


class Block(nn.Module):
    """Branches side by side, whose channels are concatenated; each is a chain of steps."""

    def __init__(self, in_channels: int, *branches: tuple[Step, ...]) -> None:
        super().__init__()
        self.branches = branches
        self.channels = 0
        for branch in branches:
            width = in_channels
            for step in branch:
                convs = _convs(step)
                for conv in convs:
                    layer = ConvNorm(width, conv.channels, conv.kernel, conv.stride, pad=conv.stride == 1)
                    self.add_module(conv.name, layer)
                width = sum(conv.channels for conv in convs) or width
            self.channels += width

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._run(branch, x) for branch in self.branches], 1)

    def _run(self, branch: tuple[Step, ...], x: Tensor) -> Tensor:
        for step in branch:
            convs = _convs(step)
            if convs:
                made = [self.get_submodule(conv.name)(x) for conv in convs]
                x = made[0] if len(made) == 1 else torch.cat(made, 1)
            else:
                x = step(x)  # type: ignore[operator]
        return x


def _convs(step: Step) -> tuple[Conv, ...]:
    if isinstance(step, Conv):
        return (step,)
    return step if isinstance(step, tuple) else ()


def _block_35(in_channels: int, pooled: int) -> Block:
    return Block(
        in_channels,
        (Conv("branch1x1", 64, 1),),
        (Conv("branch5x5_1", 48, 1), Conv("branch5x5_2", 64, 5)),
        (Conv("branch3x3dbl_1", 64, 1), Conv("branch3x3dbl_2", 96, 3), Conv("branch3x3dbl_3", 96, 3)),
        (average_pool, Conv("branch_pool", pooled, 1)),
    )


def _shrink_to_17(in_channels: int) -> Block:
    return Block(
        in_channels,
        (Conv("branch3x3", 384, 3, 2),),
        (Conv("branch3x3dbl_1", 64, 1), Conv("branch3x3dbl_2", 96, 3), Conv("branch3x3dbl_3", 96, 3, 2)),
        (half_pool,),
    )


def _block_17(in_channels: int, width: int) -> Block:
    return Block(
        in_channels,
        (Conv("branch1x1", 192, 1),),
        (
            Conv("branch7x7_1", width, 1),
            Conv("branch7x7_2", width, (1, 7)),
            Conv("branch7x7_3", 192, (7, 1)),
        ),
        (
            Conv("branch7x7dbl_1", width, 1),
            Conv("branch7x7dbl_2", width, (7, 1)),
            Conv("branch7x7dbl_3", width, (1, 7)),
            Conv("branch7x7dbl_4", width, (7, 1)),
            Conv("branch7x7dbl_5", 192, (1, 7)),
        ),
        (average_pool, Conv("branch_pool", 192, 1)),
    )


def _shrink_to_8(in_channels: int) -> Block:
    return Block(
        in_channels,
        (Conv("branch3x3_1", 192, 1), Conv("branch3x3_2", 320, 3, 2)),
        (
            Conv("branch7x7x3_1", 192, 1),
            Conv("branch7x7x3_2", 192, (1, 7)),
            Conv("branch7x7x3_3", 192, (7, 1)),
            Conv("branch7x7x3_4", 192, 3, 2),
        ),
        (half_pool,),
    )


def _block_8(in_channels: int, pool: Callable[[Tensor], Tensor]) -> Block:
    return Block(
        in_channels,
        (Conv("branch1x1", 320, 1),),
        (
            Conv("branch3x3_1", 384, 1),
            (Conv("branch3x3_2a", 384, (1, 3)), Conv("branch3x3_2b", 384, (3, 1))),
        ),
        (
            Conv("branch3x3dbl_1", 448, 1),
            Conv("branch3x3dbl_2", 384, 3),
            (Conv("branch3x3dbl_3a", 384, (1, 3)), Conv("branch3x3dbl_3b", 384, (3, 1))),
        ),
        (pool, Conv("branch_pool", 192, 1)),
    )


class Inception(nn.Module):
    """The network, from its prepared input to `InceptionOutputs`."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, 2, pad=False)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, pad=False)
        self.Mixed_5b = _block_35(192, 32)
        self.Mixed_5c = _block_35(self.Mixed_5b.channels, 64)
        self.Mixed_5d = _block_35(self.Mixed_5c.channels, 64)
        self.Mixed_6a = _shrink_to_17(self.Mixed_5d.channels)
        self.Mixed_6b = _block_17(self.Mixed_6a.channels, 128)
        self.Mixed_6c = _block_17(self.Mixed_6b.channels, 160)
        self.Mixed_6d = _block_17(self.Mixed_6c.channels, 160)
        self.Mixed_6e = _block_17(self.Mixed_6d.channels, 192)
        self.Mixed_7a = _shrink_to_8(self.Mixed_6e.channels)
        self.Mixed_7b = _block_8(self.Mixed_7a.channels, average_pool)
        self.Mixed_7c = _block_8(self.Mixed_7b.channels, max_pool)
        self.fc = nn.Linear(self.Mixed_7c.channels, NUM_CLASSES)

    def forward(self, x: Tensor) -> InceptionOutputs:
        """Return what the network says of its input, float (B, 3, 299, 299) in about [−1, 1]."""
        x = half_pool(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))
        x = half_pool(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))
        # The graph's mixed_6 is Mixed_6d here; its first channels are those of the branch mixed_6/conv.
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(self.Mixed_6e(x))))
        pooled = x.mean((2, 3))
        return InceptionOutputs(pooled, spatial, F.linear(pooled, self.fc.weight))


def load_inception(path: Path) -> tuple[Inception, str]:
    """Return the network for inference with its published weights, and their file's SHA-256.

    The network is frozen, in eval mode and in channels-last memory; each BatchNorm is folded into its
    convolution, which changes features by float32 rounding only.

    Args:
        path: a file in the layout of pt_inception-2015-12-05-6726825d.pth, or the same as safetensors.

    Raises:
        CheckpointError: the file is missing, damaged, or of another network.
    """
    state = read_state_dict(path)
    # Initial weights are not drawn: the caller's generator stays as it is, and time is saved.
    with shapes_only():
        net = Inception()
    net.to_empty(device="cpu")
    load_strictly(net, state, path)
    net.eval().requires_grad_(False)
    for layer in net.modules():
        if isinstance(layer, ConvNorm):
            layer.fold()
    return net.to(memory_format=torch.channels_last), sha256(path)  # type: ignore[call-overload]
