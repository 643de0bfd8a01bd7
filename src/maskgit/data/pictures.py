"""What evaluation asks of a set of real images, wherever it lies.

Shapes: n images read, H × W pixels.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskgit.errors import DataError


class Batch(NamedTuple):
    """Images that were read, without those that could not be.

    Attributes:
        images: uint8 (n, H, W, 3), RGB.
        labels: int32 (n,), each a class number, or −1 where the set has no classes.
        numbers: int64 (n,), which images of the set they are.
        skipped: a sentence for each image that could not be read.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int32]
    numbers: NDArray[np.int64]
    skipped: list[str]

    @property
    def floats(self) -> Tensor:
        """The images as float32 (n, 3, H, W) in [0, 1]."""
        return as_floats(self.images)


def as_floats(images: NDArray[np.uint8]) -> Tensor:
    """Return uint8 (n, H, W, 3) as float32 (n, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).movedim(-1, 1).float() / 255


class Pictures(Protocol):
    """A set of real images of one size, read by their numbers.

    Attributes:
        name: what it is, in words.
        fingerprint: SHA-256 in hexadecimal, of the content if it is packed or an .npz; else of the names and sizes
            of its files, by which a picture that was changed and kept its size is not noticed.
        resolution: (height, width) in pixels.
        num_classes: how many classes its labels are of; 0 where it has none.
        class_names: a name for each of them; None where there are none, or they have numbers alone.
        left_out: a sentence for each reason why something that lies there is not read.
        max_bad_share: the largest share of images that may be unreadable.
    """

    name: str
    fingerprint: str
    resolution: tuple[int, int]
    num_classes: int
    class_names: tuple[str, ...] | None
    left_out: tuple[str, ...]
    max_bad_share: float

    def __len__(self) -> int:
        """Return how many images there are, readable or not."""
        ...

    def read(self, numbers: Sequence[int]) -> Batch:
        """Return the images of some numbers, which rise.

        Raises:
            DataError: an image has another size than the rest, or the set cannot be read.
        """
        ...

    def count_labels(self) -> NDArray[np.int64]:
        """Return how many images each class has, int64 (num_classes,)."""
        ...


def check_share(name: str, total: int, skipped: Sequence[str], max_bad_share: float) -> None:
    """Raise a `DataError` if more of a set's `total` images could not be read than is allowed."""
    if len(skipped) == total or len(skipped) > max_bad_share * total:
        listed = "; ".join(skipped[:5]) + ("; …" if len(skipped) > 5 else "")
        raise DataError(
            f"{len(skipped):,} of the {total:,} images of {name} cannot be read, more than the allowed share "
            f"of {max_bad_share:g}: {listed}. Mend or remove them, or allow a larger share."
        )
