"""Layers that compute what those of the networks do, faster on a CPU: linear layers, GELUs, convolutions.

Shapes: B batch, C channels, H × W pixels.
"""

import functools
import math
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Packed weights belong to one number of rows; a guided and an unguided batch are two.
KEPT_PACKS = 2
# Numbers in one piece of a GELU: two of them stay in two cores' caches.
PIECE = 1 << 18
_OWN = threading.local()

Kind = TypeVar("Kind", bound=nn.Linear)


def has_mkl() -> bool:
    """Return whether torch can multiply with weights that MKL has packed."""
    return torch.backends.mkl.is_available() and hasattr(torch.ops.mkl, "_mkl_linear")


def has_onednn() -> bool:
    """Return whether torch can multiply with weights that oneDNN has packed."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class MklLinear(nn.Linear):
    """A float32 linear layer whose weights MKL has packed for the number of rows.

    Its results are those of `nn.Linear`, to the bit where that calls MKL's product, too. The packed weights take
    the weights' own size for each of the last two numbers of rows.
    """

    packs: dict[int, Tensor]

    def forward(self, input: Tensor) -> Tensor:
        rows = input.numel() // self.in_features
        pack = self.packs.get(rows)
        if pack is None:
            pack = torch.ops.mkl._mkl_reorder_linear_weight(self.weight.detach(), rows)
            # Another dictionary, for other threads may be reading this one.
            kept = list(self.packs.items())[-(KEPT_PACKS - 1) :]
            self.packs = dict([*kept, (rows, pack)])
        return torch.ops.mkl._mkl_linear(input, pack, self.weight, self.bias, rows)

    @classmethod
    def of(cls, linear: nn.Linear) -> "MklLinear":
        """Return the same layer, sharing its parameters."""
        made = _sharing(cls, linear)
        made.packs = {}
        return made


class OneDnnLinear(nn.Linear):
    """A linear layer whose weights oneDNN has packed, with a tanh-GELU behind it if wanted."""

    pack: Tensor
    gelu: bool

    def forward(self, input: Tensor) -> Tensor:
        attr, algorithm = ("gelu", "tanh") if self.gelu else ("none", "")
        return torch.ops.mkldnn._linear_pointwise(input, self.pack, self.bias, attr, [], algorithm)

    @classmethod
    def of(cls, linear: nn.Linear, *, gelu: bool = False) -> "OneDnnLinear":
        """Return the same layer, sharing its parameters."""
        made = _sharing(cls, linear)
        made.gelu = gelu
        made.pack = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        return made


class Int8Linear(nn.Module):
    """A linear layer in int8: weights scaled by output, inputs by row as they come.

    Rows have scales of their own, so an image does not depend on its companions. Where pairs of products are added
    in 16 bits (on CPUs without VNNI), inputs have 7 bits, for 8 would overflow.
    """

    def __init__(self, linear: nn.Linear) -> None:
        """Quantize a layer; its float weights are not kept."""
        super().__init__()
        weight = linear.weight.detach().float()
        self.scales = weight.abs().amax(1).clamp(min=1e-12) / 127
        self.zeros = torch.zeros(len(weight), dtype=torch.int64)
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        quantized = (weight / self.scales[:, None]).round().to(torch.int8)
        self.pack = torch.ops.onednn.qlinear_prepack(quantized, None)
        self.largest = 127 if adds_in_32_bits() else 63

    def forward(self, input: Tensor) -> Tensor:
        scale = input.abs().amax(-1, keepdim=True).clamp(min=1e-12) / self.largest
        # Without a sign: for signed inputs oneDNN has nothing but plain loops where there is no AMX.
        zero = self.largest + 1
        rows = (input / scale).round_().add_(zero).to(torch.uint8)
        product = torch.ops.onednn.qlinear_pointwise(
            rows, 1.0, zero, self.pack, self.scales, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return product * scale if self.bias is None else torch.addcmul(self.bias, product, scale)


def has_int8() -> bool:
    """Return whether torch has int8 products here."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_pointwise")


