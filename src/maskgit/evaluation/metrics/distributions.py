"""How far apart two distributions of features are, how sure and varied a classifier finds images, how codes are used.

Shapes: N and M samples, D feature dimensions, C classes, K codebook_size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from maskgit.errors import DataError
from maskgit.evaluation.metrics.vectors import Floats, as_finite, check_same_dim
from maskgit.foundation.checks import check_seed, check_whole


class KernelDistance(NamedTuple):
    """Mean and standard deviation, over subsets, of an estimated kernel distance."""

    mean: float
    std: float


def kernel_distance(
    features_a: ArrayLike | Tensor,
    features_b: ArrayLike | Tensor,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> KernelDistance:
    """Return the unbiased squared maximum mean discrepancy with the kernel (x·y / D + 1)³.

    Args:
        features_a: float (N, D), N at least `subset_size`.
        features_b: float (M, D), M at least `subset_size`.
        subsets: how many random subsets are compared, at least 1.
        subset_size: vectors drawn from each side for each, without replacement; at least 2.
        seed: decides the subsets.

    Returns:
        Mean and standard deviation over the subsets; unbiased, so that the mean may be below 0 for equal
        distributions. With Inception features it is called KID, with others it must not be.

    Raises:
        ConfigError: a setting is no whole number.
        DataError: the shapes do not fit, a value is not finite, or there are too few vectors.

    Source: Bińkowski, Sutherland, Arbel, Gretton: Demystifying MMD GANs, ICLR 2018, §4 and eq. 4.
    """
    a, b = as_finite(features_a, "The first features"), as_finite(features_b, "The second features")
    check_same_dim(a, b)
    subsets, subset_size = check_whole("subsets", subsets), check_whole("subset_size", subset_size)
    if subsets < 1 or not 2 <= subset_size <= min(len(a), len(b)):
        raise DataError(
            f"{subsets} subsets of {subset_size} cannot be drawn from {len(a)} and {len(b)} vectors: "
            "choose at least 1 subset of at least 2 vectors and at most as many as there are."
        )
    random = np.random.default_rng(check_seed(seed))

    # Only the drawn vectors become float64, so that 50,000 of a side stay as small as they are.
    def draw(x: NDArray) -> Floats:
        return x[random.choice(len(x), subset_size, replace=False)].astype(np.float64)

    values = [_unbiased_mmd(draw(a), draw(b)) for _ in range(subsets)]
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def _unbiased_mmd(a: Floats, b: Floats) -> float:
    def kernel(x: Floats, y: Floats) -> Floats:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def mean_off_diagonal(k: Floats) -> float:
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

    return mean_off_diagonal(kernel(a, a)) + mean_off_diagonal(kernel(b, b)) - 2 * float(kernel(a, b).mean())


# CMMD's kernel, and by how much it is enlarged to be read more easily.
CMMD_SIGMA, CMMD_SCALE = 10, 1000
# Vectors of a side that are compared at once.
_CHUNK = 2048


class CMMD(NamedTuple):
    """CMMD, and that of all generated embeddings but one group each, for the jackknife."""

    value: float
    without: list[float]


def cmmd(
    real: ArrayLike | Tensor,
    generated: ArrayLike | Tensor,
    groups: Sequence[NDArray[np.int64]] = (),
    *,
    device: str | torch.device = "cpu",
) -> CMMD:
    """Return the biased squared maximum mean discrepancy with a Gaussian kernel (σ = 10), times 1,000.

    Args:
        real: float (N, D), CLIP's embeddings at length 1.
        generated: float (M, D), likewise.
        groups: rows of `generated` by group, each row in one.
        device: where kernels are computed; it must know float64.

    Raises:
        DataError: the shapes do not fit, or a value is not finite.

    Source: Jayasumana et al.: Rethinking FID, CVPR 2024 (arXiv 2401.09603), §4; the estimator is that of
    google-research, cmmd/distance.py: pairs of a vector with itself count.
    """
    a, b = as_finite(real, "The real embeddings"), as_finite(generated, "The generated embeddings")
    check_same_dim(a, b)
    theirs = torch.from_numpy(a.astype(np.float64)).to(device)
    parts = [
        torch.from_numpy(b[rows].astype(np.float64)).to(device) for rows in groups or [np.arange(len(b))]
    ]
    sizes = np.array([len(part) for part in parts])
    between = np.array([_kernel_sum(part, theirs) for part in parts])
    own = np.array(
        [[_kernel_sum(x, y) if i <= j else 0.0 for j, y in enumerate(parts)] for i, x in enumerate(parts)]
    )
    own += np.triu(own, 1).T
    real_mean = _kernel_sum(theirs, theirs) / len(theirs) ** 2

    def of(kept: list[int]) -> float:
        count = sizes[kept].sum()
        mean = own[np.ix_(kept, kept)].sum() / count**2 - 2 * between[kept].sum() / (count * len(theirs))
        return float(CMMD_SCALE * (real_mean + mean))

    every = list(range(len(parts)))
    return CMMD(of(every), [of(every[:i] + every[i + 1 :]) for i in every] if groups else [])


def _kernel_sum(a: Tensor, b: Tensor) -> float:
    """Return the sum of the Gaussian kernel over all pairs of two sets of vectors."""
    total = torch.zeros((), dtype=a.dtype, device=a.device)
    for x in a.split(_CHUNK):
        for y in b.split(_CHUNK):
            squares = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
            total += (squares / (-2 * CMMD_SIGMA**2)).exp().sum()
    return float(total)


class InceptionScore(NamedTuple):
    """Mean and standard deviation, over splits, of the Inception Score."""

    mean: float
    std: float


def inception_score(logits: ArrayLike | Tensor, *, splits: int = 10, seed: int | None = 0) -> InceptionScore:
    """Return exp of the mean KL divergence of each image's class probabilities from their average.

    Args:
        logits: float (N, C), of a classifier; only with Inception's is it called the Inception Score.
        splits: parts of nearly equal size, each scored on its own, 1 to N.
        seed: decides which images go into which split; None keeps their order, which must then mix the
            classes, since a split of one class scores 1.

    Returns:
        Mean and standard deviation over the splits; a score lies in [1, C].

    Raises:
        ConfigError: a setting is no whole number.
        DataError: the shape does not fit, a value is not finite, or there are too few images.

    Source: Salimans et al.: Improved Techniques for Training GANs, NeurIPS 2016, §4. The evaluator of ADM
    (Dhariwal and Nichol, NeurIPS 2021) takes splits of 5,000 images in order: 10 of 50,000, with no seed.
    """
    rows = as_finite(logits, "Logits")
    splits = check_whole("splits", splits)
    if not 1 <= splits <= len(rows):
        raise DataError(f"{len(rows)} images cannot be cut into {splits} splits: choose 1 to {len(rows)}.")
    order = (
        np.arange(len(rows))
        if seed is None
        else np.random.default_rng(check_seed(seed)).permutation(len(rows))
    )
    scores = [_split_score(rows[part].astype(np.float64)) for part in np.array_split(order, splits)]
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


def _split_score(logits: Floats) -> float:
    shifted = logits - logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    p = np.exp(log_p)
    # A class that no image shows has probability 0 on both sides and adds nothing.
    log_q = np.log(p.mean(0).clip(min=np.finfo(np.float64).tiny))
    return float(np.exp((p * (log_p - log_q)).sum(1).mean()))


def _probabilities(counts: ArrayLike) -> Floats:
    values = np.asarray(counts, dtype=np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all() or (values < 0).any():
        raise DataError(
            f"Counts must be numbers of at least 0, one a code, but have the shape {values.shape}."
        )
    total = values.sum()
    if total == 0:
        raise DataError("No code was counted: there is nothing to measure.")
    return values / total


def codebook_usage(counts: ArrayLike) -> float:
    """Return the share of codes that were used at all.

    Args:
        counts: (K,), how often each code was chosen, at least one of them above 0.

    Returns:
        The share, in (0, 1].

    Raises:
        DataError: the counts are not counts, or all 0.
    """
    return float((_probabilities(counts) > 0).mean())


def perplexity(counts: ArrayLike) -> float:
    """Return the exponential of the codes' entropy: how many codes used equally often would be as varied.

    Args:
        counts: (K,), how often each code was chosen, at least one of them above 0.

    Returns:
        The perplexity, in [1, K].

    Raises:
        DataError: the counts are not counts, or all 0.

    Differs: the official `get_perplexity` adds 1e-5 inside the logarithm; this is the exact entropy.
    """
    p = _probabilities(counts)
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))
