"""Linear layers on a CPU: the ways to compute one, and modules that go each way.

Shapes: M rows (of all images of a batch), I inputs, O outputs.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

# Packed weights belong to one number of rows; a guided and an unguided batch are two.
KEPT_PACKS = 2

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


def replace_linears(module: nn.Module, path: str) -> None:
    """Let every linear layer of a network go one way, in place."""
    make = PATHS[path][1]
    for name, child in module.named_children():
        if not isinstance(child, nn.Linear):
            replace_linears(child, path)
        # oneDNN has a tanh-GELU for nothing.
        elif (
            path == "onednn" and name in ("up", "dense") and is_tanh_gelu(getattr(module, "activation", None))
        ):
            setattr(module, name, OneDnnLinear.of(child, gelu=True))
            module.activation = nn.Identity()
        else:
            setattr(module, name, make(child))


def is_tanh_gelu(module: nn.Module | None) -> bool:
    """Return whether a module is the GELU that has a fast form."""
    return isinstance(module, nn.GELU) and module.approximate == "tanh"


def _sharing(kind: type[Kind], linear: nn.Linear) -> Kind:
    # On the meta device nothing is allocated for weights that are replaced at once.
    made = kind(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    made.weight, made.bias = linear.weight, linear.bias
    made.train(linear.training)
    return made
