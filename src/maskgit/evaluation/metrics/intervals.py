"""How sure a score is: intervals at 95 %, by what suits each kind of score.

Shapes: N images, G groups or splits.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from maskgit.errors import DataError
from maskgit.foundation.checks import check_count, check_range, check_seed

# The normal law's quantile of 97.5 %.
Z = 1.959964


class Interval(NamedTuple):
    """The two ends of an interval."""

    low: float
    high: float


def wilson_interval(successes: float, total: float) -> Interval:
    """Return the 95 % score interval of a share, which is sound for a few images and for shares of 0 and 1.

    Source: Wilson: Probable Inference, the Law of Succession, and Statistical Inference, JASA 1927.
    """
    share, square = successes / total, Z * Z / total
    middle = (share + square / 2) / (1 + square)
    half = Z / (1 + square) * float(np.sqrt(share * (1 - share) / total + square / (4 * total)))
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def share_interval(hits: ArrayLike, strata: ArrayLike | None = None) -> Interval:
    """Return the 95 % interval of a share of independent images.

    Args:
        hits: bool (N,), N at least 1.
        strata: integers (N,), where as many images of each kind, such as a class, were asked for: what differs
            between kinds then does not vary from sample to sample, and Wilson's interval is of as many images as
            would vary as much.
    """
    values = np.asarray(hits, np.float64)
    share, total = float(values.mean()), float(len(values))
    if strata is not None:
        within = _variance_of_mean(values, np.asarray(strata))
        if within > 0:
            total = max(total, share * (1 - share) / within)
    return wilson_interval(share * total, total)


def mean_interval(values: ArrayLike, strata: ArrayLike | None = None) -> Interval:
    """Return the 95 % interval of the mean of independent images' values, by the normal law.

    Args:
        values: float (N,), N at least 2.
        strata: as for `share_interval`.
    """
    rows = np.asarray(values, np.float64)
    kinds = np.zeros(len(rows), np.int64) if strata is None else np.asarray(strata)
    mean, half = float(rows.mean()), Z * math.sqrt(_variance_of_mean(rows, kinds))
    return Interval(mean - half, mean + half)


def _variance_of_mean(values: NDArray[np.float64], strata: NDArray[Any]) -> float:
    """Return the variance of the mean of values of which those of one stratum are alike."""
    _, place = np.unique(strata, return_inverse=True)
    counts = np.bincount(place)
    if counts.min() < 2:
        # Kinds of one image have no spread that could be seen.
        return float(values.var(ddof=1) / len(values)) if len(values) > 1 else 0.0
    means = np.bincount(place, values) / counts
    squares = np.bincount(place, np.square(values - means[place]))
    return float((squares / (counts - 1) * counts).sum() / len(values) ** 2)


def splits_interval(
    value: float, parts: Sequence[float], *, low: float = -math.inf, high: float = math.inf
) -> Interval | None:
    """Return the 95 % interval of a score that disjoint splits estimate without bias, by Student's law.

    Args:
        value: the score of all images, around which the interval lies.
        parts: the splits' scores; fewer than two have no interval.
        low, high: the least and the most that the score can be.
    """
    if len(parts) < 2:
        return None
    return _around(value, float(np.var(parts, ddof=1)) / len(parts), len(parts) - 1, low, high)


def jackknife_interval(
    value: float, without: Sequence[float], *, low: float = -math.inf, high: float = math.inf
) -> Interval | None:
    """Return the 95 % interval of a score by the jackknife over groups of images.

    No image counts twice, as in a bootstrap, which Fréchet distances and nearest neighbours mistake for variety; and
    each score is of nearly all images, so that its dependence on their number hardly matters.

    Args:
        value: the score of all images, around which the interval lies.
        without: the scores of all images but one group each; fewer than two have no interval.
        low, high: the least and the most that the score can be.

    Source: Efron, Tibshirani: An Introduction to the Bootstrap, 1993, §11.5; groups as in Shao, Tu: The Jackknife
    and Bootstrap, 1995, §2.3.
    """
    groups = len(without)
    if groups < 2:
        return None
    variance = float(np.square(np.asarray(without) - np.mean(without)).sum()) * (groups - 1) / groups
    return _around(value, variance, groups - 1, low, high)


def _around(value: float, variance: float, freedom: int, low: float, high: float) -> Interval:
    half = student_quantile(freedom) * math.sqrt(variance)
    return Interval(*np.clip([value - half, value + half], low, high).tolist())


def student_quantile(freedom: int) -> float:
    """Return the quantile of 97.5 % of Student's law with so many degrees of freedom, at least 1, to a thousandth.

    Source: Abramowitz, Stegun: Handbook of Mathematical Functions, 26.7.5; closed forms below 3.
    """
    if freedom == 1:
        return math.tan(0.475 * math.pi)
    if freedom == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z, v = Z, float(freedom)
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean(dtype=np.float64))


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable[[NDArray[Any]], float] = _mean,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """Return the percentile bootstrap interval of a statistic of independent values.

    Args:
        values: (N, …): a number or row for each image, subset or split.
        statistic: rows drawn with replacement, (N, …) → a number. A statistic that repeated rows bias, as
            they bias Fréchet distances and nearest neighbours, is better taken of disjoint splits first.
        level: the share of resamples that lie inside, in (0, 1).
        resamples: how often N rows are drawn, 2 to 1,000,000.
        seed: decides the draws.

    Returns:
        The two percentiles.

    Raises:
        ConfigError: a setting is out of range.
        DataError: there are fewer than two values, or a resample's statistic is not finite.

    Source: Efron, Tibshirani: An Introduction to the Bootstrap, 1993, §13.3.
    """
    level = check_range("level", level, 1e-6, 1 - 1e-6)
    resamples = check_count("resamples", resamples, 2, 1_000_000)
    rows = np.asarray(values)
    if rows.ndim < 1 or len(rows) < 2:
        raise DataError(f"An interval needs at least 2 values, but the shape is {rows.shape}.")
    random = np.random.default_rng(check_seed(seed))
    drawn = np.array([statistic(rows[random.integers(0, len(rows), len(rows))]) for _ in range(resamples)])
    if not np.isfinite(drawn).all():
        raise DataError("A resample's statistic is not finite: leave infinite and missing values out.")
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
