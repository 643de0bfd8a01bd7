"""Float32 without TensorFloat-32 on a GPU, whatever the settings of the process.

A GPU may round the inputs of float32 products to TensorFloat-32, which keeps 10 of their 23 mantissa bits. In torch this
is on by default for convolutions and off by default for matrix products. With it, codes and logits differ from those of
other machines.

Source: https://docs.pytorch.org/docs/stable/notes/cuda.html, TensorFloat-32.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from maskgit.foundation.compiled import is_compiled


@contextmanager
def whole_float32(device: torch.device, network: nn.Module | None = None) -> Iterator[None]:
    """Compute in full float32 in this thread, unless the network is compiled.

    Convolutions are switched one by one, so that no other thread is affected. Matrix products can only be switched for
    the whole process: that is done if the process allows TensorFloat-32 for them, and undone when the last thread
    leaves.
    """
    if device.type != "cuda" or (network is not None and is_compiled(network)):
        yield
        return
    with _WholeConvolutions(), _PRODUCTS:
        yield


class _WholeConvolutions(TorchFunctionMode):
    """Calls convolutions of float32 batches on a GPU with the argument that forbids rounding."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.conv2d:
            return _conv2d(*args, **kwargs)
        if func is torch.conv_transpose2d:
            return _conv_transpose2d(*args, **kwargs)
        return func(*args, **kwargs)


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    if not _may_be_rounded(input):
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    if padding == "same":
        spans = [d * (size - 1) for d, size in zip(_pair(dilation), weight.shape[2:], strict=True)]
        (top, bottom), (left, right) = ((span // 2, span - span // 2) for span in spans)
        input = F.pad(input, (left, right, top, bottom))
    padding = 0 if isinstance(padding, str) else padding
    how = _pair(stride), _pair(padding), _pair(dilation)
    return torch._convolution(input, weight, bias, *how, False, [0, 0], groups, *_cudnn(), False)


def _conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Tensor:
    if not _may_be_rounded(input):
        return torch.conv_transpose2d(input, weight, bias, stride, padding, output_padding, groups, dilation)
    how = _pair(stride), _pair(padding), _pair(dilation)
    added = _pair(output_padding)
    return torch._convolution(input, weight, bias, *how, True, added, groups, *_cudnn(), False)


def _may_be_rounded(input: Tensor) -> bool:
    return input.is_cuda and input.dtype == torch.float32 and input.ndim == 4


def _cudnn() -> tuple[bool, bool, bool]:
    """Return what torch would have passed on: benchmark, deterministic, enabled."""
    cudnn = torch.backends.cudnn
    deterministic = cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    return bool(cudnn.benchmark), bool(deterministic), bool(cudnn.enabled)


def _pair(value: Any) -> list[int]:
    if isinstance(value, int):
        return [value, value]
    return [*value, *value] if len(value) == 1 else list(value)


class _WholeProducts:
    """Forbids TensorFloat-32 in matrix products while any thread is inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._restore: Callable[[], None] | None = None

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._restore = _forbid()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside and self._restore is not None:
                self._restore()


_PRODUCTS = _WholeProducts()


def _forbid() -> Callable[[], None] | None:
    """Forbid rounding where it is allowed, and return what allows it again as it was."""
    matmul: Any = torch.backends.cuda.matmul
    if matmul.fp32_precision != "tf32":
        return None
    # torch raises where its older and its newer setting have been used one after the other.
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        before = "highest"
    if before != "highest":
        torch.set_float32_matmul_precision("highest")
        return lambda: torch.set_float32_matmul_precision(before)
    matmul.fp32_precision = "ieee"

    def restore() -> None:
        # It may have been inherited from `torch.backends.fp32_precision`, which is to go on deciding then.
        matmul.fp32_precision = "none"
        if matmul.fp32_precision != "tf32":
            matmul.fp32_precision = "tf32"

    return restore