@functools.cache
def adds_in_32_bits() -> bool:
    """Return whether oneDNN adds products of int8 in 32 bits here, not pairs of them in 16, which may overflow."""
    # Whether the CPU has VNNI and whether oneDNN may use it only a product tells.
    rows, weight = torch.full((2, 64), 255, dtype=torch.uint8), torch.full((64, 64), 127, dtype=torch.int8)
    ones, zeros = torch.ones(64), torch.zeros(64, dtype=torch.int64)
    pack = torch.ops.onednn.qlinear_prepack(weight, None)
    product = torch.ops.onednn.qlinear_pointwise(
        rows, 1.0, 128, pack, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return bool((product == 127 * 127 * 64).all())


# How a layer may be computed: whether this build of torch can, and how to make the layer's module.
PATHS: dict[str, tuple[Callable[[], bool], Callable[[nn.Linear], nn.Module]]] = {
    "torch": (lambda: True, lambda linear: linear),
    "mkl": (has_mkl, MklLinear.of),
    "onednn": (has_onednn, OneDnnLinear.of),
    "int8": (has_int8, Int8Linear),
}
# What packs anew for another number of rows, which takes longer than it saves if that number keeps changing.
FIXED_ROWS = ("mkl",)


@functools.cache
def ways(dtype: torch.dtype) -> tuple[str, ...]:
    """Return the keys of `PATHS` by which a layer of a type can be computed here.

    Each is tried on a small layer: what oneDNN and MKL can do on a CPU, or are allowed to, only they know. "int8"
    takes and gives float32.
    """
    return tuple(name for name, (there, make) in PATHS.items() if there() and _works(name, make, dtype))


@torch.no_grad()
def _works(name: str, make: Callable[[nn.Linear], nn.Module], dtype: torch.dtype) -> bool:
    if name in ("mkl", "int8") and dtype != torch.float32:
        return False
    with torch.inference_mode(False):
        layer = nn.Linear(16, 16, dtype=dtype, device="meta").to_empty(device="cpu").requires_grad_(False)
        for parameter in layer.parameters():
            parameter.zero_()
        try:
            make(layer)(torch.zeros(2, 16, dtype=dtype))
        # As for bfloat16 in oneDNN where the CPU has no instructions for it.
        except RuntimeError:
            return False
    return True


def _sharing(kind: type[Kind], linear: nn.Linear) -> Kind:
    # On the meta device nothing is allocated for weights that are replaced at once.
    made = kind(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    made.weight, made.bias = linear.weight, linear.bias
    made.train(linear.training)
    return made


class PiecewiseGelu(nn.Module):
    """tanh-GELU of x + bias, in place and in pieces, as (x + bias) · σ(2u): half the time of torch's on a CPU.

    u = √(2/π)(y + 0.044715 y³) with y = x + bias, and ½(1 + tanh u) = σ(2u).
    """

    def __init__(self, bias: Tensor | None = None) -> None:
        """Take a bias float32 (C,), or none."""
        super().__init__()
        self.bias = bias
        slope = 2 * math.sqrt(2 / math.pi)
        self.slope, self.cubic = torch.tensor(slope), 0.044715 * slope

    def forward(self, x: Tensor) -> Tensor:
        """Change x, float32 (..., C) and contiguous, and return it."""
        rows = x.view(-1, x.shape[-1])
        pieces = max(1, min(len(rows), round(rows.numel() / PIECE)))
        size = -(-len(rows) // pieces)
        gates = _scratch(size * rows.shape[1]).view(size, rows.shape[1])
        for piece in rows.split(max(1, size)):
            gate = gates[: len(piece)]
            if self.bias is not None:
                piece.add_(self.bias)
            torch.addcmul(self.slope, piece, piece, value=self.cubic, out=gate)
            piece.mul_(gate.mul_(piece).sigmoid_())
        return x


def _scratch(count: int) -> Tensor:
    """Return this thread's buffer of that many float32 numbers; reusing one keeps it in the cache."""
    kept: Tensor | None = getattr(_OWN, "scratch", None)
    if kept is None or len(kept) < count:
        # Memory that is made in inference mode can be written to nowhere else.
        with torch.inference_mode(False):
            kept = _OWN.scratch = torch.empty(count)
    return kept[:count]


class BiasedStart(nn.Module):
    """A linear layer of which the first outputs alone have a bias, added in place."""

    def __init__(self, linear: nn.Linear, bias: Tensor) -> None:
        """Take a layer without a bias, and that of its first outputs, float32 (C,)."""
        super().__init__()
        self.linear = linear
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        y[..., : len(self.bias)].add_(self.bias)
        return y


class FoldedLayer(nn.Module):
    """A layer for inference: sums are made in place, and few modules are called; Python takes 1 % of a forward."""

    def __init__(self, layer: nn.Module) -> None:
        """Share the parts of a layer."""
        super().__init__()
        self.attention: Any = layer.attention
        self.mlp: Any = layer.mlp
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        attention, mlp = self.attention, self.mlp
        y = F.scaled_dot_product_attention(*attention.project(x)).transpose(1, 2).flatten(2)
        x = _normalize(attention.out(y).add_(x), attention.norm)
        return _normalize(mlp.down(mlp.activation(mlp.up(x))).add_(x), mlp.norm)


def _normalize(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return torch.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


class PackedConvolution(nn.Conv2d):
    """A convolution on a CPU whose weights oneDNN packs once, at the first call, and not at every one.

    Its results are those of `nn.Conv2d`, to the bit. It is for inference: gradients do not go through.
    """

    pack: Tensor | None
    pads: bool

    def forward(self, input: Tensor) -> Tensor:
        if self.pads:
            input = F.pad(input, (0, 1, 0, 1))
        return torch.ops.mkldnn._convolution_pointwise(*self._arguments(input), "none", [], "")

    def plus(self, input: Tensor, added: Tensor) -> Tensor:
        """Return the convolution of an input plus something of its result's shape, (B, C, H, W)."""
        input, *others = self._arguments(input)
        added = added.contiguous(memory_format=torch.channels_last)
        return torch.ops.mkldnn._convolution_pointwise.binary(
            input, added, *others, "add", 1.0, None, [], None
        )

    def _arguments(self, input: Tensor) -> tuple[Any, ...]:
        how = list(self.padding), list(self.stride), list(self.dilation), self.groups
        if self.pack is None:
            self.pack = torch.ops.mkldnn._reorder_convolution_weight(
                self.weight.detach(), *how, list(input.shape)
            )
        return input.contiguous(memory_format=torch.channels_last), self.pack, self.bias, *how

    @classmethod
    def of(cls, convolution: nn.Conv2d, *, pads: bool = False) -> "PackedConvolution":
        """Return the same convolution, sharing its parameters; `pads` adds a row and a column below and at the right."""
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
        made.pads = pads
        return made.eval()


class PackedResBlock(nn.Module):
    """A `ResBlock` of packed convolutions, of which the last adds the shortcut."""

    norm1: nn.Module
    norm2: nn.Module
    activation: nn.Module
    conv1: PackedConvolution
    conv2: PackedConvolution
    shortcut: PackedConvolution | None

    def __init__(self, block: nn.Module) -> None:
        """Share the parts of a block whose convolutions are packed."""
        super().__init__()
        for name, part in block.named_children():
            self.add_module(name, part)
        self.taming = bool(block.taming)
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

    def __init__(self, layer: nn.Conv2d, *, packed: bool) -> None:
        """Merge the weights of a layer, packed by oneDNN at the first call if asked."""
        super().__init__()
        self.packed = packed
        # A transposed convolution has its inputs first.
        weight = merge_weights(merge_weights(layer.weight.detach().float()).mT).mT.transpose(0, 1)
        self.register_buffer(
            "weight", weight.to(layer.weight.dtype).contiguous(memory_format=torch.channels_last)
        )
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
        input = input.contiguous(memory_format=torch.channels_last)
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
