"""The Fréchet distance against SciPy and closed forms, and statistics against NumPy's own."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg

from maskgit.errors import DataError
from maskgit.evaluation.metrics import FeatureStatistics, Gaussian, frechet_distance, frechet_report


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_statistics_do_not_depend_on_pieces_or_order(sizes, random):
    sizes = [*sizes, 5]
    # Far from 0, where sums of squares would lose the variance.
    features = np.random.default_rng(1).normal(1e6, 1, (sum(sizes), 3))
    pieces = np.split(features, np.cumsum(sizes)[:-1])
    random.shuffle(pieces)
    middle = len(pieces) // 2
    left, right = FeatureStatistics(3), FeatureStatistics(3)
    for piece in pieces[:middle]:
        left.update(piece)
    for piece in pieces[middle:]:
        right.update(torch.from_numpy(piece))
    left.merge(right)
    assert left.count == len(features)
    assert np.allclose(left.mean, features.mean(0), rtol=1e-12)
    assert np.allclose(left.covariance, np.cov(features, rowvar=False), atol=1e-6)


def test_statistics_are_saved_and_restored(tmp_path):
    statistics = FeatureStatistics(2)
    statistics.update([[0.0, 1.0], [2.0, 5.0], [1.0, 1.0]])
    np.savez(tmp_path / "state.npz", **statistics.state())
    with np.load(tmp_path / "state.npz", allow_pickle=False) as state:
        restored = FeatureStatistics.from_state(state)
    statistics.update([[3.0, 3.0]])
    restored.update([[3.0, 3.0]])
    assert restored.count == 4
    assert np.array_equal(restored.mean, statistics.mean)
    assert np.array_equal(restored.covariance, statistics.covariance)


@pytest.mark.parametrize(
    "change",
    [
        {"count": np.array(-1)},
        {"count": np.zeros(2)},
        {"mean": np.zeros(3)},
        {"mean": np.full(2, np.nan)},
        {"scatter": np.zeros((2, 3))},
        {"mean": np.array(["a", "b"])},
    ],
)
def test_a_broken_state_is_refused(change):
    with pytest.raises(DataError, match="make them again"):
        FeatureStatistics.from_state(FeatureStatistics(2).state() | change)


def test_an_incomplete_state_is_refused():
    with pytest.raises(DataError, match="'scatter'"):
        FeatureStatistics.from_state({"count": np.array(0), "mean": np.zeros(2)})


def test_features_that_do_not_fit_are_refused():
    statistics = FeatureStatistics(2)
    with pytest.raises(DataError, match="3 dimensions"):
        statistics.update(np.zeros((4, 3)))
    with pytest.raises(DataError, match="not finite"):
        statistics.update([[1.0, float("inf")]])
    with pytest.raises(DataError, match="3 dimensions"):
        statistics.merge(FeatureStatistics(3))
    statistics.update([[1.0, 2.0]])
    with pytest.raises(DataError, match="at least 2"):
        _ = statistics.covariance


def gaussian(seed, dim=12, samples=200):
    x = np.random.default_rng(seed).normal(seed, 1 + seed, (samples, dim)) @ np.random.default_rng(
        seed + 9
    ).normal(size=(dim, dim))
    return x.mean(0), np.cov(x, rowvar=False)


def test_frechet_distance_matches_scipys_matrix_root():
    (mean_a, cov_a), (mean_b, cov_b) = gaussian(0), gaussian(1)
    root = linalg.sqrtm(cov_a @ cov_b).real
    expected = np.square(mean_a - mean_b).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(mean_a, cov_a, mean_b, cov_b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(mean_b, cov_b, mean_a, cov_a) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_diagonal_gaussians_has_a_closed_form():
    random = np.random.default_rng(0)
    mean_a, mean_b = random.normal(size=(2, 30))
    # Zeros make the covariances singular, each in other directions.
    std_a, std_b = random.uniform(0, 3, (2, 30)) * (random.uniform(size=(2, 30)) > 0.4)
    expected = np.square(mean_a - mean_b).sum() + np.square(std_a - std_b).sum()
    rotation = np.linalg.qr(random.normal(size=(30, 30)))[0]
    cov_a, cov_b = (rotation * std_a**2 @ rotation.T for std_a in (std_a, std_b))
    assert frechet_distance(mean_a, np.diag(std_a**2), mean_b, np.diag(std_b**2)) == pytest.approx(
        expected, rel=1e-9
    )
    assert frechet_distance(rotation @ mean_a, cov_a, rotation @ mean_b, cov_b) == pytest.approx(
        expected, rel=1e-6
    )


def test_frechet_distance_to_itself_is_zero_with_fewer_samples_than_dimensions():
    mean, covariance = gaussian(2, dim=40, samples=5)
    assert 0 <= frechet_distance(mean, covariance, mean, covariance) <= 1e-9 * np.trace(covariance)


@pytest.mark.parametrize(
    "arguments",
    [
        (np.zeros(2), np.eye(2), np.zeros(3), np.eye(3)),
        (np.zeros(2), np.eye(3), np.zeros(2), np.eye(2)),
        (np.zeros(2), np.eye(2), np.zeros(2), np.full((2, 2), np.nan)),
    ],
)
def test_gaussians_that_do_not_fit_are_refused(arguments):
    with pytest.raises(DataError):
        frechet_distance(*arguments)


def measured(features):
    statistics = FeatureStatistics(features.shape[1])
    statistics.update(features)
    return statistics.gaussian()


def test_shards_give_the_same_distance_in_any_order():
    random = np.random.default_rng(0)
    features = 3 + random.normal(size=(300, 24)) @ random.normal(size=(24, 24))
    reference = measured(random.normal(size=(300, 24)))
    expected = frechet_report(measured(features), reference).distance
    shards = np.split(features, [7, 100, 101])
    for order in itertools.permutations(range(4)):
        merged = FeatureStatistics(24)
        for index in order:
            shard = FeatureStatistics(24)
            shard.update(shards[index].astype(np.float32))
            merged.merge(FeatureStatistics.from_state(shard.state()))
        assert frechet_report(merged.gaussian(), reference).distance == pytest.approx(expected, rel=1e-6)


def test_for_features_like_inceptions_scipys_root_is_matched():
    random = np.random.default_rng(0)
    # Inception's features are not negative and correlated; an eighth of its dimensions keeps the test short.
    mix = random.normal(size=(64, 256))
    a, b = (
        np.maximum(random.normal(s, 1, (1500, 64)) @ mix, 0) + random.random((1500, 256)) for s in (0, 0.1)
    )
    (mean_a, cov_a, _), (mean_b, cov_b, _) = measured(a), measured(b)
    root = linalg.sqrtm(cov_a @ cov_b).real
    expected = np.square(mean_a - mean_b).sum() + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(mean_a, cov_a, mean_b, cov_b) == pytest.approx(expected, rel=1e-3)


def test_the_parts_of_a_report_add_up():
    a, b = Gaussian(*gaussian(0)), Gaussian(*gaussian(1))
    report = frechet_report(a, b)
    assert report.mean_part == pytest.approx(np.square(a.mean - b.mean).sum())
    assert report.mean_part + report.covariance_part == pytest.approx(report.distance)
    assert report.distance == frechet_distance(*a[:2], *b[:2])
    assert report.cautions == ()


def test_too_few_images_are_reported():
    random = np.random.default_rng(0)
    few, many = measured(random.normal(size=(30, 30))), measured(random.normal(size=(500, 30)))
    report = frechet_report(few, many, ("sample", "reference"))
    (caution,) = report.cautions
    assert "sample set has 30 vectors of 30 dimensions" in caution
    # They are of one distribution, whose distance is 0, but so few do not show it.
    assert report.distance > 10 * frechet_report(measured(random.normal(size=(500, 30))), many).distance
    assert not frechet_report(measured(random.normal(size=(31, 30))), many).cautions


def test_repeated_images_are_reported():
    random = np.random.default_rng(0)
    many = measured(random.normal(size=(500, 30)))
    copies = measured(np.repeat(random.normal(size=(10, 30)), 40, axis=0))
    assert "singular (9 of 30 dimensions): do images repeat" in frechet_report(copies, many).cautions[0]
    fewer = measured(np.repeat(random.normal(size=(5, 30)), 4, axis=0))
    assert "span only 4 dimensions" in frechet_report(many, fewer).cautions[1]
    # A file that does not say how many images there were is looked at just the same.
    assert "singular" in frechet_report(many, copies._replace(num_images=None)).cautions[0]


def test_equal_sets_are_reported():
    same = measured(np.random.default_rng(0).normal(size=(100, 10)))
    report = frechet_report(same, same)
    assert report.distance == pytest.approx(0, abs=1e-12)
    assert report.cautions == ("Both sets have the same statistics: are they the same images?",)
