"""From what was kept of images to numbers, and how sure these are.

Shapes: N samples, M real images, D feature dimensions.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from maskgit.evaluation.metrics import (
    FeatureStatistics,
    Gaussian,
    Interval,
    as_doubles,
    bootstrap_interval,
    codebook_usage,
    density_coverage,
    frechet_report,
    inception_score,
    kernel_distance,
    perplexity,
    precision_recall,
)
from maskgit.evaluation.scores.names import Names, Score
from maskgit.evaluation.scores.statistics import ImageStatistics, check_comparable
from maskgit.foundation.devices import widest_float
from maskgit.foundation.units import Arrays

# Neighbours that decide precision and recall, as published scores have it, and density and coverage.
K_PRECISION, K_DENSITY = 3, 5
# The least images of a split: a few more than the neighbours that must lie within it.
MIN_SPLIT = 16

Value = Callable[[NDArray[np.int64]], float]


def split_rows(count: int, splits: int, seed: int = 0) -> list[NDArray[np.int64]]:
    """Return the rows of at most `splits` equal parts, drawn at random; none where images are too few."""
    splits = min(splits, count // MIN_SPLIT)
    if splits < 2:
        return []
    return np.array_split(np.random.default_rng(seed).permutation(count), splits)


def interval_around(
    value: float, parts: list[float], *, low: float = 0.0, high: float = np.inf
) -> Interval | None:
    """Return the bootstrap interval over splits' scores, moved to lie around the score of all images.

    The mean of the splits' scores varies from sample to sample about as much as the score of all does, but
    its level is another: Fréchet distances and recall depend on the number of images.

    Args:
        value: the score of all images.
        parts: the splits' scores.
        low, high: the least and the most that the score can be.
    """
    if len(parts) < 2:
        return None
    found, mean = bootstrap_interval(parts), float(np.mean(parts))
    ends = np.clip([value + found.low - mean, value + found.high - mean], low, high)
    return Interval(*ends.tolist())


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


def distances(
    samples: Arrays, reference: ImageStatistics, names: Names, *, splits: int = 10
) -> tuple[list[Score], list[str]]:
    """Return the Fréchet and kernel distances of samples to a reference, and cautions.

    Args:
        samples: arrays as `gather` returns them: `pooled`, and `spatial` and `logits` where the net has them.
        reference: statistics of real images; without its features there is no kernel distance.
        names: of scores.
        splits: parts that intervals are taken over.

    Raises:
        DataError: the reference is of another net.
    """
    pooled = samples["pooled"]
    statistics = FeatureStatistics(pooled.shape[1])
    statistics.update(pooled)
    check_comparable(
        reference, ImageStatistics(statistics.gaussian(), None, names.net.identity, reference.resolution)
    )
    parts = split_rows(len(pooled), splits)
    report = frechet_report(reference.pooled, statistics.gaussian(), ("reference", "sample"))

    def over_splits(kind: str, value: float, of: Value, low: float = 0.0) -> Score:
        return names.score(
            kind, value, interval_around(value, [of(part) for part in parts], low=low), num_images=len(pooled)
        )

    scores = [over_splits("fd", report.distance, lambda rows: split_distance(pooled[rows], reference.pooled))]
    if reference.spatial is not None and "spatial" in samples:
        theirs, spatial = reference.spatial, samples["spatial"]
        layout = FeatureStatistics(spatial.shape[1])
        layout.update(spatial)
        value = frechet_report(theirs, layout.gaussian()).distance
        scores.append(over_splits("sfd", value, lambda rows: split_distance(spatial[rows], theirs)))
    real = reference.features
    if real is not None and min(len(real), len(pooled)) >= 2:

        def kernel(rows: NDArray[np.int64], subsets: int = 20) -> float:
            size = min(1000, len(rows), len(real))
            # More than one subset only says more where a subset is not all there is.
            subsets = subsets if size < max(len(rows), len(real)) else 1
            return kernel_distance(real, pooled[rows], subsets=subsets, subset_size=size).mean

        # As many subsets as published KIDs have.
        scores.append(over_splits("kd", kernel(np.arange(len(pooled)), 100), kernel, low=-np.inf))
    if names.is_inception and "logits" in samples:
        logits = samples["logits"]
        value = inception_score(logits, splits=min(10, len(logits))).mean
        scores.append(
            over_splits(
                "inception_score", value, lambda rows: inception_score(logits[rows], splits=1).mean, 1.0
            )
        )
    return scores, list(report.cautions)


def manifolds(
    pooled: NDArray, reference: ImageStatistics, names: Names, *, splits: int = 10, device: torch.device
) -> list[Score]:
    """Return precision, recall, density and coverage, where the reference has features enough."""
    real = reference.features
    if real is None or min(len(real), len(pooled)) <= K_DENSITY:
        return []
    # Distances are float64, which not all devices know.
    where = device if widest_float(device) == torch.float64 else torch.device("cpu")

    def values(rows: NDArray[np.int64]) -> tuple[float, ...]:
        precise = precision_recall(real, pooled[rows], k=K_PRECISION, device=where)
        return (*precise, *density_coverage(real, pooled[rows], k=K_DENSITY, device=where))

    whole = values(np.arange(len(pooled)))
    parts = [values(rows) for rows in split_rows(len(pooled), splits)]
    highest = {"precision": 1.0, "recall": 1.0, "density": np.inf, "coverage": 1.0}
    return [
        names.score(
            kind,
            whole[i],
            interval_around(whole[i], [part[i] for part in parts], high=high),
            num_images=len(pooled),
        )
        for i, (kind, high) in enumerate(highest.items())
    ]


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
    made = []
    for kind, of, high in (
        ("codebook_usage", codebook_usage, 1.0),
        ("perplexity", perplexity, counts.shape[1]),
    ):
        value, parts = of(counts.sum(0)), [of(unit) for unit in counts if unit.any()]
        made.append(names.score(kind, value, interval_around(value, parts, high=high), num_images=num_images))
    return made


def reconstruction_scores(arrays: Arrays, names: Names, *, splits: int = 10) -> tuple[list[Score], list[str]]:
    """Return the scores of reconstructions beside their originals, and cautions."""
    rebuilt, originals = arrays["pooled"], arrays["original_pooled"]
    statistics = []
    for features in (originals, rebuilt):
        statistics.append(FeatureStatistics(features.shape[1]))
        statistics[-1].update(features)
    report = frechet_report(statistics[0].gaussian(), statistics[1].gaussian(), ("original", "reconstructed"))
    parts = []
    for rows in split_rows(len(rebuilt), splits):
        reference = FeatureStatistics(originals.shape[1])
        reference.update(originals[rows])
        parts.append(split_distance(rebuilt[rows], reference.gaussian()))
    scores = [
        names.score("rfd", report.distance, interval_around(report.distance, parts), num_images=len(rebuilt))
    ]
    scores += mean_scores(arrays, names, ("psnr", "ssim", "lpips"))
    return scores + code_scores(arrays["codes"], names, num_images=len(rebuilt)), list(report.cautions)
