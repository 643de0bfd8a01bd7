"""How well a tokenizer reconstructs images that it was not trained on.

Shapes: B images, K codes, D feature dimensions, S pixels a side.
"""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from maskgit.data.augment import centre_crop
from maskgit.data.caches import ImageCache
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

NUM_SHOWN = 32


@torch.no_grad()
def evaluate_tokenizer(
    tokenizer: Tokenizer,
    cache: ImageCache,
    *,
    size: int,
    precision: torch.dtype,
    num_images: int | None,
    feature_net: str | None,
    batch_size: int,
    distributed: Distributed,
) -> tuple[dict[str, float], Tensor]:
    """Reconstruct test images and compare; all processes call it and share the work.

    Args:
        tokenizer: on the processes' devices.
        cache: the test images, of which the middle is taken.
        size: S.
        precision: what the network computes in.
        num_images: the first so many; None takes all.
        feature_net: the name of a feature net for the Fréchet distance of the reconstructions to the images
            themselves, or None.
        batch_size: images a process reconstructs at once.
        distributed: the processes.

    Returns:
        scores: test_psnr, test_ssim (from 11 pixels a side on), test_code_usage, test_code_perplexity and, with a
            feature net, test_rfd; the same in all processes.
        shown: float (2 · n, 3, S, S) in [0, 1], the first images of this process, each before its reconstruction.
    """
    device = distributed.device
    count = min(len(cache), num_images or len(cache))
    own = np.arange(distributed.rank, count, distributed.world)
    sums = torch.zeros(2, dtype=torch.float64)
    counts = torch.zeros(tokenizer.config.codebook_size, dtype=torch.int64, device=device)
    net = load_feature_net(feature_net, device) if feature_net else None
    statistics = [FeatureStatistics(net.dim) for _ in range(2)] if net else []
    shown: list[Tensor] = []
    tokenizer.eval()
    for start in range(0, len(own), batch_size):
        pixels = centre_crop(cache.images[own[start : start + batch_size]], size)
        images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
        images = upload(images, device).float() / 255
        images = images.contiguous(memory_format=torch.channels_last)
        with autocast(device, precision):
            features = tokenizer.encoder(images)
        tokens = tokenizer.quantizer.tokens(features)
        with autocast(device, precision):
            reconstructions = tokenizer.decode(tokens).float().clamp(0, 1)
        count_codes(counts, tokens)
        pair = [pictures.to(comparison_device(device)) for pictures in (images, reconstructions)]
        sums[0] += psnr(*pair).clamp(max=100).sum().cpu()
        if size >= SSIM_WINDOW:
            sums[1] += ssim(*pair).sum().cpu()
        if net:
            for seen, pictures in zip(statistics, (images, reconstructions), strict=True):
                seen.update(net(pictures))
        if not shown:
            shown = [torch.stack([images, reconstructions], 1)[: NUM_SHOWN // 2].flatten(0, 1)]
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
    return scores, torch.cat(shown) if shown else torch.zeros(0, 3, size, size)


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
