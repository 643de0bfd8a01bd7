"""Masks of training: how many tokens, which ones, and of what they are a function."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskgit.sampler.schedules import MASK_SCHEDULES
from maskgit.training.objectives.masking import (
    centre_windows,
    draw_masks,
    draw_shape,
    draw_windows,
    hide_labels,
)


@given(
    seed=st.integers(0, 2**64 - 1),
    first=st.integers(0, 2**50),
    grid_size=st.integers(1, 9),
    schedule=st.sampled_from([*MASK_SCHEDULES, "pow1.5"]),
)
@settings(max_examples=60, deadline=None)
def test_every_sample_masks_between_one_and_all_tokens(seed, first, grid_size, schedule):
    masks = draw_masks(seed, torch.arange(first, first + 5), (grid_size, grid_size), mask_schedule=schedule)
    counts = masks.mask.sum((1, 2))
    assert masks.mask.shape == (5, grid_size, grid_size)
    assert counts.min() >= 1
    assert torch.equal(masks.ratio, counts / grid_size**2)


def test_a_mask_is_a_function_of_seed_and_sample_number():
    numbers = torch.arange(40)
    whole = draw_masks(7, numbers, (8, 8), label_dropout=0.5)
    for part in (numbers[:1], numbers[13:20], numbers.flip(0)):
        for drawn, expected in zip(draw_masks(7, part, (8, 8), label_dropout=0.5), whole, strict=True):
            assert torch.equal(drawn, expected[part])
    assert not torch.equal(draw_masks(8, numbers, (8, 8)).mask, whole.mask)
    assert len({tuple(mask.flatten().tolist()) for mask in whole.mask[whole.ratio < 0.9]}) > 20


@pytest.mark.parametrize(
    ("schedule", "inverse"),
    [
        ("cosine", lambda ratio: 2 / math.pi * math.acos(ratio)),
        ("uniform", lambda ratio: 1 - ratio),
        ("square", lambda ratio: math.sqrt(1 - ratio)),
    ],
)
def test_as_many_tokens_as_the_schedule_of_a_uniform_number_says(schedule, inverse):
    # ⌈γ(r) · N⌉ ≤ c exactly where γ(r) ≤ c / N, that is r ≥ γ⁻¹(c / N), as γ falls.
    counts = draw_masks(1, torch.arange(20_000), (4, 4), mask_schedule=schedule).mask.sum((1, 2))
    for count in range(1, 16):
        expected = 1 - inverse(count / 16)
        assert float((counts <= count).float().mean()) == pytest.approx(expected, abs=0.015)


def test_a_share_of_samples_is_wholly_masked():
    ratio = draw_masks(2, torch.arange(20_000), (8, 8)).ratio
    # γ(r) > 63/64 for r below 2/π · acos(63/64).
    assert float((ratio == 1).float().mean()) == pytest.approx(2 / math.pi * math.acos(63 / 64), abs=0.01)


def test_all_positions_are_masked_equally_often_and_independently():
    mask = draw_masks(3, torch.arange(20_000), (4, 4), mask_schedule="uniform").mask.flatten(1).float()
    share = mask.mean(0)
    # Masked: on average E⌈u · 16⌉ / 16 = 17 / 32 of the tokens.
    assert torch.allclose(share, torch.full((16,), 17 / 32), atol=0.015)
    together = (mask.T @ mask) / len(mask)
    apart = together[~torch.eye(16, dtype=torch.bool)]
    # E[c (c − 1)] / (16 · 15) for c uniform on 1 … 16.
    expected = sum(c * (c - 1) for c in range(1, 17)) / 16 / 240
    assert torch.allclose(apart, torch.full_like(apart, expected), atol=0.02)


def test_labels_are_dropped_at_the_rate_asked_for_whatever_the_mask():
    masks = draw_masks(4, torch.arange(20_000), (4, 4), label_dropout=0.1)
    assert float(masks.drop_label.float().mean()) == pytest.approx(0.1, abs=0.01)
    assert float(masks.drop_label[masks.ratio < 0.5].float().mean()) == pytest.approx(0.1, abs=0.02)
    assert not draw_masks(4, torch.arange(1000), (4, 4), label_dropout=0.0).drop_label.any()
    assert draw_masks(4, torch.arange(1000), (4, 4), label_dropout=1.0).drop_label.all()


def test_dropped_labels_become_no_class():
    assert hide_labels(torch.tensor([3, 4]), torch.tensor([True, False])).tolist() == [-1, 4]


def test_windows_are_cut_anywhere_and_belong_to_their_sample():
    tokens = torch.arange(20).view(1, 4, 5).expand(2000, -1, -1)
    numbers = torch.arange(2000)
    windows = draw_windows(5, numbers, tokens, (3, 2))
    assert windows.shape == (2000, 3, 2)
    first = windows[:, :1, :1]
    assert torch.equal(windows - first, torch.tensor([[0, 1], [5, 6], [10, 11]]).expand(2000, -1, -1))
    counts = torch.bincount(first.flatten(), minlength=20).view(4, 5)
    assert (counts[:2, :4] > 190).all()  # Eight places, 250 images each.
    assert counts.sum() == counts[:2, :4].sum()
    assert torch.equal(draw_windows(5, numbers[7:9], tokens[:2], (3, 2)), windows[7:9])
    assert torch.equal(draw_windows(5, numbers[:3], tokens[:3], (4, 5)), tokens[:3])
    assert centre_windows(tokens[:1], (2, 3)).tolist() == [[[6, 7, 8], [11, 12, 13]]]


def test_shapes_change_from_step_to_step_by_the_seed():
    shapes = ((4, 4), (2, 8), (8, 2))
    drawn = [draw_shape(3, step, shapes) for step in range(300)]
    assert drawn == [draw_shape(3, step, shapes) for step in range(300)]
    assert all(60 < drawn.count(shape) < 140 for shape in shapes)
    assert drawn != [draw_shape(4, step, shapes) for step in range(300)]
