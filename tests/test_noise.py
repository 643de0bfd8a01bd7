"""Philox against its published answers, and the noise's independence and law."""

import numpy as np
import pytest
import torch

from maskgit.errors import ConfigError
from maskgit.sampler.noise import ImageNoise, gumbel, philox, seed_words, uniform


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        # The known answers that Random123 publishes for philox4x32-10.
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
            (0xFFFFFFFF, 0xFFFFFFFF),
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, answer):
    assert tuple(int(word) for word in philox(counter, key)) == answer


def test_a_number_depends_on_its_place_alone():
    whole = uniform(5, torch.arange(10), 3, 1, 101)
    assert torch.equal(whole[4:6], uniform(5, torch.tensor([4, 5]), 3, 1, 101))
    # A longer draw begins with the shorter, and pieces made for the cache join without a seam.
    assert torch.equal(whole[:, :50], uniform(5, torch.arange(10), 3, 1, 50))
    long = uniform(5, torch.arange(2), 3, 1, 300_000)
    assert torch.equal(long[:1], uniform(5, torch.arange(1), 3, 1, 300_000))
    for other in (
        uniform(6, torch.arange(10), 3, 1, 101),
        uniform(5 + 2**40, torch.arange(10), 3, 1, 101),
        uniform(5, torch.arange(10) + 10, 3, 1, 101),
        uniform(5, torch.arange(10) + 2**33, 3, 1, 101),
        uniform(5, torch.arange(10), 4, 1, 101),
        uniform(5, torch.arange(10), 3, 2, 101),
    ):
        assert not (other == whole).any(dim=1).all()
        assert abs(np.corrcoef(other.flatten(), whole.flatten())[0, 1]) < 0.15


def test_uniform_numbers_are_uniform_and_open():
    numbers = uniform(0, torch.arange(4), 0, 0, 250_000).double()
    assert 0 < float(numbers.min()) < float(numbers.max()) < 1
    counts = torch.histc(numbers, 100, 0, 1)
    assert float(((counts - 1e4) ** 2 / 1e4).sum()) < 149  # χ², 99 degrees of freedom, p = 0.001


def test_gumbel_noise_has_gumbels_law():
    noise = gumbel(uniform(0, torch.arange(1), 0, 0, 1_000_000)).double()
    assert torch.isfinite(noise).all()
    assert float(noise.mean()) == pytest.approx(np.euler_gamma, abs=5e-3)
    assert float(noise.var()) == pytest.approx(np.pi**2 / 6, abs=1.4e-2)  # four standard deviations


def test_the_seed_is_checked():
    with pytest.raises(ConfigError, match="seed"):
        ImageNoise(-1, torch.arange(1), 3, 4)
    with pytest.raises(ConfigError, match="seed"):
        ImageNoise(2**64, torch.arange(1), 3, 4)
    assert ImageNoise(2**64 - 1, torch.arange(2), 3, 4).tokens(0).shape == (2, 3, 4)


def test_keys_and_counters_broadcast():
    keys = torch.arange(3)[:, None]
    words = philox((torch.arange(4)[None], 1, 2, 3), (keys, 7))
    for row in range(3):
        alone = philox((torch.arange(4), 1, 2, 3), (row, 7))
        assert all(torch.equal(many[row], one) for many, one in zip(words, alone, strict=True))


@pytest.mark.parametrize("codes", [16, 17, 18, 19])
def test_noise_of_some_places_is_that_of_all(codes):
    step, wanted = (
        torch.tensor([[3], [0]]),
        torch.rand(2, 9, generator=torch.Generator().manual_seed(0)) < 0.4,
    )
    of_batch = ImageNoise(5, torch.tensor([0, 2**40]), 9, codes)
    assert torch.equal(of_batch.tokens_at(step, wanted), of_batch.tokens(step)[wanted])
    of_words = ImageNoise.of_words(seed_words([5, 2**63]), torch.tensor([0, 7]), 9, codes)
    assert torch.equal(of_words.tokens_at(step, wanted), of_words.tokens(step)[wanted])
    assert of_batch.tokens_at(step, torch.zeros_like(wanted)).shape == (0, codes)
