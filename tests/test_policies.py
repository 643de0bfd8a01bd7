"""Policies against a model whose joint distribution is known, and against their definitions.

The mock model holds a joint distribution over all images of four tokens and three codes, and predicts each
token's exact marginal given the known ones. One token an evaluation, at temperature 1, then samples the joint
distribution itself, if the order does not depend on the values that are being sampled.
"""

import dataclasses
import itertools
import math
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, qmc

from maskgit.errors import ConfigError
from maskgit.sampler.config import SamplerConfig, StepTables
from maskgit.sampler.loop import decode, decode_steps
from maskgit.sampler.noise import ImageNoise
from maskgit.sampler.plans import plan_steps
from maskgit.sampler.policies import POLICIES, Policy, Start, Step, make_policy
from maskgit.sampler.policies.ordered import halton_places, radical_inverse

CODES, TOKENS, CLASS, MASK = 3, 4, 50, 99
STATES = torch.tensor(list(itertools.product(range(CODES), repeat=TOKENS)))
JOINT = (torch.randn(len(STATES), generator=torch.Generator().manual_seed(4)) * 0.9).softmax(0)


@lru_cache
def marginals():
    """Return log-probabilities (4⁴, 4, K) of each token, by what is known: digits in base 4, 3 = masked."""
    known = torch.tensor(list(itertools.product(range(CODES + 1), repeat=TOKENS)))
    fits = ((known[:, None] == STATES) | (known[:, None] == CODES)).all(-1)
    one_hot = torch.nn.functional.one_hot(STATES, CODES).float()
    found = torch.einsum("bm,mnk->bnk", fits * JOINT, one_hot) / (fits * JOINT).sum(-1)[:, None, None]
    return found.clamp(min=1e-12).log()


def exact_model(sequence):
    """Return log-probabilities (B, S, K) of each token given those that are known."""
    digits = sequence[:, 1:].clamp(max=CODES)
    numbers = (digits * torch.tensor([(CODES + 1) ** i for i in reversed(range(TOKENS))])).sum(-1)
    return torch.nn.functional.pad(marginals()[numbers], (0, 0, 1, 0))


def sample(count, first=0, *, start=None, **settings_):
    """Return the images (count, 4) that a sampler makes of the mock model."""
    sequence = torch.full((count, TOKENS + 1), MASK)
    sequence[:, 0] = CLASS
    if start is not None:
        sequence[:, 1:] = start
    noise = ImageNoise(11, torch.arange(first, first + count), TOKENS + 1, CODES)
    return decode(exact_model, sequence, SamplerConfig(**settings_), mask_token=MASK, noise=noise)[:, -1, 1:]


def frequencies(samples):
    numbers = (samples * torch.tensor([CODES**i for i in reversed(range(TOKENS))])).sum(-1)
    return numbers.bincount(minlength=len(STATES)).double()


def chi_square(samples):
    counts, expected = frequencies(samples), JOINT.double() * len(samples)
    return float(((counts - expected) ** 2 / expected).sum())


def total_variation(samples):
    return float((frequencies(samples) / len(samples) - JOINT.double()).abs().sum() / 2)


BOUND = chi2.ppf(0.999, len(STATES) - 1)
EXACT = {
    "random": {"policy": "random", "steps": TOKENS},
    "random, more steps than tokens": {"policy": "random", "steps": 50},
    "halton": {"policy": "halton", "steps": TOKENS},
    "halton, not rolled": {"policy": "halton", "steps": TOKENS, "policy_options": {"roll": False}},
    "moment": {"policy": "moment", "steps": TOKENS, "policy_options": {"temper": False}},
    "entropy_bounded": {"policy": "entropy_bounded", "steps": TOKENS, "policy_options": {"gamma": 0.0}},
    "stable": {"policy": "stable", "steps": TOKENS, "policy_options": {"confidence": 1.0}},
    "mdlm": {"policy": "mdlm", "steps": 150, "mask_schedule": "uniform"},
    "remdm rescale": {"policy": "remdm", "steps": 150, "policy_options": {"eta": 0.2}},
    "remdm cap": {"policy": "remdm", "steps": 150, "policy_options": {"form": "cap", "eta": 0.02}},
    # Its re-masking looks at the values, so that it needs many more steps than the others.
    "remdm confidence": {"policy": "remdm", "steps": 600, "policy_options": {"form": "confidence"}},
    "confidence, random order": {"policy": "confidence", "steps": TOKENS, "choice_temperature": 1e6},
}


@pytest.mark.parametrize("name", EXACT)
def test_one_token_an_evaluation_samples_the_joint_distribution(name):
    assert chi_square(sample(10_000, **EXACT[name])) < BOUND


