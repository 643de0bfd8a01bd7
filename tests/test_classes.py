"""Finding the class that a user means."""

import pytest

from maskgit.classes import find_class, imagenet_class_names
from maskgit.errors import ConfigError

NAMES = imagenet_class_names()


@pytest.mark.parametrize(
    ("query", "number"),
    [
        (0, 0),
        ("90", 90),
        ("lorikeet", 90),
        ("Lorikeet ", 90),
        ("golden_retriever", 207),
        ("Panthera leo", 291),
        ("king of beasts, ", None),
        ("lion, king of beasts, Panthera leo", 291),
        ("crane bird", 134),
        ("construction crane", 517),
        ("web site", 916),
        ("toilet tissue", 999),
    ],
)
def test_classes_are_found_by_number_name_and_synonym(query, number):
    if number is None:
        with pytest.raises(ConfigError, match="291: lion"):
            find_class(query, NAMES, 1000)
    else:
        assert find_class(query, NAMES, 1000) == number


def test_near_misses_are_suggested():
    with pytest.raises(ConfigError, match="Did you mean 90: lorikeet"):
        find_class("lorikete", NAMES, 1000)
    with pytest.raises(ConfigError, match="207: golden retriever"):
        find_class("retriever", NAMES, 1000)
    with pytest.raises(ConfigError, match=r"names several classes.*134.*517"):
        find_class("crane", NAMES, 1000)
    with pytest.raises(ConfigError, match=r"Unknown class 'zzzz'\. `maskgit info"):
        find_class("zzzz", NAMES, 1000)


def test_numbers_are_checked_and_nameless_models_say_so():
    for query in (1000, -1, "1000", "+1000", "9" * 5000):
        with pytest.raises(ConfigError, match="classes are 0 to 999"):
            find_class(query, NAMES, 1000)
    with pytest.raises(ConfigError, match="no class names"):
        find_class("frog", None, 10)


def test_there_are_a_thousand_names_and_none_is_empty():
    assert len(NAMES) == 1000
    assert all(name.strip() == name and name for name in NAMES)
    assert len(set(NAMES)) == 1000
