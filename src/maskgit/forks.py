"""What is put right when a process forks: threads do not come along, and a lock that one of them held stays held.

A parallel region of GNU OpenMP, which torch's CPU builds use, waits in a forked child for the threads that its
parent had, for ever. They are given back before a fork, and both processes start new ones when they need them;
where the runtime cannot do so, the child computes in one thread.

Importing this module is enough for that; an object that has locks, threads or connections of its own asks for
more by `resets`.
"""

import ctypes
import os
import sys
import weakref
from typing import Any, Protocol

# omp_pause_hard of OpenMP 5.0's omp_pause_resource_t.
_PAUSE_HARD = 2


class AfterFork(Protocol):
    """What has something to put right."""

    def after_fork(self) -> None:
        """Put it right, in the child, in which only this thread runs."""
        ...


_RESETS: "weakref.WeakSet[AfterFork]" = weakref.WeakSet()


def resets(thing: AfterFork) -> None:
    """Have an object's `after_fork` called in every child that is forked while the object lives."""
    _RESETS.add(thing)


def give_back_threads() -> bool:
    """Give back the threads that GNU OpenMP keeps for this one, and return whether a child could compute.

    LLVM's and Intel's runtimes see to forks themselves.
    """
    # torch loads its runtime for the whole process.
    library: Any = ctypes.CDLL(None)
    if not hasattr(library, "GOMP_parallel") or hasattr(library, "kmp_set_defaults"):
        return True
    # Libraries older than OpenMP 5 lack it, and it is not 0 in the middle of a parallel region.
    pause = getattr(library, "omp_pause_resource_all", None)
    return pause is not None and pause(_PAUSE_HARD) == 0


def _before_fork() -> None:
    global _can_compute
    _can_compute = "torch" not in sys.modules or give_back_threads()


def _after_fork() -> None:
    if not _can_compute:
        sys.modules["torch"].set_num_threads(1)
    for thing in list(_RESETS):
        thing.after_fork()


_can_compute = True
# Windows has no forks.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork)
