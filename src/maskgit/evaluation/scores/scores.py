"""From what was kept of images to numbers, and how sure these are.

Shapes: N samples, M real images, D feature dimensions.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from maskgit.evaluation.metrics import (
    FeatureStatistics,
    Gaussian,
    Interval,
    Manifolds,
    as_doubles,
    bootstrap_interval,
    cmmd,
    codebook_usage,
    frechet_report,
    inception_score,
    jackknife_interval,
    kernel_distance,
    mean_interval,
    perplexity,
    share_interval,
    splits_interval,
    student_quantile,
    symmetric_root,
)
from maskgit.evaluation.scores.names import Names, Score
from maskgit.evaluation.scores.statistics import ImageStatistics, check_comparable
from maskgit.foundation.devices import widest_float
from maskgit.foundation.units import Arrays

# Neighbours and images that precision, recall, density and coverage are of unless said otherwise.
K_NEIGHBOURS, NEIGHBOUR_IMAGES = 3, 2000
# Random halves whose scores say how much recall varies.
HALVES = 20
# The least images of a split: a few more than the neighbours that must lie within it.
MIN_SPLIT = 16
# From so many images on, the Fréchet distance of infinitely many is extrapolated, from so many sizes.
MIN_EXTRAPOLATED, EXTRAPOLATED_SIZES = 2000, 6

Rows = NDArray[np.int64]
Labels = NDArray[np.int32]


def device_of_doubles(device: torch.device) -> torch.device:
    """Return the device, or the CPU where it does not know float64, which distances are computed in."""
    return device if widest_float(device) == torch.float64 else torch.device("cpu")


def split_rows(count: int, splits: int, seed: int = 0, strata: Labels | None = None) -> list[Rows]:
    """Return the rows of at most `splits` equal parts, drawn at random; none where images are too few.

    Args:
        count: how many rows there are.
        splits: how many parts.
        seed: decides the parts.
        strata: int32 (count,), kinds of which each part gets its share.
    """
    splits = min(splits, count // MIN_SPLIT)
    if splits < 2:
        return []
    order = np.random.default_rng(seed).permutation(count)
    if strata is None:
        return np.array_split(order, splits)
    order = order[np.argsort(strata[order], kind="stable")]
    return [order[place::splits] for place in range(splits)]


def split_distance(features: NDArray, reference: Gaussian) -> float:
    """Return the Fréchet distance of a split to a reference, with less work than `frechet_distance`.

    The root's trace is the sum of the roots of the eigenvalues of Ca·Cb, which those of Y·Ca·Yᵀ are, where
    Cb = Yᵀ·Y; with Y the split's deviations, few images make a small matrix. Rounding of eigenvalues near 0
    leaves about five digits, enough for an interval.
    """
    x = as_doubles(features, "Features")
    mean = x.mean(0)
    y = (x - mean) / np.sqrt(len(x) - 1)
    trace = float(np.trace(reference.covariance) + np.square(y).sum())
    if len(y) > y.shape[1]:
        y = np.linalg.qr(y, mode="r")
    values = np.linalg.eigvalsh(y @ reference.covariance @ y.T)
    cross = float(np.sqrt(values.clip(min=0)).sum())
    return float(np.square(mean - reference.mean).sum()) + max(0.0, trace - 2 * cross)


def distances_without(features: NDArray, reference: Gaussian, groups: Sequence[Rows]) -> list[float]:
    """Return the Fréchet distances to a reference of all images but each group."""
    if len(features) <= 2 * features.shape[1]:
        return [split_distance(np.delete(features, group, 0), reference) for group in groups]
    root = symmetric_root(reference.covariance)[0]
    return [_distance(one, reference, root) for one in _without(features, groups)]


def _without(features: NDArray, groups: Sequence[Rows]) -> Iterator[Gaussian]:
    """Yield the statistics of all images but each group, of which each image is counted once."""
    parts = []
    for group in groups:
        parts.append(FeatureStatistics(features.shape[1]))
        parts[-1].update(features[group])
    for left_out in parts:
        merged = FeatureStatistics(features.shape[1])
        for part in parts:
            if part is not left_out:
                merged.merge(part)
        yield merged.gaussian()


def _distance(one: Gaussian, other: Gaussian, root: NDArray[np.float64]) -> float:
    """Return the Fréchet distance of two Gaussians, the root of the other's covariance being known."""
    values = np.linalg.eigvalsh(root @ one.covariance @ root)
    trace = float(np.trace(one.covariance) + np.trace(other.covariance))
    cross = float(np.sqrt(values.clip(min=0)).sum())
    return float(np.square(one.mean - other.mean).sum()) + max(0.0, trace - 2 * cross)


