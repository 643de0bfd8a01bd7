"""Intervals against a closed form and SciPy."""

import numpy as np
import pytest
from scipy import stats

from maskgit.errors import ConfigError, DataError
from maskgit.evaluation.metrics import (
    bootstrap_interval,
    jackknife_interval,
    mean_interval,
    share_interval,
    splits_interval,
    student_quantile,
    wilson_interval,
)


def test_the_interval_of_a_mean_is_that_of_the_normal_law():
    values = np.random.default_rng(0).normal(5, 2, 400)
    low, high = bootstrap_interval(values, resamples=4000)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.03)
    assert high == pytest.approx(values.mean() + half, abs=0.03)


def test_the_interval_is_scipys():
    values = np.random.default_rng(1).exponential(1, 60)
    ours = bootstrap_interval(values, np.median, level=0.9, resamples=5000)
    theirs = stats.bootstrap(
        (values,), np.median, confidence_level=0.9, n_resamples=5000, method="percentile", rng=0
    ).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.03)


def test_rows_stay_together_and_the_seed_decides():
    rows = np.arange(40.0).reshape(20, 2)
    difference = bootstrap_interval(rows, lambda x: float((x[:, 1] - x[:, 0]).mean()))
    assert difference == (1, 1)
    assert bootstrap_interval(rows[:, 0], seed=1) == bootstrap_interval(rows[:, 0], seed=1)
    assert bootstrap_interval(rows[:, 0], seed=1) != bootstrap_interval(rows[:, 0], seed=2)
    narrow, wide = (bootstrap_interval(rows[:, 0], level=level) for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_what_cannot_be_resampled_is_refused():
    for settings in ({"level": 1.0}, {"resamples": 1}):
        with pytest.raises(ConfigError):
            bootstrap_interval([1.0, 2.0], **settings)
    for values in ([1.0], 3.0):
        with pytest.raises(DataError, match="at least 2"):
            bootstrap_interval(values)
    with pytest.raises(DataError, match="not finite"):
        bootstrap_interval([1.0, np.inf])


@pytest.mark.parametrize("freedom", [1, 2, 3, 5, 9, 19, 200])
def test_students_quantile_is_scipys(freedom):
    assert student_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=5e-3)


def test_of_a_mean_all_intervals_are_the_textbooks():
    values = np.random.default_rng(0).exponential(size=60)
    groups = values.reshape(12, 5)
    half = stats.t.ppf(0.975, 11) * groups.mean(1).std(ddof=1) / np.sqrt(12)
    expected = values.mean() - half, values.mean() + half
    without = [float(np.delete(groups, g, 0).mean()) for g in range(12)]
    assert splits_interval(values.mean(), groups.mean(1).tolist()) == pytest.approx(expected, rel=1e-3)
    assert jackknife_interval(values.mean(), without) == pytest.approx(expected, rel=1e-3)
    normal = stats.norm.interval(0.95, values.mean(), values.std(ddof=1) / np.sqrt(60))
    assert mean_interval(values) == pytest.approx(normal)
    hits = values > 1
    assert share_interval(hits) == wilson_interval(int(hits.sum()), 60)
    assert splits_interval(0.5, [0.0, 1.0], low=0, high=1) == (0, 1)
    assert splits_interval(0.5, [0.5]) is None
    assert jackknife_interval(0.5, [0.5]) is None


def test_what_differs_between_kinds_does_not_widen_an_interval():
    # One kind always, one never: other samples of as many of each have the same share.
    kinds = np.arange(100) % 2
    hits = kinds == 0
    assert share_interval(hits) == wilson_interval(50, 100)
    rng = np.random.default_rng(0)
    hits = np.where(kinds == 0, rng.random(100) < 0.95, rng.random(100) < 0.05)
    within = [hits[kinds == kind].var(ddof=1) for kind in (0, 1)]
    low, high = share_interval(hits, kinds)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(np.mean(within) / 100), rel=0.02)
    low, high = mean_interval(hits + 10.0 * kinds, kinds)
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(np.mean(within) / 100), rel=1e-3)
