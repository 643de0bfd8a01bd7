"""Whether a model repeats its training images: the search for copies of them among its samples.

Shapes: N samples, M training images, D feature dimensions, H × W pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskgit.data.picture_sets import Pictures
from maskgit.errors import DataError
from maskgit.evaluation.metrics import authenticity
from maskgit.evaluation.metrics.copies import (
    CANDIDATES,
    SUSPICIOUS,
    Candidates,
    candidates,
    pixel_agreement,
    suspicion,
)
from maskgit.evaluation.metrics.intervals import wilson_interval
from maskgit.evaluation.metrics.vectors import nearest_neighbours
from maskgit.evaluation.scores.names import Baseline, Names, Score
from maskgit.foundation.units import Arrays

# Rows of the page: random samples, and those that look most like copies.
NUM_RANDOM, NUM_NEAREST = 8, 24
# So many images, which look most like copies by their features, are compared by their pixels.
MAX_CHECKED = 256

Images = NDArray[np.uint8]


class Row(NamedTuple):
    """A sample and the training images nearest to it.

    Attributes:
        sample: its index.
        image: uint8 (H, W, 3).
        numbers: of the training images, nearest first.
        distances: theirs, Euclidean, of features; to the reconstruction where that is nearer.
        neighbours: uint8 (H, W, 3) each; none where they are not to be shown.
        suspicion: how much it looks like a copy, 0 for an exact one; see `metrics.copies`.
    """

    sample: int
    image: Images
    numbers: list[int]
    distances: list[float]
    neighbours: list[Images]
    suspicion: float


class Memorisation(NamedTuple):
    """What the search for copies found.

    Attributes:
        num_training: training images searched.
        random: samples drawn before any was made.
        nearest: the samples that look most like copies, most suspicious first.
        sample_distance: the median distance of a sample to its nearest training image.
        real_distance: that of real images to theirs; None where there are none to compare with.
        real_authenticity: the authenticity of these real images; None likewise.
        flagged: samples that look like copies.
        real_flagged: the share of real images that do, which are false alarms unless the data repeat; None where
            their pictures are not at hand.
        reconstructions: whether the training images' reconstructions were searched too.
    """

    num_training: int
    random: list[Row]
    nearest: list[Row]
    sample_distance: float
    real_distance: float | None
    real_authenticity: float | None
    flagged: int = 0
    real_flagged: float | None = None
    reconstructions: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return all but the pictures as plain JSON values."""

        def rows(chosen: list[Row]) -> list[dict[str, Any]]:
            return [
                {
                    "sample": row.sample,
                    "training_images": row.numbers,
                    "distances": row.distances,
                    "suspicion": row.suspicion,
                }
                for row in chosen
            ]

        return self._asdict() | {"random": rows(self.random), "nearest": rows(self.nearest)}


class Gallery:
    """The training images that are searched."""

    def __init__(
        self,
        data: Pictures,
        arrays: Arrays,
        rebuilt: Arrays | None = None,
        rebuild: Callable[[Images], Images] | None = None,
    ) -> None:
        """Take the images with what was measured of them.

        Args:
            data: the training images themselves.
            arrays: `pooled` and `numbers` of them, as `gather` returns them.
            rebuilt: `pooled` of their reconstructions, which a copy made by a model is nearest to; None searches the
                images alone.
            rebuild: makes reconstructions of images, uint8 (B, H, W, 3); needed with `rebuilt`.

        Raises:
            DataError: there are fewer than two images, or not as many reconstructions.
        """
        self.data, self.numbers, self.pooled = data, arrays["numbers"], arrays["pooled"]
        self.rebuild = None if rebuilt is None else rebuild
        self._forms = [self.pooled] if rebuilt is None else [self.pooled, rebuilt["pooled"]]
        if len(self.pooled) < 2 or len(self._forms[-1]) != len(self.pooled):
            raise DataError(
                f"The search for copies needs at least two training images and a reconstruction of each, not "
                f"{len(self.pooled)} and {len(self._forms[-1])}."
            )

    def search(self, pooled: NDArray) -> tuple[Candidates, float]:
        """Return the nearest training images of others, and the share of these that is authentic."""
        count = min(CANDIDATES, len(self.pooled))
        forms = [nearest_neighbours(pooled, form, k=count) for form in self._forms]
        return candidates(forms), authenticity(self.pooled, pooled, nearest=forms[0])

    def suspicion(self, found: Candidates, picture: Callable[[int], Images]) -> NDArray[np.float64]:
        """Return how much images look like copies; only the first by features are looked at, others are 1 or more.

        Args:
            found: their candidates.
            picture: an image by its row, uint8 (H, W, 3).
        """
        checked = np.argsort(found.ratios, kind="stable")[:MAX_CHECKED]
        result = 1 + found.ratios
        # All at once, since a stream may be read from its beginning each time.
        pictures = self.read(found.rows[checked])
        for row in checked.tolist():
            near = np.stack([pictures[number] for number in self.numbers[found.rows[row]].tolist()])
            forms = [near] if self.rebuild is None else [near, self.rebuild(near)]
            looked_at = picture(row)
            agreement = max(pixel_agreement(looked_at, form).max() for form in forms)
            result[row] = suspicion(found.ratios[row], agreement)
        return result

    def read(self, rows: NDArray[np.int64]) -> dict[int, Images]:
        """Return training images by their numbers in the data."""
        batch = self.data.read(sorted(set(self.numbers[rows].flatten().tolist())))
        return dict(zip(batch.numbers.tolist(), batch.images, strict=True))


