"""Nearest neighbours against SciPy's k-d tree."""

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

from maskgit.errors import DataError
from maskgit.evaluation.metrics.vectors import nearest_neighbours


@pytest.mark.parametrize("k", [1, 3, 40])
@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_neighbours_match_a_tree(k, chunk):
    random = np.random.default_rng(0)
    queries, gallery = random.normal(size=(15, 5)), random.normal(size=(40, 5))
    distances, indices = cKDTree(gallery).query(queries, k=[*range(1, k + 1)])
    found = nearest_neighbours(queries, gallery, k, chunk)
    assert np.array_equal(found.indices, indices)
    assert np.allclose(found.distances, distances, atol=1e-12)


def test_a_copy_is_found_at_distance_zero_among_large_values():
    gallery = np.random.default_rng(0).integers(0, 256, (300, 3072), dtype=np.uint8)
    found = nearest_neighbours(gallery[[7, 250]], gallery, k=2, chunk=64)
    assert found.indices[:, 0].tolist() == [7, 250]
    assert (found.distances[:, 0] == 0).all()
    assert (found.distances[:, 1] > 1000).all()


def test_tensors_of_any_float_type_are_taken():
    gallery = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert nearest_neighbours(gallery, gallery).indices[:, 0].tolist() == list(range(20))


@pytest.mark.parametrize(
    ("queries", "gallery", "k", "match"),
    [
        (np.zeros((2, 3)), np.zeros((2, 4)), 1, "3 dimensions"),
        (np.zeros((2, 3)), np.zeros((2, 3)), 3, "k must be"),
        (np.zeros(3), np.zeros((2, 3)), 1, "shape"),
        (np.zeros((2, 3)), np.full((2, 3), np.nan), 1, "finite"),
    ],
)
def test_what_does_not_fit_is_refused(queries, gallery, k, match):
    with pytest.raises(DataError, match=match):
        nearest_neighbours(queries, gallery, k)
