"""Writing folders so that nothing half-written is ever seen."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from maskgit.errors import OutputError
from maskgit.foundation.files import destination, expand, output_error
from maskgit.foundation.locks import locked

CARD = "README.md"


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write plain values as JSON that can be read by people."""
    # A class that is called after a folder whose name is no text keeps it in JSON's escapes.
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8", "backslashreplace")


def write_folder(
    path: str | Path, names: tuple[str, ...], write: Callable[[Path], None], *, overwrite: bool = True
) -> Path:
    """Fill a new folder and put it in the place of `path`.

    An older one is replaced if it holds what `write` makes, `names`, and nothing else but a card, which stays.
    Of a symbolic link, what it points to is replaced. Several processes may do it at once: the last one's stays.

    Raises:
        OutputError: it cannot be written, holds something else, or is there and is not to be replaced.
    """
    given, path = expand(path), destination(path)
    temporary: Path | None = None
    try:
        _check_replaceable(path, names, overwrite)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        new, old = temporary / "new", temporary / "old"
        new.mkdir()
        write(new)
        with locked(path.with_name(f".{path.name}.lock"), lambda holder: None):
            # Another process may have put something there meanwhile.
            held = _check_replaceable(path, names, overwrite)
            if CARD in held:
                shutil.copyfile(path / CARD, new / CARD)
            if path.exists():
                os.replace(path, old)
            try:
                os.replace(new, path)
            except BaseException:
                if old.exists():
                    os.replace(old, path)
                raise
    except (OSError, SafetensorError) as error:
        reason = error if isinstance(error, OSError) else OSError(str(error))
        raise output_error(path, reason) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return given


def _check_replaceable(path: Path, names: tuple[str, ...], overwrite: bool) -> set[str]:
    """Return the names in a folder, all of which may go."""
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file; choose another folder.")
    held = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
    foreign = sorted(held - {*names, CARD})
    if foreign or (held and names[0] not in held):
        named = foreign[0] if foreign else sorted(held)[0]
        raise OutputError(f"{path} holds {named}, which is not part of a model; choose another folder.")
    if held and not overwrite:
        raise OutputError(f"{path} is there already; choose another folder, or say --overwrite.")
    return held
