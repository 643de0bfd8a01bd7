"""Feature vectors as arrays that can be computed with.

Shapes: N vectors, D their dimensions.
"""

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from maskgit.errors import DataError

Floats = NDArray[np.float64]


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
