"""What both loops compute in, and what dropout draws from."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from maskgit.engine.host import has_bfloat16_units
from maskgit.foundation.checks import check_choice

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the type that networks compute in: "float32", "bfloat16", or "auto", bfloat16 where it is fast."""
    if name != "auto":
        check_choice("precision", name, PRECISIONS)
        return PRECISIONS[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and has_bfloat16_units()
    return torch.bfloat16 if fast else torch.float32


def warnings_of_speed(precision: str, device: torch.device, *, compiles: bool = False) -> tuple[str, ...]:
    """Return sentences about what will be slow: a precision that the CPU does not know, and compilation."""
    told = []
    if precision == "bfloat16" and device.type == "cpu" and not has_bfloat16_units():
        told.append(
            'precision is "bfloat16", but this CPU has no units for it: expect a tenth of the speed. Choose "auto".'
        )
    if compiles:
        told.append("Compiling the layers: the first steps may take some minutes, the others are faster.")
    return tuple(told)


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Return the context in which networks compute in `precision`; their weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16)


def attention(device: torch.device, *, compiled: bool = False) -> AbstractContextManager[object]:
    """Return the context in which the attention that trains fastest on a device is computed.

    On a CPU that is the plain one, in bfloat16 where autocast says so: the backward pass of torch's fused attention for
    CPUs takes five times as long. It is chosen for the current thread, or for the whole process if the blocks are
    compiled, since Dynamo cannot trace a thread's choice.
    """
    if device.type != "cpu":
        return nullcontext()
    return _plain_in_process() if compiled else _PlainAttention()


@contextmanager
def _plain_in_process() -> Iterator[None]:
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    # Despite its module, this governs the plain attention of every device.
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


class _PlainAttention(TorchFunctionMode):
    """Computes attention as two products and a softmax; unlike `sdpa_kernel`, in the current thread alone."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attend(*args, **kwargs or {})
        return func(*args, **kwargs or {})


def _attend(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0) -> Tensor:
    """Return what each query gathers: (B, H, P, D) of keys and values (B, H, S, D)."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    # Each factor takes half of the scale, so that products stay in range.
    scale = math.sqrt(1 / math.sqrt(q.shape[-1]))
    weights = ((q * scale) @ (k * scale).transpose(-2, -1)).softmax(-1)
    return F.dropout(weights, dropout_p) @ v


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch a module to evaluation, without gradients, inside a `with` block."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(training)


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seed torch's global generators, which dropout reads, from (seed, step, rank).

    So a resumed run draws what an uninterrupted one would. Differs: dropout depends on the rank, since torch's
    dropout cannot count by sample; runs of 1 and 2 processes agree exactly where dropout is 0.
    """
    state = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state) % 2**63)
