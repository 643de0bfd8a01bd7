"""Bars that show how far a work is, on a terminal alone."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def bar(iterable: Iterable[Any] | None = None, *, shown: bool = True, **options: Any) -> "tqdm[Any]":
    """Return a `tqdm` bar that goes to standard error if that is a terminal, and is gone at its end.

    Args:
        iterable: what it counts, if it is to be iterated over.
        shown: False keeps it off a terminal, too.
        **options: further ones of `tqdm`.
    """
    given: dict[str, Any] = {"leave": False, "disable": None if shown and sys.stderr else True}
    return tqdm(iterable, **given | options)
