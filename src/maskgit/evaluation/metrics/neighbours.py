"""The nearest vectors of a gallery: whether generated images are copies of training images.

Shapes: N queries, M gallery vectors, D their dimensions.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from maskgit.errors import DataError
from maskgit.evaluation.metrics import Floats, as_doubles, as_vectors
from maskgit.foundation.checks import check_whole


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
        chunk: vectors compared at once on each side, which bounds memory.

    Returns:
        `Neighbours`; a copy of a query is at distance 0 exactly.

    Raises:
        ConfigError: k or chunk is no whole number.
        DataError: the shapes do not fit, a value is not finite, or the gallery has fewer than k vectors.
    """
    names = "Queries", "Gallery vectors"
    queries, gallery = as_vectors(queries, names[0]), as_vectors(gallery, names[1])
    if queries.shape[1] != gallery.shape[1]:
        raise DataError(
            f"Queries have {queries.shape[1]} dimensions, but the gallery has {gallery.shape[1]}."
        )
    k, chunk = check_whole("k", k), check_whole("chunk", chunk)
    if not 1 <= k <= len(gallery) or chunk < 1:
        raise DataError(
            f"k must be 1 to {len(gallery)}, the gallery's size, and chunk above 0, not {k} and {chunk}."
        )
    indices = np.empty((len(queries), k), np.int64)
    distances = np.empty((len(queries), k))
    for start in range(0, len(queries), chunk):
        query = as_doubles(queries[start : start + chunk], names[0])
        squares = np.empty((len(query), 0))
        rows = np.empty((len(query), 0), np.int64)
        for first in range(0, len(gallery), chunk):
            part = as_doubles(gallery[first : first + chunk], names[1])
            # |q − g|² less |q|², which is the same for all.
            new = np.square(part).sum(1) - 2 * query @ part.T
            new_rows = np.broadcast_to(np.arange(first, first + len(part)), new.shape)
            squares, rows = np.concatenate([squares, new], 1), np.concatenate([rows, new_rows], 1)
            if rows.shape[1] > k:
                keep = np.argpartition(squares, k - 1, axis=1)[:, :k]
                squares, rows = np.take_along_axis(squares, keep, 1), np.take_along_axis(rows, keep, 1)
        # The expanded square ranks the candidates but loses digits where vectors nearly agree.
        exact = np.stack(
            [np.linalg.norm(gallery[rows[:, i]].astype(np.float64) - query, axis=1) for i in range(k)], 1
        )
        order = np.lexsort((rows, exact), axis=1)
        indices[start : start + chunk] = np.take_along_axis(rows, order, 1)
        distances[start : start + chunk] = np.take_along_axis(exact, order, 1)
    return Neighbours(indices, distances)
