"""How sure a score is: percentile intervals by resampling.

Shapes: N images, subsets or splits.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from maskgit.errors import DataError
from maskgit.foundation.checks import check_count, check_range, check_seed


class Interval(NamedTuple):
    """The two ends of an interval."""

    low: float
    high: float


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
