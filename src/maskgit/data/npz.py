"""Reading arrays and images out of `.npz` files of unknown origin: nothing is unpickled, and sizes are checked first.

An `.npz` file is a zip of `.npy` files; a member's header says its type and shape before any of it is read.

Shapes: B batch, N images, H × W pixels.
"""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskgit.errors import DataError, MaskGITError
from maskgit.foundation.files import expand

MAX_SIDE = 4096
MAX_CLASSES = 1_000_000


class Header(NamedTuple):
    """What a member says of its array."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype[Any]

    @property
    def num_bytes(self) -> int:
        """Bytes of the whole array, in Python's unbounded integers."""
        total = self.dtype.itemsize
        for side in self.shape:
            total *= side
        return total


class Archive:
    """An open `.npz` file.

    Attributes:
        path: where it is.
        names: its arrays.
    """

    def __init__(self, path: Path, file: zipfile.ZipFile) -> None:
        self.path = path
        self._zip = file
        self.names = {name.removesuffix(".npy") for name in file.namelist() if name.endswith(".npy")}

    def header(self, name: str) -> Header:
        """Return what an array's header says, reading nothing else.

        Raises:
            DataError: there is no such array, or it holds Python objects.
        """
        with self._member(name) as (header, _):
            return header

    def read(self, name: str, max_bytes: int) -> NDArray[Any]:
        """Return an array of at most `max_bytes`.

        Raises:
            DataError: there is no such array, it is larger, or it holds Python objects.
        """
        with self._member(name) as (header, member):
            if header.num_bytes > max_bytes:
                raise DataError(
                    f"{self.path}: {name!r} has {header.num_bytes} bytes, more than the {max_bytes} that are "
                    "allowed: is it the right file?"
                )
            flat = np.frombuffer(_exactly(member, header.num_bytes), header.dtype)
            return flat.reshape(header.shape[::-1]).T if header.fortran else flat.reshape(header.shape)

    def rows(self, name: str, batch_size: int) -> Iterator[NDArray[Any]]:
        """Yield an array in pieces of `batch_size` rows, so that it may be larger than memory.

        Raises:
            DataError: there is no such array, or it cannot be read row by row.
        """
        with self._member(name) as (header, member):
            if header.fortran or not header.shape:
                raise DataError(f"{self.path}: {name!r} is not stored row by row: save it in C order.")
            row = header._replace(shape=header.shape[1:])
            for start in range(0, header.shape[0], batch_size):
                count = min(batch_size, header.shape[0] - start)
                data = _exactly(member, count * row.num_bytes)
                yield np.frombuffer(data, header.dtype).reshape(count, *row.shape)

    @contextmanager
    def _member(self, name: str) -> Iterator[tuple[Header, IO[bytes]]]:
        if name not in self.names:
            raise DataError(f"{self.path} lacks the array {name!r}: is it the right file?")
        with self._zip.open(f"{name}.npy") as member:
            version = np.lib.format.read_magic(member)
            if version == (1, 0):
                header = Header(*np.lib.format.read_array_header_1_0(member))
            elif version == (2, 0):
                header = Header(*np.lib.format.read_array_header_2_0(member))
            else:
                raise DataError(f"{self.path}: {name!r} has the .npy version {version}: save it again.")
            if header.dtype.hasobject or any(side < 0 for side in header.shape):
                raise DataError(f"{self.path}: {name!r} does not hold plain numbers: is it the right file?")
            yield header, member


def _exactly(member: IO[bytes], size: int) -> bytes:
    data = member.read(size)
    if len(data) != size:
        raise EOFError
    return data


@contextmanager
def open_npz(path: str | Path) -> Iterator[Archive]:
    """Open an `.npz` file for reading.

    Raises:
        DataError: there is no such file, or it is damaged or of another kind; also within the block.
    """
    path = expand(path)
    try:
        with zipfile.ZipFile(path) as file:
            yield Archive(path, file)
    except FileNotFoundError as error:
        raise DataError(f"{path} is not a file: check the path.") from error
    # What zipfile and NumPy raise of damaged, cut-off, encrypted or strangely compressed files.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, SyntaxError, OverflowError) as error:
        raise DataError(f"{path} is not an .npz file, or is damaged: fetch or make it again.") from error
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}. Check its permissions."
        ) from error
    except ValueError as error:
        if isinstance(error, MaskGITError):
            raise
        raise DataError(f"{path} holds an array that is damaged: fetch or make it again.") from error


@dataclass(frozen=True)
class SampleFile:
    """The images of an ADM sample or reference batch, read in pieces.

    Attributes:
        path: the `.npz` file, whose `arr_0` is uint8 (N, H, W, 3).
        num_images: N.
        resolution: (height, width) in pixels.
    """

    path: Path
    num_images: int
    resolution: tuple[int, int]

    def batches(self, batch_size: int = 64) -> Iterator[Tensor]:
        """Yield the images in order, float32 (B, 3, H, W) in [0, 1].

        Raises:
            DataError: the file is damaged or has been cut off.
        """
        with open_npz(self.path) as archive:
            for rows in archive.rows("arr_0", batch_size):
                yield torch.from_numpy(rows.transpose(0, 3, 1, 2).astype(np.float32) / 255)


def open_samples(path: str | Path) -> SampleFile:
    """Return the images of an ADM sample batch, of which nothing but the header is read yet.

    Args:
        path: an `.npz` file with `arr_0`, uint8 (N, H, W, 3).

    Raises:
        DataError: there is no such file, or it holds no such array.
    """
    with open_npz(path) as archive:
        header = archive.header("arr_0")
    shape = header.shape
    fits = len(shape) == 4 and shape[3] == 3 and shape[0] > 0 and all(1 <= s <= MAX_SIDE for s in shape[1:3])
    if not fits or header.dtype != np.uint8:
        raise DataError(
            f"{path}: 'arr_0' must be uint8 (N, H, W, 3), but is {header.dtype} of {shape}: "
            "is it the right file?"
        )
    return SampleFile(expand(path), shape[0], (shape[1], shape[2]))


def read_labels(path: str | Path, num_images: int) -> NDArray[np.int32]:
    """Return the classes of an ADM sample batch, int32 (N,), from `arr_1`; −1 for each image where it has none.

    Raises:
        DataError: `arr_1` does not hold a class number for each image.
    """
    with open_npz(path) as archive:
        if "arr_1" not in archive.names:
            return np.full(num_images, -1, np.int32)
        labels = archive.read("arr_1", 16 * num_images)
    if labels.shape != (num_images,) or labels.dtype.kind not in "iu":
        raise DataError(
            f"{path}: 'arr_1' must hold a class number for each of the {num_images:,} images, but is {labels.dtype} "
            f"of {labels.shape}: leave it out, or save the labels there."
        )
    if labels.min() < -1 or labels.max() >= MAX_CLASSES:
        raise DataError(
            f"{path}: 'arr_1' holds class numbers from {labels.min()} to {labels.max()}; they count from 0 to at "
            f"most {MAX_CLASSES - 1:,}."
        )
    return labels.astype(np.int32)
