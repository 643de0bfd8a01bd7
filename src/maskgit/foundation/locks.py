"""Lock files, by which processes and threads exclude each other."""

import json
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from maskgit.errors import MaskGITError
from maskgit.foundation.files import output_error

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

log = logging.getLogger(__name__)

Busy = Callable[[str], None]


class HeldError(Exception):
    """A lock is held, and is not waited for."""


def wait(holder: str) -> None:
    """A `busy` for `locked` that waits without a word."""


def give_up(holder: str) -> None:
    """A `busy` for `locked` that raises a `HeldError` rather than wait."""
    raise HeldError(holder)


def waits_for(what: str) -> Busy:
    """Return a `busy` for `locked` that logs who is waited for; `what` is what they are doing."""
    return lambda holder: log.warning("Waiting for %s, by %s.", what, holder)


@contextmanager
def locked(path: Path, busy: Busy) -> Iterator[None]:
    """Hold a lock during the block, waiting until whoever holds it lets go.

    The work may have been done by someone else while this process waited, so the block should check again. The lock
    is the operating system's: it is freed when its process is killed. File systems without locks exclude nobody.

    Args:
        path: the lock's file, beside what it guards; its folder is made if needed, and the file is removed afterwards.
        busy: called once with a description of the holder if the lock is held; it may raise an error rather than wait.

    Raises:
        OutputError: the file cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        held = _Flock(path, busy) if fcntl else _library_lock(path, busy)
    except MaskGITError:
        raise
    except OSError as error:
        raise output_error(path.parent, error) from error
    try:
        yield
    finally:
        held.release()


def _library_lock(path: Path, busy: Busy) -> Any:
    # A dependency of torch. Not used where there is `fcntl`, because it does not tell who holds a lock.
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        busy("another process")
        lock.acquire()
    return lock


class _Flock:
    """A lock file that names its holder and is removed at the end."""

    def __init__(self, path: Path, busy: Busy) -> None:
        self._path = path
        told = False
        while True:
            handle = _open(path)
            try:
                if not _try(handle):
                    if not told:
                        told = True
                        busy(_holder(path))
                    fcntl.flock(handle, fcntl.LOCK_EX)
                # The previous holder removed its file, and there may be a new one.
                if _is_at(handle, path):
                    break
            except BaseException:
                os.close(handle)
                raise
            os.close(handle)
        self._handle = handle
        with suppress(OSError):  # another user's file, opened for reading
            os.ftruncate(handle, 0)
            os.write(handle, json.dumps({"host": socket.gethostname(), "process": os.getpid()}).encode())

    def release(self) -> None:
        with suppress(OSError):  # in a folder that has become read-only or is gone
            self._path.unlink()
        with suppress(OSError):
            # Closing is not enough where a child process has inherited the file.
            fcntl.flock(self._handle, fcntl.LOCK_UN)
        os.close(self._handle)


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    try:
        return os.open(path, flags, 0o666)
    except PermissionError:
        # Another user's, which can still be waited for.
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)


def _try(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # No locks on this file system.
        return True
    return True


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    try:
        about = json.loads(path.read_text("utf-8"))
        return f"process {int(about['process'])} on {about['host']!s:.80}"
    # It is just being written or removed, or is another user's.
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
