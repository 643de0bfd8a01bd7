"""What is worth saying and no error: how a picture was understood, or a hint at a likely mistake."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_listener: ContextVar[Callable[[str], object] | None] = ContextVar("maskgit_notes", default=None)


class PictureWarning(UserWarning):
    """A picture was understood in a way that its owner should know of."""


def note(text: str) -> None:
    """Say a sentence to whoever listens in this thread or task, or else as a `PictureWarning`."""
    told = _listener.get()
    if told is None:
        # Of the caller of the function that found it out, as far as one number can say.
        warnings.warn(text, PictureWarning, stacklevel=3)
    else:
        told(text)


@contextmanager
def listening(told: Callable[[str], object]) -> Iterator[None]:
    """Call `told` with every note of this thread or task, in place of a warning, until the block ends."""
    token = _listener.set(told)
    try:
        yield
    finally:
        _listener.reset(token)
