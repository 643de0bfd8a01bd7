"""Classes of a model and of the data it is compared with: matched by name, or left out with a reason."""

import json
from dataclasses import replace

import numpy as np
import pytest

from maskgit.errors import ConfigError, DataError
from maskgit.evaluation.runs.measure import measure
from maskgit.evaluation.scores.references import Reference
from maskgit.evaluation.scores.statistics import merge_statistics, read_statistics, write_statistics
from maskgit.pipeline import MaskGIT
from small_evaluation import evaluation, real_images, toy_net

OWN = ("plane, aeroplane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture(scope="module")
def named(tiny):
    """The tiny model with names for its ten classes."""
    return MaskGIT(replace(tiny.config, class_names=OWN), tiny.tokenizer, tiny.transformer)


def renamed(names, seed=0):
    """Return the real images whose class c is called OWN[c], numbered by where that stands in `names`."""
    pictures = real_images(seed=seed)
    pictures.class_names = tuple(names)
    words = [name.split(",")[0] for name in OWN]
    order = [names.index(word) if word in names else i for i, word in enumerate(words)]
    pictures.labels = np.array(order, np.int32)[pictures.labels]
    return pictures


def report_of(model, out, pictures, **changes):
    reference = Reference("real", None, pictures, pictures.fingerprint)
    evaluation(model, reference=reference, training=False, **changes).run(out)
    return json.loads((out / "report.json").read_text())


WORDS = tuple(name.split(",")[0] for name in OWN)


@pytest.mark.parametrize(
    "names",
    [
        tuple(sorted(WORDS)),
        WORDS[::-1],
        tuple(word.upper() for word in WORDS),
    ],
    ids=["sorted", "reversed", "upper case"],
)
def test_a_reference_in_another_order_gives_the_same_scores(named, tmp_path, names):
    expected = report_of(named, tmp_path / "own", renamed(WORDS))
    found = report_of(named, tmp_path / "other", renamed(names))
    assert found["metrics"] == expected["metrics"]
    assert found["classes"] == expected["classes"]
    assert len(found["classes"]) == 10
    assert found["no_classes"] is None


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (
            tuple(map(str, range(1, 11))),
            "The reference names its classes (1, 2, 3, …) differently from the model (plane, car, bird, …).",
        ),
        (("airliner", *WORDS[1:]), "(airliner, car, bird, …) differently from the model"),
        ((*WORDS, "zebra"), "The reference has 11 classes, but the model has 10."),
    ],
)
def test_per_class_scores_are_left_out_where_names_do_not_match(named, tmp_path, names, said):
    report = report_of(named, tmp_path, renamed(names))
    assert said in report["no_classes"]
    assert report["no_classes"] in report["cautions"]
    assert report["classes"] == []
    assert "class_agreement_toy" not in report["metrics"]
    assert said.split("(")[0] in (tmp_path / "report.html").read_text().replace("&#x27;", "'")


def test_a_reference_without_names_is_taken_by_its_numbers_and_says_so(named, tiny, tmp_path):
    report = report_of(named, tmp_path / "a", real_images())
    assert "The reference does not say what its classes are called" in report["cautions"][-1]
    assert len(report["classes"]) == 10
    # Numbers as names are no names.
    numbered = report_of(named, tmp_path / "b", renamed(tuple(map(str, range(10)))))
    assert numbered["classes"] == report["classes"]
    assert numbered["cautions"] == report["cautions"]
    unnamed = report_of(tiny, tmp_path / "c", real_images())
    assert not any("called" in caution for caution in unnamed["cautions"])
    assert len(unnamed["classes"]) == 10


def test_labels_drawn_as_in_the_data_are_those_of_the_same_names(named, tmp_path):
    names = tuple(sorted(WORDS))
    pictures = renamed(names)
    pictures.labels = np.where(np.arange(40) < 30, names.index("frog"), pictures.labels).astype(np.int32)
    reference = Reference("real", None, pictures, pictures.fingerprint)
    evaluation(named, reference=reference, training=False, labels="dataset").run(tmp_path)
    counts = json.loads((tmp_path / "report.json").read_text())["settings"]["class_counts"]
    assert counts == [int((pictures.labels == names.index(word)).sum()) for word in WORDS]
    assert counts[WORDS.index("frog")] >= 30
    other = renamed(tuple(map(str, range(1, 11))))
    with pytest.raises(ConfigError, match="one with the model's classes"):
        report_of(named, tmp_path / "other", other, labels="dataset")


def test_statistics_keep_the_names(tmp_path):
    pictures, net = renamed(tuple(sorted(WORDS))), toy_net()
    found = measure(pictures, net).statistics
    write_statistics(tmp_path / "a.npz", found)
    again = read_statistics(tmp_path / "a.npz")
    assert again.class_names == tuple(sorted(WORDS))
    assert merge_statistics([found, found]).class_names == found.class_names
    other = merge_statistics([found, replace(found, class_names=WORDS)])
    assert (other.labels, other.class_names) == (None, None)
    arrays = dict(np.load(tmp_path / "a.npz"))
    # Files of before have no names.
    names = arrays.pop("class_names")
    np.savez(tmp_path / "b.npz", **arrays)
    assert read_statistics(tmp_path / "b.npz").class_names is None
    assert (read_statistics(tmp_path / "b.npz").labels == found.labels).all()
    for wrong in (
        np.array(json.dumps(WORDS[:3])),
        np.array("{"),
        np.array([1]),
        np.array("[1, 2]"),
        names[None],
    ):
        np.savez(tmp_path / "c.npz", **arrays, class_names=wrong)
        with pytest.raises(DataError, match="no list of a name for each class"):
            read_statistics(tmp_path / "c.npz")
