"""What images are compared with: statistics in files, and real images that are measured.

Shapes: D feature dimensions.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from maskgit.data.npz import open_npz
from maskgit.data.picture_sets import MAX_BAD_SHARE, NpzPictures, Pictures, open_pictures
from maskgit.data.rows import check_share
from maskgit.errors import DataError
from maskgit.evaluation.metrics import Gaussian
from maskgit.evaluation.networks.features import FeatureNet
from maskgit.evaluation.scores.names import Names
from maskgit.evaluation.scores.statistics import (
    FEATURE_ARRAYS,
    Collector,
    ImageStatistics,
    check_comparable,
    read_statistics,
)
from maskgit.foundation.download import sha256
from maskgit.foundation.files import expand
from maskgit.foundation.units import Arrays, Units


@dataclass(frozen=True)
class Reference:
    """What images are compared with: statistics from a file, images to be measured, or both.

    Attributes:
        name: what it is, in words.
        statistics: means and covariances; None where `images` are to give them.
        images: images whose features are compared one by one, and whose means and covariances count where
            there are no `statistics`.
        digest: SHA-256 of the file of statistics, or else the images' fingerprint (see `Pictures`).
    """

    name: str
    statistics: ImageStatistics | None
    images: Pictures | None
    digest: str

    def check(self, net: FeatureNet, resolution: tuple[int, int], also: Collection[str] = ()) -> None:
        """Raise a `DataError` if scores of nets and images of a size cannot be compared with it."""
        if also and self.images is None:
            raise DataError(
                f"{self.name} holds statistics of one feature net alone, and {', '.join(also)} cannot be compared with "
                "it: give images as the reference, or leave out --also."
            )
        blank = Gaussian(np.zeros(net.dim), np.zeros((net.dim, net.dim)))
        ours = ImageStatistics(blank, None, net.identity, resolution)
        if self.statistics is not None:
            check_comparable(self.statistics, ours)
        if self.images is not None:
            check_comparable(replace(ours, resolution=self.images.resolution), ours)

    @property
    def cautions(self) -> list[str]:
        """What a reader has to make sure of: which network made statistics that do not say so."""
        origin = None if self.statistics is None else self.statistics.origin
        if origin is None or not origin.advice:
            return []
        return [
            f"{self.name} does not say which network made it; by its {len(self.statistics.pooled.mean):,} dimensions "  # type: ignore[union-attr]
            f"it is taken as {origin.whose}. {origin.advice}"
        ]

    def joined(self, measured: ImageStatistics | None) -> ImageStatistics:
        """Return the statistics with the features of the images, once these are measured."""
        if self.statistics is None:
            assert measured is not None, "a reference has statistics or images"
            return measured
        if measured is None:
            return self.statistics
        # As ADM has it: distances to the whole data set, precision and recall to a sample of it.
        return replace(
            self.statistics,
            features=measured.features,
            labels=measured.labels,
            class_names=measured.class_names,
        )

    def identity(self, joined: ImageStatistics) -> dict[str, Any]:
        """Return what a report says of it."""
        return {
            "name": self.name,
            "sha256": self.digest,
            "num_images": joined.pooled.num_images,
            "num_features": 0 if joined.features is None else len(joined.features),
            "resolution": joined.resolution,
            "features": joined.identity,
        }


def open_reference(
    place: str | Path, *, size: int | None = None, max_bad_share: float = MAX_BAD_SHARE
) -> Reference:
    """Open statistics in a file (see `read_statistics`), or a set of images that are yet to be measured.

    Args:
        place: such a file, or what `open_pictures` takes.
        size, max_bad_share: as for `open_pictures`, for images that are not in an `.npz` file.

    Raises:
        DataError: there is nothing, or nothing that can be read.
    """
    path = expand(place)
    if path.suffix in (".pt", ".npy"):
        return Reference(str(place), read_statistics(path), None, sha256(path))
    if path.suffix == ".npz":
        with open_npz(path) as archive:
            names = archive.names
        statistics = read_statistics(path) if names & {"mu", "format", *FEATURE_ARRAYS} else None
        images = NpzPictures(path) if "arr_0" in names else None
        if statistics is None and images is None:
            read_statistics(path)  # which says what is wrong
        return Reference(str(place), statistics, images, sha256(path))
    pictures = open_pictures(place, size=size, max_bad_share=max_bad_share)
    return Reference(pictures.name, None, pictures, pictures.fingerprint)


def reference_statistics(
    units: Units, data: Pictures, net: FeatureNet, *, also: str = "", keep: int = 10_000
) -> tuple[ImageStatistics, list[str]]:
    """Return the statistics of images that `RealImages` has measured, and sentences about those left out.

    Args:
        units: finished.
        data: the images.
        net: what measured them.
        also: its name, where it is one of those that measured them too; see `of_net`.
        keep: how many images' features are kept.

    Raises:
        DataError: a unit is damaged, or too many images could not be read.
    """
    skipped: list[str] = []
    collector = Collector(
        net, keep=keep, total=units.work.count, resolution=data.resolution, class_names=data.class_names
    )
    for number in range(len(units)):
        made = units.read(number)
        skipped.extend(made.notes.get("skipped", []))
        collector.add_features(of_net(made.arrays, also))
    check_share(data.name, units.work.count, skipped, data.max_bad_share)
    return collector.finish(), skipped


def of_net(arrays: Arrays, also: str) -> Arrays:
    """Return what one feature net says of images, by the names of `Features`, with their labels and numbers.

    Args:
        arrays: as `measured` returns them.
        also: the net's name, if it is not the one that all scores are of; what it says is named after it.
    """
    if not also:
        return arrays
    parts = {
        name.removesuffix(f"_{also}"): part for name, part in arrays.items() if name.endswith(f"_{also}")
    }
    return parts | {name: arrays[name] for name in ("labels", "numbers") if name in arrays}


def evaluator_identity(names: Names) -> dict[str, Any]:
    """Return what a report says of the feature net."""
    net = names.net
    return {
        "features": names.features,
        "identity": net.identity,
        "published": net.published,
    }
