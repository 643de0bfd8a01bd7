"""What a user can do wrong, as exceptions whose message says how to mend it.

Every error that a wrong input, file, setting or environment can cause is a `MaskGITError`; the command line
prints its message and exits with code 2. Anything else that escapes is a bug in this package.
"""

import difflib
from collections.abc import Iterable


class MaskGITError(Exception):
    """The base of all errors that the caller can mend."""


class ConfigError(MaskGITError, ValueError):
    """A setting has a value that is not allowed, or a name that is not in its table."""


class CheckpointError(MaskGITError, ValueError):
    """A model file is broken, incomplete, or not of the kind that was asked for."""


class ImageError(MaskGITError, ValueError):
    """A picture cannot be read, is not a picture, or is of a kind that is refused."""


class RegionError(MaskGITError, ValueError):
    """A box or mask does not fit the image."""


class DownloadError(MaskGITError, OSError):
    """Something could not be fetched, or is not what was fetched before."""


class OutputError(MaskGITError, OSError):
    """Something could not be written."""


class DataError(MaskGITError, ValueError):
    """A data set or cache is empty, unreadable, or does not belong to the model."""


def install_extra(extra: str) -> str:
    """Return what to do for packages that only some features need, a name in pyproject.toml's extras."""
    return f"in a clone of the repository, run pip install -c constraints.txt '.[{extra}]'"


def unknown_name(kind: str, name: object, choices: Iterable[str]) -> ConfigError:
    """Return the error for a `name` that is not among `choices`, with the nearest one suggested."""
    choices = list(choices)
    near = difflib.get_close_matches(str(name), choices, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"Unknown {kind} {name!r}.{hint} Choose from: {', '.join(choices)}.")
