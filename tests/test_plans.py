"""Rows of one batch at different steps of different plans."""

import pytest
import torch

from maskgit.sampler.config import SamplerConfig
from maskgit.sampler.loop import begin, decode, decode_step, free_tokens
from maskgit.sampler.noise import ImageNoise, seed_words
from maskgit.sampler.plans import Numbers, plan_steps
from maskgit.sampler.policies import POLICIES, make_policy

MASK, TOKENS, CODES = 99, 12, 5
CONFIGS = (
    {"steps": 7, "choice_temperature": 3.0, "guidance_scale": 2.0},
    {"steps": 3, "temperature": 0.7, "mask_schedule": "uniform"},
    {"steps": 5, "guidance_scale": 3.5, "temperature_schedule": "linear:1,0.5"},
    {"steps": 9, "choice_temperature": 0.0},
)


def predict(sequence):
    position = torch.arange(sequence.shape[1])
    return torch.sin(sequence[..., None] * 1.7 + position[:, None] + torch.arange(CODES) * 2.3) * 3


def sequence_of(row):
    tokens = torch.where(torch.arange(TOKENS) % 5 < row, torch.arange(TOKENS) % CODES, MASK)
    return torch.cat([torch.tensor([50 + row]), tokens])[None]


def decoded_alone(row, policy):
    config = SamplerConfig(policy=policy, **CONFIGS[row])
    noise = ImageNoise(7 + row, torch.tensor([row]), TOKENS + 1, CODES)
    return decode(predict, sequence_of(row), config, mask_token=MASK, noise=noise)[:, -1]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_row_is_decoded_as_it_would_be_alone(policy):
    chosen = make_policy(policy)
    plans = [plan_steps(SamplerConfig(policy=policy, **c), TOKENS, remasks=chosen.remasks) for c in CONFIGS]
    sequences = torch.cat([sequence_of(row) for row in range(len(CONFIGS))])
    free = free_tokens(sequences, MASK)
    words = seed_words([7 + row for row in range(len(CONFIGS))])
    noise = ImageNoise.of_words(words, torch.arange(len(CONFIGS)), TOKENS + 1, CODES)
    memory = begin(chosen, free, CODES, noise)
    steps, finished = [0] * len(CONFIGS), {}
    # A row that is done stays as it is, at its last step; the third row waits two rounds before it begins.
    for round_ in range(12):
        waiting = {2} if round_ < 2 else set()
        packed = torch.cat(
            [
                plan.numbers(min(step, plan.steps - 1), 0, rows.sum(-1, keepdim=True)).pack()
                for plan, step, rows in zip(plans, steps, free.split(1), strict=True)
            ]
        )
        made = decode_step(
            predict, sequences, free, memory, Numbers.unpack(packed),
            policy=chosen, mask_token=MASK, noise=noise, guides=True,
        )  # fmt: skip
        moves = torch.tensor([[row not in waiting and row not in finished] for row in range(len(CONFIGS))])
        sequences = torch.where(moves, made.sequence, sequences)
        memory = tuple(
            torch.where(moves.reshape(-1, *[1] * (now.ndim - 1)), now, before)
            for now, before in zip(made.memory, memory, strict=True)
        )
        for row, plan in enumerate(plans):
            if moves[row]:
                steps[row] += 1
                if steps[row] == plan.steps:
                    assert not made.again[row].any()
                    finished[row] = made.tokens[row : row + 1]
    assert sorted(finished) == [0, 1, 2, 3]
    for row, tokens in finished.items():
        assert torch.equal(tokens, decoded_alone(row, policy)), row


def test_numbers_survive_packing():
    plan = plan_steps(SamplerConfig(steps=12, guidance_scale=3.3, temperature=0.9), 1024, remasks=False)
    numbers = plan.numbers(7, 2, torch.tensor([[1024], [3], [500]]))
    for before, after in zip(numbers, Numbers.unpack(numbers.pack()), strict=True):
        assert before.dtype == after.dtype
        assert torch.equal(before, after)


def test_seeds_of_rows_are_the_seeds_of_batches():
    seeds = [0, 5, 2**64 - 1, 2**63]
    rows = ImageNoise.of_words(seed_words(seeds), torch.arange(4), 9, 8)
    for row, seed in enumerate(seeds):
        alone = ImageNoise(seed, torch.tensor([row]), 9, 8)
        assert torch.equal(rows.tokens(3)[row], alone.tokens(3)[0])
        assert torch.equal(rows.choice(torch.full((4, 1), 3))[row], alone.choice(3)[0])