def extrapolated_distance(features: NDArray, reference: Gaussian, seed: int = 0) -> float:
    """Return what the Fréchet distance to a reference would be of infinitely many images.

    Fréchet distances of few images are too large by an amount that falls like one over their number; a line through
    the distances of random subsets, from half of the images to all of them, meets 0 there.

    Args:
        features: float (N, D); with N below a few times D the line is rough.
        reference: whose own number of images still makes the distance larger.
        seed: decides the subsets.

    Source: Chong, Forsyth: Effectively Unbiased FID and Inception Score, CVPR 2020 (arXiv 1911.07023), §4.
    """
    random, sizes = np.random.default_rng(seed), np.linspace(0.5, 1, EXTRAPOLATED_SIZES) * len(features)
    root = symmetric_root(reference.covariance)[0]
    found = []
    for size in sizes.astype(int):
        subset = FeatureStatistics(features.shape[1])
        subset.update(features[random.permutation(len(features))[:size]])
        found.append(_distance(subset.gaussian(), reference, root))
    return float(np.polyfit(1 / sizes.astype(int), found, 1)[1])


def distances(
    samples: Arrays,
    reference: ImageStatistics,
    names: Names,
    *,
    splits: int = 10,
    strata: Labels | None = None,
) -> tuple[list[Score], list[str]]:
    """Return the Fréchet and kernel distances of samples to a reference, and cautions.

    Args:
        samples: arrays as `gather` returns them: `pooled`, and `spatial` and `logits` where the net has them.
        reference: statistics of real images; without its features there is no kernel distance.
        names: of scores.
        splits: parts that intervals are taken over.
        strata: the samples' classes, where other samples would be of the same ones.

    Raises:
        DataError: the reference is of another net.
    """
    pooled, count = samples["pooled"], len(samples["pooled"])
    statistics = FeatureStatistics(pooled.shape[1])
    statistics.update(pooled)
    check_comparable(
        reference, ImageStatistics(statistics.gaussian(), None, names.net.identity, reference.resolution)
    )
    parts = split_rows(count, splits, strata=strata)
    report = frechet_report(reference.pooled, statistics.gaussian(), ("reference", "sample"))

    def frechet(kind: str, value: float, features: NDArray, theirs: Gaussian) -> Score:
        interval = jackknife_interval(value, distances_without(features, theirs, parts), low=0)
        return names.score(kind, value, interval, num_images=count)

    scores = [frechet("fd", report.distance, pooled, reference.pooled)]
    if count >= MIN_EXTRAPOLATED:
        value = extrapolated_distance(pooled, reference.pooled)
        scores.append(names.score("fd_infinity", value, num_images=count))
    if reference.spatial is not None and "spatial" in samples:
        layout = FeatureStatistics(samples["spatial"].shape[1])
        layout.update(samples["spatial"])
        value = frechet_report(reference.spatial, layout.gaussian()).distance
        scores.append(frechet("sfd", value, samples["spatial"], reference.spatial))
    if reference.features is not None and min(len(reference.features), count) >= 2:
        if names.features == "clip":
            found = cmmd(reference.features, pooled, parts, device=device_of_doubles(names.net.device))
            interval = jackknife_interval(found.value, found.without, low=0)
            scores.append(names.score("cmmd", found.value, interval, num_images=count))
        scores.append(_kernel_score(pooled, reference.features, parts, names))
    if names.is_inception and "logits" in samples:
        scores.append(_inception_score(samples["logits"], names))
    return scores, list(report.cautions)


def _kernel_score(pooled: NDArray, real: NDArray, parts: Sequence[Rows], names: Names) -> Score:
    def kernel(rows: Rows, subsets: int = 20) -> float:
        size = min(1000, len(rows), len(real))
        # More than one subset only says more where a subset is not all there is.
        subsets = subsets if size < max(len(rows), len(real)) else 1
        return kernel_distance(real, pooled[rows], subsets=subsets, subset_size=size).mean

    # As many subsets as published KIDs have.
    value = kernel(np.arange(len(pooled)), 100)
    interval = splits_interval(value, [kernel(part) for part in parts])
    return names.score("kd", value, interval, num_images=len(pooled))


def _inception_score(logits: NDArray, names: Names) -> Score:
    splits = min(10, len(logits))
    found = inception_score(logits, splits=splits)
    # It is the mean of its splits, whose spread is that of a population.
    half = student_quantile(splits - 1) * found.std / np.sqrt(splits - 1)
    interval = Interval(max(1.0, found.mean - half), found.mean + half)
    return names.score("inception_score", found.mean, interval, num_images=len(logits))


