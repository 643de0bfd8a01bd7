"""The Fréchet distance of feature vectors, whose statistics may come in pieces.

Shapes: N samples, D feature dimensions.
"""

from collections.abc import Mapping
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from maskgit.errors import DataError
from maskgit.evaluation.metrics.vectors import Floats, as_doubles

# Eigenvalues below the largest times this, times D, are taken for rounding.
EPSILON = float(np.finfo(np.float64).eps)


class Gaussian(NamedTuple):
    """The mean and covariance of a set of feature vectors.

    Attributes:
        mean: float64 (D,).
        covariance: float64 (D, D), unbiased.
        num_images: how many vectors it describes; None where a file does not say.
    """

    mean: Floats
    covariance: Floats
    num_images: int | None = None


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

    def gaussian(self) -> Gaussian:
        """Return the mean and unbiased covariance with their count.

        Raises:
            DataError: fewer than two vectors were seen.
        """
        return Gaussian(self.mean, self.covariance, self.count)

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

    Args:
        mean_a, mean_b: float (D,).
        covariance_a, covariance_b: float (D, D), symmetric with eigenvalues of at least 0.

    Returns:
        The distance, at least 0; with Inception features it is called FID, with others it must not be.

    Raises:
        DataError: the shapes do not fit, or a value is not finite.

    Source: Heusel et al.: GANs trained by a two time-scale update rule, NeurIPS 2017, eq. 6.
    """
    a = Gaussian(np.asarray(mean_a, np.float64), np.asarray(covariance_a, np.float64))
    b = Gaussian(np.asarray(mean_b, np.float64), np.asarray(covariance_b, np.float64))
    return frechet_report(a, b).distance


class FrechetReport(NamedTuple):
    """A Fréchet distance, its parts, and what a reader must know about it.

    Attributes:
        distance: the squared distance, at least 0.
        mean_part: what the means differ by, |μa − μb|².
        covariance_part: what the covariances differ by, tr(Ca + Cb − 2·(Ca·Cb)^½).
        cautions: a sentence for each reason why the number may mislead; empty where none was found.
    """

    distance: float
    mean_part: float
    covariance_part: float
    cautions: tuple[str, ...]


def frechet_report(a: Gaussian, b: Gaussian, names: tuple[str, str] = ("first", "second")) -> FrechetReport:
    """Return the squared Fréchet distance of two Gaussians with its parts and cautions.

    The trace of the product's root is the sum of the singular values of Ca^½·Cb^½, which needs no root of a
    matrix that is not symmetric and is exact for singular covariances, such as those of fewer images than
    dimensions. Such covariances are reported, since they make the distance too large.

    Args:
        a, b: two Gaussians of one D.
        names: what the two are called in cautions.

    Raises:
        DataError: the shapes do not fit, or a value is not finite.

    Source: see `frechet_distance`.
    """
    dim = a.mean.size
    if any(x.mean.shape != (dim,) or x.covariance.shape != (dim, dim) for x in (a, b)):
        shapes = ", ".join(str(part.shape) for x in (a, b) for part in x[:2])
        raise DataError(
            f"Two Gaussians need means (D,) and covariances (D, D) of one D, but they are {shapes}."
        )
    if not all(np.isfinite(part).all() for x in (a, b) for part in x[:2]):
        raise DataError("A mean or covariance holds values that are not finite: make the statistics again.")
    (root_a, rank_a), (root_b, rank_b) = symmetric_root(a.covariance), symmetric_root(b.covariance)
    cross = np.linalg.svd(root_a @ root_b, compute_uv=False).sum()
    trace = float(np.trace(a.covariance + b.covariance))
    means = float(np.square(a.mean - b.mean).sum())
    # Rounding can leave −1e-12 where the covariances are equal.
    covariances = max(0.0, trace - 2 * float(cross))
    cautions = [
        *_rank_cautions(a, rank_a, names[0]),
        *_rank_cautions(b, rank_b, names[1]),
    ]
    if means + covariances <= 1e-9 * trace:
        cautions.append("Both sets have the same statistics: are they the same images?")
    return FrechetReport(means + covariances, means, covariances, tuple(cautions))


def symmetric_root(covariance: Floats) -> tuple[Floats, int]:
    """Return the symmetric root of a covariance, and its numerical rank."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    rank = int((values > values[-1] * len(values) * EPSILON).sum())
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T, rank


def _rank_cautions(side: Gaussian, rank: int, name: str) -> list[str]:
    dim, count = len(side.mean), side.num_images
    if count is not None and count <= dim:
        cautions = [
            f"The {name} set has {count} vectors of {dim} dimensions, too few for a covariance, and "
            "its distance to anything is too large: compare only scores of as many images."
        ]
        if rank < count - 1:
            cautions.append(
                f"The {name} set's {count} vectors span only {rank} dimensions: do images repeat?"
            )
        return cautions
    if rank < dim:
        return [
            f"The {name} set's covariance is singular ({rank} of {dim} dimensions): do images repeat, "
            "or were there fewer than dimensions?"
        ]
    return []