class Held(NamedTuple):
    """Real images that the model was not trained on.

    Attributes:
        pooled: float (N, D).
        picture: makes the picture of one from its row; None where there are none.
    """

    pooled: NDArray
    picture: Callable[[int], Images] | None = None


def search(
    pooled: NDArray[np.float32],
    shown: NDArray[np.int64],
    picture: Callable[[int], Images],
    gallery: Gallery,
    real: Held | None,
    names: Names,
    *,
    show: bool = True,
) -> tuple[Memorisation, list[Score]]:
    """Look for training images among samples.

    Args:
        pooled: (N, D), the samples' features.
        shown: indices of the samples of the random sheet.
        picture: makes a sample's picture, uint8 (H, W, 3), from its index.
        gallery: what is searched.
        real: real images to compare with, which are asked the same.
        names: of scores.
        show: whether rows hold the training images.

    Raises:
        DataError: there are too few samples.
    """
    if len(pooled) < 2:
        raise DataError("The search for copies needs at least two samples.")
    found, share = gallery.search(pooled)
    suspicions = gallery.suspicion(found, picture)
    flagged = int((suspicions < SUSPICIOUS).sum())
    random = shown[:: max(1, len(shown) // NUM_RANDOM)][:NUM_RANDOM]
    closest = np.argsort(suspicions, kind="stable")[:NUM_NEAREST]
    pictures = gallery.read(found.rows[np.concatenate([random, closest])]) if show else {}

    def rows(indices: NDArray[np.int64]) -> list[Row]:
        made = []
        for index in indices.tolist():
            numbers = gallery.numbers[found.rows[index]].tolist()
            near = [pictures[number] for number in numbers] if show else []
            distances = found.distances[index].tolist()
            made.append(Row(index, picture(index), numbers, distances, near, float(suspicions[index])))
        return made

    total = len(pooled)
    scores = [
        names.score("authenticity", share, wilson_interval(round(share * total), total), num_images=total),
        names.score("copies", flagged / total, wilson_interval(flagged, total), num_images=total),
    ]
    memorisation = Memorisation(
        len(gallery.pooled),
        rows(random),
        rows(closest),
        float(np.median(found.distances[:, 0])),
        None,
        None,
        flagged,
        None,
        gallery.rebuild is not None,
    )
    if real is None or len(real.pooled) < 2:
        return memorisation, scores
    theirs, authentic = gallery.search(real.pooled)
    alarms = None
    if real.picture is not None:
        alarms = float((gallery.suspicion(theirs, real.picture) < SUSPICIOUS).mean())
    memorisation = memorisation._replace(
        real_distance=float(np.median(theirs.distances[:, 0])),
        real_authenticity=authentic,
        real_flagged=alarms,
    )
    return memorisation, _beside(scores, (authentic, alarms), len(real.pooled))


def _beside(scores: Sequence[Score], shares: Sequence[float | None], total: int) -> list[Score]:
    """Return scores with the same shares of so many real images beside them."""
    return [
        score
        if share is None
        else replace(
            score, baselines={"real": Baseline(share, wilson_interval(round(share * total), total), total)}
        )
        for score, share in zip(scores, shares, strict=True)
    ]
