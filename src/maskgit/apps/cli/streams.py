"""What is printed, whoever reads it: nobody, a pipe that breaks, a full disk, a terminal of few characters."""

import codecs
import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO, cast

# What our own sentences are written with where an encoding lacks it.
PLAIN = {
    "×": "x", "·": "*", "−": "-", "–": "-", "—": "-", "…": "...", "’": "'", "→": "->", "↔": "<->", "≤": "<=",
    "≥": ">=", "±": "+-", "½": "1/2", "⁰": "^0", "²": "^2", "³": "^3", "⁴": "^4", "⁶": "^6", "₀": "0",
    "α": "alpha", "β": "beta", "γ": "gamma", "μ": "mu", "π": "pi", "σ": "sigma", "τ": "tau", "§": "section ", "Σ": "sum ",
    "ₓ": "_x", "•": "-", "∞": "infinity",
}  # fmt: skip
READABLE = "maskgit-readable"


def _readable(error: UnicodeError) -> tuple[str | bytes, int]:
    """Write what an encoding lacks: signs in ASCII, a file name's own bytes, all else as an escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    end = error.start + 1
    if "\udc80" <= character <= "\udcff":
        return character.encode("ascii", "surrogateescape"), end
    return PLAIN.get(character) or character.encode("ascii", "backslashreplace").decode(), end


codecs.register_error(READABLE, _readable)


class Outlet:
    """A text stream that can always be written to: once nobody takes what is written, it is dropped.

    Attributes:
        error: why it was dropped, or None.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Write, or drop, and return the length of the text."""
        try:
            self._stream.write(text)
        except OSError as error:
            self._drop(error)
        return len(text)

    def flush(self) -> None:
        """Write out what was held back, or drop it."""
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        self.error = self.error or error
        # What the stream holds back, and what other code writes to the same file, goes nowhere from now on.
        with suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)

    @property
    def unread(self) -> bool:
        """Whether the reader went away, as `head` does."""
        return self.error is not None and self.error.errno in (errno.EPIPE, errno.ECONNRESET)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def open_closed() -> None:
    """Put the null device where this process was started without standard streams.

    Otherwise the next file that is opened takes the place, and gets what libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


@contextmanager
def outlets() -> Iterator[Outlet]:
    """Make printing and progress safe for the time of a command, and give what replaces standard output."""
    out, err = (_outlet(stream) for stream in (sys.stdout, sys.stderr))
    with (
        _readable_errors(sys.stdout),
        _readable_errors(sys.stderr),
        redirect_stdout(cast(TextIO, out)),
        redirect_stderr(cast(TextIO, err)),
    ):
        try:
            yield out
        finally:
            out.flush()
            err.flush()


def _outlet(stream: TextIO | None) -> Outlet:
    if stream is None:
        stream = open(os.devnull, "w", encoding="utf-8", errors=READABLE)  # noqa: SIM115
    return Outlet(stream)


@contextmanager
def _readable_errors(stream: Any) -> Iterator[None]:
    """Let a stream write what its encoding lacks in another way, for some time."""
    before = getattr(stream, "errors", None)
    if stream is None or before is None or not hasattr(stream, "reconfigure"):
        yield
        return
    stream.reconfigure(errors=READABLE)
    try:
        yield
    finally:
        stream.reconfigure(errors=before)
