"""How well a network in training does: scores on test images, and sheets of images for people to look at.

Shapes: B images of a batch, N of a data set, n of a sheet, K codes, h × w the token grid, S pixels a side.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from maskgit.data.augment import centre_crop
from maskgit.data.batches import Shuffler, spread
from maskgit.data.image_cache import ImageCache
from maskgit.data.token_cache import TokenCache
from maskgit.evaluation.metrics import (
    SSIM_WINDOW,
    FeatureStatistics,
    codebook_usage,
    frechet_distance,
    perplexity,
    psnr,
    ssim,
)
from maskgit.evaluation.networks.features import load_feature_net
from maskgit.foundation.devices import upload, widest_float
from maskgit.networks.tokenizer import Tokenizer
from maskgit.networks.vocabulary import Vocabulary
from maskgit.sampler.config import SamplerConfig
from maskgit.sampler.loop import decode
from maskgit.sampler.noise import ImageNoise
from maskgit.training.distributed import Distributed
from maskgit.training.numerics import autocast, evaluating
from maskgit.training.objectives.losses import sequence_losses
from maskgit.training.objectives.masking import centre_windows, draw_masks
from maskgit.training.run.progress import Logger, Sheet
from maskgit.training.tokenizer_parts import count_codes

NUM_PAIRS = 16


@torch.no_grad()
def evaluate_tokenizer(
    tokenizer: Tokenizer,
    cache: ImageCache,
    *,
    size: int,
    precision: torch.dtype,
    seed: int,
    num_images: int | None,
    feature_net: str | None,
    batch_size: int,
    distributed: Distributed,
) -> dict[str, float]:
    """Reconstruct test images and compare; all processes call it and share the work.

    Args:
        tokenizer: on the processes' devices.
        cache: the test images, of which the middle is taken.
        size: S.
        precision: what the network computes in.
        seed: decides which images are taken, where not all are.
        num_images: so many, spread over the classes; None takes all.
        feature_net: the name of a feature net for the Fréchet distance of the reconstructions to the images
            themselves, or None.
        batch_size: images a process reconstructs at once.
        distributed: the processes.

    Returns:
        test_psnr, test_ssim (from 11 pixels a side on), test_code_usage, test_code_perplexity and, with a feature
        net, test_rfd; the same in all processes.
    """
    device = distributed.device
    count = min(len(cache), num_images or len(cache))
    own = spread(cache.labels, seed)[:count][distributed.rank :: distributed.world]
    sums = torch.zeros(2, dtype=torch.float64)
    counts = torch.zeros(tokenizer.config.codebook_size, dtype=torch.int64, device=device)
    net = load_feature_net(feature_net, device) if feature_net else None
    statistics = [FeatureStatistics(net.dim) for _ in range(2)] if net else []
    tokenizer.eval()
    for start in range(0, len(own), batch_size):
        images = _read(cache, own[start : start + batch_size], size, device)
        tokens, reconstructions = _reconstruct(tokenizer, images, precision)
        count_codes(counts, tokens)
        pair = [pictures.to(comparison_device(device)) for pictures in (images, reconstructions)]
        sums[0] += psnr(*pair).clamp(max=100).sum().cpu()
        if size >= SSIM_WINDOW:
            sums[1] += ssim(*pair).sum().cpu()
        if net:
            for seen, pictures in zip(statistics, (images, reconstructions), strict=True):
                seen.update(net(pictures))
    tokenizer.train()
    # The sums stay on the CPU, whose backend every group has: not all devices know float64.
    sums, counts = _total(sums, distributed), _total(counts, distributed).cpu()
    scores = {"test_psnr": float(sums[0] / count)}
    if size >= SSIM_WINDOW:
        scores["test_ssim"] = float(sums[1] / count)
    scores["test_code_usage"] = codebook_usage(counts.numpy())
    scores["test_code_perplexity"] = perplexity(counts.numpy())
    if statistics:
        originals, reconstructed = (_merged(seen, distributed) for seen in statistics)
        scores["test_rfd"] = frechet_distance(
            originals.mean, originals.covariance, reconstructed.mean, reconstructed.covariance
        )
    return scores


@torch.no_grad()
def reconstruction_sheet(
    tokenizer: Tokenizer, cache: ImageCache, *, size: int, seed: int, precision: torch.dtype
) -> Sheet:
    """Return test images with their reconstructions below them, a class a column.

    Args:
        tokenizer: where the images are to be reconstructed.
        cache: the test images, of which the middle is taken.
        size: S.
        seed: decides which images are taken.
        precision: what the network computes in.
    """
    device = tokenizer.device
    columns = class_columns(np.unique(cache.labels), seed, NUM_PAIRS)
    count = NUM_PAIRS // len(columns) * len(columns)
    members = class_members(cache.labels, columns, seed, count)
    images = _read(cache, members, size, device)
    tokenizer.eval()
    _, reconstructions = _reconstruct(tokenizer, images, precision)
    tokenizer.train()
    pair = [pictures.to(comparison_device(device)) for pictures in (images, reconstructions)]
    levels = psnr(*pair).tolist()
    # A row of images, then the row of their reconstructions.
    rows = torch.stack([part.unflatten(0, (-1, len(columns))) for part in (images, reconstructions)], 1)
    captions: list[str] = []
    for start in range(0, count, len(columns)):
        captions += [cache.class_names[cache.labels[i]] for i in members[start : start + len(columns)]]
        captions += [f"rebuilt, {level:.1f} dB" for level in levels[start : start + len(columns)]]
    return Sheet(rows.flatten(0, 2), tuple(captions), len(columns))


def _read(cache: ImageCache, indices: np.ndarray, size: int, device: torch.device) -> Tensor:
    """Return the middle of some images, float (n, 3, S, S) in [0, 1], on a device."""
    pixels = centre_crop(cache.images[indices], size)
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    return (upload(images, device).float() / 255).contiguous(memory_format=torch.channels_last)


def _reconstruct(tokenizer: Tokenizer, images: Tensor, precision: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the tokens of images float (n, 3, S, S), int64 (n, h, w), and what they are decoded to."""
    with autocast(images.device, precision):
        features = tokenizer.encoder(images)
    tokens = tokenizer.quantizer.tokens(features)
    with autocast(images.device, precision):
        return tokens, tokenizer.decode(tokens).float().clamp(0, 1)


