"""Feature vectors as arrays, and the nearest of a set, which balls around vectors and the search for copies are made of.

Shapes: N vectors or queries, M gallery vectors, D their dimensions. Distances are float64; pieces of `chunk` vectors on
each side are compared at once, which bounds memory to a few chunk² numbers and chunk vectors.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from maskgit.errors import DataError
from maskgit.foundation.checks import check_whole

Floats = NDArray[np.float64]
CHUNK = 2048


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
    return as_finite(values, name).astype(np.float64)


def as_finite(values: ArrayLike | Tensor, name: str) -> NDArray:
    """Return an array or tensor of vectors (N, D) as an array of its own type, once all values are finite.

    Raises:
        DataError: the shape does not fit, or a value is not finite.
    """
    rows = as_vectors(values, name)
    # In pieces, since the comparison of 50,000 vectors at once would take memory of its own.
    if not all(np.isfinite(rows[start : start + 1024]).all() for start in range(0, len(rows), 1024)):
        raise DataError(f"{name} hold values that are not finite: look at the images that made them.")
    return rows


def check_same_dim(a: NDArray, b: NDArray) -> None:
    """Raise a `DataError` unless the vectors of both arrays are of one length."""
    if a.shape[1] != b.shape[1]:
        raise DataError(f"The features have {a.shape[1]} and {b.shape[1]} dimensions: use one feature net.")


class Neighbours(NamedTuple):
    """The nearest vectors of each query.

    Attributes:
        indices: int64 (N, k), rows of the gallery.
        distances: float64 (N, k), Euclidean.
    """

    indices: NDArray[np.int64]
    distances: Floats


def nearest_neighbours(
    queries: ArrayLike | Tensor, gallery: ArrayLike | Tensor, k: int = 1, chunk: int = 1024
) -> Neighbours:
    """Return the nearest gallery vectors of each query, by Euclidean distance, nearest first.

    Args:
        queries: float (N, D): features, or pixels of flattened images.
        gallery: float (M, D).
        k: how many neighbours, 1 to M.
        chunk: see the module.

    Returns:
        `Neighbours`; a copy of a query is at distance 0 exactly.

    Raises:
        ConfigError: k or chunk is no whole number.
        DataError: the shapes do not fit, a value is not finite, or the gallery has fewer than k vectors.
    """
    queries, gallery = as_finite(queries, "Queries"), as_finite(gallery, "Gallery vectors")
    if queries.shape[1] != gallery.shape[1]:
        raise DataError(
            f"Queries have {queries.shape[1]} dimensions, but the gallery has {gallery.shape[1]}."
        )
    k, chunk = check_whole("k", k), check_whole("chunk", chunk)
    if not 1 <= k <= len(gallery) or chunk < 1:
        raise DataError(
            f"k must be 1 to {len(gallery)}, the gallery's size, and chunk above 0, not {k} and {chunk}."
        )
    rows = Distances(gallery, chunk, "cpu").nearest(queries, gallery, k).rows.numpy()
    distances = np.empty(rows.shape)
    for start in range(0, len(queries), chunk):
        part = slice(start, start + chunk)
        query = queries[part].astype(np.float64)
        # The expanded square ranks the candidates but loses digits where vectors nearly agree.
        exact = np.stack(
            [np.linalg.norm(gallery[rows[part, i]].astype(np.float64) - query, axis=1) for i in range(k)], 1
        )
        order = np.lexsort((rows[part], exact), axis=1)
        rows[part] = np.take_along_axis(rows[part], order, 1)
        distances[part] = np.take_along_axis(exact, order, 1)
    return Neighbours(rows, distances)


class Nearest(NamedTuple):
    """The nearest vectors of each of N others, in no order.

    Attributes:
        squares: float64 (N, k), squared distances.
        rows: int64 (N, k).
    """

    squares: Tensor
    rows: Tensor


class Distances:
    """Squared distances between sets of vectors, in pieces, on a device that knows float64."""

    def __init__(self, around: NDArray, chunk: int, device: str | torch.device) -> None:
        """Begin with vectors (M, D) whose mean is taken off all others.

        Distances lose fewer digits between vectors that lie around 0.
        """
        self.chunk, self.device = chunk, torch.device(device)
        self._centre = torch.from_numpy(around.mean(0, dtype=np.float64)).to(self.device)

    def pieces(self, a: NDArray, b: NDArray) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield rows of a, rows of b, and the squared distances between them, float64."""
        for start in range(0, len(a), self.chunk):
            rows = slice(start, min(start + self.chunk, len(a)))
            left = self._load(a[rows])
            left_squares = left.square().sum(1)[:, None]
            for first in range(0, len(b), self.chunk):
                columns = slice(first, min(first + self.chunk, len(b)))
                right = self._load(b[columns])
                scale = left_squares + right.square().sum(1)
                squares = scale - 2 * left @ right.T
                # What is left of the distance of equal vectors is rounding.
                squares[squares < 1e-12 * scale] = 0
                yield rows, columns, squares

    def nearest(self, a: NDArray, b: NDArray, k: int, *, others: bool = False) -> Nearest:
        """Return the k nearest of b to each of a; with `others`, both are one set, and none is its own."""
        squares = torch.full((len(a), k), torch.inf, dtype=torch.float64, device=self.device)
        found = torch.zeros((len(a), k), dtype=torch.int64, device=self.device)
        for rows, columns, piece in self.pieces(a, b):
            numbers = torch.arange(columns.start, columns.stop, device=self.device).expand(piece.shape)
            if others:
                itself = torch.arange(rows.start, rows.stop, device=self.device)[:, None] == numbers
                piece[itself] = torch.inf
            both = torch.cat([squares[rows], piece], 1)
            squares[rows], places = both.topk(k, largest=False)
            found[rows] = torch.cat([found[rows], numbers], 1).gather(1, places)
        return Nearest(squares, found)

    def _load(self, rows: NDArray) -> Tensor:
        return torch.from_numpy(rows.astype(np.float64)).to(self.device) - self._centre
