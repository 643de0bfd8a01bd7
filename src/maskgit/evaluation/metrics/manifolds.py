"""Whether generated images lie where real ones do, whether these are covered, and whether they are copies.

Each set is described by balls around its vectors, whose radius is the distance to the k-th nearest neighbour
in the same set.

Shapes: N real and M generated vectors, D their dimensions. Distances are float64; pieces of `chunk` vectors
on each side are compared at once, which bounds memory to a few chunk² numbers and chunk vectors.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from maskgit.errors import DataError
from maskgit.evaluation.metrics.vectors import (
    CHUNK,
    Distances,
    Neighbours,
    as_finite,
    check_same_dim,
    nearest_neighbours,
)
from maskgit.foundation.checks import check_whole


class PrecisionRecall(NamedTuple):
    """Improved precision and recall, each in [0, 1].

    Attributes:
        precision: the share of generated vectors inside a ball of the real ones: fidelity.
        recall: the share of real vectors inside a ball of the generated ones: variety.
    """

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Density and coverage.

    Attributes:
        density: balls of real vectors that a generated one lies in, on average, divided by k; about 1 for
            equal distributions, and not bounded by it.
        coverage: the share of real vectors whose ball holds a generated one, in [0, 1].
    """

    density: float
    coverage: float


def precision_recall(
    real: ArrayLike | Tensor,
    generated: ArrayLike | Tensor,
    *,
    k: int = 3,
    chunk: int = CHUNK,
    device: str | torch.device = "cpu",
) -> PrecisionRecall:
    """Return improved precision and recall.

    Args:
        real: float (N, D), N above k.
        generated: float (M, D), M above k.
        k: the neighbour that decides the radius; published scores use 3.
        chunk: see the module.
        device: where distances are computed; it must know float64.

    Raises:
        ConfigError: a setting is no whole number.
        DataError: the shapes do not fit, a value is not finite, or there are too few vectors.

    Source: Kynkäänniemi et al.: Improved Precision and Recall Metric for Assessing Generative Models,
    NeurIPS 2019, eq. 1–3.

    Differs: ADM's evaluator computes distances in float16; ours are float64, so that the third digit may
    differ.
    """
    k = check_whole("k", k)
    vectors = _Pair(real, generated, k, chunk, device)
    radii, generated_radii = vectors.radii(vectors.real, k), vectors.radii(vectors.generated, k)
    inside = torch.zeros(len(vectors.generated), dtype=torch.bool, device=device)
    reached = torch.zeros(len(vectors.real), dtype=torch.bool, device=device)
    for rows, columns, squares in vectors.pieces(vectors.real, vectors.generated):
        inside[columns] |= (squares <= radii[rows, None]).any(0)
        reached[rows] |= (squares <= generated_radii[None, columns]).any(1)
    return PrecisionRecall(_share(inside), _share(reached))


def density_coverage(
    real: ArrayLike | Tensor,
    generated: ArrayLike | Tensor,
    *,
    k: int = 5,
    chunk: int = CHUNK,
    device: str | torch.device = "cpu",
) -> DensityCoverage:
    """Return density and coverage.

    Args:
        real, generated, chunk, device: as for `precision_recall`.
        k: the neighbour that decides the radius; the paper takes 5.

    Raises:
        ConfigError: a setting is no whole number.
        DataError: the shapes do not fit, a value is not finite, or there are too few vectors.

    Source: Naeem et al.: Reliable Fidelity and Diversity Metrics for Generative Models, ICML 2020, §3.

    Differs: a vector exactly on a ball's surface counts as inside, as for precision; the paper's code leaves
    it out.
    """
    k = check_whole("k", k)
    vectors = _Pair(real, generated, k, chunk, device)
    radii = vectors.radii(vectors.real, k)
    balls = torch.zeros((), dtype=torch.int64, device=device)
    covered = torch.zeros(len(vectors.real), dtype=torch.bool, device=device)
    for rows, _, squares in vectors.pieces(vectors.real, vectors.generated):
        hits = squares <= radii[rows, None]
        balls += hits.sum()
        covered[rows] |= hits.any(1)
    return DensityCoverage(balls.item() / (k * len(vectors.generated)), _share(covered))


class ManifoldScores(NamedTuple):
    """The four scores of `PrecisionRecall` and `DensityCoverage`."""

    precision: float
    recall: float
    density: float
    coverage: float


