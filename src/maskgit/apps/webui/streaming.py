"""Decoding that can be looked at while it runs, and stopped.

Shapes: B images, h × w the token grid.
"""

import queue
import threading
from collections.abc import Callable, Generator
from typing import NamedTuple

from torch import Tensor

from maskgit.results import Output

# What the threads that decode are called.
THREAD = "maskgit-decoding"


class Step(NamedTuple):
    """A step of decoding that has been made.

    Attributes:
        number: counted from 0.
        tokens: int64 (B, h, w), what the step sampled.
    """

    number: int
    tokens: Tensor


class _StoppedError(Exception):
    """Raised inside the pipeline, through its callback, when nobody watches any more."""


def watch(make: Callable[..., Output]) -> Generator[Step | Output, None, None]:
    """Give the steps of decoding while they are made, and then what was made.

    Decoding runs in a thread of its own and never waits: whoever looks too seldom is given the newest step.
    As soon as the generator is closed, the decoding stops at its next step.

    Args:
        make: decodes, telling its argument `callback` after each step (see `maskgit.results.Callback`).

    Raises:
        Whatever `make` raises.
    """
    told: queue.SimpleQueue[Step | Output | BaseException] = queue.SimpleQueue()
    stopped = threading.Event()

    def callback(step: int, _: Tensor, tokens: Tensor) -> None:
        if stopped.is_set():
            raise _StoppedError
        told.put(Step(step, tokens))

    def work() -> None:
        try:
            told.put(make(callback=callback))
        # Whatever it is, it is raised again where the steps are waited for.
        except BaseException as error:
            told.put(error)

    threading.Thread(target=work, name=THREAD, daemon=True).start()
    try:
        while True:
            newest = told.get()
            while isinstance(newest, Step) and not told.empty():
                newest = told.get()
            if isinstance(newest, BaseException):
                raise newest
            yield newest
            if isinstance(newest, Output):
                return
    finally:
        stopped.set()
