"""IDX files, the format of MNIST and Fashion-MNIST, gzipped or not.

    four bytes: 0, 0, the type (8: uint8), the number of axes; each axis' length, big-endian uint32; the data

Source: LeCun, Cortes, Burges: The MNIST database of handwritten digits, "the IDX file format".
"""

import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

import numpy as np

from maskgit.errors import DataError

# What the files of each split are called.
SPLITS = {"train": "train", "test": "t10k"}
MAX_ITEM_BYTES = 1 << 26

Stream = gzip.GzipFile | BufferedReader


def find_idx(folder: Path, split: str) -> tuple[Path, Path] | None:
    """Return the image and label files of a split in a folder, or None."""
    prefix = SPLITS.get(split)
    found = []
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        names = (f"{prefix}-{kind}", f"{prefix}-{kind}.gz")
        file = next((folder / name for name in names if (folder / name).is_file()), None)
        if file is None:
            return None
        found.append(file)
    return found[0], found[1]


def read_idx(images: Path, labels: Path) -> Iterator[tuple[np.ndarray, int]]:
    """Yield each image, uint8 (H, W), with its label.

    Raises:
        DataError: a file has another format, is truncated or too long, or the two files differ in number.
    """
    counts = []
    for file, num_axes in ((images, 3), (labels, 1)):
        with _opened(file) as stream:
            counts.append(_shape(file, stream, num_axes)[0])
    if counts[0] != counts[1]:
        raise DataError(f"{images} holds {counts[0]:,} images, but {labels} holds {counts[1]:,} labels.")
    for image, label in zip(_items(images, 3), _items(labels, 1), strict=True):
        yield image, int(label)


def _items(file: Path, num_axes: int) -> Iterator[np.ndarray]:
    with _opened(file) as stream:
        count, *shape = _shape(file, stream, num_axes)
        size = math.prod(shape)
        for i in range(count):
            data = stream.read(size)
            if len(data) < size:
                raise DataError(f"{file} is truncated: it holds {i:,} of {count:,} items. Download it again.")
            yield np.frombuffer(data, np.uint8).reshape(shape)
        if stream.read(1):
            raise DataError(f"{file} has data after its {count:,} items: it is damaged. Download it again.")


@contextmanager
def _opened(file: Path) -> Iterator[Stream]:
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as stream:
            yield stream
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {error}. Download it again.") from error


def _shape(file: Path, stream: Stream, num_axes: int) -> tuple[int, ...]:
    head = stream.read(4)
    if len(head) < 4 or head[:3] != b"\0\0\x08" or head[3] != num_axes:
        raise DataError(f"{file} is not an IDX file of bytes with {num_axes} axes.")
    data = stream.read(4 * head[3])
    if len(data) < 4 * head[3]:
        raise DataError(f"{file} is truncated: its header is incomplete. Download it again.")
    shape = struct.unpack(f">{head[3]}I", data)
    if not shape or shape[0] == 0 or not 0 < math.prod(shape[1:]) <= MAX_ITEM_BYTES:
        raise DataError(f"{file} declares {shape[0]:,} items of shape {shape[1:]}, which is not allowed.")
    return shape