def test_all_tokens_at_once_do_not():
    # The test above could not pass by chance: independent marginals are far from the joint distribution.
    assert chi_square(sample(10_000, policy="random", steps=1)) > 5 * BOUND


def test_confidence_is_biased_towards_what_is_likely():
    # The order depends on the sampled values: likely ones are kept first (docs/samplers.md gives the numbers).
    biased = sample(10_000, policy="confidence", steps=TOKENS, choice_temperature=0)
    assert chi_square(biased) > BOUND
    assert total_variation(biased) == pytest.approx(0.50, abs=0.03)
    likely = JOINT.argmax()
    assert frequencies(biased)[likely] / 10_000 > JOINT[likely]


def test_tempered_moments_are_the_limit_of_confidence():
    # MaskGIT's implicit temperature: with many masked tokens and one kept, both keep (i, x) in proportion to
    # p_i(x)^β. One step of each on independent tokens, against that formula.
    logits = torch.randn(64, 4, generator=torch.Generator().manual_seed(1)) * 1.5
    alpha = 2.0
    config = {"steps": 2, "choice_temperature": 2 * alpha, "tables": StepTables(mask_ratio=(63 / 64, 0.0))}
    powered = (logits.log_softmax(-1) * (1 + 1 / alpha)).exp()
    expected = powered.sum(0) / powered.sum()
    for policy in ("confidence", "moment"):
        sequence = torch.full((4000, 65), MASK)
        noise = ImageNoise(5, torch.arange(4000), 65, 4)
        first = next(
            decode_steps(
                lambda s: torch.nn.functional.pad(logits, (0, 0, 1, 0)).expand(len(s), -1, -1),
                sequence, SamplerConfig(policy=policy, **config), mask_token=MASK, noise=noise,
            )
        )  # fmt: skip
        kept = first.unknown & ~first.again
        assert (kept.sum(1) == 1).all()
        found = first.tokens[kept].bincount(minlength=4) / 4000
        torch.testing.assert_close(found, expected, atol=0.05, rtol=0)


def test_the_last_step_of_moment_is_not_greedy():
    # All that is left is kept, so that tokens follow the model, as they do with `confidence`.
    policy = make_policy("moment")
    one, choice = torch.ones(2, 1), torch.tensor([[0.0], [2.0]])
    assert policy.token_temperature(one, choice).tolist() == [[1], [pytest.approx(1 / 1.5)]]
    fixed = make_policy("moment", {"beta": 4.0})
    assert fixed.token_temperature(one, choice).tolist() == [[0.25], [0.25]]


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=12, deadline=None)
@given(
    known=st.lists(st.lists(st.booleans(), min_size=TOKENS, max_size=TOKENS), min_size=1, max_size=4),
    steps=st.integers(1, 9),
    start=st.integers(0, 8),
    schedule=st.sampled_from(["cosine", "uniform", "log", "arccos"]),
    seed=st.integers(0, 2**64 - 1),
)
def test_known_tokens_never_change(policy, known, steps, start, schedule, seed):
    known = torch.tensor(known)
    sequence = torch.where(known, torch.arange(TOKENS) % CODES, MASK)
    sequence = torch.nn.functional.pad(sequence, (1, 0), value=CLASS)
    noise = ImageNoise(seed, torch.arange(len(known)), TOKENS + 1, CODES)
    asked = []

    def predict(current):
        asked.append(current)
        return exact_model(current)

    out = decode(
        predict, sequence, SamplerConfig(policy=policy, steps=steps, mask_schedule=schedule),
        mask_token=MASK, noise=noise, start_step=min(start, steps - 1),
    )  # fmt: skip
    assert out.shape[1] <= steps
    assert (out[:, :, 0] == CLASS).all()
    assert (out[:, :, 1:] < CODES).all()
    for seen in (*asked, *out.unbind(1)):
        assert torch.equal(seen[:, 1:][known], sequence[:, 1:][known])


@pytest.mark.parametrize("policy", POLICIES)
def test_an_image_is_the_same_in_any_batch(policy):
    # Halves of the batch start with different numbers of known tokens.
    start = torch.full((64, TOKENS), MASK)
    start[::2, 1:3] = 1
    config = {"policy": policy, "steps": 7}
    whole = sample(64, start=start, **config)
    for size in (1, 7):
        for first in range(0, 14, size):
            part = sample(size, first, start=start[first : first + size], **config)
            assert torch.equal(part, whole[first : first + size])


