"""How well a transformer in training does: its loss on images it has not seen, and samples to look at.

Shapes: B batch, h × w the token grid.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from maskgit.data.token_cache import TokenCache
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
from maskgit.training.sheets import Sheet, class_columns

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

    Every image counts once, whatever the batch size and the number of processes. The labels are given and the targets
    are not smoothed.

    Args:
        transformer: the network, as it was wrapped for several processes.
        cache: the images' tokens, of which the first view is taken.
        vocabulary: the network's.
        classes: int64 (classes,), which of the model's classes each of the cache's is.
        seed: of the masks.
        batch_size: images at once over all processes.
        mask_schedule: a name in `schedules`.
        precision: what the network computes in.
        distributed: the processes.
    """
    total = torch.zeros((), device=distributed.device)
    with evaluating(transformer):
        for start in range(0, len(cache), batch_size):
            indices, weights = _share(start, min(start + batch_size, len(cache)), distributed)
            batch = (
                torch.from_numpy(cache.take(indices, np.zeros_like(indices)).astype(np.int64)),
                classes[torch.from_numpy(cache.labels[indices].astype(np.int64))],
                torch.from_numpy(indices),
                torch.from_numpy(weights),
            )
            tokens, labels, numbers, counted = (upload(tensor, distributed.device) for tensor in batch)
            masks = draw_masks(
                seed, numbers, vocabulary.grid_size, groups=vocabulary.groups, mask_schedule=mask_schedule
            )
            with autocast(distributed.device, precision):
                logits = transformer(
                    vocabulary.sequence(labels, tokens, masks.mask), codes=vocabulary.num_codes
                )
            losses = sequence_losses(
                logits[:, 1:], vocabulary.split(tokens).flatten(1), masks.mask.flatten(1)
            )
            total += (losses * counted).sum()
    return float(distributed.mean(total)) * distributed.world / len(cache)


def _share(start: int, stop: int, distributed: Distributed) -> tuple[np.ndarray, np.ndarray]:
    """Return the images from `start` to `stop` that are this process's, int64 (n,), and whether each counts.

    All processes have equally many, for sharded networks meet at every forward pass: those at the end may have images
    of others, which count 0 with them, float32 (n,).
    """
    share = -(-(stop - start) // distributed.world)
    own = start + distributed.rank * share + np.arange(share, dtype=np.int64)
    return np.minimum(own, stop - 1), (own < stop).astype(np.float32)


class Samples(NamedTuple):
    """Images made for people to look at, and their tokens, int64 (B, h, w)."""

    sheet: Sheet
    tokens: Tensor


def sample(
    transformer: nn.Module,
    tokenizer: Tokenizer,
    vocabulary: Vocabulary,
    *,
    class_names: Sequence[str],
    num_images: int,
    seed: int,
    sampler: SamplerConfig,
    precision: torch.dtype,
) -> Samples:
    """Return the same images as at every other step, from the same noise: a class a column, chosen by the seed."""
    device = next(tokenizer.parameters()).device
    columns = class_columns(np.arange(vocabulary.num_classes), seed, num_images)
    classes = np.resize(columns, num_images)
    indices = torch.arange(num_images, device=device)
    sequence = vocabulary.sequence(upload(torch.from_numpy(classes), device))

    def predict_logits(sequence: Tensor) -> Tensor:
        with autocast(device, precision):
            return transformer(sequence, codes=vocabulary.num_logits).float()

    with evaluating(transformer):
        history = decode(
            predict_logits,
            sequence,
            sampler,
            mask_token=vocabulary.mask,
            noise=ImageNoise(seed, indices, vocabulary.num_tokens + 1, vocabulary.num_logits),
            groups=vocabulary.groups,
        )
        tokens = vocabulary.grid(history[:, -1])
        captions = tuple(class_names[label] for label in classes)
        return Samples(Sheet(tokenizer.decode(tokens), captions, len(columns)), tokens)


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