class Manifolds:
    """All four scores of a set and of parts of it, from distances that are computed once and kept.

    Attributes:
        num_real: N.
        inside: bool (M,), whether each generated vector lies in a ball of the real ones: its share is precision.
        balls: int64 (M,), how many it lies in: their mean divided by k is density.
        only: int64 (M,), in how many of them no other lies: coverage loses these without it.
    """

    def __init__(
        self,
        real: ArrayLike | Tensor,
        generated: ArrayLike | Tensor,
        *,
        k: int = 3,
        chunk: int = CHUNK,
        device: str | torch.device = "cpu",
    ) -> None:
        """Compute the distances, which take 8·M·(N + M) bytes; the arguments are `precision_recall`'s."""
        self.k = check_whole("k", k)
        pair = _Pair(real, generated, self.k, chunk, device)
        count, self.num_real = len(pair.generated), len(pair.real)
        self._between = torch.empty(len(pair.real), count, dtype=torch.float64, device=pair.device)
        for rows, columns, squares in pair.pieces(pair.real, pair.generated):
            self._between[rows, columns] = squares
        self._own = torch.empty(count, count, dtype=torch.float64, device=pair.device)
        for rows, columns, squares in pair.pieces(pair.generated, pair.generated):
            self._own[rows, columns] = squares
        self._own.fill_diagonal_(torch.inf)
        self._hits = self._between <= pair.radii(pair.real, self.k)[:, None]
        self.inside = self._hits.any(0).cpu().numpy()
        self.balls = self._hits.sum(0).cpu().numpy()
        alone = self._hits.sum(1) == 1
        self.only = self._hits[alone].sum(0).cpu().numpy()

    def scores(self, rows: NDArray[np.int64] | None = None) -> ManifoldScores:
        """Return the scores of some generated vectors, more than k, or of all."""
        hits, own, between = self._hits, self._own, self._between
        if rows is not None:
            chosen = torch.from_numpy(rows).to(own.device)
            hits, own, between = hits[:, chosen], own[chosen][:, chosen], between[:, chosen]
        radii = own.topk(self.k, largest=False).values.amax(1)
        return ManifoldScores(
            _share(hits.any(0)),
            _share((between <= radii).any(1)),
            int(hits.sum()) / (self.k * hits.shape[1]),
            _share(hits.any(1)),
        )


def authenticity(
    training: ArrayLike | Tensor,
    generated: ArrayLike | Tensor,
    *,
    nearest: Neighbours | None = None,
    chunk: int = CHUNK,
) -> float:
    """Return the share of generated images that do not look like copies of training images.

    A vector is a copy if it is nearer to its nearest training vector than that one is to any other.

    Args:
        training: float (N, D), N at least 2: the images that the model was trained on.
        generated: float (M, D), M at least 2.
        nearest: the nearest training vectors of the generated ones, where they are known already.
        chunk: see the module.

    Returns:
        The share, in [0, 1]: 0 for copies; compare it with that of real images held out from training.

    Raises:
        ConfigError: a setting is no whole number.
        DataError: the shapes do not fit, a value is not finite, or there are too few vectors.

    Source: Alaa, van Breugel, Saveliev, van der Schaar: How Faithful is your Synthetic Data?, ICML 2022: its
    authenticity.
    """
    training, generated = as_finite(training, "Training features"), as_finite(generated, "Generated features")
    if min(len(training), len(generated)) < 2:
        raise DataError(
            f"Authenticity needs at least 2 vectors of each set, but there are {len(training)} and {len(generated)}."
        )
    nearest = nearest or nearest_neighbours(generated, training, chunk=chunk)
    # Only those that are nearest to something are asked for their own neighbours: few of a large set.
    places, back = np.unique(nearest.indices[:, 0], return_inverse=True)
    # The first neighbour of a training vector is itself, or a copy of it.
    limit = nearest_neighbours(training[places], training, k=2, chunk=chunk).distances[:, 1]
    found = nearest.distances[:, 0]
    # Copies of vectors that the training set holds twice lie at distance 0, as do their own neighbours.
    return float(((found >= limit[back]) & (found > 0)).mean())


def _share(chosen: Tensor) -> float:
    return chosen.double().mean().item()


class _Pair(Distances):
    """Two checked sets of vectors, and their squared distances in pieces."""

    def __init__(
        self,
        real: ArrayLike | Tensor,
        generated: ArrayLike | Tensor,
        k: int,
        chunk: int,
        device: str | torch.device,
    ) -> None:
        self.real, self.generated = (
            as_finite(real, "Real features"),
            as_finite(generated, "Generated features"),
        )
        check_same_dim(self.real, self.generated)
        smallest = min(len(self.real), len(self.generated))
        chunk = check_whole("chunk", chunk)
        if not 1 <= k < smallest or chunk < 1:
            raise DataError(
                f"k must be above 0 and below {smallest}, the size of the smaller set, and chunk above 0, "
                f"but they are {k} and {chunk}."
            )
        super().__init__(self.real, chunk, device)

    def radii(self, x: np.ndarray, k: int) -> Tensor:
        """Return the squared distance of each vector to its k-th nearest other one, float64 (N,)."""
        return self.nearest(x, x, k, others=True).squares.amax(1)
