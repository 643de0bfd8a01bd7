"""Repairs after a fork: threads do not survive it, and a lock that one of them held stays held.

In a forked child, a parallel region of GNU OpenMP, which torch's CPU builds use, would wait forever for the threads of
its parent. They are released before a fork, and both processes start new ones when they need them; where the runtime
cannot do so, the child computes in one thread. CUDA cannot be repaired, and is refused.

Importing this module is enough for that; an object that has locks, threads or connections of its own registers with
`resets`.
"""

import ctypes
import os
import sys
import weakref
from typing import TYPE_CHECKING, Any, Protocol

from maskgit.errors import ConfigError

if TYPE_CHECKING:
    import torch

# omp_pause_hard of OpenMP 5.0's omp_pause_resource_t.
_PAUSE_HARD = 2


class AfterFork(Protocol):
    """An object with something to repair."""

    def after_fork(self) -> None:
        """Repair it, in the child, where only this thread runs."""
        ...


_RESETS: "weakref.WeakSet[AfterFork]" = weakref.WeakSet()


def resets(thing: AfterFork) -> None:
    """Have an object's `after_fork` called in every child that is forked while the object lives."""
    _RESETS.add(thing)


def give_back_threads() -> bool:
    """Release the threads that GNU OpenMP keeps for this one, and return whether a forked child could compute.

    LLVM's and Intel's runtimes handle forks themselves.
    """
    # torch loads its OpenMP runtime for the whole process.
    library: Any = ctypes.CDLL(None)
    if not hasattr(library, "GOMP_parallel") or hasattr(library, "kmp_set_defaults"):
        return True
    # Libraries older than OpenMP 5 lack it, and it is not 0 in the middle of a parallel region.
    pause = getattr(library, "omp_pause_resource_all", None)
    return pause is not None and pause(_PAUSE_HARD) == 0


def check_process(device: "torch.device") -> None:
    """Raise a `ConfigError` if a device was used before this process was forked, and cannot be used in it."""
    if device.type == "cuda" and _cuda_stayed_behind:
        raise ConfigError(
            "CUDA was used before this process was forked, and cannot be used in it; start processes with "
            'multiprocessing\'s method "spawn", or load the model after the fork.'
        )


def _before_fork() -> None:
    global _can_compute, _uses_cuda
    torch = sys.modules.get("torch")
    _can_compute = torch is None or give_back_threads()
    # A fork may come while torch is still being imported.
    cuda = getattr(torch, "cuda", None)
    _uses_cuda = cuda is not None and cuda.is_initialized()


def _after_fork() -> None:
    global _cuda_stayed_behind
    _cuda_stayed_behind = _cuda_stayed_behind or _uses_cuda
    if not _can_compute:
        sys.modules["torch"].set_num_threads(1)
    for thing in list(_RESETS):
        thing.after_fork()


_can_compute, _uses_cuda, _cuda_stayed_behind = True, False, False
# Windows has no forks.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)