@pytest.mark.parametrize("policy", POLICIES)
def test_decoding_goes_on_from_any_state(policy):
    config = SamplerConfig(policy=policy, steps=TOKENS)
    sequence = torch.full((16, TOKENS + 1), MASK)

    def run(state=None):
        noise = ImageNoise(3, torch.arange(16), TOKENS + 1, CODES)
        return list(
            decode_steps(
                exact_model, sequence, config, mask_token=MASK, noise=noise, start_step=1, state=state
            )
        )

    straight = run()
    for made in straight[:-1]:
        assert torch.equal(run(made.state)[-1].tokens, straight[-1].tokens)
    assert straight[-1].state is None


@pytest.mark.parametrize("policy", [name for name in POLICIES if not POLICIES[name].remasks])
def test_more_steps_than_tokens_are_not_made(policy):
    asked = []

    def predict(current):
        asked.append(1)
        return exact_model(current)

    sequence = torch.full((2, TOKENS + 1), MASK)
    noise = ImageNoise(0, torch.arange(2), TOKENS + 1, CODES)
    decode(predict, sequence, SamplerConfig(policy=policy, steps=1000), mask_token=MASK, noise=noise)
    assert len(asked) <= TOKENS


# Definitions


def test_halton_places_are_those_of_scipy():
    assert radical_inverse(6, 2) == 3 / 8
    side = 8
    points = qmc.Halton(d=2, scramble=False).random(5000)[1:]
    order = []
    for row, column in np.floor(points * side).astype(int):
        position = int(row * side + column)
        if position not in order:
            order.append(position)
    places = halton_places(side**2)
    assert sorted(range(side**2), key=places.__getitem__) == order


def test_halton_keeps_the_papers_counts():
    steps, tokens = 8, 64
    sequence = torch.full((1, tokens + 1), MASK)
    made = decode_steps(
        lambda s: torch.zeros(len(s), tokens + 1, CODES), sequence,
        SamplerConfig(policy="halton", steps=steps, mask_schedule="arccos"),
        mask_token=MASK, noise=ImageNoise(0, torch.arange(1), tokens + 1, CODES),
    )  # fmt: skip
    known = [tokens - int(step.again.sum()) for step in made]
    assert known == [
        math.floor(tokens * (1 - 2 / math.pi * math.acos((i + 1) / steps))) for i in range(steps)
    ]


def at(number, steps):
    return {"number_B1": torch.tensor([[number]]), "steps_B1": torch.tensor([[steps]])}


class Drawn:
    """Noise of given uniform numbers, by stream, and without any on confidence."""

    def __init__(self, uniform):
        self.drawn = uniform

    def choice(self, step):
        return torch.zeros(1)

    def uniform(self, step, stream):
        return self.drawn(stream)


def a_step(logits, unknown, **given_):
    batch, length, _ = logits.shape
    uniform = torch.rand(batch, length, generator=torch.Generator().manual_seed(0))
    values = {
        "number_B1": torch.zeros(batch, 1, dtype=torch.long),
        "steps_B1": torch.full((batch, 1), length - 1),
        "logits_BSK": logits,
        "tokens_BS": logits.argmax(-1),
        "unknown_BS": unknown,
        "free_BS": unknown,
        "num_masked_B1": torch.zeros(batch, 1, dtype=torch.long),
        "ratio_before_B1": torch.ones(batch, 1),
        "ratio_after_B1": torch.ones(batch, 1),
        "temperature_B1": torch.ones(batch, 1),
        "choice_temperature_B1": torch.zeros(batch, 1),
        "mask_token": MASK,
        "predict": lambda s: logits,
        "noise": Drawn(lambda stream: uniform),
        "drawn_B1": torch.zeros(batch, 1, dtype=torch.long),
    }
    return Step(**values | given_)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.5, 4.0, 100.0])
def test_the_entropy_bound_is_the_longest_prefix(gamma):
    torch.manual_seed(0)
    logits = torch.randn(5, 13, 6) * 4
    unknown = torch.rand(5, 13) < 0.8
    unknown[:, 0] = False
    again, _ = make_policy("entropy_bounded", {"gamma": gamma}).choose(a_step(logits, unknown), ())
    for row in range(5):
        entropies = torch.distributions.Categorical(logits=logits[row]).entropy()
        order = sorted(unknown[row].nonzero()[:, 0].tolist(), key=lambda i: float(entropies[i]))
        longest = 1
        for size in range(1, len(order) + 1):
            chosen = entropies[order[:size]]
            if float(chosen.sum() - chosen.max()) <= gamma:
                longest = size
        assert set((unknown[row] & ~again[row]).nonzero()[:, 0].tolist()) == set(order[:longest])


