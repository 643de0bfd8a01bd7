"""Bootstrap intervals against a closed form and SciPy."""

import numpy as np
import pytest
from scipy import stats

from maskgit.errors import ConfigError, DataError
from maskgit.evaluation.metrics import bootstrap_interval


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
