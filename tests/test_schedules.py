"""Mask schedules against the official ones."""

import numpy as np
import pytest
import torch

from maskgit.errors import ConfigError
from maskgit.schedules import MASK_SCHEDULES, mask_counts, mask_ratio, mask_schedule


@pytest.mark.parametrize("num_unknown", [64, 256, 1024])
@pytest.mark.parametrize("name", ["uniform", "cosine", "pow0.5", "pow2", "pow3", "log", "exp"])
def test_ratios_equal_the_official_ones(name, num_unknown, golden):
    record = np.load(golden / "official_losses.npz")
    ratios = mask_ratio(name, torch.from_numpy(record["schedule_ratio"]), num_unknown)
    assert ratios.dtype == torch.float32
    np.testing.assert_allclose(ratios, record[f"schedule_{name}_{num_unknown}"], rtol=0, atol=1e-6)


def test_counts_are_those_of_float32():
    # cos(π/2 · 8/12) is a hair under 1/2 in float32 and a hair over in float64.
    assert int(mask_counts("cosine", 12, 1024)[7, 1024]) == 511


@pytest.mark.parametrize("name", [*MASK_SCHEDULES, "pow1.5"])
def test_counts_fall_from_all_to_none(name):
    counts = mask_counts(name, 10, 30)
    assert counts.shape == (10, 31)
    assert counts.dtype == torch.int64
    assert (counts >= 0).all()
    assert (counts <= torch.arange(31)).all()
    assert (counts.diff(dim=0) <= 0).all()
    assert (counts[-1] == 0).all()


@pytest.mark.parametrize("name", ["", "pow", "pow0", "pow-1", "powx", "pow1e9", "linear", "__import__"])
def test_an_unknown_schedule_lists_the_choices(name):
    with pytest.raises(ConfigError, match="uniform, cosine, log, exp"):
        mask_schedule(name)
