"""Counter-based noise: a function of (seed, image index, step), the same on every device and in any batch.

A number is drawn by putting where it stands into Philox4x32-10's counter and the seed into its key, so it
needs no state, and an image's noise does not depend on its companions, its batch or what was drawn before.

    counter words:  block of four numbers | step and stream | image index, low | image index, high
    key words:      seed, low | seed, high

Source: Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).
"""

import math
from collections.abc import Callable, Sequence
from typing import Protocol, Self

import torch
from torch import Tensor

from maskgit.foundation.checks import check_seed

MASK32 = 0xFFFFFFFF
# Streams keep draws for different purposes apart; a new purpose takes a new number below 256.
TOKENS, CHOICE, ORDER, UNMASK, REMASK, FOLDS, LABELS, VARY = range(8)
NUM_STREAMS = 256

# On a CPU, blocks are made in pieces that stay in its cache; torch gives a thread at least half of this.
_CPU_PIECE = 1 << 16


class Noise(Protocol):
    """What the sampler asks for.

    `step` is each row's, int64 (B, 1), counted from 0 whatever step its decoding starts at.
    """

    def tokens(self, step: Tensor) -> Tensor:
        """Return the Gumbel noise that samples tokens, float32 (B, N + 1, codes)."""
        ...

    def choice(self, step: Tensor) -> Tensor:
        """Return the Gumbel noise on confidence, float32 (B, N + 1)."""
        ...

    def uniform(self, step: Tensor, stream: int) -> Tensor:
        """Return uniform numbers for another purpose, float32 (B, N + 1) in (0, 1)."""
        ...


def philox(counter: tuple[Tensor | int, ...], key: tuple[Tensor | int, Tensor | int]) -> tuple[Tensor, ...]:
    """Return four random 32-bit words for every counter.

    Args:
        counter: four words in [0, 2³²), int64 tensors of shapes that broadcast, or ints.
        key: two words in [0, 2³²), likewise.

    Returns:
        Four int64 tensors of the broadcast shape, each in [0, 2³²).
    """
    tensors = [word for word in (*counter, *key) if isinstance(word, Tensor)]
    # Filled in on the device, for a copy of a number would make the host wait.
    device = tensors[0].device if tensors else None
    words = (
        word if isinstance(word, Tensor) else torch.full((), word, dtype=torch.int64, device=device)
        for word in counter
    )
    a, b, c, d = torch.broadcast_tensors(*words, *tensors)[:4]
    k0, k1 = key
    for _ in range(10):
        # The products overflow int64 but keep their bits, which is all that the shifts and masks read. What is
        # carried to the next round, b and d, is masked there.
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a = (q >> 32).bitwise_xor_(b).bitwise_xor_(k0).bitwise_and_(MASK32)
        c = (p >> 32).bitwise_xor_(d).bitwise_xor_(k1).bitwise_and_(MASK32)
        b, d = q, p
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return a, b & MASK32, c, d & MASK32


