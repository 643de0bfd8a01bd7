"""The same scores of real images and of reconstructions: what a score can be at best, and what the tokenizer loses.

Shapes: N samples, M real images, D feature dimensions.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskgit.evaluation.metrics import FeatureStatistics
from maskgit.evaluation.scores.classwise import ClassJudge, Labelled, labelled
from maskgit.evaluation.scores.names import Names, Score
from maskgit.evaluation.scores.scores import Rows, split_rows
from maskgit.evaluation.scores.statistics import ImageStatistics
from maskgit.foundation.units import Arrays

# What `distances` and `manifolds` say of images against a reference.
Scoring = Callable[[Arrays, ImageStatistics], list[Score]]


def drawn_rows(total: int, count: int) -> Rows:
    """Return `count` of `total` rows, drawn at random, in order; all where there are no more."""
    return np.sort(np.random.default_rng(0).permutation(total)[:count])


def chosen(arrays: Arrays, rows: Rows) -> Arrays:
    """Return some of the images whose features are known."""
    names = ("pooled", "spatial", "logits", "labels", "numbers")
    return {name: arrays[name][rows] for name in names if name in arrays}


def _count(statistics: ImageStatistics) -> int:
    return 0 if statistics.features is None else len(statistics.features)


class Context(NamedTuple):
    """What samples are seen beside.

    Attributes:
        baselines: the same scores of other images, by names of `BASELINES`.
        judge: says whether an image looks like its class; None where the reference's classes are not known.
    """

    baselines: dict[str, list[Score]]
    judge: ClassJudge | None


def of_training(
    scoring: Scoring,
    reference: ImageStatistics,
    training: Arrays,
    rebuilt: Arrays,
    numbers: NDArray[np.int32] | None,
    count: int,
    names: Names,
    *,
    judged: bool = True,
) -> Context:
    """Score as many training images as there are samples, and their reconstructions.

    Args:
        scoring: what makes scores.
        reference: what samples are compared with.
        training: of the training images, which are not in the reference.
        rebuilt: of their reconstructions, in the same order.
        numbers: int32 (classes,), which of the model's classes the data's are; None where they do not match.
        count: N.
        names: of scores.
        judged: whether class agreement is told too.
    """
    total = len(training["pooled"])
    rows = drawn_rows(total, count)
    sets = {"real": training, "reconstructions": rebuilt}
    found = {name: scoring(chosen(arrays, rows), reference) for name, arrays in sets.items()}
    if not judged or labelled(reference) is None:
        return Context(found, None)
    # The probe knows what it learned from: reconstructions are judged of images that it has not seen.
    others = np.setdiff1d(np.arange(total), rows)
    unseen = len(others) >= total / 2
    fitted = None
    if numbers is not None:
        known = Labelled(training["pooled"], numbers[training["labels"]])
        fitted = known.rows(others) if unseen else known
    judge = ClassJudge(reference, fitted)
    found["real"].append(judge.score(judge.real, names))
    if numbers is not None and unseen:
        agreed = judge.agrees(rebuilt["pooled"][rows], numbers[rebuilt["labels"][rows]])
        found["reconstructions"].append(judge.score(agreed, names))
    return Context(found, judge)


def of_halves(
    scoring: Scoring,
    reference: ImageStatistics,
    rebuilt: ImageStatistics | None,
    count: int,
    names: Names,
    *,
    judged: bool = True,
) -> Context:
    """Score half of the reference, and its reconstructions, against the other half.

    Args:
        scoring: what makes scores.
        reference: with features; without, there is nothing to be halved.
        rebuilt: reconstructions of the same images in the same order; None leaves them out.
        count: N.
        names: of scores.
        judged: whether class agreement is told too.
    """
    features, found = reference.features, dict[str, list[Score]]()
    if rebuilt is not None and (features is None or _count(rebuilt) != len(features)):
        rebuilt = None
    halves = [] if features is None else split_rows(len(features), 2, strata=reference.labels)
    if features is not None and halves:
        first, second = np.sort(halves[0][:count]), halves[1]
        statistics = FeatureStatistics(features.shape[1])
        statistics.update(features[second])
        other = replace(
            reference, pooled=statistics.gaussian(), spatial=None, features=features[second], labels=None
        )
        found["real"] = scoring({"pooled": features[first]}, other)
        if rebuilt is not None and rebuilt.features is not None:
            found["reconstructions"] = scoring({"pooled": rebuilt.features[first]}, other)
    if not judged or labelled(reference) is None:
        return Context(found, None)
    judge = ClassJudge(reference)
    found.setdefault("real", []).append(judge.score(judge.real, names))
    if rebuilt is not None and rebuilt.features is not None:
        agreed = judge.agrees(rebuilt.features[judge.held_out], judge.real_labels)
        found.setdefault("reconstructions", []).append(judge.score(agreed, names))
    return Context(found, judge)
