"""Class names: ImageNet's, and finding the class that a user means."""

import difflib
import re
from collections.abc import Sequence
from importlib import resources

from maskgit.errors import ConfigError


def imagenet_class_names() -> tuple[str, ...]:
    """Return the 1000 names of ILSVRC 2012 in the order of its labels, synonyms separated by commas.

    Source: the WordNet 3.0 synsets of the challenge; the two cranes are told apart by a further synonym.
    """
    text = resources.files("maskgit").joinpath("assets/imagenet_classes.txt").read_text("utf-8")
    return tuple(text.splitlines())


def find_class(query: str | int, names: Sequence[str] | None, num_classes: int) -> int:
    """Return the number of the class that a user means.

    Args:
        query: a class number (also as text), or a name or synonym in any case.
        names: the model's class names, or None if it has none.
        num_classes: how many classes the model has.

    Returns:
        A number in [0, num_classes).

    Raises:
        ConfigError: no class, or more than one, is meant; near names are suggested.
    """
    text = str(query).strip()
    if re.fullmatch(r"[+-]?[0-9]+", text):
        if len(text) < 12 and 0 <= int(text) < num_classes:
            return int(text)
        raise ConfigError(f"There is no class {text:.20}: this model's classes are 0 to {num_classes - 1}.")
    if names is None:
        raise ConfigError(f"This model has no class names; give a number from 0 to {num_classes - 1}.")
    synonyms = [
        (name.strip().casefold(), i) for i, group in enumerate(names) for name in (group, *group.split(","))
    ]
    wanted = _normal(text)
    exact = {i for name, i in synonyms if _normal(name) == wanted}
    if len(exact) == 1:
        return exact.pop()
    if exact:
        listed = "; ".join(f"{i}: {names[i]}" for i in sorted(exact))
        raise ConfigError(f"{text!r} names several classes; give one's number: {listed}.")
    near = difflib.get_close_matches(wanted, [_normal(name) for name, _ in synonyms], n=8, cutoff=0.6)
    near += [_normal(name) for name, _ in synonyms if wanted and wanted in _normal(name)]
    numbers = list(dict.fromkeys(i for n in near for name, i in synonyms if _normal(name) == n))[:5]
    hint = "; ".join(f"{i}: {names[i]}" for i in numbers)
    raise ConfigError(
        f"Unknown class {text!r}."
        + (f" Did you mean {hint}?" if hint else " `maskgit info MODEL --classes` lists them.")
    )


def _normal(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").replace("-", " ").split())
