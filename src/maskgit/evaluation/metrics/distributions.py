"""How far apart two distributions of features are, and how sure and varied a classifier finds images.

Shapes: N and M samples, D feature dimensions, C classes.
"""

from typing import NamedTuple

import numpy as np
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
