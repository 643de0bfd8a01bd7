"""Progress bars, on terminals only."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def bar(iterable: Iterable[Any] | None = None, *, shown: bool = True, **options: Any) -> "tqdm[Any]":
    """Return a `tqdm` bar on standard error, if that is a terminal, which disappears at the end.

    Args:
        iterable: what to iterate over and count, if anything.
        shown: False hides it even on a terminal.
        **options: passed to `tqdm`.
    """
    given: dict[str, Any] = {"leave": False, "disable": None if shown and sys.stderr else True}
    return tqdm(iterable, **given | options)
