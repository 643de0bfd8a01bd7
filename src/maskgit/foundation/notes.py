"""Notes to the user that are not errors: how an image was interpreted, or a hint at a likely mistake."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_listener: ContextVar[Callable[[str], object] | None] = ContextVar("maskgit_notes", default=None)


class PictureWarning(UserWarning):
    """An image was interpreted in a way that its owner should know about."""


def note(text: str) -> None:
    """Pass a sentence to the listener of this thread or task, or else issue a `PictureWarning`."""
    told = _listener.get()
    if told is None:
        # Attributed to the caller of the function that calls `note`, as far as one number can.
        warnings.warn(text, PictureWarning, stacklevel=3)
    else:
        told(text)


@contextmanager
def listening(told: Callable[[str], object]) -> Iterator[None]:
    """Call `told` with every note of this thread or task, instead of a warning, until the block ends."""
    token = _listener.set(told)
    try:
        yield
    finally:
        _listener.reset(token)
