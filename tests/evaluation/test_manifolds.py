"""Precision, recall, density, coverage and authenticity against their formulas written out."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from maskgit.errors import DataError
from maskgit.evaluation.metrics import Manifolds, authenticity, density_coverage, precision_recall
from maskgit.evaluation.metrics.vectors import nearest_neighbours


def sets(seed=0, n=70, m=53, dim=6, shift=0.5):
    random = np.random.default_rng(seed)
    return random.normal(size=(n, dim)), random.normal(shift, 0.8, (m, dim))


def kth(x, k):
    # The smallest distance is that to itself.
    return np.sort(cdist(x, x), axis=1)[:, k]


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("chunk", [7, 1000])
def test_scores_are_their_formulas(k, chunk):
    real, generated = sets()
    d = cdist(real, generated)
    expected = (d <= kth(real, k)[:, None]).any(0).mean(), (d <= kth(generated, k)[None]).any(1).mean()
    assert precision_recall(real, generated, k=k, chunk=chunk) == pytest.approx(expected)
    inside = d < kth(real, k)[:, None]
    expected = inside.sum() / (k * len(generated)), inside.any(1).mean()
    assert density_coverage(real, generated, k=k, chunk=chunk) == pytest.approx(expected)
    assert 0 < expected[1] < 1


@pytest.mark.parametrize("chunk", [7, 1000])
@pytest.mark.parametrize("repeated", [0, 5])
def test_authenticity_is_its_formula(chunk, repeated):
    real, generated = sets(shift=0)
    real = np.concatenate([real, real[:repeated]])
    d = cdist(real, generated)
    copies = [d[i := d[:, j].argmin(), j] < kth(real, 1)[i] for j in range(len(generated))]
    assert authenticity(real, generated, chunk=chunk) == pytest.approx(1 - np.mean(copies))
    assert 0.2 < np.mean(copies) < 0.8
    nearest = nearest_neighbours(generated, real)
    assert authenticity(real, generated, nearest=nearest) == authenticity(real, generated)


@pytest.mark.parametrize("chunk", [7, 1000])
def test_scores_of_parts_are_those_of_the_parts_alone(chunk):
    real, generated = sets()
    found = Manifolds(real, generated, k=3, chunk=chunk)
    rows = np.random.default_rng(1).permutation(53)[:30]
    for part, scores in ((generated, found.scores()), (generated[rows], found.scores(rows))):
        assert scores[:2] == precision_recall(real, part, k=3)
        assert scores[2:] == density_coverage(real, part, k=3)
    assert found.inside.mean() == found.scores().precision
    assert found.balls.mean() / 3 == pytest.approx(found.scores().density)
    for left_out in range(53):
        without = found.scores(np.delete(np.arange(53), left_out)).coverage
        assert without == pytest.approx(found.scores().coverage - found.only[left_out] / 70)


def test_features_may_be_float32_tensors_far_from_zero():
    real, generated = (x.astype(np.float32) + np.float32(1000) for x in sets())
    d = cdist(real.astype(np.float64), generated.astype(np.float64))
    expected = (d <= kth(real.astype(np.float64), 3)[:, None]).any(0).mean()
    found = precision_recall(torch.from_numpy(real), torch.from_numpy(generated)).precision
    assert found == pytest.approx(expected)


def test_equal_sets_are_precise_and_covered():
    real, _ = sets()
    assert precision_recall(real, real) == (1, 1)
    assert density_coverage(real, real).coverage == 1


def test_copies_are_not_authentic_even_of_images_that_repeat():
    real, generated = sets()
    assert authenticity(real, real[:20]) == 0
    assert authenticity(np.concatenate([real, real]), real[:20]) == 0
    assert authenticity(real, generated + 50) == 1


def test_a_repeated_image_has_a_ball_of_no_size():
    real, generated = sets(shift=0)
    assert precision_recall(np.repeat(real[:5], 4, axis=0), generated).precision == 0
    assert precision_recall(np.repeat(real[:5], 4, axis=0), real[:5]).precision == 1


@pytest.mark.parametrize(
    ("settings", "match"), [({"k": 0}, "above 0"), ({"k": 53}, "below 53"), ({"chunk": 0}, "chunk above 0")]
)
def test_settings_that_are_not_allowed_are_refused(settings, match):
    for score in (precision_recall, density_coverage):
        with pytest.raises(DataError, match=match):
            score(*sets(), **settings)


def test_features_that_do_not_fit_are_refused():
    real, generated = sets()
    with pytest.raises(DataError, match="6 and 5 dimensions"):
        precision_recall(real, generated[:, :5])
    with pytest.raises(DataError, match="not finite"):
        density_coverage(real, generated * np.nan)
