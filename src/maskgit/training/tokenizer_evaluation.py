"""How well a tokenizer reconstructs images that it was not trained on.

Shapes: B images, K codes, D feature dimensions, S pixels a side.
"""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from maskgit.data.augment import centre_crop
from maskgit.data.batches import spread
from maskgit.data.image_cache import ImageCache
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
from maskgit.training.codebook import count_codes
from maskgit.training.distributed import Distributed
from maskgit.training.numerics import autocast
from maskgit.training.sheets import Sheet, class_columns, class_members

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
