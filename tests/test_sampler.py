"""The decoding loop against the official decoder's records, and its own promises."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskgit.errors import ConfigError
from maskgit.sampler.config import SamplerConfig
from maskgit.sampler.loop import decode
from maskgit.sampler.noise import ImageNoise

MASK = 99


class Recorded:
    """The Gumbel noise that an official run drew."""

    def __init__(self, record) -> None:
        self.record = record

    def tokens(self, step):
        return torch.from_numpy(self.record["gumbel_tokens"][int(step[0])])

    def choice(self, step):
        return torch.from_numpy(self.record["gumbel_choice"][int(step[0])])


@pytest.mark.parametrize(
    "name",
    ["generate_cosine", "generate_exp", "generate_log", "generate_pow2", "generate_uniform", "edit_start2"],
)
def test_every_step_equals_the_official_decoder(name, tiny, golden):
    record = np.load(golden / f"tiny_decode_{name}.npz")
    mask = tiny.vocabulary.mask
    inputs = torch.from_numpy(record["inputs"]).long()
    calls = []
    steps = decode(
        lambda sequence: tiny.transformer(sequence, codes=tiny.vocabulary.num_codes),
        torch.where(inputs < 0, mask, inputs),
        SamplerConfig(
            steps=int(record["num_iter"]),
            choice_temperature=float(record["choice_temperature"]),
            mask_schedule=str(record["schedule"]),
        ),
        mask_token=mask,
        start_step=int(record["start_iter"]),
        noise=Recorded(record),
        callback=lambda step, tokens: calls.append((step, tokens)),
    )
    np.testing.assert_array_equal(steps, record["tokens_per_step"])
    assert [step for step, _ in calls] == list(range(int(record["start_iter"]), int(record["num_iter"])))
    assert all(torch.equal(tokens, steps[:, i]) for i, (_, tokens) in enumerate(calls))


def random_logits(seed: int, codes: int):
    """A mock model: logits that depend on the sequence alone."""

    def predict(sequence):
        position = torch.arange(sequence.shape[1]) + seed
        return torch.sin(sequence[..., None] * 1.7 + position[:, None] + torch.arange(codes) * 2.3) * 3

    return predict


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 4),
    num_tokens=st.integers(1, 12),
    steps=st.integers(1, 15),
    start=st.integers(0, 14),
    schedule=st.sampled_from(["cosine", "uniform", "log", "exp", "pow3"]),
    seed=st.integers(0, 2**64 - 1),
    data=st.data(),
)
def test_known_tokens_never_change_and_all_are_filled(batch, num_tokens, steps, start, schedule, seed, data):
    start = min(start, steps - 1)
    known = data.draw(
        st.lists(
            st.lists(st.booleans(), min_size=num_tokens, max_size=num_tokens), min_size=batch, max_size=batch
        )
    )
    known = torch.tensor(known)
    sequence = torch.cat(
        [torch.full((batch, 1), 50), torch.where(known, torch.arange(num_tokens) % 5, MASK)], dim=1
    )
    noise = ImageNoise(seed, torch.arange(batch), num_tokens + 1, 5)
    seen = []

    def predict(current):
        seen.append(current)
        return random_logits(3, 5)(current)

    out = decode(
        predict,
        sequence,
        SamplerConfig(steps=steps, mask_schedule=schedule),
        mask_token=MASK,
        start_step=start,
        noise=noise,
    )
    # More steps than tokens are not made.
    steps = min(steps, num_tokens)
    start = min(start, steps - 1)
    assert out.shape == (batch, steps - start, num_tokens + 1)
    assert (out[:, :, 0] == 50).all()
    assert (out[:, :, 1:] < 5).all()
    for step in range(steps - start):
        assert torch.equal(out[:, step, 1:][known], sequence[:, 1:][known])
    masked = torch.stack([(current == MASK).sum(1) for current in seen])
    # Each step keeps at least one token, until one is left.
    assert ((masked[1:] < masked[:-1]) | (masked[:-1] <= 1)).all()


def test_an_open_class_is_left_open():
    sequence = torch.full((2, 5), MASK)
    noise = ImageNoise(0, torch.arange(2), 5, 5)
    out = decode(random_logits(0, 5), sequence, SamplerConfig(steps=3), mask_token=MASK, noise=noise)
    assert (out[:, :, 0] == MASK).all()
    assert (out[:, -1, 1:] < 5).all()


@pytest.mark.parametrize("batches", [[1] * 7, [7], [2, 5], [3, 3, 1]])
def test_an_image_does_not_depend_on_its_batch(batches):
    def run(indices):
        sequence = torch.full((len(indices), 17), MASK)
        sequence[:, 0] = 50
        noise = ImageNoise(7, torch.tensor(indices), 17, 8)
        return decode(random_logits(1, 8), sequence, SamplerConfig(steps=6), mask_token=MASK, noise=noise)[
            :, -1
        ]

    pieces, start = [], 0
    for size in batches:
        pieces.append(run(list(range(start, start + size))))
        start += size
    assert torch.equal(torch.cat(pieces), torch.cat([run([i]) for i in range(7)]))


def test_temperature_zero_takes_the_likeliest_token():
    sequence = torch.tensor([[50] + [MASK] * 6])
    predict = random_logits(5, 8)
    noise = ImageNoise(1, torch.arange(1), 7, 8)
    out = decode(predict, sequence, SamplerConfig(steps=1, temperature=0), mask_token=MASK, noise=noise)
    assert torch.equal(out[0, 0, 1:], predict(sequence)[0, 1:].argmax(-1))


def test_one_step_samples_from_the_tempered_model():
    # 4000 images of one step against the softmax it must follow.
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    sequence = torch.full((4000, 2), MASK)
    sequence[:, 0] = 50
    noise = ImageNoise(3, torch.arange(4000), 2, 4)
    out = decode(
        lambda s: logits.expand(len(s), 2, 4),
        sequence,
        SamplerConfig(steps=1, temperature=1.5),
        mask_token=MASK,
        noise=noise,
    )
    counts = out[:, 0, 1].bincount(minlength=4).double()
    expected = (logits / 1.5).softmax(0).double() * 4000
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.27  # χ², 3 degrees of freedom, p = 0.001


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"steps": 0}, "steps must be between 1"),
        ({"steps": 4, "start_step": 4}, "start_step must be from 0 to 3"),
        ({"steps": 4, "choice_temperature": -1.0}, "choice_temperature"),
        ({"steps": 4, "temperature": float("nan")}, "temperature"),
        ({"steps": 4, "mask_schedule": "cosin"}, "Unknown mask schedule 'cosin'"),
        ({"steps": 4, "policy": "confident"}, "Did you mean 'confidence'"),
    ],
)
def test_bad_settings_are_told(settings_, message):
    sequence = torch.full((1, 3), MASK)
    start = settings_.pop("start_step", 0)
    with pytest.raises(ConfigError, match=message):
        decode(
            random_logits(0, 5),
            sequence,
            SamplerConfig(**settings_),
            start_step=start,
            mask_token=MASK,
            noise=ImageNoise(0, torch.arange(1), 3, 5),
        )
