"""Choosing where to run, and building networks without memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard, cast

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from maskgit.errors import ConfigError, unknown_name
from maskgit.forks import check_process

# What callers name them by.
Device = str | int | torch.device
Dtype = str | torch.dtype | np.dtype | type[np.generic]

# The types that networks compute in.
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def is_dtype(value: object) -> TypeGuard[Dtype]:
    """Return whether a value names a type, which then need not be one that networks compute in."""
    if isinstance(value, str):
        return isinstance(getattr(torch, value.removeprefix("torch."), None), torch.dtype)
    return isinstance(value, torch.dtype | np.dtype) or (
        isinstance(value, type) and issubclass(value, np.generic)
    )


def choose_dtype(value: Any) -> torch.dtype | None:
    """Return the type that a caller names.

    Args:
        value: a `torch.dtype`, numpy's, or a name in `DTYPES`, with or without "torch." before it. None and "auto"
            leave the choice to what is done with it.

    Returns:
        The type, or None for no choice.

    Raises:
        ConfigError: it is none that networks compute in.
    """
    if value is None or (isinstance(value, str) and value == "auto"):
        return None
    if isinstance(value, str | torch.dtype):
        name = str(value).removeprefix("torch.")
    elif is_dtype(value):
        name = np.dtype(cast(Any, value)).name
    else:
        name = repr(value)[:80]
    if name in DTYPES:
        return DTYPES[name]
    if is_dtype(name):
        raise ConfigError(f"Networks compute in floating point, in {', '.join(DTYPES)}, but not in {name}.")
    raise unknown_name("dtype", name, ("auto", *DTYPES))


def choose_device(name: Device = "auto") -> torch.device:
    """Return the device of a name, after checking that it is there.

    Args:
        name: "auto" (CUDA, else MPS, else the CPU), or what `torch.device` takes, such as "cuda:1" or 0.

    Raises:
        ConfigError: there is no such device here.
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