def comparison_device(device: torch.device) -> torch.device:
    """Return where images that lie on a device are compared, which takes float64: there, or on the CPU."""
    return device if widest_float(device) == torch.float64 else torch.device("cpu")


def _total(value: Tensor, distributed: Distributed) -> Tensor:
    if distributed.world > 1:
        dist.all_reduce(value)
    return value


def _merged(statistics: FeatureStatistics, distributed: Distributed) -> FeatureStatistics:
    """Return the statistics of all processes together."""
    if distributed.world == 1:
        return statistics
    states: list[dict] = [{} for _ in range(distributed.world)]
    dist.all_gather_object(states, statistics.state())
    merged = FeatureStatistics.from_state(states[0])
    for state in states[1:]:
        merged.merge(FeatureStatistics.from_state(state))
    return merged


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
        cache: the images' tokens, of which the first view is taken, and the middle where the network's grid is smaller.
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
            tokens = centre_windows(tokens, vocabulary.shape)
            masks = draw_masks(
                seed, numbers, vocabulary.shape, groups=vocabulary.groups, mask_schedule=mask_schedule
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


MAX_COLUMNS = 8


def class_columns(classes: np.ndarray, seed: int, num_images: int) -> np.ndarray:
    """Return the class of each column of a sheet.

    Args:
        classes: int (C,), those to choose from, each once.
        seed: decides which, where there are more than columns.
        num_images: on the sheet.

    Returns:
        int64 (columns,), in rising order; a class may have several columns, each as many as the others.
    """
    width = min(MAX_COLUMNS, num_images)
    chosen = np.sort(classes[Shuffler(len(classes), seed).order(0)[:width]])
    return np.repeat(chosen.astype(np.int64), width // len(chosen))


def class_members(labels: np.ndarray, columns: np.ndarray, seed: int, num_images: int) -> np.ndarray:
    """Return images of a data set for a sheet whose columns are of given classes.

    Args:
        labels: int (N,), of the data set.
        columns: int (columns,), classes that have at least one image.
        seed: decides which images.
        num_images: n; the last row may be shorter.

    Returns:
        int64 (n,) in [0, N), row by row; where a class has too few images, they come again.
    """
    order = spread(labels, seed)
    waiting = {int(c): np.flatnonzero(labels[order] == c) for c in np.unique(columns)}
    used = dict.fromkeys(waiting, 0)
    members = []
    for i in range(num_images):
        own = int(columns[i % len(columns)])
        members.append(order[waiting[own][used[own] % len(waiting[own])]])
        used[own] += 1
    return np.array(members, np.int64)