def seed_words(seeds: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Return the low and high words of seeds in [0, 2⁶⁴), which int64 cannot hold: int64 (B, 2)."""
    return torch.tensor([_halves(seed) for seed in seeds], device=device)


def _halves(seed: int) -> tuple[int, int]:
    return seed & MASK32, seed >> 32


def uniform(
    seed: int | Tensor,
    indices: Tensor,
    step: int | Tensor,
    stream: int,
    count: int,
    first_block: int | Tensor = 0,
) -> Tensor:
    """Return uniform numbers for some images.

    Args:
        seed: in [0, 2⁶⁴), or one for each image as `seed_words` makes them.
        indices: int64 (B,), image indices ≥ 0; the result lies on their device.
        step: in [0, 2²⁴), or one for each image, int64 (B, 1).
        stream: the purpose, in [0, 256).
        count: numbers for each image.
        first_block: the block of four numbers to begin at, or one for each image, int64 (B, 1).

    Returns:
        float32 (B, count), in the open interval (0, 1), multiples of 2⁻²⁴.
    """
    key = _halves(seed) if isinstance(seed, int) else (seed[:, :1], seed[:, 1:])
    device = indices.device
    low, high = (indices & MASK32)[:, None], (indices >> 32)[:, None]
    where = step * NUM_STREAMS + stream
    blocks = math.ceil(count / 4)
    pieces = round(blocks * len(indices) / _CPU_PIECE) if device.type == "cpu" else 1
    piece = max(1, math.ceil(blocks / max(1, pieces)))
    made = []
    for start in range(0, blocks, piece):
        block = torch.arange(start, min(start + piece, blocks), device=device)[None] + first_block
        # 23 bits and a half: the largest number float32 can still tell from 1.
        words = [(word >> 9).float() for word in philox((block, where, low, high), key)]
        made.append(torch.stack(words, dim=-1).add_(0.5).mul_(2.0**-23))
    return torch.cat(made, dim=1).flatten(1)[:, :count]


def gumbel(uniforms: Tensor) -> Tensor:
    """Turn uniform numbers in (0, 1) into standard Gumbel ones."""
    return uniforms.log().neg_().log_().neg_()


def gumbels(seed: int | Tensor, indices: Tensor, step: int | Tensor, stream: int, count: int) -> Tensor:
    """Return standard Gumbel noise; see `uniform`."""
    return gumbel(uniform(seed, indices, step, stream, count))


class ImageNoise:
    """The noise of a batch of images, each a function of (seed, its index, step)."""

    def __init__(self, seed: int, indices: Tensor, num_positions: int, num_codes: int) -> None:
        """Describe the noise; nothing is drawn yet.

        Args:
            seed: in [0, 2⁶⁴); for seeds of the images' own, see `of_words`.
            indices: int64 (B,), one ≥ 0 for each image of the batch.
            num_positions: length of a sequence, N + 1.
            num_codes: codes to choose from at each position.

        Raises:
            ConfigError: the seed is out of range.
        """
        self.seed: int | Tensor = check_seed(seed)
        self.indices = indices
        self.num_positions = num_positions
        self.num_codes = num_codes

    @classmethod
    def of_words(cls, words: Tensor, indices: Tensor, num_positions: int, num_codes: int) -> Self:
        """Return the noise of images that have seeds of their own.

        Args:
            words: int64 (B, 2), the seeds as `seed_words` makes them.
            indices, num_positions, num_codes: as for the constructor.
        """
        made = cls(0, indices, num_positions, num_codes)
        made.seed = words
        return made

    def words(self) -> Tensor:
        """Return each image's seed as `seed_words` does, int64 (B, 2)."""
        if isinstance(self.seed, int):
            halves = [self.indices.new_full((len(self.indices),), half) for half in _halves(self.seed)]
            self.seed = torch.stack(halves, dim=1)
        return self.seed

    def tokens(self, step: int | Tensor) -> Tensor:
        """Return Gumbel noise, float32 (B, N + 1, codes)."""
        return self._tokens(step, gumbels)

    def tokens_at(self, step: Tensor, wanted: Tensor) -> Tensor:
        """Return the rows of `tokens` where bool (B, N + 1) says, float32 (n, codes), and draw no others."""
        images, places = wanted.nonzero(as_tuple=True)
        first = (places * self.num_codes)[:, None]
        seed = self.seed if isinstance(self.seed, int) else self.seed[images]
        # Three more than asked for, as a place's numbers need not begin with a block.
        numbers = uniform(seed, self.indices[images], step[images], TOKENS, self.num_codes + 3, first // 4)
        offsets = torch.arange(self.num_codes, device=first.device) + first % 4
        return gumbel(numbers.gather(1, offsets))

    def _tokens(self, step: int | Tensor, draw: Callable[..., Tensor]) -> Tensor:
        numbers = draw(self.seed, self.indices, step, TOKENS, self.num_positions * self.num_codes)
        return numbers.unflatten(1, (self.num_positions, self.num_codes))

    def choice(self, step: int | Tensor) -> Tensor:
        """Return Gumbel noise, float32 (B, N + 1)."""
        return gumbels(self.seed, self.indices, step, CHOICE, self.num_positions)

    def uniform(self, step: int | Tensor, stream: int) -> Tensor:
        """Return uniform numbers, float32 (B, N + 1) in (0, 1)."""
        return uniform(self.seed, self.indices, step, stream, self.num_positions)