def test_halton_opens_the_groups_of_a_position_one_after_the_other():
    """With two groups a position's place in the order is the one it has alone, and both of its tokens share it."""
    policy = make_policy("halton")
    for free in (torch.ones(2, 1 + 2 * 16, dtype=torch.bool), torch.ones(2, 1 + 4 * 16, dtype=torch.bool)):
        groups = (free.shape[1] - 1) // 16
        drawn = torch.tensor([0.1, 0.7])[:, None].expand(free.shape)
        (grouped,) = policy.begin(Start(free, 3, Drawn(lambda _, drawn=drawn: drawn), groups))
        (alone,) = policy.begin(Start(free[:, :17], 3, Drawn(lambda _, drawn=drawn: drawn[:, :17])))
        expected = alone[:, 1:, None] * groups + torch.arange(groups)
        assert torch.equal(grouped[:, 1:], expected.flatten(1))


def test_redraw_draws_known_tokens_anew_and_leaves_what_was_given():
    noise = ImageNoise(3, torch.arange(2), 17, 5)
    logits = torch.zeros(2, 17, 5)
    sequence = torch.full((2, 17), 9)
    sequence[:, 0], sequence[:, 1:4] = 6, 4
    config = SamplerConfig(steps=6, policy="redraw")
    history = decode(lambda _: logits, sequence, config, mask_token=9, noise=noise)
    assert (history[:, :, 1:4] == 4).all()
    assert (history[:, 0, 4:] != history[:, 1, 4:]).any(1).all()
    last = noise.tokens(torch.full((2, 1), 5)).argmax(-1)
    assert torch.equal(history[:, -1, 4:], last[:, 4:])  # Equal logits: the noise alone decides.


def test_stable_waits_until_distributions_rest():
    policy = make_policy("stable", {"confidence": 0.5, "kl": 0.01, "history": 2})
    sure, unsure = torch.tensor([3.0, 0, 0]), torch.tensor([0.1, 0, 0])
    logits = torch.stack([unsure, sure, 0.9 * sure, unsure])[None]
    moved = torch.stack([unsure, sure, 0.9 * sure.roll(1), unsure])[None]
    unknown = torch.tensor([[False, True, True, True]])
    memory, kept = policy.begin(Start(unknown, 3, Drawn(torch.rand))), []
    for number, current in enumerate([logits, logits, moved, moved, moved]):
        # Many steps are left, so that the pace asks for one token alone; nothing is really kept.
        again, memory = policy.choose(a_step(current, unknown, **at(number, 1000)), memory)
        kept.append((unknown & ~again)[0].nonzero()[:, 0].tolist())
    assert kept[0] == kept[1] == [1]  # none has rested for two steps: the surest, the first of equals
    assert kept[2] == [1]  # rested twice
    again, _ = policy.choose(
        a_step(logits, unknown, **at(0, 1000)), policy.choose(a_step(logits, unknown), memory)[1]
    )
    assert not again[0, 1]


def test_remdm_without_remasking_is_mdlm():
    config = {"steps": 12, "mask_schedule": "cosine"}
    plain = sample(200, policy="mdlm", **config)
    assert torch.equal(sample(200, policy="remdm", policy_options={"eta": 0.0}, **config), plain)
    assert not torch.equal(sample(200, policy="remdm", policy_options={"eta": 0.3}, **config), plain)


@pytest.mark.parametrize(("form", "eta"), [("rescale", 0.3), ("cap", 0.2)])
def test_remdm_masks_again_with_its_probability(form, eta):
    # A known share of 1/2 goes to 3/4: σ_max = min(1, (1 − 3/4) / (1/2)) = 1/2.
    batch, length = 400, 101
    unknown = torch.zeros(batch, length, dtype=torch.bool)
    unknown[:, 51:] = True
    free = torch.ones_like(unknown)
    free[:, 0] = False
    draws = torch.rand(2, batch, length)
    step = a_step(
        torch.zeros(batch, length, CODES), unknown, free_BS=free,
        ratio_before_B1=torch.full((batch, 1), 0.5), ratio_after_B1=torch.full((batch, 1), 0.25),
        noise=Drawn(lambda stream: draws[stream % 2]),
    )  # fmt: skip
    policy = make_policy("remdm", {"form": form, "eta": eta})
    again, _ = policy.choose(step, policy.begin(Start(free, CODES, step.noise)))
    sigma = eta * 0.5 if form == "rescale" else min(eta, 0.5)
    assert float(again[:, 1:51].float().mean()) == pytest.approx(sigma, abs=0.01)
    stay = (0.25 - sigma * 0.5) / 0.5
    assert float(again[:, 51:].float().mean()) == pytest.approx(stay, abs=0.01)
    assert not again[:, 0].any()


