"""Variations and crossings: their ends against what they must equal, and which tokens change in between."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskgit.editing.variations import resumed
from maskgit.errors import ConfigError
from maskgit.sampler.config import SamplerConfig, StepTables
from maskgit.sampler.policies import POLICIES
from maskgit.sampler.schedules import mask_ratios
from pictures import noise


@pytest.mark.parametrize("policy", POLICIES)
def test_strength_goes_from_the_reconstruction_to_a_new_image(tiny, policy):
    photo = noise(32, 32)
    options = {"num_images": 3, "steps": 5, "seed": 2, "first_index": 5, "policy": policy}
    reconstruction = tiny.reconstruct(photo)
    made = tiny.vary(photo, 0, 1, **options)
    assert torch.equal(made.tokens, reconstruction.tokens.expand(3, -1, -1))
    assert torch.equal(tiny.vary(photo, 1, 1, **options).tokens, tiny.generate(1, **options).tokens)
    half = tiny.vary(photo, 0.5, 1, **options)
    assert (half.token_mask.sum((1, 2)) == 32).all()
    known = ~half.token_mask
    assert torch.equal(half.tokens[known], reconstruction.tokens.expand(3, -1, -1)[known])
    alone = tiny.vary(photo, 0.5, 1, **(options | {"num_images": 1, "first_index": 6}))
    assert torch.equal(alone.tokens[0], half.tokens[1])


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 1), st.integers(0, 2**63))
def test_a_stronger_variation_masks_more_of_the_same_tokens(tiny, strength, seed):
    photo = noise(32, 32)
    made = tiny.vary(photo, strength, 1, seed=seed, steps=2)
    assert int(made.token_mask.sum()) == round(64 * strength)
    assert (
        made.token_mask <= tiny.vary(photo, min(1, strength + 0.1), 1, seed=seed, steps=2).token_mask
    ).all()


@settings(deadline=None)
@given(st.floats(0, 1), st.integers(1, 20), st.sampled_from(["cosine", "uniform", "pow3", "log"]))
def test_decoding_goes_on_at_the_schedules_pace(share, steps, schedule):
    config = SamplerConfig(steps=steps, mask_schedule=schedule)
    later, start = resumed(config, share, 64)
    ratios = mask_ratios(schedule, steps, 64)[:, 64]
    before = 1.0 if start == 0 else float(ratios[start - 1])
    assert before >= share or start == 0
    assert start == steps - 1 or float(ratios[start]) < share or share == 1
    if share == 1:
        assert later == config
    elif share > 0:
        left = torch.tensor(later.tables.mask_ratio)[start:] * share
        torch.testing.assert_close(left, ratios[start:].clamp(max=share))


def test_tables_of_the_models_own_are_gone_on_from():
    tables = StepTables(mask_ratio=(0.9, 0.5, 0.1, 0.0))
    later, start = resumed(SamplerConfig(steps=4, tables=tables), 0.5, 64)
    assert start == 2
    assert later.tables.mask_ratio == pytest.approx((1.0, 1.0, 0.2, 0.0))
    assert dataclasses.replace(later, tables=tables) == SamplerConfig(steps=4, tables=tables)


@pytest.mark.parametrize("policy", POLICIES)
def test_classes_are_switched_at_a_step(tiny, policy):
    options = {"num_images": 2, "steps": 6, "seed": 3, "policy": policy, "return_steps": True}
    first, second = tiny.generate(1, **options), tiny.generate(2, **options)
    assert torch.equal(tiny.interpolate_classes(1, 2, switch=1, **options).tokens, first.tokens)
    assert torch.equal(tiny.interpolate_classes(1, 2, switch=0, **options).tokens, second.tokens)
    between = tiny.interpolate_classes(1, 2, switch=1 / 3, **options)
    assert torch.equal(between.trace.tokens[:, :2], first.trace.tokens[:, :2])
    # Two classes may well give the same tokens, but hardly the same probabilities.
    assert not torch.equal(between.trace.confidence[:, 2], first.trace.confidence[:, 2])
    same = tiny.interpolate_classes(1, 1, switch=0.5, **options)
    assert torch.equal(same.trace.tokens, first.trace.tokens)
    one_by_one = tiny.interpolate_classes(1, 2, switch=1 / 3, batch_size=1, **options)
    assert torch.equal(one_by_one.tokens, between.tokens)


def test_more_steps_than_tokens_are_switched_at_their_share(tiny):
    made = tiny.interpolate_classes(1, 2, switch=1, steps=200)
    assert torch.equal(made.tokens, tiny.generate(1, steps=200).tokens)


@settings(max_examples=20, deadline=None)
@given(st.floats(0, 1), st.integers(0, 3), st.integers(0, 2), st.integers(0, 99))
def test_crossed_tokens_come_from_either_image_but_at_their_border(tiny, share, smoothness, refine, seed):
    pictures = noise(32, 32), noise(32, 32, seed=1)
    ours, theirs = (tiny.reconstruct(picture).tokens[0] for picture in pictures)
    options = {"share": share, "smoothness": smoothness, "seed": seed, "steps": 2}
    plain = tiny.interpolate_images(*pictures, **options).tokens[0]
    assert ((plain == ours) | (plain == theirs)).all()
    differ = ours != theirs
    assert int((plain != ours).sum()) <= round(64 * share)
    assert int((plain != theirs).sum()) <= 64 - round(64 * share)
    made = tiny.interpolate_images(*pictures, 1, refine=refine, **options)
    known = ~made.token_mask[0]
    assert torch.equal(made.tokens[0][known], plain[known])
    if refine and 0 < round(64 * share) < 64:
        chosen = (plain == theirs) & differ
        edges = differ[:, 1:] & differ[:, :-1] & (chosen[:, 1:] != chosen[:, :-1])
        assert (~known[:, 1:] & ~known[:, :-1])[edges].all()
    if not refine:
        assert known.all()


def test_smoother_fields_have_fewer_borders(tiny):
    pictures = noise(32, 32), noise(32, 32, seed=1)
    borders = [
        tiny.interpolate_images(*pictures, 1, smoothness=s, refine=1, steps=1, num_images=8).token_mask.sum()
        for s in (0, 1, 3)
    ]
    assert borders[0] > borders[1] > borders[2] > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, p: m.vary(p, 1.5, 1), "strength must be between"),
        (lambda m, p: m.vary(p, float("nan"), 1), "strength must be between"),
        (lambda m, p: m.vary(p, 0.5, None), "name a class"),
        (lambda m, p: m.vary(p, 0.5, 1, num_images=0), "num_images"),
        (lambda m, p: m.vary(p, 0.5, 1, first_index=-1), "first_index"),
        (lambda m, p: m.interpolate_classes(1, 2, switch=2), "switch must be between"),
        (lambda m, p: m.interpolate_classes(1, 99), "classes are 0 to 9"),
        (lambda m, p: m.interpolate_images(p, p, share=-1), "share must be between"),
        (lambda m, p: m.interpolate_images(p, p, smoothness=-1), "smoothness must be between"),
        (lambda m, p: m.interpolate_images(p, p, refine=1), "name a class"),
    ],
)
def test_wrong_arguments_are_told(tiny, call, message):
    with pytest.raises(ConfigError, match=message):
        call(tiny, noise(32, 32))
