"""Metrics against scikit-image, SciPy, NumPy's own statistics and closed forms."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from maskgit.errors import DataError, ImageError
from maskgit.evaluation.metrics import (
    FeatureStatistics,
    codebook_usage,
    frechet_distance,
    kernel_distance,
    perplexity,
    psnr,
    ssim,
)


@pytest.fixture(scope="module")
def pairs():
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(3, 3, 24, 37, generator=generator)
    noise = torch.rand(a.shape, generator=generator)
    amount = torch.tensor([0.02, 0.3, 1.0]).view(3, 1, 1, 1)
    return a, torch.lerp(a, noise, amount)


def as_image(tensor):
    return tensor.permute(1, 2, 0).double().numpy()


def test_psnr_matches_scikit_image(pairs):
    expected = [
        peak_signal_noise_ratio(as_image(x), as_image(y), data_range=1) for x, y in zip(*pairs, strict=True)
    ]
    assert np.allclose(psnr(*pairs), expected, atol=1e-9)


def test_psnr_of_equal_images_is_infinite(pairs):
    assert torch.isposinf(psnr(pairs[0], pairs[0])).all()


def test_ssim_matches_scikit_image(pairs):
    expected = [
        structural_similarity(
            as_image(x),
            as_image(y),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
            channel_axis=2,
        )
        for x, y in zip(*pairs, strict=True)
    ]
    assert np.allclose(ssim(*pairs), expected, atol=1e-7)


def test_ssim_of_equal_images_is_one(pairs):
    assert torch.allclose(ssim(pairs[0], pairs[0]), torch.ones(3, dtype=torch.float64))


def test_float32_images_lose_nothing_in_the_sums(pairs):
    a, b = pairs
    for metric in (psnr, ssim):
        assert metric(a, b).dtype == torch.float64
        assert torch.equal(metric(a, b), metric(a.double(), b.double()))


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 15)),
        (torch.rand(3, 16, 16), torch.rand(3, 16, 16)),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, 3, 16, 16, dtype=torch.uint8)),
    ],
)
def test_images_that_do_not_fit_are_refused(metric, a, b):
    with pytest.raises(ImageError, match="must"):
        metric(a, b)


def test_ssim_refuses_images_smaller_than_its_window():
    with pytest.raises(ImageError, match="at least 11"):
        ssim(torch.rand(1, 3, 10, 32), torch.rand(1, 3, 10, 32))


def test_perplexity_and_usage_of_known_counts():
    assert perplexity([5, 5, 5, 5]) == pytest.approx(4)
    assert perplexity([0, 9, 0]) == pytest.approx(1)
    assert perplexity([1, 1, 2]) == pytest.approx(2**1.5)
    assert codebook_usage([0, 3, 0, 1]) == 0.5


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=50).filter(any))
def test_perplexity_lies_between_one_and_the_codes_used(counts):
    used = sum(count > 0 for count in counts)
    assert 1 - 1e-9 <= perplexity(counts) <= used * (1 + 1e-9)
    assert codebook_usage(counts) == used / len(counts)


@pytest.mark.parametrize("counts", [[], [0, 0], [1, -1], [1, float("nan")], [[1, 2]], 3])
@pytest.mark.parametrize("measure", [perplexity, codebook_usage])
def test_what_is_no_count_is_refused(measure, counts):
    with pytest.raises(DataError):
        measure(counts)


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


def loop_mmd(a, b):
    def k(x, y):
        return (np.dot(x, y) / len(x) + 1) ** 3

    within = [
        np.mean([k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j]) for x in (a, b)
    ]
    return sum(within) - 2 * np.mean([k(x, y) for x in a for y in b])


def test_kernel_distance_matches_its_definition():
    a, b = np.random.default_rng(0).normal(size=(2, 9, 4))
    # Subsets of all vectors are all alike.
    result = kernel_distance(a, torch.from_numpy(b), subsets=3, subset_size=9, seed=0)
    assert result.mean == pytest.approx(loop_mmd(a, b))
    assert result.std == pytest.approx(0, abs=1e-12)


def test_kernel_distance_is_unbiased_and_sees_a_shift():
    a, b = np.random.default_rng(0).normal(size=(2, 2000, 8))
    settings = {"subsets": 60, "subset_size": 100}
    same, shifted = kernel_distance(a, b, **settings), kernel_distance(a, b + 0.5, **settings)
    assert abs(same.mean) < 4 * same.std / 60**0.5
    # The expectation for N(0, I) and N(0.5, I) in 8 dimensions, from many independent pairs.
    x, y = np.random.default_rng(1).normal(size=(2, 20_000, 8))
    mu, shift = y @ x.T[:, :500] / 8, (y + 0.5) @ (x.T[:, :500] + 0.5) / 8
    cross = (y + 0.5) @ x.T[:, :500] / 8
    expected = sum(((k + 1) ** 3).mean() for k in (mu, shift)) - 2 * ((cross + 1) ** 3).mean()
    assert shifted.mean == pytest.approx(expected, rel=0.15)


def test_kernel_distance_depends_on_its_settings_and_on_nothing_else():
    a, b = np.random.default_rng(0).normal(size=(2, 50, 4))
    base = {"subsets": 5, "subset_size": 20, "seed": 0}
    assert kernel_distance(a, b, **base) == kernel_distance(a, b, **base)
    for change in ({"subsets": 6}, {"subset_size": 21}, {"seed": 1}):
        assert kernel_distance(a, b, **(base | change)) != kernel_distance(a, b, **base)


@pytest.mark.parametrize(
    "settings", [{"subset_size": 6}, {"subset_size": 1}, {"subset_size": 4, "subsets": 0}]
)
def test_kernel_distance_refuses_subsets_that_cannot_be_drawn(settings):
    with pytest.raises(DataError, match="cannot be drawn"):
        kernel_distance(np.zeros((5, 2)), np.zeros((9, 2)), **settings)


def test_kernel_distance_refuses_features_of_two_nets():
    with pytest.raises(DataError, match="2 and 3 dimensions"):
        kernel_distance(np.zeros((5, 2)), np.zeros((5, 3)), subset_size=2)