def test_the_self_critic_finds_an_implausible_token():
    # A model that wants all tokens alike; one of the kept ones is not.
    def alike(sequence):
        known = torch.nn.functional.one_hot(sequence.clamp(max=CODES), CODES + 1)[..., :CODES].float()
        counts = known[:, 1:].sum(1, keepdim=True)
        return (counts * 2).expand(-1, sequence.shape[1], -1)

    tokens = torch.tensor([[0, 1, 1, 1, 2, 1, 1, 1, 1]])
    free = torch.ones_like(tokens, dtype=torch.bool)
    free[:, 0] = False
    step = a_step(
        alike(tokens), free, tokens_BS=tokens, num_masked_B1=torch.ones(1, 1, dtype=torch.long), predict=alike
    )
    again, _ = make_policy("self_critic").choose(step, ())
    assert again.nonzero().tolist() == [[0, 4]]


def test_tables_replace_curves():
    tables = StepTables(
        mask_ratio=(0.75, 0.25, 0.0), temperature=(0.5, 1.0, 2.0), choice_temperature=(3.0, 1.0, 0.0),
        guidance_scale=(1.0, 2.0, 3.0),
    )  # fmt: skip
    plan = plan_steps(SamplerConfig(steps=3, guidance_scale=7.0, tables=tables), 4, remasks=False)
    assert plan.counts_TN[:, 4].tolist() == [3, 1, 0]
    assert plan.temperatures == [0.5, 1.0, 2.0]
    assert plan.choice_temperatures == [3.0, 1.0, 0.0]
    assert plan.guidance_scales == [1.0, 2.0, 3.0]


def test_schedules_scale_their_settings():
    plan = plan_steps(
        SamplerConfig(
            steps=4, temperature=2.0, temperature_schedule="linear:1,0.5", choice_temperature=4.0,
            guidance_scale=3.0, guidance_schedule="linear",
        ), 64, remasks=False,
    )  # fmt: skip
    assert plan.temperatures == [1.75, 1.5, 1.25, 1.0]
    assert plan.choice_temperatures == [3.0, 2.0, 1.0, 0.0]
    assert plan.guidance_scales == [1.5, 2.0, 2.5, 3.0]


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"policy": "halten"}, "Did you mean 'halton'"),
        ({"policy": "remdm", "policy_options": {"etta": 1}}, "Did you mean 'eta'"),
        ({"policy": "random", "policy_options": {"eta": 1}}, "has no parameters"),
        ({"policy": "remdm", "policy_options": {"eta": 2.0}}, "eta must be between 0 and 1"),
        ({"policy": "remdm", "policy_options": {"form": "best"}}, "rescale, cap, confidence"),
        ({"policy": "self_critic", "policy_options": {"folds": 1}}, "folds must be between 2"),
        ({"policy": "stable", "policy_options": {"history": "x"}}, "history must be a whole number"),
        ({"steps": 3, "tables": StepTables(temperature=(1.0,))}, "has 1 values, but there are 3 steps"),
        ({"guidance_schedule": "up"}, "Unknown schedule 'up'"),
    ],
)
def test_wrong_settings_are_told(given_, message):
    with pytest.raises(ConfigError, match=message):
        SamplerConfig(**given_)


def test_rising_mask_ratios_are_refused():
    with pytest.raises(ConfigError, match="must never rise"):
        StepTables(mask_ratio=(0.5, 0.6))


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_described(name):
    policy = POLICIES[name]
    assert policy.source
    assert policy.__doc__
    for field in dataclasses.fields(policy):
        assert f"{field.name}" in policy.__doc__


def test_a_new_policy_is_one_class():
    @dataclasses.dataclass(frozen=True)
    class LeftToRight(Policy):
        """Keep tokens from left to right."""

        source = "autoregression"

        def choose(self, step, memory):
            place = torch.arange(step.tokens_BS.shape[1]).expand_as(step.tokens_BS)
            still = step.unknown_BS.sum(-1, keepdim=True) - step.at_most()
            rank = (step.unknown_BS.cumsum(-1) - 1).masked_fill(~step.unknown_BS, -1)
            return (rank >= still) & (place > 0), memory

    sequence = torch.full((10_000, TOKENS + 1), MASK)
    noise = ImageNoise(0, torch.arange(10_000), TOKENS + 1, CODES)
    out = decode(
        exact_model, sequence, SamplerConfig(steps=TOKENS), mask_token=MASK, noise=noise, policy=LeftToRight()
    )
    assert chi_square(out[:, -1, 1:]) < BOUND