def manifolds(
    pooled: NDArray,
    reference: ImageStatistics,
    names: Names,
    *,
    device: torch.device,
    strata: Labels | None = None,
    k: int = K_NEIGHBOURS,
    num_images: int = NEIGHBOUR_IMAGES,
) -> list[Score]:
    """Return precision, recall, density and coverage, where the reference has features enough.

    Given the reference, each sample counts for itself in precision and density. Coverage is of all samples together:
    its interval is the jackknife's. Recall varies as it does among random halves of the samples: drawn without
    replacement, since a sample that counts twice has no distance to itself.

    Args:
        pooled: float (N, D), the samples' features.
        reference: real images.
        names: of scores.
        device: where distances are computed, if it knows float64.
        strata: int32 (N,), as for `distances`.
        k: the neighbour that decides the radius of a ball.
        num_images: of so many samples and real images at most; recall and coverage depend on it.
    """
    real = reference.features
    if real is None or min(len(real), len(pooled)) <= k:
        return []
    # Samples of every class are spread over all indices; other images may lie class by class.
    rows = np.arange(min(num_images, len(pooled))) if strata is not None else _some(len(pooled), num_images)
    own = None if strata is None else strata[rows]
    where = device_of_doubles(device)
    found = Manifolds(real[_some(len(real), num_images)], pooled[rows], k=k, device=where)
    whole = found.scores()
    halves = [split_rows(len(rows), 2, seed, own) for seed in range(HALVES)]
    parts = [found.scores(half[0]) for half in halves if half]

    def by_halves(kind: str) -> Interval | None:
        value, varied = getattr(whole, kind), [getattr(part, kind) for part in parts]
        if not varied:
            return None
        half = student_quantile(len(varied) - 1) * float(np.std(varied, ddof=1))
        return Interval(max(0.0, value - half), min(1.0, value + half))

    density = mean_interval(found.balls / k, own)
    # The jackknife that leaves out one sample at a time, of which no distance has to be computed again.
    spread = mean_interval(len(rows) / found.num_real * found.only, own)
    lost = (spread.high - spread.low) / 2
    intervals = {
        "precision": share_interval(found.inside, own),
        "recall": by_halves("recall"),
        "density": Interval(max(0.0, density.low), density.high),
        "coverage": Interval(max(0.0, whole.coverage - lost), min(1.0, whole.coverage + lost)),
    }
    return [
        names.score(kind, getattr(whole, kind), interval, num_images=len(rows))
        for kind, interval in intervals.items()
    ]


def _some(total: int, count: int) -> Rows:
    """Return at most `count` of `total` rows, drawn at random, in order."""
    return np.sort(np.random.default_rng(0).permutation(total)[:count])


def mean_scores(arrays: Arrays, names: Names, kinds: Iterable[str]) -> list[Score]:
    """Return means over images of the kinds that there are, with bootstrap intervals."""
    return [
        names.score(
            kind,
            float(arrays[kind].mean(dtype=np.float64)),
            bootstrap_interval(arrays[kind]) if len(arrays[kind]) > 1 else None,
            num_images=len(arrays[kind]),
        )
        for kind in kinds
        if kind in arrays
    ]


def code_scores(counts: NDArray[np.int64], names: Names, *, num_images: int) -> list[Score]:
    """Return how well the codebook is used, from counts int64 (units, codes); intervals are over units."""
    made, units = [], [unit for unit in counts if unit.any()]
    for kind, of, high in (
        ("codebook_usage", codebook_usage, 1.0),
        ("perplexity", perplexity, counts.shape[1]),
    ):
        total = counts.sum(0)
        without = [of(total - unit) for unit in units] if len(units) > 1 else []
        interval = jackknife_interval(of(total), without, low=0, high=high)
        made.append(names.score(kind, of(total), interval, num_images=num_images))
    return made


def reconstruction_scores(arrays: Arrays, names: Names, *, splits: int = 10) -> tuple[list[Score], list[str]]:
    """Return the scores of reconstructions beside their originals, and cautions."""
    rebuilt, originals = arrays["pooled"], arrays["original_pooled"]
    statistics = []
    for features in (originals, rebuilt):
        statistics.append(FeatureStatistics(features.shape[1]))
        statistics[-1].update(features)
    report = frechet_report(statistics[0].gaussian(), statistics[1].gaussian(), ("original", "reconstructed"))
    groups = split_rows(len(rebuilt), splits)
    pairs = zip(_without(originals, groups), _without(rebuilt, groups), strict=True)
    without = [_distance(made, real, symmetric_root(real.covariance)[0]) for real, made in pairs]
    interval = jackknife_interval(report.distance, without, low=0)
    scores = [names.score("rfd", report.distance, interval, num_images=len(rebuilt))]
    scores += mean_scores(arrays, names, ("psnr", "ssim", "lpips"))
    return scores + code_scores(arrays["codes"], names, num_images=len(rebuilt)), list(report.cautions)
