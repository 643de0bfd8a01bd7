"""How well a transformer in training does: its loss on images it has not seen, and samples to look at.

Shapes: B batch, h × w the token grid.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from maskgit.data.batches import TokenBatches
from maskgit.data.caches import TokenCache
from maskgit.foundation.devices import upload
from maskgit.networks.tokenizer import Tokenizer
from maskgit.networks.vocabulary import Vocabulary
from maskgit.sampler.config import SamplerConfig
from maskgit.sampler.loop import decode
from maskgit.sampler.noise import ImageNoise
from maskgit.training.distributed import Distributed
from maskgit.training.numerics import autocast
from maskgit.training.objectives.losses import sequence_losses
from maskgit.training.objectives.masking import draw_masks
from maskgit.training.run.progress import Logger

NUM_RATIO_BINS = 10


class RatioLosses:
    """The mean loss by tenths of the mask ratio since the last reading."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, NUM_RATIO_BINS, device=device)

    def update(self, losses: Tensor, ratio: Tensor) -> None:
        """Count the losses float (B,) of sequences with mask ratios float (B,) in (0, 1]."""
        bins = (ratio * NUM_RATIO_BINS).ceil().long().clamp(1, NUM_RATIO_BINS) - 1
        self._sums[0].index_add_(0, bins, losses.detach())
        self._sums[1].index_add_(0, bins, torch.ones_like(losses))

    def read(self, distributed: Distributed) -> dict[str, float]:
        """Return the means over all processes by name, without tenths that had no sample; all must call it."""
        sums, counts = distributed.mean(self._sums.clone()).tolist()
        self._sums.zero_()
        names = [
            f"loss_by_mask_ratio/{i / NUM_RATIO_BINS:.1f}-{(i + 1) / NUM_RATIO_BINS:.1f}" for i in range(10)
        ]
        return {name: s / n for name, s, n in zip(names, sums, counts, strict=True) if n}


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch a module to evaluation, without gradients, inside a `with` block."""
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train(training)


def evaluate_loss(
    transformer: nn.Module,
    cache: TokenCache,
    vocabulary: Vocabulary,
    *,
    classes: Tensor,
    seed: int,
    batch_size: int,
    mask_schedule: str,
    precision: torch.dtype,
    distributed: Distributed,
) -> float:
    """Return the mean loss over a token cache, each image masked once and always alike; all must call it.

    `classes` says which of the model's classes each of the cache's is, int64 (classes,). The labels are given and the targets are not smoothed. What does not fill a batch is left out, unless there
    is less than one, whose images then count repeatedly.
    """
    batches = TokenBatches(
        cache,
        seed=seed,
        global_batch=batch_size,
        rank=distributed.rank,
        world=distributed.world,
        random_view=False,
        shuffle=False,
    )
    total = torch.zeros((), device=distributed.device)
    count = max(1, len(cache) // batch_size)
    with evaluating(transformer):
        for step in range(count):
            batch = batches.batch(step)
            batch = batch._replace(labels=classes[batch.labels])
            tokens, labels, numbers = (upload(t, distributed.device) for t in batch)
            masks = draw_masks(seed, numbers, vocabulary.grid_size, mask_schedule=mask_schedule)
            with autocast(distributed.device, precision):
                logits = transformer(
                    vocabulary.sequence(labels, tokens, masks.mask), codes=vocabulary.num_codes
                )
            total += sequence_losses(logits[:, 1:], tokens.flatten(1), masks.mask.flatten(1)).mean()
    return float(distributed.mean(total)) / count


class Samples(NamedTuple):
    """Images made for people to look at, float (B, 3, H, W) nominally in [0, 1], and their tokens (B, h, w)."""

    images: Tensor
    tokens: Tensor


def sample(
    transformer: nn.Module,
    tokenizer: Tokenizer,
    vocabulary: Vocabulary,
    *,
    num_images: int,
    seed: int,
    sampler: SamplerConfig,
    precision: torch.dtype,
) -> Samples:
    """Return the same images, the first classes in turn, from the same noise as at every other step."""
    device = next(tokenizer.parameters()).device
    indices = torch.arange(num_images, device=device)
    sequence = vocabulary.sequence(indices % vocabulary.num_classes)

    def predict_logits(sequence: Tensor) -> Tensor:
        with autocast(device, precision):
            return transformer(sequence, codes=vocabulary.num_codes).float()

    with evaluating(transformer):
        history = decode(
            predict_logits,
            sequence,
            sampler,
            mask_token=vocabulary.mask,
            noise=ImageNoise(seed, indices, vocabulary.num_tokens + 1, vocabulary.num_codes),
        )
        tokens = vocabulary.grid(history[:, -1])
        return Samples(tokenizer.decode(tokens), tokens)


def warn_of_samples(logger: Logger, step: int, tokens: Tensor) -> None:
    """Say in words if samples, int64 (B, h, w), look wrong."""
    if len(tokens) < 2:
        return
    if bool((tokens == tokens[:1]).all()):
        logger.warn(
            "constant output",
            step,
            "All samples are the same image: the output does not depend on noise or class. Lower the learning "
            "rate, or look at the data.",
        )
    elif int(tokens.unique().numel()) <= 2:
        logger.warn(
            "few codes",
            step,
            "The samples use no more than two codes. If that lasts, the codebook or the transformer has collapsed.",
        )
