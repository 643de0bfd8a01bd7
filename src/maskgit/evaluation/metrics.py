"""How good images, reconstructions and codes are: pure functions of arrays.

Shapes: B batch, N and M samples, D feature dimensions, K codebook_size, H × W pixels.
Long sums are float64. Images are float tensors (B, 3, H, W) in [0, 1]; features, counts and statistics are
NumPy arrays.
"""

from collections.abc import Mapping
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from maskgit.errors import DataError, ImageError

Floats = NDArray[np.float64]


def _check_pair(a: Tensor, b: Tensor) -> None:
    if a.ndim != 4 or a.shape != b.shape or 0 in a.shape[1:]:
        raise ImageError(
            "Two batches of images must have one shape (B, 3, H, W), "
            f"but are {tuple(a.shape)} and {tuple(b.shape)}."
        )
    if not (a.is_floating_point() and b.is_floating_point()):
        raise ImageError(f"Images must be float in [0, 1], but are {a.dtype} and {b.dtype}.")


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each pair of images, in decibels.

    Args:
        a: float (B, 3, H, W) in [0, 1].
        b: the same.

    Returns:
        float64 (B,), −10 · log₁₀ of the mean squared difference; infinite where images are equal.

    Raises:
        ImageError: the shapes or types do not fit.
    """
    _check_pair(a, b)
    error = (a.double() - b.double()).square().mean((1, 2, 3))
    return -10 * error.log10()


SSIM_WINDOW = 11
SSIM_SIGMA = 1.5


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Return the structural similarity of each pair of images.

    Each channel is compared within an 11 × 11 Gaussian window (σ 1.5, K₁ 0.01, K₂ 0.03), only where the
    window lies wholly inside the image, and averaged.

    Args:
        a: float (B, 3, H, W) in [0, 1], at least 11 pixels a side.
        b: the same.

    Returns:
        float64 (B,), at most 1, which only equal images reach.

    Raises:
        ImageError: the shapes or types do not fit.

    Source: Wang, Bovik, Sheikh, Simoncelli: Image quality assessment, IEEE TIP 2004, eq. 13.
    """
    _check_pair(a, b)
    if min(a.shape[2:]) < SSIM_WINDOW:
        raise ImageError(
            f"SSIM needs images of at least {SSIM_WINDOW} pixels a side, not {tuple(a.shape[2:])}."
        )
    a, b = a.double(), b.double()
    offsets = torch.arange(SSIM_WINDOW, dtype=a.dtype, device=a.device) - SSIM_WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    window /= window.sum()

    def blur(x: Tensor) -> Tensor:
        planes = x.flatten(0, 1)[:, None]
        planes = F.conv2d(F.conv2d(planes, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
        return planes.view(x.shape[0], x.shape[1], *planes.shape[2:])

    mean_a, mean_b = blur(a), blur(b)
    variance_a = blur(a * a) - mean_a**2
    variance_b = blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return (luminance * structure).mean((1, 2, 3))


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


def as_vectors(values: ArrayLike | Tensor, name: str) -> NDArray:
    """Return an array or tensor of vectors (N, D) as an array of its own type; `name` is for messages.

    Raises:
        DataError: the shape does not fit.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        # NumPy has no bfloat16.
        values = values.float().numpy() if values.dtype == torch.bfloat16 else values.numpy()
    array = np.asarray(values)
    if array.ndim != 2 or array.shape[1] == 0:
        raise DataError(f"{name} must be of shape (N, D), but are {array.shape}.")
    return array


def as_doubles(values: ArrayLike | Tensor, name: str) -> Floats:
    """Return an array or tensor of vectors as float64 (N, D); `name` is for messages.

    Raises:
        DataError: the shape does not fit, or a value is not finite.
    """
    rows = as_vectors(values, name)
    if not np.isfinite(rows).all():
        raise DataError(f"{name} hold values that are not finite: look at the images that made them.")
    return rows.astype(np.float64)


class FeatureStatistics:
    """Count, mean and covariance of feature vectors that come in any number of pieces, in float64.

    Pieces may come in any order and any size, and be counted in several places and merged: the result is the
    same but for float64 rounding.

    Attributes:
        count: vectors seen.
        mean: float64 (D,), their mean; 0 when there are none.
        scatter: float64 (D, D), the sum of outer products of their deviations from the mean.

    Source: Chan, Golub, LeVeque: Algorithms for computing the sample variance, The American Statistician
    1983: the update of a sum of squares by that of another sample, with outer products for squares.
    """

    def __init__(self, dim: int) -> None:
        """Begin with no vectors of length `dim`."""
        self.count = 0
        self.mean: Floats = np.zeros(dim)
        self.scatter: Floats = np.zeros((dim, dim))

    @property
    def covariance(self) -> Floats:
        """The unbiased covariance, float64 (D, D).

        Raises:
            DataError: fewer than two vectors were seen.
        """
        if self.count < 2:
            raise DataError(f"A covariance needs at least 2 feature vectors, but {self.count} were given.")
        return self.scatter / (self.count - 1)

    def update(self, features: ArrayLike | Tensor) -> None:
        """Add feature vectors.

        Args:
            features: float (B, D), an array or tensor.

        Raises:
            DataError: the shape does not fit, or a value is not finite.
        """
        x = as_doubles(features, "Features")
        self._check_dim(x.shape[1])
        if len(x):
            mean = x.mean(0)
            deviations = x - mean
            self._add(len(x), mean, deviations.T @ deviations)

    def merge(self, other: Self) -> None:
        """Add the vectors that `other` has seen.

        Raises:
            DataError: they have another length.
        """
        self._check_dim(len(other.mean))
        if other.count:
            self._add(other.count, other.mean, other.scatter)

    def state(self) -> dict[str, NDArray]:
        """Return plain arrays to save: `count` int64 (), `mean` float64 (D,), `scatter` float64 (D, D)."""
        return {
            "count": np.array(self.count, np.int64),
            "mean": self.mean.copy(),
            "scatter": self.scatter.copy(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, NDArray]) -> Self:
        """Return the statistics whose `state` was saved.

        Raises:
            DataError: an array is missing, of the wrong shape, or holds impossible values.
        """
        try:
            count, mean, scatter = (np.asarray(state[name]) for name in ("count", "mean", "scatter"))
        except KeyError as error:
            raise DataError(f"Saved feature statistics lack {error}: make them again.") from error
        dim = len(mean) if mean.ndim == 1 else 0
        fits = count.shape == () and dim > 0 and scatter.shape == (dim, dim)
        if not fits or not all(np.issubdtype(x.dtype, np.number) for x in (count, mean, scatter)):
            raise DataError("Saved feature statistics have the wrong shapes or types: make them again.")
        if not (count >= 0 and np.isfinite(mean).all() and np.isfinite(scatter).all()):
            raise DataError("Saved feature statistics hold impossible values: make them again.")
        made = cls(dim)
        made.count, made.mean, made.scatter = int(count), mean.astype(np.float64), scatter.astype(np.float64)
        return made

    def _check_dim(self, dim: int) -> None:
        if dim != len(self.mean):
            raise DataError(
                f"Features have {dim} dimensions, but {len(self.mean)} were expected: use one feature net."
            )

    def _add(self, count: int, mean: Floats, scatter: Floats) -> None:
        total = self.count + count
        step = mean - self.mean
        self.scatter = self.scatter + scatter + np.outer(step, step) * (self.count * count / total)
        self.mean = self.mean + step * (count / total)
        self.count = total


def frechet_distance(
    mean_a: ArrayLike, covariance_a: ArrayLike, mean_b: ArrayLike, covariance_b: ArrayLike
) -> float:
    """Return the squared Fréchet distance of two Gaussians, |μa − μb|² + tr(Ca + Cb − 2·(Ca·Cb)^½).

    The trace of the product's root is the sum of the singular values of Ca^½·Cb^½, which needs no root of a
    matrix that is not symmetric and is exact for singular covariances, such as those of fewer images than
    dimensions.

    Args:
        mean_a, mean_b: float (D,).
        covariance_a, covariance_b: float (D, D), symmetric with eigenvalues of at least 0.

    Returns:
        The distance, at least 0; with Inception features it is called FID, with others it must not be.

    Raises:
        DataError: the shapes do not fit, or a value is not finite.

    Source: Heusel et al.: GANs trained by a two time-scale update rule, NeurIPS 2017, eq. 6.
    """
    means = [np.asarray(mean, np.float64) for mean in (mean_a, mean_b)]
    covariances = [np.asarray(covariance, np.float64) for covariance in (covariance_a, covariance_b)]
    dim = means[0].size
    if any(mean.shape != (dim,) for mean in means) or any(c.shape != (dim, dim) for c in covariances):
        shapes = ", ".join(str(x.shape) for x in (*means, *covariances))
        raise DataError(
            f"Two Gaussians need means (D,) and covariances (D, D) of one D, but they are {shapes}."
        )
    if not all(np.isfinite(x).all() for x in (*means, *covariances)):
        raise DataError("A mean or covariance holds values that are not finite: make the statistics again.")
    cross = np.linalg.svd(_root(covariances[0]) @ _root(covariances[1]), compute_uv=False).sum()
    distance = np.square(means[0] - means[1]).sum() + np.trace(covariances[0] + covariances[1]) - 2 * cross
    # Rounding can leave −1e-12 where the Gaussians are equal.
    return max(0.0, float(distance))


def _root(covariance: Floats) -> Floats:
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


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
        DataError: the shapes do not fit, a value is not finite, or there are too few vectors.

    Source: Bińkowski, Sutherland, Arbel, Gretton: Demystifying MMD GANs, ICLR 2018, §4 and eq. 4.
    """
    a, b = as_doubles(features_a, "The first features"), as_doubles(features_b, "The second features")
    if a.shape[1] != b.shape[1]:
        raise DataError(f"The features have {a.shape[1]} and {b.shape[1]} dimensions: use one feature net.")
    if subsets < 1 or not 2 <= subset_size <= min(len(a), len(b)):
        raise DataError(
            f"{subsets} subsets of {subset_size} cannot be drawn from {len(a)} and {len(b)} vectors: "
            "choose at least 1 subset of at least 2 vectors and at most as many as there are."
        )
    random = np.random.default_rng(seed)

    def draw(x: Floats) -> Floats:
        return x[random.choice(len(x), subset_size, replace=False)]

    values = [_unbiased_mmd(draw(a), draw(b)) for _ in range(subsets)]
    return KernelDistance(float(np.mean(values)), float(np.std(values)))


def _unbiased_mmd(a: Floats, b: Floats) -> float:
    def kernel(x: Floats, y: Floats) -> Floats:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def mean_off_diagonal(k: Floats) -> float:
        return (k.sum() - np.trace(k)) / (len(k) * (len(k) - 1))

    return mean_off_diagonal(kernel(a, a)) + mean_off_diagonal(kernel(b, b)) - 2 * float(kernel(a, b).mean())
