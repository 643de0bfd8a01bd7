"""Choosing where to run."""

import torch

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
