"""What is chosen for people to look at: pictures of every class, a class a column, with what they are.

Shapes: N images of a data set, n of a sheet, H × W pixels.
"""

from typing import NamedTuple

import numpy as np
from torch import Tensor

from maskgit.data.batches import Shuffler, spread

MAX_COLUMNS = 8


class Sheet(NamedTuple):
    """Images laid out row by row.

    Attributes:
        images: float (n, 3, H, W) nominally in [0, 1].
        captions: a line for each.
        columns: images a row.
    """

    images: Tensor
    captions: tuple[str, ...]
    columns: int


def class_columns(classes: np.ndarray, seed: int, num_images: int) -> np.ndarray:
    """Return the class of each column of a sheet.

    Args:
        classes: int (C,), those to choose from, each once.
        seed: decides which, where there are more than columns.
        num_images: on the sheet.

    Returns:
        int64 (columns,), in rising order; a class may have several columns, each as many as the others.
    """
    width = min(MAX_COLUMNS, num_images)
    chosen = np.sort(classes[Shuffler(len(classes), seed).order(0)[:width]])
    return np.repeat(chosen.astype(np.int64), width // len(chosen))


def class_members(labels: np.ndarray, columns: np.ndarray, seed: int, num_images: int) -> np.ndarray:
    """Return images of a data set for a sheet whose columns are of given classes.

    Args:
        labels: int (N,), of the data set.
        columns: int (columns,), classes that have at least one image.
        seed: decides which images.
        num_images: n; the last row may be shorter.

    Returns:
        int64 (n,) in [0, N), row by row; where a class has too few images, they come again.
    """
    order = spread(labels, seed)
    waiting = {int(c): np.flatnonzero(labels[order] == c) for c in np.unique(columns)}
    used = dict.fromkeys(waiting, 0)
    members = []
    for i in range(num_images):
        own = int(columns[i % len(columns)])
        members.append(order[waiting[own][used[own] % len(waiting[own])]])
        used[own] += 1
    return np.array(members, np.int64)
