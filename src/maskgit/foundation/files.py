"""Files and folders: paths as people write them, JSON of limited size, and writing whole or not at all."""

import errno
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from maskgit.errors import CheckpointError, MaskGITError, OutputError

MAX_JSON_BYTES = 4 * 2**20
# A folder's description for people, which stays when the folder is written again.
CARD = "README.md"
HALF_CARD = re.compile(rf"\.{re.escape(CARD)}\.[0-9a-f]{{8}}\.md")


def write_bytes(path: str | Path, data: bytes, *, overwrite: bool = True) -> None:
    """Write a file whole or not at all, making its folder if needed.

    Raises:
        OutputError: it cannot be written, or is there and may not be replaced; what stood there before still does.
    """
    with replacing(path, overwrite=overwrite) as temporary:
        temporary.write_bytes(data)


@contextmanager
def replacing(path: str | Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`, and move the file there once the block has ended without an error.

    Args:
        path: the file to write; ~ is the user's home, and a symbolic link is followed to its target.
        overwrite: whether a file that is there may be replaced, including one that appears during the block.

    Raises:
        OutputError: the folder cannot be made or written, the disk is full, or the file is there and may not be
            replaced; nothing is left behind.
    """
    path = destination(path)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        name = path.with_name(f".{path.name}.{secrets.token_hex(4)}{path.suffix}")
        # Created with the permissions of any new file, unlike tempfile's. The umask itself cannot be read without
        # changing it for all threads.
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
    """Rename a file unless the name is taken, atomically where the file system can."""
    try:
        os.link(temporary, path)
    except FileExistsError as error:
        raise OutputError(
            f"{path} exists already; choose another name or allow it to be overwritten."
        ) from error
    except OSError:
        # Some file systems have no hard links.
        if path.exists():
            raise OutputError(
                f"{path} exists already; choose another name or allow it to be overwritten."
            ) from None
        os.replace(temporary, path)


def expand(path: str | os.PathLike[str]) -> Path:
    """Return a path with ~ replaced by the user's home, where there is one."""
    try:
        return Path(path).expanduser()
    except RuntimeError:  # ~nobody
        return Path(path)


def expand_argument(argument: str) -> str:
    """Return a command-line argument with the ~ of a path expanded, as in --out=~/frogs, which shells leave alone."""
    flag, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return f"{flag}{equals}{expand(value)}" if value == "~" or value.startswith("~/") else argument


def cache_dir() -> Path:
    """Return the cache: $MASKGIT_CACHE, or `maskgit` in the user's cache folder.

    Raises:
        OutputError: the user has no home folder, and no environment variable names a cache.
    """
    named = os.environ.get("MASKGIT_CACHE")
    if named:
        return expand(named)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "maskgit"
    except RuntimeError as error:
        raise OutputError(
            "This user has no home folder for the cache; set the environment variable MASKGIT_CACHE to a writable "
            "folder."
        ) from error


@contextmanager
def naming_the_cache() -> Iterator[None]:
    """Add to errors about the cache which environment variable moves it."""
    try:
        yield
    except OutputError as error:
        raise OutputError(
            f"{error} Set the environment variable MASKGIT_CACHE to use another cache folder."
        ) from error


def destination(path: str | Path) -> Path:
    """Return the path that a replacement of `path` is written to: ~ is expanded and a symbolic link is followed."""
    path = expand(path)
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def read_json(
    path: Path,
    error: type[MaskGITError] = CheckpointError,
    *,
    limit: int = MAX_JSON_BYTES,
    remedy: str = "",
) -> dict[str, Any]:
    """Return the JSON object in a file, which may be anybody's.

    Args:
        path: the file.
        error: what is raised.
        limit: bytes; a larger file is refused before it is read.
        remedy: what to do about a file that cannot be used, a sentence.

    Raises:
        MaskGITError: of the class `error`: the file cannot be read, is too large, or holds no JSON object.
    """
    try:
        if path.stat().st_size > limit:
            raise error(f"{path} is larger than the {limit:,} bytes that are read. {remedy}".rstrip())
        data = path.read_bytes()
    except OSError as reason:
        if isinstance(reason, MaskGITError):
            raise
        raise error(f"{path} cannot be read: {reason.strerror or reason}. {remedy}".rstrip()) from reason
    return parse_json(data, str(path), error, remedy=remedy)


def parse_json(
    text: str | bytes, name: str, error: type[MaskGITError], *, limit: int = 2**30, remedy: str = ""
) -> dict[str, Any]:
    """Return the JSON object in a text; see `read_json`. `name` is what the text is called in messages."""
    if len(text) > limit:
        raise error(f"{name} is longer than the {limit:,} characters that are read. {remedy}".rstrip())
    try:
        values = json.loads(text)  # of bytes, a byte-order mark is passed over
    except (ValueError, RecursionError) as reason:
        raise error(f"{name} is not JSON. {remedy}".rstrip()) from reason
    if not isinstance(values, dict):
        raise error(f"{name} is not a JSON object. {remedy}".rstrip())
    return values


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write plain values as JSON that people can read."""
    # A class named after a folder whose name is not valid text keeps it in JSON's escapes.
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8", "backslashreplace")


@contextmanager
def new_folder(path: Path, admit: Callable[[Path], None] | None = None) -> Iterator[Path]:
    """Give an empty folder, and move it to `path` once the block has ended well: it appears whole or not at all.

    Several processes may do so at once: with `admit` the last one's folder stays, without it the first one's.

    Args:
        path: where the folder goes; its parent is made if needed.
        admit: called with the new folder before it takes the place of what stands at `path`; raises if that must stay.

    Raises:
        OutputError: the folder cannot be made or written, or may not take the place of what is there. Nothing
            half-written is left behind, and what stood there still does.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        # Inside it, because mkdtemp makes its folder private.
        new = temporary / "new"
        new.mkdir()
        yield new
        if admit is None:
            os.replace(new, path)
        else:
            _swap(new, path, temporary, admit)
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, path: Path, temporary: Path, admit: Callable[[Path], None]) -> None:
    while True:
        admit(new)
        old = temporary / secrets.token_hex(4)
        with suppress(FileNotFoundError):
            os.replace(path, old)
        try:
            os.replace(new, path)
            return
        except BaseException as error:
            with suppress(OSError):
                os.replace(old, path)
            # Another process has put its folder there in between.
            if getattr(error, "errno", None) not in (errno.ENOTEMPTY, errno.EEXIST):
                raise


def write_folder(
    path: str | Path, names: tuple[str, ...], write: Callable[[Path], None], *, overwrite: bool = True
) -> Path:
    """Fill a new folder and put it in the place of `path`.

    A folder that is there is replaced if it holds what `write` makes, `names`, and nothing else but a `CARD`, which
    is kept. Where `path` is a symbolic link, its target is replaced.

    Raises:
        OutputError: as `new_folder`, or something else is there, or a folder that is not to be overwritten.
    """
    given, path = expand(path), destination(path)
    _check_replaceable(path, names, overwrite)

    def admit(new: Path) -> None:
        if CARD in _check_replaceable(path, names, overwrite):
            shutil.copyfile(path / CARD, new / CARD)

    with new_folder(path, admit) as new:
        write(new)
    return given


def _check_replaceable(path: Path, names: tuple[str, ...], overwrite: bool) -> set[str]:
    """Return the names in a folder, all of which may go."""
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file; choose another folder.")
    held = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    # A process that was killed may have left a half-written card.
    foreign = sorted(name for name in held - {*names, CARD} if not HALF_CARD.fullmatch(name))
    if foreign or (held and names[0] not in held):
        named = foreign[0] if foreign else sorted(held)[0]
        raise OutputError(f"{path} holds {named}, which is not part of a model; choose another folder.")
    if held and not overwrite:
        raise OutputError(f"{path} exists already; choose another folder, or add --overwrite.")
    return held


def check_writable(folder: str | Path) -> None:
    """Check that a folder can be made and written to, before long work begins.

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
    """Return an error that tells the user why `path` cannot be written."""
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
