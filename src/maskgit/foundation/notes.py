"""What a user is told meanwhile, errors aside: notes on how something was understood, and progress bars."""

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

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


def bar(iterable: Iterable[Any] | None = None, *, shown: bool = True, **options: Any) -> "tqdm[Any]":
    """Return a `tqdm` bar on standard error, if that is a terminal, which disappears at the end.

    Args:
        iterable: what to iterate over and count, if anything.
        shown: False hides it even on a terminal.
        **options: passed to `tqdm`.
    """
    from tqdm import tqdm

    given: dict[str, Any] = {"leave": False, "disable": None if shown and sys.stderr else True}
    return tqdm(iterable, **given | options)
