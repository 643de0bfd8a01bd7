"""The tokenizer's convolutions, laid out for speed.

Shapes: B batch, C channels, H × W pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskgit.tokenizer import Upsample


class MergedUpsample(nn.Module):
    """An `Upsample` as one transposed convolution, 4×4 with stride 2: 4 of 9 products are left.

    Of the nine weights that reach an output pixel, those that read the same input pixel are added beforehand.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, layer: Upsample) -> None:
        super().__init__()
        # A transposed convolution has its inputs first.
        weight = merge_weights(merge_weights(layer.weight.detach().float()).mT).mT.transpose(0, 1)
        self.register_buffer(
            "weight", weight.to(layer.weight.dtype).contiguous(memory_format=torch.channels_last)
        )
        self.register_buffer("bias", layer.bias.detach() if layer.bias is not None else None)

    def forward(self, input: Tensor) -> Tensor:
        return F.conv_transpose2d(input, self.weight, self.bias, stride=2, padding=1)


def merge_weights(weight: Tensor) -> Tensor:
    """Return the taps of a convolution behind a doubling, along the last axis: 3 → the 4 of a transposed one.

    An even output pixel sees w₀ on the pixel before and w₁ + w₂ on its own; an odd one w₀ + w₁ and w₂.
    """
    w0, w1, w2 = weight.unbind(-1)
    return torch.stack([w2, w1 + w2, w0 + w1, w0], dim=-1)


def prepare_convolutions(module: nn.Module) -> None:
    """Lay a network's convolutions out with channels last, merge its up-samplings, and swish in place."""
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    _replace(module)


def _replace(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, Upsample):
            setattr(module, name, MergedUpsample(child))
        elif isinstance(child, nn.SiLU):
            # Its input is always a norm's output, which nothing else reads.
            setattr(module, name, nn.SiLU(inplace=True))
        else:
            _replace(child)
