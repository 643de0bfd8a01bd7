"""What callers give, checked and converted once at the public border.

Numbers come as Python's, as numpy's and torch's scalars, and as arrays and tensors without dimensions, on any
device; inside the package they are Python's. True and False are no numbers, and neither is text.
"""

import numbers
from collections.abc import Iterable
from typing import Any

from maskgit.errors import ConfigError, unknown_name

# Seeds are below.
NUM_SEEDS = 2**64


def plain(value: Any) -> Any:
    """Return a value with the numbers in it as Python's: a scalar, or a list, tuple or dict of such.

    Arrays and tensors become lists of their rows. Whatever else there is stays as it is.
    """
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        made = [plain(item) for item in value]
        return made if isinstance(value, list) else tuple(made)
    # What numpy and torch have in common; neither is imported for this.
    if isinstance(getattr(value, "shape", None), tuple) and hasattr(value, "tolist"):
        return value.tolist()
    return value


def check_whole(name: str, value: Any) -> int:
    """Return a whole number of any integer type as an int.

    Raises:
        ConfigError: it is none.
    """
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, numbers.Integral):
        raise ConfigError(f"{name} must be a whole number, but is {value!r:.80}.")
    return int(number)


def check_number(name: str, value: Any) -> float:
    """Return a number of any real type: an int as an int, anything else as a float, of the same value.

    Raises:
        ConfigError: it is none.
    """
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        raise ConfigError(f"{name} must be a number, but is {value!r:.80}.")
    return int(number) if isinstance(number, numbers.Integral) else float(number)


def check_flag(name: str, value: Any) -> bool:
    """Return True or False of any such type as a bool.

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
        ConfigError: it is none, or not between low and high (which a NaN never is).
    """
    number = check_number(name, value)
    if not low <= number <= high:
        raise ConfigError(f"{name} must be between {low} and {high}, but is {number}.")
    return number


def check_count(name: str, value: Any, low: int, high: int) -> int:
    """Return a whole number as `check_whole` does.

    Raises:
        ConfigError: it is none, or not between low and high.
    """
    number = check_whole(name, value)
    check_range(name, number, low, high)
    return number


def check_seed(value: Any) -> int:
    """Return a seed, in [0, 2⁶⁴), as an int.

    Raises:
        ConfigError: it is none.
    """
    return check_count("seed", value, 0, NUM_SEEDS - 1)


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise a `ConfigError` that lists the choices unless `value` is one of them."""
    choices = tuple(choices)
    if value not in choices:
        raise unknown_name(name, value, choices)
