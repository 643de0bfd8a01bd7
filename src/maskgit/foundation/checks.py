"""Arguments from callers, checked and converted once at the public boundary.

Numbers may be Python's, NumPy's or torch's scalars, or arrays and tensors without dimensions, on any device; inside the
package they are Python's. Booleans and strings are not numbers.
"""

import dataclasses
import numbers
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

from maskgit.errors import ConfigError, unknown_name

# Seeds are below this.
NUM_SEEDS = 2**64


def plain(value: Any) -> Any:
    """Return a value with all numbers in it as Python's: a scalar, or a list, tuple or dict of scalars.

    Arrays and tensors become nested lists. Anything else stays as it is.
    """
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        made = [plain(item) for item in value]
        return made if isinstance(value, list) else tuple(made)
    # Common to NumPy and torch, neither of which is imported for this.
    if isinstance(getattr(value, "shape", None), tuple) and hasattr(value, "tolist"):
        return value.tolist()
    return value


def check_whole(name: str, value: Any) -> int:
    """Return a whole number of any integer type as an int.

    Raises:
        ConfigError: it is not a whole number.
    """
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, numbers.Integral):
        raise ConfigError(f"{name} must be a whole number, but is {value!r:.80}.")
    return int(number)


def check_number(name: str, value: Any) -> float:
    """Return a number of any real type: an integer as an int, anything else as a float.

    Raises:
        ConfigError: it is not a number.
    """
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise ConfigError(f"{name} must be a number, but is {value!r:.80}.")
    return int(number) if isinstance(number, numbers.Integral) else float(number)


def check_flag(name: str, value: Any) -> bool:
    """Return a boolean of any type as a bool.

    Raises:
        ConfigError: it is neither.
    """
    flag = plain(value)
    if not isinstance(flag, bool):
        raise ConfigError(f"{name} must be true or false, but is {value!r:.80}.")
    return flag


def check_range(name: str, value: Any, low: float, high: float) -> float:
    """Return a number as `check_number` does.

    Raises:
        ConfigError: it is not a number between low and high; NaN never is.
    """
    number = check_number(name, value)
    if not low <= number <= high:
        raise ConfigError(f"{name} must be between {low} and {high}, but is {number}.")
    return number


def check_count(name: str, value: Any, low: int, high: int) -> int:
    """Return a whole number as `check_whole` does.

    Raises:
        ConfigError: it is not a whole number between low and high.
    """
    number = check_whole(name, value)
    check_range(name, number, low, high)
    return number


def check_seed(value: Any) -> int:
    """Return a seed, in [0, 2⁶⁴), as an int.

    Raises:
        ConfigError: it is out of range or not a whole number.
    """
    return check_count("seed", value, 0, NUM_SEEDS - 1)


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise a `ConfigError` that lists the choices unless `value` is one of them."""
    choices = tuple(choices)
    if value not in choices:
        raise unknown_name(name, value, choices)


def _converted(name: str, value: Any, expected: Any) -> Any:
    """Return a field's value converted to its type.

    Raises:
        ConfigError: it cannot be converted.
    """
    origin = typing.get_origin(expected)
    if origin in (typing.Union, types.UnionType):
        allowed = typing.get_args(expected)
        if value is None and type(None) in allowed:
            return None
        return _converted(name, value, next(a for a in allowed if a is not type(None)))
    if origin is tuple:
        (item, _) = typing.get_args(expected)
        listed = plain(value)
        if not isinstance(listed, list | tuple):
            raise ConfigError(f"{name} must be a list, but is {value!r:.80}.")
        return tuple(_converted(f"{name}[{i}]", entry, item) for i, entry in enumerate(listed))
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise ConfigError(f"{name} must be an object of named values, but is {value!r:.80}.")
        return plain(value)
    if expected in _NUMBERS:
        return _NUMBERS[expected](name, value)
    if not isinstance(value, expected):
        kind = getattr(expected, "__name__", "number")
        raise ConfigError(f"{name} must be of type {kind}, but is {value!r:.80}.")
    return value


_NUMBERS: dict[Any, Callable[[str, Any], Any]] = {int: check_whole, float: check_number, bool: check_flag}


@dataclass(frozen=True)
class Config:
    """The base of all configs: types are checked on construction, and configs convert to and from JSON."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, _converted(f.name, getattr(self, f.name), hints[f.name]))
        self.validate()

    def validate(self) -> None:
        """Raise a `ConfigError` if values are out of range or inconsistent."""

    def to_dict(self) -> dict[str, Any]:
        """Return the config as plain JSON values."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Make the config from plain JSON values.

        Raises:
            ConfigError: a key is unknown or missing, or a value is not allowed.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"{cls.__name__} must be a JSON object, but is {type(values).__name__}.")
        hints = typing.get_type_hints(cls)
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for key in values:
            if key not in fields:
                raise unknown_name(f"key in {cls.__name__}", key, fields)
        required = (dataclasses.MISSING, dataclasses.MISSING)
        for name, f in fields.items():
            if name not in values and (f.default, f.default_factory) == required:
                raise ConfigError(f"{cls.__name__} lacks the key {name!r}.")
        made = {}
        for key, value in values.items():
            kind = hints[key]
            if isinstance(kind, type) and issubclass(kind, Config):
                value = kind.from_dict(value)
            made[key] = value
        return cls(**made)


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, dict):
        return dict(value)
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value
