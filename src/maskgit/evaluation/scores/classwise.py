"""How each class fares, by a measure that is sound with a few images a class.

Shapes: N images, M real ones that are held out, D feature dimensions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskgit.evaluation.metrics import Interval
from maskgit.evaluation.metrics.intervals import share_interval
from maskgit.evaluation.metrics.probe import LinearProbe
from maskgit.evaluation.scores.names import Names, Score
from maskgit.evaluation.scores.statistics import ImageStatistics
from maskgit.networks.classes import are_numbers, match_classes

# The probe learns from so many images, spread evenly over those there are, which bounds memory.
MAX_FITTED = 20_000


class ClassScore(NamedTuple):
    """How one class fares.

    Attributes:
        label: its number.
        num_images: samples of it.
        agreement: the share of them that look like it; see `ClassJudge`.
        interval: of the agreement, 95 %.
        real: the same share of real images that the probe did not learn from; None where there are none.
        real_interval: of that, 95 %.
    """

    label: int
    num_images: int
    agreement: float
    interval: Interval
    real: float | None
    real_interval: Interval | None = None


class Labelled(NamedTuple):
    """Images by their features.

    Attributes:
        features: float (N, D).
        labels: int32 (N,).
    """

    features: NDArray
    labels: NDArray[np.int32]

    def rows(self, chosen: NDArray[np.int64]) -> "Labelled":
        """Return some of the images."""
        return Labelled(self.features[chosen], self.labels[chosen])


def labelled(statistics: ImageStatistics) -> Labelled | None:
    """Return the images whose features and classes are kept, if there are enough to learn from a half."""
    features, labels = statistics.features, statistics.labels
    if features is None or labels is None or len(features) < 4:
        return None
    return Labelled(features, labels)


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


class ClassJudge:
    """Says whether images look like their class, by a linear probe that real images have taught.

    Attributes:
        source: what it learned from, in words.
        num_fitted: how many images that were.
        held_out: int64 (M,), rows of the reference that it did not learn from.
        real: whether each of them looks like its class, bool (M,).
        real_labels: int32 (M,), their classes.
    """

    def __init__(self, reference: ImageStatistics, training: Labelled | None = None) -> None:
        """Fit the probe: on training images where they are given, else on half of the reference.

        Args:
            reference: real images, of which features and labels are known.
            training: others, of the same classes, that are not in the reference.
        """
        held_out = labelled(reference)
        assert held_out is not None, "the reference has features and labels"
        self.source, self.held_out = "training images", np.arange(len(held_out.labels))
        if training is None:
            # Every other image of each class.
            order = np.argsort(held_out.labels, kind="stable")
            training = held_out.rows(np.sort(order[::2]))
            self.held_out = np.sort(order[1::2])
            held_out = held_out.rows(self.held_out)
            self.source = "half of the reference"
        fitted = training.rows(spread_rows(len(training.labels), MAX_FITTED))
        num_classes = int(max(fitted.labels.max(), held_out.labels.max())) + 1
        self.num_fitted = len(fitted.labels)
        self._probe = LinearProbe(fitted.features, fitted.labels, num_classes)
        self.real, self.real_labels = self.agrees(*held_out), held_out.labels

    def agrees(self, features: NDArray, labels: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Return whether each image, features float (N, D), looks like its class, int32 (N,)."""
        return self._probe.classes(features) == labels

    def score(
        self, agreed: NDArray[np.bool_], names: Names, strata: NDArray[np.int32] | None = None
    ) -> Score:
        """Return the share of images that look like their class, from what `agrees` says."""
        share = float(agreed.mean())
        return names.score("class_agreement", share, share_interval(agreed, strata), num_images=len(agreed))

    def table(self, agreed: NDArray[np.bool_], labels: NDArray[np.int32]) -> list[ClassScore]:
        """Return the shares by class of those that have images, from what `agrees` says."""
        return [self._class(int(label), agreed[labels == label]) for label in np.unique(labels)]

    def _class(self, label: int, mine: NDArray[np.bool_]) -> ClassScore:
        theirs = self.real[self.real_labels == label]
        known = len(theirs) > 0
        return ClassScore(
            label,
            len(mine),
            float(mine.mean()),
            share_interval(mine),
            float(theirs.mean()) if known else None,
            share_interval(theirs) if known else None,
        )


def spread_rows(total: int, count: int) -> NDArray[np.int64]:
    """Return at most `count` of `total` rows, spread evenly over them."""
    count = min(count, total)
    return np.arange(count) * total // count


def best_and_worst(classes: list[ClassScore], count: int = 5) -> list[ClassScore]:
    """Return the classes with the highest and the lowest agreement, best first; all where they are few."""
    ordered = sorted(classes, key=lambda entry: (-entry.agreement, entry.label))
    return ordered if len(ordered) <= 2 * count else ordered[:count] + ordered[-count:]
