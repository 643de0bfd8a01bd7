"""Choosing where to run, bringing tensors there and back, and building networks without memory."""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from maskgit.errors import ConfigError


def choose_device(name: str = "auto") -> torch.device:
    """Return the device of a name, after checking that it is there.

    Args:
        name: "auto" (CUDA, else MPS, else the CPU), or what `torch.device` takes, such as "cuda:1".

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    # An unknown name, a build without it and a missing driver raise RuntimeError, AssertionError and others.
    except Exception as error:
        raise ConfigError(f"The device {name!r} is not available here; try --device cpu.") from error
    return device


def own_device(name: str = "auto") -> torch.device:
    """Return the device of this process, and make it the one that torch means by "cuda".

    Under torchrun "auto" and "cuda" are one GPU a process.

    Args:
        name: as for `choose_device`.

    Raises:
        ConfigError: there is no such device here.
    """
    chosen = choose_device(name)
    if chosen.type != "cuda":
        return chosen
    if chosen.index is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        chosen = choose_device(f"cuda:{os.environ.get('LOCAL_RANK', os.environ.get('RANK', '0'))}")
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
    """Return whether a device copies to and from pinned memory while the host goes on.

    MPS shares the host's memory and has little to gain; what it does aside could be read too early.
    """
    return device.type not in ("cpu", "mps")


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Bring a tensor to a device without waiting for what that is busy with.

    Args:
        tensor: where it is. What lies in pinned memory already is not copied twice.
        device: where to.
    """
    if not copies_aside(device):
        return tensor.to(device)
    return (tensor.pin_memory() if tensor.device.type == "cpu" else tensor).to(device, non_blocking=True)


class Landing:
    """Tensors on their way to the CPU, behind all that their device was asked for before."""

    def __init__(self, *tensors: Tensor) -> None:
        """Send them off.

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
            # The stream of their own device, which need not be the current one.
            self._event.record(module.current_stream(device))

    @property
    def landed(self) -> bool:
        """Whether they are there."""
        return self._event is None or self._event.query()

    def wait(self) -> list[Tensor]:
        """Return them on the CPU, once they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._parts


@contextmanager
def shapes_only() -> Iterator[None]:
    """Let networks be built on the meta device: nothing is allocated, and no initial weights are drawn."""
    with torch.device("meta"), _NoDraws():
        yield


_DRAWS = (torch.Tensor.normal_, torch.Tensor.uniform_)


class _NoDraws(TorchFunctionMode):
    """Skips random initialization, for which torch would load its compiler on the meta device, for 0.7 s."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init" or func in _DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
