"""Mask schedules against the official ones."""

import numpy as np
import pytest
import torch

from maskgit.errors import ConfigError
from maskgit.sampler.config import SamplerConfig
from maskgit.sampler.plans import plan_steps
from maskgit.sampler.schedules import (
    MASK_SCHEDULES,
    curve,
    curve_progress,
    mask_counts,
    mask_ratio,
    mask_ratios,
    mask_schedule,
)


@pytest.mark.parametrize("num_unknown", [64, 256, 1024])
@pytest.mark.parametrize("name", ["uniform", "cosine", "pow0.5", "pow2", "pow3", "log", "exp"])
def test_ratios_equal_the_official_ones(name, num_unknown, golden):
    record = np.load(golden / "official_losses.npz")
    ratios = mask_ratio(name, torch.from_numpy(record["schedule_ratio"]), num_unknown)
    assert ratios.dtype == torch.float32
    np.testing.assert_allclose(ratios, record[f"schedule_{name}_{num_unknown}"], rtol=0, atol=1e-6)


def test_counts_are_those_of_float32():
    # cos(π/2 · 8/12) is a hair under 1/2 in float32 and a hair over in float64.
    assert int(mask_counts(mask_ratios("cosine", 12, 1024))[7, 1024]) == 511


@pytest.mark.parametrize("name", [*MASK_SCHEDULES, "pow1.5"])
def test_counts_fall_from_all_to_none(name):
    counts = mask_counts(mask_ratios(name, 10, 30))
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


def test_curves_are_their_formulas():
    r = 0.3
    assert curve("constant", start=1, end=0)(r) == 1
    assert curve("linear", start=1, end=0)(r) == pytest.approx(0.7)
    assert curve("linear:0.2,1", start=1, end=0)(r) == pytest.approx(0.2 + 0.8 * 0.3)
    assert curve("cosine", start=0, end=1)(r) == pytest.approx(np.sin(np.pi * r / 2) ** 2)
    assert curve("power-cosine:2", start=0, end=1)(r) == pytest.approx(np.sin(np.pi * r**2 / 2) ** 2)
    assert curve("power-cosine:2,1,0.5", start=0, end=1)(1.0) == pytest.approx(0.5)
    inside = curve("interval:0.2,0.6", start=0, end=1)
    assert [inside(r) for r in (0.1, 0.2, 0.6, 0.7)] == [0, 1, 1, 0]
    assert curve("cosine@before", start=0, end=1)(r) == curve("cosine", start=0, end=1)(r)


def test_a_curve_is_read_after_the_step_or_before_it():
    assert curve_progress("linear", 4) == [0.25, 0.5, 0.75, 1]
    assert curve_progress("linear:0,1@before", 4) == [0, 0.25, 0.5, 0.75]
    config = SamplerConfig(steps=4, guidance_scale=5.0, guidance_schedule="linear@before")
    assert list(plan_steps(config, 16, remasks=False).guidance_scales) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "spec", ["", "sine", "linear:1", "linear:1,2,3", "constant:1", "interval", "interval:a,b", "power-cosine",
             "linear:nan,1", "linear:-1,1", "linear:1e9,1", "linear@after", "linear@"],
)  # fmt: skip
def test_a_wrong_curve_is_told_in_a_sentence(spec):
    with pytest.raises(ConfigError, match=r"schedule"):
        curve(spec, start=0, end=1)
