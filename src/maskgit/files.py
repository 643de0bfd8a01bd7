"""Writing files so that nothing half-written is ever seen."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from maskgit.errors import OutputError


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write a file whole or not at all, making its folder if needed.

    Raises:
        OutputError: it cannot be written; what stood there before still does.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, and move it there once the block has ended well.

    Raises:
        OutputError: the folder cannot be made or written, or the disk is full; nothing is left behind.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(file_mode())  # mkstemp makes files private
        os.replace(temporary, path)
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def file_mode() -> int:
    """Return the permissions that the user's umask gives a new file."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def expand(path: str | Path) -> Path:
    """Return a path with ~ replaced by the user's home, where there is one."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # ~nobody
        return Path(path)


def check_writable(folder: str | Path) -> None:
    """Make a folder, and a file in it that is gone again, so that long work is not done for nothing.

    Raises:
        OutputError: it cannot be made or written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise output_error(folder, error) from error


def output_error(path: str | Path, error: OSError) -> OutputError:
    """Return the error that tells a user why `path` cannot be written."""
    if isinstance(error, OutputError):
        return error
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"{path} cannot be written: the disk is full. Free some space or choose another folder."
        )
    if isinstance(error, FileExistsError | NotADirectoryError):
        return OutputError(
            f"{path} cannot be written: a file stands where a folder should be. Choose another folder."
        )
    return OutputError(f"{path} cannot be written: {error.strerror or error}. Choose another folder.")
