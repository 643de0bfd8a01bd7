"""The tokenizer's convolutions, laid out for speed.

Shapes: B batch, C channels, H × W pixels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgit.networks.tokenizer import Downsample, ResBlock, Upsample

CHANNELS_LAST = torch.channels_last


class PackedConvolution(nn.Conv2d):
    """A convolution on a CPU whose weights oneDNN packs once, at the first call, and not at every one.

    Its results are those of `nn.Conv2d`, to the bit. It is for inference: gradients do not go through.
    """

    pack: Tensor | None
    pads: bool  # As a `Downsample` of kernel 3 does, at the right and below.

    def forward(self, input: Tensor) -> Tensor:
        if self.pads:
            input = F.pad(input, (0, 1, 0, 1))
        return torch.ops.mkldnn._convolution_pointwise(*self._arguments(input), "none", [], "")

    def plus(self, input: Tensor, added: Tensor) -> Tensor:
        """Return the convolution of an input plus something of its result's shape, (B, C, H, W)."""
        input, *others = self._arguments(input)
        added = added.contiguous(memory_format=CHANNELS_LAST)
        return torch.ops.mkldnn._convolution_pointwise.binary(
            input, added, *others, "add", 1.0, None, [], None
        )

    def _arguments(self, input: Tensor) -> tuple[Any, ...]:
        how = list(self.padding), list(self.stride), list(self.dilation), self.groups
        if self.pack is None:
            self.pack = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight.detach(), *how, list(input.shape)
            )
        return input.contiguous(memory_format=CHANNELS_LAST), self.pack, self.bias, *how

    @classmethod
    def of(cls, convolution: nn.Conv2d) -> "PackedConvolution":
        """Return the same convolution, sharing its parameters."""
        made = cls(
            convolution.in_channels,
            convolution.out_channels,
            convolution.kernel_size,  # type: ignore[arg-type]
            convolution.stride,  # type: ignore[arg-type]
            convolution.padding,  # type: ignore[arg-type]
            convolution.dilation,  # type: ignore[arg-type]
            convolution.groups,
            convolution.bias is not None,
            device="meta",
        )
        made.weight, made.bias, made.pack = convolution.weight, convolution.bias, None
        made.pads = isinstance(convolution, Downsample) and not convolution.padding[0]
        return made.eval()


class PackedResBlock(ResBlock):
    """A `ResBlock` of packed convolutions, of which the last adds the shortcut."""

    conv1: PackedConvolution
    conv2: PackedConvolution
    shortcut: PackedConvolution | None

    def __init__(self, block: ResBlock) -> None:
        """Share the parts of a block whose convolutions are packed."""
        nn.Module.__init__(self)
        for name, part in block.named_children():
            self.add_module(name, part)
        self.taming = block.taming
        if block.shortcut is None:
            self.shortcut = None
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.activation(self.norm1(x)))
        y = self.activation(self.norm2(y))
        if self.shortcut is None:
            return self.conv2.plus(y, x)
        y = self.conv2(y)
        return self.shortcut.plus(x if self.taming else y, y)


class MergedUpsample(nn.Module):
    """An `Upsample` as one transposed convolution, 4×4 with stride 2: 4 of 9 products are left.

    Of the nine weights that reach an output pixel, those that read the same input pixel are added beforehand.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: Upsample, *, packed: bool) -> None:
        """Merge the weights of a layer, packed by oneDNN at the first call if asked."""
        super().__init__()
        self.packed = packed
        # A transposed convolution has its inputs first.
        weight = merge_weights(merge_weights(layer.weight.detach().float()).mT).mT.transpose(0, 1)
        self.register_buffer("weight", weight.to(layer.weight.dtype).contiguous(memory_format=CHANNELS_LAST))
        self.register_buffer("bias", layer.bias.detach() if layer.bias is not None else None)

    def forward(self, input: Tensor) -> Tensor:
        if not self.packed:
            return F.conv_transpose2d(input, self.weight, self.bias, stride=2, padding=1)
        # Padding, that of the output, stride, dilation and groups.
        how = [1, 1], [0, 0], [2, 2], [1, 1], 1
        weight = self.weight
        if not weight.is_mkldnn:
            weight = self.weight = torch.ops.mkldnn._reorder_convolution_transpose_weight(
                weight, *how, list(input.shape)
            )
        input = input.contiguous(memory_format=CHANNELS_LAST)
        return torch.ops.mkldnn._convolution_transpose_pointwise(
            input, weight, self.bias, *how, "none", [], ""
        )


def merge_weights(weight: Tensor) -> Tensor:
    """Return the taps of a convolution behind a doubling, along the last axis: 3 → the 4 of a transposed one.

    An even output pixel sees w₀ on the pixel before and w₁ + w₂ on its own; an odd one w₀ + w₁ and w₂.
    """
    w0, w1, w2 = weight.unbind(-1)
    return torch.stack([w2, w1 + w2, w0 + w1, w0], dim=-1)


def can_pack(dtype: torch.dtype) -> bool:
    """Return whether torch can convolve with weights of a type that oneDNN has packed, on this CPU."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")):
        return False
    weight = torch.zeros(16, 16, 3, 3, dtype=dtype)
    try:
        torch.ops.mkldnn._reorder_convolution_weight(weight, [1, 1], [1, 1], [1, 1], 1, [1, 16, 8, 8])
    except RuntimeError:
        # As for bfloat16 where the CPU has no instructions for it.
        return False
    return True


def prepare_convolutions(module: nn.Module, *, pack: bool) -> None:
    """Lay a network's convolutions out with channels last, merge its up-samplings, and swish in place.

    Args:
        module: is changed in place.
        pack: whether oneDNN packs the weights; for float32 and bfloat16 on a CPU, without compilation.
    """
    if not pack:
        module.to(memory_format=CHANNELS_LAST)  # type: ignore[call-overload]
    _replace(module, pack)


def _replace(module: nn.Module, pack: bool) -> None:
    for name, child in module.named_children():
        if isinstance(child, Upsample):
            setattr(module, name, MergedUpsample(child, packed=pack))
        elif isinstance(child, nn.SiLU):
            # Its input is always a norm's output, which nothing else reads.
            setattr(module, name, nn.SiLU(inplace=True))
        elif pack and isinstance(child, nn.Conv2d):
            setattr(module, name, PackedConvolution.of(child))
        else:
            _replace(child, pack)
            if pack and isinstance(child, ResBlock):
                setattr(module, name, PackedResBlock(child))
