"""Files: paths as people write them, JSON as it is read, and writing so that nothing half-written is ever seen."""

import errno
import json
import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maskgit.errors import CheckpointError, OutputError

MAX_JSON_BYTES = 4 * 2**20


def write_bytes(path: str | Path, data: bytes, *, overwrite: bool = True) -> None:
    """Write a file whole or not at all, making its folder if needed.

    Raises:
        OutputError: it cannot be written, or is there and may not be replaced; what stood there before still does.
    """
    with replacing(path, overwrite=overwrite) as temporary:
        temporary.write_bytes(data)


@contextmanager
def replacing(path: str | Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Give a temporary path beside `path`, and move it there once the block has ended well.

    Args:
        path: the file to write; ~ is the user's home, and of a symbolic link it is what the link points to.
        overwrite: whether a file that is there may be replaced, also one that appears during the block.

    Raises:
        OutputError: the folder cannot be made or written, the disk is full, or the file is there and may not be
            replaced; nothing is left behind.
    """
    path = destination(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        name = path.with_name(f".{path.name}.{secrets.token_hex(4)}{path.suffix}")
        # Made with the permissions that any new file gets here, which tempfile's lack. The umask itself cannot be
        # read without changing it for all threads.
        os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        temporary = name
        yield temporary
        if overwrite:
            os.replace(temporary, path)
        else:
            _place(temporary, path)
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _place(temporary: Path, path: Path) -> None:
    """Give a file its name unless that is taken, in one step where the file system can."""
    try:
        os.link(temporary, path)
    except FileExistsError as error:
        raise OutputError(
            f"{path} is there already; choose another name or allow it to be overwritten."
        ) from error
    except OSError:
        # Some file systems have no hard links.
        if path.exists():
            raise OutputError(
                f"{path} is there already; choose another name or allow it to be overwritten."
            ) from None
        os.replace(temporary, path)


def expand(path: str | os.PathLike[str]) -> Path:
    """Return a path with ~ replaced by the user's home, where there is one."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # ~nobody
        return Path(path)


def expand_argument(argument: str) -> str:
    """Return a command line's argument with the ~ of a path replaced, as in --out=~/frogs, which shells leave."""
    flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{flag}{equals}{expand(value)}" if value == "~" or value.startswith("~/") else argument


def destination(path: str | Path) -> Path:
    """Return where something that is to replace `path` goes: ~ is the user's home, and links are followed."""
    path = expand(path)
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file that is part of a model.

    Raises:
        CheckpointError: it cannot be read, or is none.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path} is larger than any config.")
        values = json.loads(path.read_bytes())  # a byte-order mark may stand in front
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror or error}); is this a model folder?"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is not a JSON object.")
    return values


def check_writable(folder: str | Path) -> None:
    """Make a folder, and a file in it that is gone again, so that long work is not done for nothing.

    Raises:
        OutputError: it cannot be made or written.
    """
    folder = expand(folder)
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
