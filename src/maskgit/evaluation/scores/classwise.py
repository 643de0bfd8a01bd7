"""How each class fares, by a measure that is sound with a few images a class.

Shapes: N samples, M real images, D feature dimensions, k neighbours.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskgit.evaluation.metrics import Interval
from maskgit.evaluation.metrics.neighbours import nearest_neighbours
from maskgit.evaluation.scores.statistics import ImageStatistics
from maskgit.networks.classes import are_numbers, match_classes

# Neighbours that vote on an image's class.
K_VOTES = 10


class ClassScore(NamedTuple):
    """How one class fares.

    Attributes:
        label: its number.
        num_images: samples of it.
        agreement: the share of them that look like it; see `class_agreement`.
        interval: of the agreement, 95 %.
        real: the same share of real images, the ceiling; None where the reference has none of it.
    """

    label: int
    num_images: int
    agreement: float
    interval: Interval
    real: float | None


class Matched(NamedTuple):
    """Which of a model's classes those of other data are.

    Attributes:
        numbers: int32 (classes of the data,), the model's; None where the classes do not match.
        reason: why they do not, or what was assumed; empty where each name has its like.
    """

    numbers: NDArray[np.int32] | None
    reason: str


def matched_classes(
    names: Sequence[str] | None, count: int, own: Sequence[str] | None, own_count: int, whose: str
) -> Matched:
    """Match classes to a model's by name, in whatever order; by number where one side has no names.

    Args:
        names: of the data's classes, or None, and `count` how many there are.
        own: of the model's classes, or None, and `own_count` how many there are.
        whose: the data, for the reason.
    """
    if count != own_count:
        return Matched(None, f"{whose} has {count:,} classes, but the model has {own_count:,}.")
    names = None if names is None or are_numbers(names) else names
    own = None if own is None or are_numbers(own) else own
    if names is None or own is None:
        nameless = whose if names is None else "The model"
        assumed = f"{nameless} does not say what its classes are called: they are taken by their numbers."
        return Matched(np.arange(count, dtype=np.int32), assumed if (names is None) != (own is None) else "")
    found = match_classes(names, own)
    if found is None:
        return Matched(
            None, f"{whose} names its classes ({_some(names)}) differently from the model ({_some(own)})."
        )
    return Matched(np.array(found, np.int32), "")


def _some(names: Sequence[str]) -> str:
    first = ", ".join(name.split(",")[0] for name in names[:3])
    return first + (", …" if len(names) > 3 else "")


def class_agreement(
    features: NDArray, labels: NDArray[np.int32], reference: ImageStatistics
) -> tuple[NDArray[np.bool_], list[ClassScore]] | None:
    """Return whether each sample looks like its class, and the shares by class.

    The nearest ten real images vote, a tie going to the nearer ones. This needs no training and no
    covariance, so it is sound with a few images a class, where a Fréchet distance is not. Real images are
    asked the same, each without itself.

    Args:
        features: float (N, D), of samples.
        labels: int32 (N,), the classes that were asked for.
        reference: with features and labels.

    Returns:
        bool (N,) and one `ClassScore` for each class that has samples; None where the reference has no
        labels.
    """
    real, classes = reference.features, reference.labels
    if real is None or classes is None or len(real) < 2:
        return None
    num_classes = int(max(labels.max(), classes.max())) + 1
    votes = nearest_neighbours(features, real, k=min(K_VOTES, len(real))).indices
    agreed = _elected(classes[votes], num_classes) == labels
    own = nearest_neighbours(real, real, k=min(K_VOTES + 1, len(real))).indices
    # Where images repeat, an image itself may not come first.
    itself = own == np.arange(len(real))[:, None]
    itself[~itself.any(1), -1] = True
    real_agreed = _elected(classes[own[~itself].reshape(len(real), -1)], num_classes) == classes
    table = []
    for label in np.unique(labels):
        mine, theirs = agreed[labels == label], real_agreed[classes == label]
        ceiling = float(theirs.mean()) if len(theirs) else None
        share = wilson_interval(int(mine.sum()), len(mine))
        table.append(ClassScore(int(label), len(mine), float(mine.mean()), share, ceiling))
    return agreed, table


def _elected(votes: NDArray[np.int32], num_classes: int) -> NDArray[np.int64]:
    """Return the class that most neighbours are of: int (N, k), nearest first → int64 (N,)."""
    chosen = np.empty(len(votes), np.int64)
    weights = 1 - 1e-3 * np.arange(votes.shape[1])
    for row, classes in enumerate(votes):
        chosen[row] = np.bincount(classes, weights, num_classes).argmax()
    return chosen


def wilson_interval(successes: int, total: int) -> Interval:
    """Return the 95 % score interval of a share, which is sound for a few images and for shares of 0 and 1.

    Source: Wilson: Probable Inference, the Law of Succession, and Statistical Inference, JASA 1927.
    """
    z = 1.959964
    share, square = successes / total, z * z / total
    middle = (share + square / 2) / (1 + square)
    half = z / (1 + square) * float(np.sqrt(share * (1 - share) / total + square / (4 * total)))
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def best_and_worst(classes: list[ClassScore], count: int = 5) -> list[ClassScore]:
    """Return the classes with the highest and the lowest agreement, best first; all where they are few."""
    ordered = sorted(classes, key=lambda entry: (-entry.agreement, entry.label))
    return ordered if len(ordered) <= 2 * count else ordered[:count] + ordered[-count:]
