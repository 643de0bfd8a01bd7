"""Codebook usage and perplexity against closed forms."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskgit.errors import DataError
from maskgit.evaluation.metrics import codebook_usage, perplexity


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
