"""Class names: ImageNet's, and finding the class that a user means."""

import difflib
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from importlib import resources

from maskgit.errors import ConfigError

# Where a class is asked for, these mean no class, and the one that a picture is taken for.
RESERVED = ("none", "guess")
_NUMBER = "[+-]?[0-9]+"


def imagenet_class_names() -> tuple[str, ...]:
    """Return the 1000 names of ILSVRC 2012 in the order of its labels, synonyms separated by commas.

    Source: the WordNet 3.0 synsets of the challenge; the two cranes are told apart by a further synonym.
    """
    text = resources.files("maskgit").joinpath("assets/imagenet_classes.txt").read_text("utf-8")
    return tuple(text.splitlines())


def sort_names(names: Iterable[str]) -> tuple[str, ...]:
    """Return names in the order in which they are numbered: numbers by their value, then text."""
    return tuple(sorted(names, key=_order))


def _order(name: str) -> tuple[bool, int, str, str]:
    if not re.fullmatch("[0-9]+", name):
        return True, 0, "", name
    digits = name.lstrip("0")
    return False, len(digits), digits, name


def find_class(query: str | int, names: Sequence[str] | None, num_classes: int) -> int:
    """Return the number of the class that a user means.

    Args:
        query: a name or synonym in any case, or a class number (also as text). What is both is the name.
            "name:…" is a name and "number:…" a number, whatever else they may be.
        names: the model's class names, or None if it has none.
        num_classes: how many classes the model has.

    Returns:
        A number in [0, num_classes).

    Raises:
        ConfigError: no class, or more than one, is meant; near names are suggested.
    """
    text = str(query).strip()
    if not isinstance(query, str) and re.fullmatch(_NUMBER, text):
        return _numbered(text, num_classes)
    table = _by_name(tuple(names or ()))
    found = table.get(_normal(text), [])
    if not found:
        kind, colon, rest = text.partition(":")
        if colon and kind in ("name", "number"):
            text = rest.strip()
            found = table.get(_normal(text), []) if kind == "name" else []
        else:
            kind = ""
        if not found and kind != "name" and (kind or re.fullmatch(_NUMBER, text)):
            return _numbered(text, num_classes)
    if len(found) == 1:
        return found[0]
    if names is None:
        raise ConfigError(f"This model has no class names; give a number from 0 to {num_classes - 1}.")
    if found:
        listed = "; ".join(f"{i}: {names[i]}" for i in found)
        raise ConfigError(
            f"{text!r} names several classes; give one's number, as number:{found[0]}: {listed}."
        )
    wanted = _normal(text)
    near = difflib.get_close_matches(wanted, table, n=8, cutoff=0.6)
    near += [name for name in table if wanted and wanted in name]
    numbers = list(dict.fromkeys(i for name in near for i in table[name]))[:5]
    hint = "; ".join(f"{i}: {names[i]}" for i in numbers)
    raise ConfigError(
        f"Unknown class {text!r}."
        + (f" Did you mean {hint}?" if hint else " `maskgit info MODEL --classes` lists them.")
    )


def class_query(name: str, number: int, names: Sequence[str]) -> str:
    """Return what `find_class` takes for a class, wherever "none" and "guess" mean something else.

    Args:
        name: what the class is to be called.
        number: of the class.
        names: the model's class names.

    Returns:
        The name, after "name:" where it could be taken for something else, or "number:…" where it does not say
        which class it is.
    """
    query = f"name:{name}" if name.strip() in RESERVED else name
    try:
        found = find_class(query, names, len(names))
    except ConfigError:
        found = -1
    return query if found == number else f"number:{number}"


def _numbered(text: str, num_classes: int) -> int:
    if re.fullmatch(r"[+-]?[0-9]{1,11}", text) and 0 <= int(text) < num_classes:
        return int(text)
    raise ConfigError(f"There is no class {text:.20}: this model's classes are 0 to {num_classes - 1}.")


def match_classes(names: Sequence[str], own: Sequence[str]) -> tuple[int, ...] | None:
    """Return which of a model's classes each class of other data is, by name, in whatever order.

    Args:
        names: of the data's classes.
        own: of the model's.

    Returns:
        For each of `names` the number of the model's class that has it as its name or one of its synonyms; None
        unless every class of either has exactly one of the other. Names that are but the classes' numbers, from
        0 on, match by number.
    """
    if len(names) != len(own):
        return None
    if are_numbers(names) or are_numbers(own):
        return tuple(range(len(own)))
    table = _by_name(tuple(own))
    numbers = []
    for name in names:
        # A name as a whole says more than its synonyms, of which another class may have one too.
        found = table.get(_normal(name)) or [
            i for word in name.split(",") for i in table.get(_normal(word), [])
        ]
        if len(set(found)) != 1:
            return None
        numbers.append(found[0])
    return tuple(numbers) if len(set(numbers)) == len(own) else None


def are_numbers(names: Sequence[str]) -> bool:
    """Return whether names are but the classes' numbers, as those of sources that have no names are."""
    return all(name == str(number) for number, name in enumerate(names))


@lru_cache(maxsize=8)
def _by_name(names: tuple[str, ...]) -> dict[str, list[int]]:
    """Return the numbers of the classes that have each name, normalised, in rising order.

    What is the whole name of a class is not taken as a synonym of others.
    """
    whole: dict[str, list[int]] = {}
    synonyms: dict[str, list[int]] = {}
    for number, group in enumerate(names):
        name, *others = dict.fromkeys(map(_normal, (group, *group.split(","))))
        whole.setdefault(name, []).append(number)
        for other in others:
            synonyms.setdefault(other, []).append(number)
    return synonyms | whole


def _normal(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())
