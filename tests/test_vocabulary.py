"""Sequences and grids."""

import pytest
import torch

from maskgit.errors import ConfigError
from maskgit.networks.vocabulary import Vocabulary

VOCABULARY = Vocabulary(num_codes=8, num_classes=3, grid_size=2)


def test_the_official_layout():
    official = Vocabulary(1024, 1000, 16)
    assert (official.size, official.mask, official.num_tokens) == (2025, 2024, 256)
    assert official.sequence(torch.tensor([207]))[0, :2].tolist() == [1231, 2024]


def test_tokens_are_laid_out_in_raster_order():
    tokens = torch.tensor([[[1, 2], [3, 4]]])
    mask = torch.tensor([[False, True], [False, False]])
    sequence = VOCABULARY.sequence(torch.tensor([2]), tokens, mask)
    assert sequence.tolist() == [[10, 1, 11, 3, 4]]
    assert torch.equal(VOCABULARY.grid(VOCABULARY.sequence(torch.tensor([0]), tokens)), tokens)
    assert VOCABULARY.grid(torch.zeros(2, 7, 5)).shape == (2, 7, 2, 2)


def test_no_class_is_the_mask():
    assert VOCABULARY.sequence(torch.tensor([-1])).tolist() == [[11, 11, 11, 11, 11]]


@pytest.mark.parametrize(
    "labels", [torch.tensor([3]), torch.tensor([-2]), torch.tensor([]).long(), torch.tensor([[1]])]
)
def test_wrong_labels_are_told(labels):
    with pytest.raises(ConfigError, match="label"):
        VOCABULARY.sequence(labels)


def test_a_wrong_grid_is_told():
    with pytest.raises(ConfigError, match=r"tokens must be of shape \(1, 2, 2\)"):
        VOCABULARY.sequence(torch.tensor([0]), torch.zeros(1, 3, 3, dtype=torch.int64))
