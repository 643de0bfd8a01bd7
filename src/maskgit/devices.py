"""Choosing where to run, going there, and building networks without memory."""

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


def make_current(device: torch.device) -> torch.device:
    """Let this process's CUDA calls that name no device mean this one, and return it.

    For programs; a library leaves that to whoever uses it.
    """
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU on a device, without waiting for CUDA."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


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
