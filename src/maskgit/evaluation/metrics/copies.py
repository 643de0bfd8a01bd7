"""How much an image looks like a copy of one of a gallery, by features and then by pixels.

Flat images lie near to everything, so that a distance alone says little: what counts is how much nearer the nearest image
is than the next ones. Features forgive brightness and small shifts; pixels, compared at several places, sizes and
mirrored, tell a copy from another picture of the same kind.

Shapes: N queries, M gallery images, D feature dimensions, k candidates, H × W pixels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from maskgit.evaluation.metrics.vectors import Floats, Neighbours

# Gallery images that a query is compared with.
CANDIDATES = 5
# A sample that scores less is flagged. Measured on the bundled model: docs/evaluation.md.
SUSPICIOUS = 0.3
# Pixels a side at which images are compared, and the part of a side that has to agree.
_SIDE, _WINDOW = 32, 24
# Sides that a query is shrunk to, since a copy may be a part of the image, enlarged.
_SIZES = (32, 28, 24)
# Standard deviation of grey levels, of 1, below which an image is too flat to agree with anything.
_FLAT = 0.01


class Candidates(NamedTuple):
    """The gallery images nearest to each query.

    Attributes:
        rows: int64 (N, k), of the gallery, nearest first.
        distances: float64 (N, k), to the nearer of an image's forms.
        ratios: float64 (N,), the first distance divided by the mean of the next ones: usually a little below 1.
    """

    rows: NDArray[np.int64]
    distances: Floats
    ratios: Floats


def candidates(forms: Sequence[Neighbours]) -> Candidates:
    """Return the nearest gallery images, each of which may have several forms, such as its reconstruction.

    Args:
        forms: the nearest vectors in the gallery of each form, of which row i is image i; as many of each, 2 or more.
    """
    rows = np.concatenate([form.indices for form in forms], 1)
    distances = np.concatenate([form.distances for form in forms], 1)
    order = np.argsort(distances, 1, kind="stable")
    rows, distances = np.take_along_axis(rows, order, 1), np.take_along_axis(distances, order, 1)
    # An image's second form is the same image: places of those that came before go last.
    before = (rows[:, :, None] == rows[:, None, :]) & np.tri(rows.shape[1], k=-1, dtype=bool)
    keep = np.argsort(before.any(2), 1, kind="stable")[:, : forms[0].indices.shape[1]]
    rows, distances = np.take_along_axis(rows, keep, 1), np.take_along_axis(distances, keep, 1)
    others = distances[:, 1:].mean(1)
    # Where the gallery repeats an image, all are at distance 0.
    ratios = np.divide(distances[:, 0], others, out=np.zeros(len(rows)), where=others > 0)
    return Candidates(rows, distances, ratios)


def pixel_agreement(image: NDArray[np.uint8], others: NDArray[np.uint8]) -> Floats:
    """Return how well the middle of an image agrees with the best fitting part of others.

    Both are shrunk to 32 pixels. The middle three quarters of the image, at three sizes and mirrored, are laid on every
    place of each other image; the correlation of colours, less where both are nearly flat, is that of the best fit.

    Args:
        image: uint8 (H, W, 3).
        others: uint8 (k, H, W, 3).

    Returns:
        float64 (k,), at most 1.
    """
    query, gallery = _shrunk(image[None], _SIDE), _shrunk(others, _SIDE)
    templates = []
    for size in _SIZES:
        shrunk = F.interpolate(query, (size, size), mode="bilinear", antialias=True)
        start = (size - _WINDOW) // 2
        middle = shrunk[:, :, start : start + _WINDOW, start : start + _WINDOW]
        templates += [middle, middle.flip(-1)]
    wanted = _standardized(torch.cat(templates).flatten(1))
    # One at a time, since all windows of an image are many numbers.
    best = [(wanted @ _standardized(F.unfold(one[None], _WINDOW)[0].T).T).max() for one in gallery]
    return torch.stack(best).double().numpy()


def _shrunk(images: NDArray[np.uint8], side: int) -> Tensor:
    """Return uint8 (B, H, W, 3) as float (B, 3, side, side) in [0, 1]."""
    floats = torch.from_numpy(np.ascontiguousarray(images)).movedim(-1, 1).float() / 255
    return F.interpolate(floats, (side, side), mode="bilinear", antialias=True)


def _standardized(rows: Tensor) -> Tensor:
    rows = rows - rows.mean(1, keepdim=True)
    return rows / (rows.norm(dim=1, keepdim=True) + _FLAT * rows.shape[1] ** 0.5)


def suspicion(ratios: ArrayLike, agreement: ArrayLike) -> Floats:
    """Return how much images look like copies, 0 for exact ones: the ratio times the root of what disagrees."""
    return np.asarray(ratios) * np.sqrt(1 - np.minimum(np.asarray(agreement), 1))
