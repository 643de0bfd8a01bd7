"""Measuring sets of real images and comparing two of them, within one process."""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskgit.data.picture_sets import Pictures
from maskgit.data.rows import check_share
from maskgit.errors import DataError
from maskgit.evaluation.metrics import authenticity
from maskgit.evaluation.metrics.intervals import wilson_interval
from maskgit.evaluation.networks.features import FeatureNet
from maskgit.evaluation.runs.sampling import NONE, RealImages, joined
from maskgit.evaluation.scores.names import Names, Score, with_baselines
from maskgit.evaluation.scores.references import Reference, of_net
from maskgit.evaluation.scores.scores import distances, manifolds
from maskgit.evaluation.scores.statistics import Collector, ImageStatistics
from maskgit.foundation.checks import check_count
from maskgit.foundation.units import Arrays

# Called with what is measured and the images done and in all.
Progress = Callable[[str, int, int], None]
# Images that are added up at once.
_PIECE = 512


class Measured(NamedTuple):
    """What was measured of a set of images.

    Attributes:
        statistics: of all that could be read.
        skipped: a sentence for each image that could not be.
        others: the statistics by the features of other nets, by name.
    """

    statistics: ImageStatistics
    skipped: list[str]
    others: dict[str, ImageStatistics]


class Compared(NamedTuple):
    """What two sets of images differ by.

    Attributes:
        scores: of the second against the first.
        cautions: a sentence for each reason why a number may mislead.
        skipped: a sentence for each image that could not be read.
    """

    scores: list[Score]
    cautions: list[str]
    skipped: list[str]


def measure(
    pictures: Pictures,
    net: FeatureNet,
    *,
    num_images: int | None = None,
    keep: int = 10_000,
    batch_size: int = 64,
    also: Mapping[str, FeatureNet] = NONE,
    progress: Progress | None = None,
) -> Measured:
    """Return the statistics of a set of images.

    Args:
        pictures: the images.
        net: the feature net.
        num_images: how many of them, spread evenly over the set; None takes all.
        keep: images whose features are kept, spread evenly, 0 to 1,000,000.
        batch_size: images read together.
        also: by name, other nets whose features are computed too.
        progress: called as images are done.

    Raises:
        DataError: too many images cannot be read, or they differ in size.
    """
    keep = check_count("keep", keep, 0, 1_000_000)
    batch_size = check_count("batch_size", batch_size, 1, 65_536)
    if num_images is not None:
        num_images = check_count("num_images", num_images, 2, len(pictures))
    work = RealImages(pictures, net, num_images=num_images, batch_size=batch_size, also=also)
    skipped: list[str] = []
    collectors = {
        name: Collector(
            one, keep=keep, total=work.count, resolution=pictures.resolution, class_names=pictures.class_names
        )
        for name, one in {"": net, **also}.items()
    }
    for arrays in _pieces(work, skipped, progress):
        for name, collector in collectors.items():
            collector.add_features(of_net(arrays, name))
    found = {name: collector.finish() for name, collector in collectors.items()}
    return Measured(found.pop(""), skipped, found)


def _pieces(work: RealImages, skipped: list[str], progress: Progress | None) -> Iterator[Arrays]:
    for first in range(0, work.count, _PIECE):
        stop = min(first + _PIECE, work.count)
        made = work.make(first, stop)
        skipped += made.notes["skipped"]
        yield made.arrays
        if progress is not None:
            progress(work.data.name, stop, work.count)
    check_share(work.data.name, work.count, skipped, work.data.max_bad_share)


def compare_pictures(
    reference: Reference,
    pictures: Pictures,
    net: FeatureNet,
    features: str,
    *,
    training: Pictures | None = None,
    num_training: int = 50_000,
    splits: int = 10,
    batch_size: int = 64,
    also: Mapping[str, FeatureNet] = NONE,
    progress: Progress | None = None,
) -> Compared:
    """Return the scores of images against a reference.

    Args:
        reference: real images or their statistics.
        pictures: the images to score.
        net: the feature net, and `features` its name in `FEATURE_NETS`.
        training: the images that a model was trained on, of which the second set is not to hold copies.
        num_training: so many of them, spread evenly over them.
        splits: parts that intervals are taken over.
        batch_size: images read together.
        also: by name in `FEATURE_NETS`, other nets by whose features distances are told too.
        progress: called as images are done.

    Raises:
        DataError: the sets are of different sizes or nets, or too many images cannot be read.
    """
    splits = check_count("splits", splits, 2, 1000)
    reference.check(net, pictures.resolution, also)
    names = Names(features, net)
    skipped: list[str] = []
    measured, theirs = None, dict[str, ImageStatistics]()
    if reference.images is not None:
        real = measure(reference.images, net, batch_size=batch_size, also=also, progress=progress)
        measured, theirs = real.statistics, real.others
        skipped += real.skipped
    work = RealImages(pictures, net, batch_size=batch_size, also=also)
    own: list[str] = []
    arrays = joined([piece for piece in _pieces(work, own, progress) if piece])
    skipped += own
    if len(arrays.get("pooled", ())) < 2:
        raise DataError(f"{pictures.name} holds fewer than two images: scores are of many.")
    against = reference.joined(measured)
    scores, cautions = distances(arrays, against, names, splits=splits)
    scores += manifolds(np.asarray(arrays["pooled"]), against, names, device=net.device)
    for name, other in theirs.items():
        found, more = distances(of_net(arrays, name), other, Names(name, also[name]), splits=splits)
        scores, cautions = scores + found, cautions + more
    if training is not None:
        known = RealImages(training, net, num_images=num_training, batch_size=batch_size)
        torn: list[str] = []
        gallery = joined([piece for piece in _pieces(known, torn, progress) if piece])["pooled"]
        skipped += torn
        scores.append(_authenticity(gallery, np.asarray(arrays["pooled"]), against, names))
    return Compared(scores, cautions + reference.cautions, skipped)


def _authenticity(gallery: NDArray, pooled: NDArray, reference: ImageStatistics, names: Names) -> Score:
    """Return the share of images that are no copies of training images, beside that of the reference."""

    def score(features: NDArray) -> Score:
        share = authenticity(gallery, features)
        interval = wilson_interval(round(share * len(features)), len(features))
        return names.score("authenticity", share, interval, num_images=len(features))

    real = {} if reference.features is None else {"real": [score(reference.features)]}
    return with_baselines([score(pooled)], real)[0]
