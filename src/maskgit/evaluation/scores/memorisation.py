"""Whether a model repeats its training images: the nearest of them to its samples.

Shapes: N samples, M training images, D feature dimensions, H × W pixels.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskgit.data.picture_sets import Pictures
from maskgit.errors import DataError
from maskgit.evaluation.metrics import authenticity
from maskgit.evaluation.metrics.intervals import wilson_interval
from maskgit.evaluation.metrics.neighbours import nearest_neighbours
from maskgit.evaluation.scores.names import Names, Score
from maskgit.evaluation.scores.statistics import ImageStatistics
from maskgit.foundation.units import Arrays

NUM_ROWS = 8
NUM_NEIGHBOURS = 5


class Row(NamedTuple):
    """A sample and the training images nearest to it.

    Attributes:
        sample: its index.
        image: uint8 (H, W, 3).
        numbers: of the training images, nearest first.
        distances: theirs, Euclidean, of features.
        neighbours: uint8 (H, W, 3) each; none where they are not to be shown.
    """

    sample: int
    image: NDArray[np.uint8]
    numbers: list[int]
    distances: list[float]
    neighbours: list[NDArray[np.uint8]]


class Memorisation(NamedTuple):
    """What the search for copies found.

    Attributes:
        num_training: training images searched.
        random: samples drawn before any was made.
        nearest: the samples nearest to a training image.
        sample_distance: the median distance of a sample to its nearest training image.
        real_distance: that of real images to theirs; None where the reference has no features.
        real_authenticity: the authenticity of these real images; None likewise.
    """

    num_training: int
    random: list[Row]
    nearest: list[Row]
    sample_distance: float
    real_distance: float | None
    real_authenticity: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return all but the pictures as plain JSON values."""

        def rows(chosen: list[Row]) -> list[dict[str, Any]]:
            return [
                {"sample": row.sample, "training_images": row.numbers, "distances": row.distances}
                for row in chosen
            ]

        return self._asdict() | {"random": rows(self.random), "nearest": rows(self.nearest)}


def search(
    pooled: NDArray[np.float32],
    shown: NDArray[np.int64],
    picture: Callable[[int], NDArray[np.uint8]],
    training: Arrays,
    data: Pictures | None,
    reference: ImageStatistics | None,
    names: Names,
) -> tuple[Memorisation, Score]:
    """Look for training images among samples.

    Args:
        pooled: (N, D), the samples' features.
        shown: indices of the samples of the random sheet.
        picture: makes a sample's picture, uint8 (H, W, 3), from its index.
        training: what `gather` returns of training images: `pooled` and `numbers`.
        data: the training images themselves; None leaves them out.
        reference: real images to compare with, of which those with features are asked the same.
        names: of scores.

    Raises:
        DataError: there are too few images.
    """
    gallery = training["pooled"]
    if min(len(gallery), len(pooled)) < 2:
        raise DataError("The search for copies needs at least two samples and two training images.")
    count = min(NUM_NEIGHBOURS, len(gallery))
    nearest = nearest_neighbours(pooled, gallery)
    closest = np.argsort(nearest.distances[:, 0], kind="stable")[:NUM_ROWS]

    sheets = shown[:: max(1, len(shown) // NUM_ROWS)][:NUM_ROWS], closest
    neighbours = [nearest_neighbours(pooled[indices], gallery, k=count) for indices in sheets]
    numbers = [training["numbers"][near.indices].tolist() for near in neighbours]
    # All at once, since a stream may be read from its beginning each time.
    pictures = {} if data is None else _pictures(data, {n for sheet in numbers for row in sheet for n in row})
    random, nearest_rows = (
        [
            Row(index, picture(index), row, distances, [pictures[n] for n in row if data is not None])
            for index, row, distances in zip(indices.tolist(), listed, near.distances.tolist(), strict=True)
        ]
        for indices, listed, near in zip(sheets, numbers, neighbours, strict=True)
    )
    real_distance = real_share = None
    if reference is not None and reference.features is not None and len(reference.features) > 1:
        real = reference.features
        theirs = nearest_neighbours(real, gallery)
        real_distance, real_share = (
            float(np.median(theirs.distances)),
            authenticity(gallery, real, nearest=theirs),
        )
    share = authenticity(gallery, pooled, nearest=nearest)
    interval = wilson_interval(round(share * len(pooled)), len(pooled))
    found = Memorisation(
        len(gallery),
        random,
        nearest_rows,
        float(np.median(nearest.distances)),
        real_distance,
        real_share,
    )
    return found, names.score("authenticity", share, interval, num_images=len(pooled))


def _pictures(data: Pictures, numbers: set[int]) -> dict[int, NDArray[np.uint8]]:
    """Return pictures by their numbers."""
    batch = data.read(sorted(numbers))
    return dict(zip(batch.numbers.tolist(), batch.images, strict=True))
