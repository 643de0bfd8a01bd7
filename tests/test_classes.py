"""Finding the class that a user means."""

from importlib import resources

import numpy as np
import pytest

from maskgit.errors import ConfigError
from maskgit.networks import classes
from maskgit.networks.classes import class_query, find_class, imagenet_class_names, match_classes, sort_names

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


def test_numeric_names_sort_as_numbers_before_text():
    names = ["10", "b", "2", "1", "a10", "007", "7", "a2", "9" * 5000]
    assert sort_names(names) == ("1", "2", "007", "7", "10", "9" * 5000, "a10", "a2", "b")
    assert sort_names(map(str, range(30))) == tuple(map(str, range(30)))


def test_a_query_that_is_a_name_is_that_class_before_it_is_a_number():
    folders = tuple(map(str, range(1, 13)))
    assert [find_class(name, folders, 12) for name in ("10", "12", "1")] == [9, 11, 0]
    assert [find_class(query, folders, 12) for query in ("0", 3, "number:3", "number: 10")] == [0, 3, 3, 10]
    assert find_class("number:3", NAMES, 1000) == find_class("3", None, 10) == 3
    for query, said in (
        ("name:13", "Unknown class '13'"),
        ("number:12", "no class 12"),
        ("number:x", "no class x"),
    ):
        with pytest.raises(ConfigError, match=said):
            find_class(query, folders, 12)
    # Labels that come as numbers are numbers.
    assert find_class(np.int64(10), folders, 12) == 10


def test_classes_called_none_guess_or_like_a_query_can_be_asked_for():
    names = ("guess", "none", "name:none", "cat, none of the above", "5")
    assert [find_class(f"name:{name}", names, 5) for name in ("guess", "NONE", "5")] == [0, 2, 4]
    assert find_class("name: none", ("guess", "none"), 2) == 1
    # What a class is recorded as is found again, even where the command line would take it for something else.
    for number, name in enumerate(("none", "guess", "5", "crane", "crane, bird")):
        names = ("none", "guess", "5", "crane", "crane, bird")
        query = class_query(name, number, names)
        assert query not in ("none", "guess")
        assert find_class(query, names, 5) == number
    assert class_query("lorikeet", 90, NAMES) == "lorikeet"
    assert class_query("crane", 134, NAMES) == "number:134"


@pytest.mark.parametrize(
    ("theirs", "own", "matched"),
    [
        (("cat", "dog"), ("dog", "cat"), (1, 0)),
        (("T_Shirt", "Ankle-Boot"), ("ankle boot", "t-shirt, top"), (1, 0)),
        (("10", "2", "1"), ("1", "2", "10"), (2, 1, 0)),
        (("0", "1", "2"), ("ant", "bee", "cow"), (0, 1, 2)),
        (("ant", "bee"), ("0", "1"), (0, 1)),
        (("1", "2"), ("ant", "bee"), None),
        (("plane", "car"), ("airplane", "automobile"), None),
        (("cat", "cat"), ("cat", "dog"), None),
        (("crane",), ("crane", "crane, bird"), None),
    ],
)
def test_classes_are_matched_by_name_in_whatever_order(theirs, own, matched):
    assert match_classes(theirs, own) == matched


def test_a_whole_name_comes_before_a_synonym_of_another_class():
    names = ("ship, boat", "boat", "Car", "lorry, car")
    assert [find_class(name, names, 4) for name in (*names, "ship", "BOAT", "lorry")] == [0, 1, 2, 3, 0, 1, 3]
    assert match_classes(names[::-1], names) == (3, 2, 1, 0)
    assert match_classes(("boat", "car", "lorry", "ship"), names) == (1, 2, 3, 0)
    # ImageNet has "maillot" and "maillot, tank suit".
    assert match_classes(NAMES, NAMES) == tuple(range(1000))
    assert find_class("maillot", NAMES, 1000) == 638


def test_finding_classes_by_name_looks_through_the_names_once(monkeypatch):
    seen = []
    normal = classes._normal
    monkeypatch.setattr(classes, "_normal", lambda name: seen.append(name) or normal(name))
    names = tuple(f"kind {i}" for i in range(100))
    for i in range(100):
        assert find_class(f"kind_{i}", names, 100) == i
    # A name is looked at as a whole and as a synonym, and then each query is.
    assert len(seen) <= 2 * 100 + 100


def test_the_licence_of_the_names_stands_beside_them():
    names = resources.files("maskgit") / "assets" / "imagenet_classes.txt"
    licence = resources.files("maskgit") / "assets" / "imagenet_classes.LICENSE.txt"
    assert names.is_file()
    text = " ".join(licence.read_text("utf-8").split())
    assert "WordNet 3.0 Copyright 2006 by Princeton University. All rights reserved." in text
    # The notice must appear whole on all copies: from its first words to its last.
    assert (
        "This software and database is being provided to you, the LICENSEE, by Princeton University" in text
    )
    assert text.endswith("with Princeton University and LICENSEE agrees to preserve same.")
