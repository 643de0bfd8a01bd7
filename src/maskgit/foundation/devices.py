"""Devices: choosing one, bringing tensors there and back, full float32 on it, and networks that take no memory."""

import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from maskgit.errors import ConfigError, unknown_name
from maskgit.foundation.compiled import is_compiled
from maskgit.foundation.forks import check_process

# How callers name them.
Device = str | int | torch.device
Dtype = str | torch.dtype | np.dtype | type[np.generic]

# The types that networks compute in.
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# Names that other libraries give them.
SHORT_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


def is_dtype(value: object) -> TypeGuard[Dtype]:
    """Return whether a value names any dtype, whether or not networks compute in it."""
    if isinstance(value, str):
        return value in SHORT_NAMES or isinstance(
            getattr(torch, value.removeprefix("torch."), None), torch.dtype
        )
    return isinstance(value, torch.dtype | np.dtype) or (
        isinstance(value, type) and issubclass(value, np.generic)
    )


def choose_dtype(value: Any) -> torch.dtype | None:
    """Return the dtype that a caller names.

    Args:
        value: a `torch.dtype`, numpy's, or a name: one in `DTYPES` or `SHORT_NAMES`, or torch's own, such as "half",
            with or without "torch." before it. None and "auto" leave the choice to the caller.

    Returns:
        The dtype, or None if the choice is left open.

    Raises:
        ConfigError: networks do not compute in it.
    """
    if value is None or (isinstance(value, str) and value == "auto"):
        return None
    if isinstance(value, str | torch.dtype):
        name = str(value).removeprefix("torch.")
        # torch's "half" is float16.
        name = SHORT_NAMES.get(
            name, str(getattr(torch, name, name)).removeprefix("torch.") if is_dtype(name) else name
        )
    elif is_dtype(value):
        name = np.dtype(cast(Any, value)).name
    else:
        name = repr(value)[:80]
    if name in DTYPES:
        return DTYPES[name]
    if is_dtype(name):
        raise ConfigError(f"Networks compute in {', '.join(DTYPES)}, not in {name}.")
    raise unknown_name("dtype", name, ("auto", *DTYPES))


def choose_device(name: Device = "auto") -> torch.device:
    """Return the named device, after checking that it is available.

    Args:
        name: "auto" (CUDA, else MPS, else the CPU), or what `torch.device` takes, such as "cuda:1" or 0.

    Raises:
        ConfigError: the device is not available.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        check_process(device)
        torch.empty(1, device=device)
    except ConfigError:
        raise
    # An unknown name, a build without it and a missing driver raise RuntimeError, AssertionError and others.
    except Exception as error:
        shown = str(name) if isinstance(name, torch.device) else name
        raise ConfigError(f"The device {shown!r} is not available here; try --device cpu.") from error
    return device


def rank_and_world() -> tuple[int, int]:
    """Return which of torchrun's processes this is, and how many there are; (0, 1) where it runs alone."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def own_device(name: Device = "auto") -> torch.device:
    """Return this process's device, and make it the one that torch means by "cuda".

    Under torchrun "auto" and "cuda" mean one GPU for each process.

    Args:
        name: as for `choose_device`.

    Raises:
        ConfigError: the device is not available.
    """
    chosen = choose_device(name)
    if chosen.type != "cuda":
        return chosen
    rank, world = rank_and_world()
    if chosen.index is None and world > 1:
        chosen = choose_device(f"cuda:{os.environ.get('LOCAL_RANK', rank)}")
    # What is made without a device named, such as streams, events and communicators, then belongs to this one.
    torch.cuda.set_device(torch.cuda.current_device() if chosen.index is None else chosen.index)
    return torch.device("cuda", torch.cuda.current_device())


@functools.cache
def widest_float(device: torch.device) -> torch.dtype:
    """Return the most precise type that a device computes in: float64, or float32 where there is none (MPS)."""
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except TypeError:
        return torch.float32
    return torch.float64


def copies_aside(device: torch.device) -> bool:
    """Return whether a device copies to and from pinned memory asynchronously.

    MPS shares the host's memory and would gain little, and an asynchronous result could be read too early.
    """
    return device.type not in ("cpu", "mps")


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device without waiting for the device's pending work.

    Args:
        tensor: on any device. Pinned memory is not copied twice.
        device: the destination.
    """
    if not copies_aside(device):
        return tensor.to(device)
    return (tensor.pin_memory() if tensor.device.type == "cpu" else tensor).to(device, non_blocking=True)


class Landing:
    """Tensors on their way to the CPU, queued after their device's pending work."""

    def __init__(self, *tensors: Tensor) -> None:
        """Start the copies.

        Args:
            tensors: on one device.
        """
        device = tensors[0].device
        aside = copies_aside(device)
        self._parts = [tensor.to("cpu", non_blocking=aside) for tensor in tensors]
        self._event: Any = None
        if aside:
            module: Any = torch.get_device_module(device)
            self._event = module.Event()
            # Their own device's stream; that device need not be the current one.
            self._event.record(module.current_stream(device))

    @property
    def landed(self) -> bool:
        """Whether the copies are complete."""
        return self._event is None or self._event.query()

    def wait(self) -> list[Tensor]:
        """Wait for the copies and return them, on the CPU."""
        if self._event is not None:
            self._event.synchronize()
        return self._parts


@contextmanager
def shapes_only() -> Iterator[None]:
    """Build networks on the meta device: nothing is allocated, and no initial weights are drawn."""
    with torch.device("meta"), _NoDraws():
        yield


_DRAWS = (torch.Tensor.normal_, torch.Tensor.uniform_)


class _NoDraws(TorchFunctionMode):
    """Skips random initialization, for which torch would load its compiler on the meta device, in 0.7 s."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init" or func in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def whole_float32(device: torch.device, network: nn.Module | None = None) -> Iterator[None]:
    """Compute in full float32 in this thread, unless the network is compiled.

    A GPU may round the inputs of float32 products to TensorFloat-32, which keeps 10 of their 23 mantissa bits. In torch
    this is on by default for convolutions and off for matrix products. With it, codes and logits differ from those of
    other machines.

    Convolutions are switched one by one, so that no other thread is affected. Matrix products can only be switched for
    the whole process: that is done if the process allows TensorFloat-32 for them, and undone when the last thread
    leaves.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html, TensorFloat-32.
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
