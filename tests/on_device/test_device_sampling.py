"""Noise and decoding on a device: the CPU's tokens, and nothing that makes the host wait."""

import copy
import dataclasses

import pytest
import torch

from fake_device import FROM_FREE, TO, counting
from maskgit.engine.graphs import GraphedSteps
from maskgit.sampler.config import SamplerConfig, StepTables
from maskgit.sampler.loop import decode, decode_step, decode_steps
from maskgit.sampler.noise import ImageNoise, philox, uniform
from maskgit.sampler.policies import POLICIES, make_policy

STEPS = 4
WAYS = {
    "plain": SamplerConfig(steps=STEPS),
    "guided": SamplerConfig(steps=STEPS, guidance_scale=2.5, guidance_schedule="linear", force_guidance=True),
    "tables": SamplerConfig(
        steps=STEPS,
        tables=StepTables(
            mask_ratio=(0.8, 0.5, 0.2, 0.0),
            temperature=(1.0, 0.9, 0.8, 0.7),
            choice_temperature=(4.0, 3.0, 1.0, 0.0),
            guidance_scale=(1.0, 1.5, 2.0, 1.0),
        ),
    ),
}
OPTIONS = {"remdm": {"eta": 0.2, "begin_at": 0.2, "end_at": 0.8}, "stable": {"kl": 10.0}}


@pytest.fixture(scope="module")
def sequences(tiny):
    """Two images of which nothing is known, and one that is half known."""
    vocabulary = tiny.vocabulary
    shape = (3, vocabulary.grid_size, vocabulary.grid_size)
    tokens = torch.randint(vocabulary.num_codes, shape, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[2, ::2] = False
    return vocabulary.sequence(torch.tensor([1, 2, 0]), tokens, mask)


@pytest.fixture(scope="module", autouse=True)
def _tables(on_device, sequences):
    """Tables of plans and orders are copied to the device once for all: before these tests count."""
    for way in WAYS.values():
        list(steps_of(on_device, sequences.to("gpu"), dataclasses.replace(way, policy="halton"), decode_step))


def steps_of(model, sequences, config, step_function):
    indices = torch.tensor([5, 2**40, 7], device=sequences.device)
    noise = ImageNoise(2**63 + 5, indices, sequences.shape[1], model.vocabulary.num_codes)
    return decode_steps(
        model.predict_logits,
        sequences,
        config,
        mask_token=model.vocabulary.mask,
        noise=noise,
        start_step=1,
        step_function=step_function,
    )


def tokens_of(steps):
    return [made.tokens.cpu() for made in steps]


@pytest.mark.parametrize("step", [3, torch.tensor([[3], [4]])], ids=["int", "tensor"])
@pytest.mark.parametrize("seed", [2**64 - 1, torch.tensor([[1, 2], [3, 4]])], ids=["int", "words"])
def test_noise_is_the_cpus_and_waits_for_nothing(step, seed):
    def there(value, device):
        return value.to(device) if isinstance(value, torch.Tensor) else value

    def drawn(device):
        indices = torch.arange(2).to(device) + 2**40
        made_of = ImageNoise.of_words if isinstance(seed, torch.Tensor) else ImageNoise
        noise = made_of(there(seed, device), indices, 5, 7)
        number = there(step, device)
        with counting() as counts:
            made = [noise.tokens(number), noise.choice(number), noise.uniform(number, 3), noise.words()]
        assert not counts.events, counts
        return made

    for one, other in zip(drawn("cpu"), drawn("gpu"), strict=True):
        assert torch.equal(one, other.cpu())


def test_words_of_both_kinds_may_be_mixed():
    block, key = torch.arange(4)[None], torch.arange(3)[:, None]
    expected = philox((block, 1, 2, 3), (key, 7))
    made = philox((block.to("gpu"), 1, 2, 3), (key.to("gpu"), 7))
    assert all(torch.equal(one, other.cpu()) for one, other in zip(expected, made, strict=True))
    assert uniform(1, torch.arange(2, device="gpu"), 0, 0, 9).device.type == "gpu"


@pytest.mark.parametrize("captured", [False, True], ids=["plain steps", "captured steps"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("policy", POLICIES)
def test_decoding_gives_the_cpus_tokens_and_waits_for_nothing(
    tiny, on_device, sequences, policy, way, captured
):
    config = dataclasses.replace(WAYS[way], policy=policy, policy_options=OPTIONS.get(policy, {}))
    there = sequences.to("gpu")

    def step_function():
        return GraphedSteps(capture=False, compile_noise=False) if captured else decode_step

    steps = steps_of(on_device, there, config, step_function())
    with counting() as counts:
        made = list(steps)
    expected = tokens_of(steps_of(tiny, sequences, config, decode_step))
    equal = [torch.equal(one, other) for one, other in zip(expected, tokens_of(made), strict=True)]
    assert all(equal), equal
    if make_policy(policy).adapts:
        # Whether a step was the last is on its way to the host while the device makes the next.
        assert counts.events == {FROM_FREE: min(len(made) + 1, STEPS - 1)}, counts
    else:
        assert not counts.events, counts


@pytest.mark.parametrize("policy", ["entropy_bounded", "stable"])
def test_policies_that_adapt_stop_early_with_the_cpus_steps(tiny, on_device, sequences, policy):
    options = {"entropy_bounded": {"gamma": 1e6}, "stable": {"confidence": 0.0, "kl": 1e6}}[policy]
    config = SamplerConfig(steps=9, policy=policy, policy_options=options)
    there = list(steps_of(on_device, sequences.to("gpu"), config, decode_step))
    here = list(steps_of(tiny, sequences, config, decode_step))
    assert [made.step for made in there] == [made.step for made in here]
    assert there[-1].step < 8
    assert there[-1].state is None is here[-1].state
    assert all(made.state is not None for made in there[:-1])


def test_tables_are_copied_once(on_device, sequences):
    config = SamplerConfig(steps=STEPS, policy="halton", mask_schedule="pow1.25")
    copies = []
    for _ in range(2):
        steps = steps_of(on_device, sequences.to("gpu"), config, decode_step)
        with counting() as counts:
            list(steps)
        assert set(counts.events) <= {TO}
        copies.append(counts[TO])
    # Ratios and counts; the order is there already.
    assert copies == [2, 0]


def test_decode_returns_the_history_of_the_cpu(tiny, on_device, sequences):
    def history(model, device):
        noise = ImageNoise(3, torch.arange(3).to(device), sequences.shape[1], model.vocabulary.num_codes)
        config = SamplerConfig(steps=9, policy="entropy_bounded")
        mask = model.vocabulary.mask
        return decode(model.predict_logits, sequences.to(device), config, mask_token=mask, noise=noise).cpu()

    assert torch.equal(history(tiny, "cpu"), history(on_device, "gpu"))


def test_the_second_device_is_as_good_as_the_first(tiny, kind):
    if kind == "mps":
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            torch.zeros(1, device="gpu:1")
        return
    model = copy.deepcopy(tiny).to("gpu:1")
    assert model.device == torch.device("gpu:1")
    for policy in POLICIES:
        made = model.generate([0, 1], seed=2, policy=policy, steps=3)
        assert torch.equal(made.tokens, tiny.generate([0, 1], seed=2, policy=policy, steps=3).tokens)
