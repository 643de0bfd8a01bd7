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
        # mkstemp makes files private; what we leave has the mode that the user's umask gives.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, path)
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


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
