"""What a model is asked to draw, and what it gives back.

Shapes: B images, T steps, h × w the token grid.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from maskgit import images
from maskgit.foundation.checks import check_count, check_seed
from maskgit.images import provenance

# Called with the step's number, the indices int64 (B,) of the images and their tokens int64 (B, h, w) so far.
# One with a method `expect` hears before the first step how many calls more will come at most.
Callback = Callable[[int, Tensor, Tensor], None]
# Enough to keep a GPU busy, in little memory.
DEFAULT_BATCH_SIZE = 16


@dataclass(frozen=True)
class Draw:
    """Which images are drawn, how many at a time, and what is told of their making.

    An image is a function of (weights, label, settings, seed, index), so any part of a draw can be made again: image
    i of a draw is image 0 of one whose first_index is i higher.

    Attributes:
        seed: in [0, 2⁶⁴).
        first_index: the index of the first image, in [0, 2⁶²]; the others count on from it.
        batch_size: images decoded together, in [1, 65536].
        return_steps: whether the `Trace` of every step is kept.
        callback: called after each step, or None; see `Callback`.
        pixels: whether tokens are decoded to images.

    Raises:
        ConfigError: a number is out of range.
    """

    seed: int = 0
    first_index: int = 0
    batch_size: int = DEFAULT_BATCH_SIZE
    return_steps: bool = False
    callback: Callback | None = None
    pixels: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", check_seed(self.seed))
        object.__setattr__(self, "first_index", check_count("first_index", self.first_index, 0, 2**62))
        object.__setattr__(self, "batch_size", check_count("batch_size", self.batch_size, 1, 65_536))

    @property
    def drafts(self) -> bool:
        """Whether anyone reads the tokens that a step masks again: a trace, or a callback that does not deny it.

        A callback denies it by an attribute `reads_tokens` that is False.
        """
        told = self.callback is not None and getattr(self.callback, "reads_tokens", True)
        return self.return_steps or told

    def announce(self, num_calls: int) -> None:
        """Tell a callback that asks for it, by a method `expect`, how many calls more will come at most."""
        expect = getattr(self.callback, "expect", None)
        if expect is not None:
            expect(num_calls)


@dataclass(frozen=True)
class Trace:
    """How images came to be, on the CPU.

    Attributes:
        tokens: int64 (B, T, h, w), the tokens sampled at each step.
        unknown: bool (B, T, h, w), what was masked before each step.
        confidence: float32 (B, T, h, w) in [0, 1], the probability that the model gave each of those tokens.
    """

    tokens: Tensor
    unknown: Tensor
    confidence: Tensor

    @property
    def fixed_at(self) -> Tensor:
        """The step that fixed each token, int64 (B, h, w); −1 where it was known from the start."""
        steps = torch.arange(self.unknown.shape[1])[:, None, None]
        return torch.where(self.unknown, steps, -1).amax(1)

    @property
    def final_confidence(self) -> Tensor:
        """The probability that each token had when it was fixed, float32 (B, h, w); 1 where it was known."""
        fixed_at = self.fixed_at
        found = self.confidence.gather(1, fixed_at.clamp(min=0)[:, None])[:, 0]
        return torch.where(fixed_at < 0, 1.0, found)

    def extended(self, steps: int) -> "Trace":
        """Return a trace of so many steps: one that was done early repeats its last, with nothing unknown."""
        more = steps - self.tokens.shape[1]
        if not more:
            return self

        def repeated(part: Tensor) -> Tensor:
            return part[:, -1:].expand(-1, more, -1, -1)

        return Trace(
            torch.cat([self.tokens, repeated(self.tokens)], 1),
            torch.cat([self.unknown, torch.zeros_like(repeated(self.unknown))], 1),
            torch.cat([self.confidence, repeated(self.confidence)], 1),
        )


class ClassGuess(NamedTuple):
    """Which class an image is of, as the model sees it.

    Attributes:
        label: the likeliest class's number.
        log_likelihoods: float32 (num_classes,), as `maskgit.editing.likelihood.guess_class` returns them.
    """

    label: int
    log_likelihoods: Tensor


@dataclass(frozen=True)
class Output:
    """What the pipeline makes.

    Attributes:
        images: float32 (B, 3, H, W) in [0, 1], RGB, on the CPU; of a photo, the part that the model saw, at
            the model's size. Of size (B, 3, 0, 0) where only tokens were asked for.
        tokens: int64 (B, h, w), what the images were decoded from, on the CPU.
        trace: how they came to be, if asked for.
        token_mask: bool (h, w), or (B, h, w) where images differ, True where an edit made new tokens, or
            None.
        before: float32 (1, 3, H, W) in [0, 1], what an edit began with, or None.
        photos: of an edit, the B whole photos with what is new in its place, RGB or RGBA, or None.
        class_guess: which class an edit found, where it was asked to guess, or None.
        scores: float32 (B,), of the images chosen by score, or None.
        indices: int64 (B,), by which each of those can be made again alone (`first_index`), or None.
        source: what files of them say that they are, `provenance.GENERATED` or `provenance.EDITED`.
    """

    images: Tensor
    tokens: Tensor
    trace: Trace | None = None
    token_mask: Tensor | None = None
    before: Tensor | None = None
    photos: list[Image.Image] | None = None
    class_guess: ClassGuess | None = None
    scores: Tensor | None = None
    indices: Tensor | None = None
    source: str = provenance.GENERATED

    def __post_init__(self) -> None:
        provenance.say(self.photos or (), self.source)

    def to_pil(self) -> list[Image.Image]:
        """Return the photos, or else the images as 8-bit RGB pictures.

        Their `info` says what they are; `maskgit.images.save_png` writes it.
        """
        if self.photos is not None:
            return list(self.photos)
        pictures = images.to_pil(self.images)
        provenance.say(pictures, self.source)
        return pictures


def join_outputs(batches: list[Output]) -> Output:
    """Return the images, tokens and traces of several batches as one `Output`."""
    traces = [batch.trace for batch in batches if batch.trace is not None]
    trace = None
    if traces:
        steps = max(part.tokens.shape[1] for part in traces)
        traces = [part.extended(steps) for part in traces]
        trace = Trace(
            torch.cat([part.tokens for part in traces]),
            torch.cat([part.unknown for part in traces]),
            torch.cat([part.confidence for part in traces]),
        )
    return Output(
        torch.cat([batch.images for batch in batches]), torch.cat([batch.tokens for batch in batches]), trace
    )
