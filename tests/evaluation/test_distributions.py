"""Kernel distances against loops; the Inception Score, codebook usage and perplexity against closed forms."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from maskgit.errors import DataError
from maskgit.evaluation.metrics import cmmd, codebook_usage, inception_score, kernel_distance, perplexity


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


def sure(labels, classes):
    """Logits of a classifier that has no doubt."""
    return 100.0 * np.eye(classes)[labels]


def test_inception_score_of_sure_and_varied_images_is_the_number_of_classes():
    labels = np.tile(np.arange(7), 20)
    assert inception_score(sure(labels, 7), splits=1).mean == pytest.approx(7)
    assert inception_score(sure(labels, 7), splits=20, seed=None) == pytest.approx((7, 0))


def test_inception_score_of_unsure_or_unvaried_images_is_one():
    assert inception_score(np.zeros((50, 7))) == pytest.approx((1, 0))
    assert inception_score(sure(np.full(50, 3), 7)) == pytest.approx((1, 0))


def test_inception_score_has_a_closed_form_for_two_kinds_of_images():
    # Half the images are of class 0 with probability p, half of class 1.
    p = 0.8
    logits = np.log(np.repeat([[p, 1 - p], [1 - p, p]], 40, axis=0))
    expected = np.exp(p * np.log(p) + (1 - p) * np.log(1 - p) - np.log(0.5))
    assert inception_score(logits, splits=1).mean == pytest.approx(expected)
    # Only differences of logits matter, however large.
    assert inception_score(torch.from_numpy(logits + 5000), splits=1).mean == pytest.approx(expected)


def test_splits_are_mixed_unless_their_order_is_asked_for():
    labels = np.repeat(np.arange(10), 50)
    assert inception_score(sure(labels, 10), splits=10, seed=None).mean == pytest.approx(1)
    mixed = inception_score(sure(labels, 10), splits=10)
    assert mixed.mean > 8
    assert mixed == inception_score(sure(labels, 10), splits=10)
    assert mixed != inception_score(sure(labels, 10), splits=10, seed=1)


def test_inception_score_is_adms_on_splits_in_order():
    logits = np.random.default_rng(0).normal(0, 2, (250, 11))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    # As its evaluator computes it, with splits of 50.
    scores = []
    for start in range(0, 250, 50):
        part = p[start : start + 50]
        divergence = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
        scores.append(np.exp(divergence.sum(1).mean()))
    assert inception_score(logits, splits=5, seed=None) == pytest.approx((np.mean(scores), np.std(scores)))


def test_inception_score_refuses_what_it_cannot_split():
    for splits in (0, 6):
        with pytest.raises(DataError, match="cannot be cut"):
            inception_score(np.zeros((5, 3)), splits=splits)
    with pytest.raises(DataError, match="not finite"):
        inception_score(np.full((5, 3), np.nan), splits=1)


def test_cmmd_matches_its_definition():
    real, made = np.random.default_rng(0).normal(size=(2, 12, 5))
    made = made[:9] + 3

    def k(x, y):
        return np.exp(-np.square(x[:, None] - y).sum(-1) / 200).mean()

    def expected(rows):
        return 1000 * (k(real, real) + k(rows, rows) - 2 * k(real, rows))

    groups = [np.array([0, 3]), np.array([1, 2, 8]), np.array([4, 5, 6, 7])]
    found = cmmd(real, torch.from_numpy(made), groups)
    assert found.value == pytest.approx(expected(made), rel=1e-9)
    assert found.without == pytest.approx([expected(np.delete(made, rows, 0)) for rows in groups], rel=1e-9)
    assert cmmd(real, made) == (pytest.approx(found.value, rel=1e-9), [])
    assert cmmd(real, real).value == pytest.approx(0, abs=1e-9)
    with pytest.raises(DataError, match="5 and 4 dimensions"):
        cmmd(real, made[:, :4])


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
