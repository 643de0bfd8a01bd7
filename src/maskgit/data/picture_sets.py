"""Real images for evaluation, from wherever they lie: packed, in a folder, in an `.npz`, or in a stream.

Shapes: n images read, H × W pixels.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskgit.data.image_cache import META, ImageCache
from maskgit.data.npz import open_npz, open_samples, read_labels
from maskgit.data.rows import ClassNumbers, Row, Source, Unlabelled, decode, decode_square
from maskgit.data.rows import Picture as Encoded
from maskgit.data.sources import open_source
from maskgit.errors import DataError, ImageError
from maskgit.foundation.checks import check_range
from maskgit.foundation.download import sha256
from maskgit.foundation.files import expand
from maskgit.networks.classes import sort_names

# Threads that decode.
NUM_WORKERS = 4
MAX_BAD_SHARE = 0.01


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


def open_pictures(
    place: str | Path,
    *,
    split: str | None = None,
    size: int | None = None,
    max_bad_share: float = MAX_BAD_SHARE,
) -> Pictures:
    """Open a set of images by where it lies.

    Args:
        place: a folder that `maskgit pack` made, an `.npz` file of images, or what `maskgit pack` reads, where
            classes are optional.
        split: which part of a source that has several.
        size: crop the central square of each image and resize it to this many pixels a side, for a pack at most its
            own; None takes images as they are, which must then all have one size.
        max_bad_share: largest share of images that may be unreadable, in [0, 1].

    Raises:
        DataError: there is nothing, or nothing that can be read.
    """
    max_bad_share = check_range("max_bad_share", max_bad_share, 0, 1)
    path = expand(place)
    if (path / META).is_file() or path.suffix == ".npz":
        made: Pictures = PackedPictures(path, size) if path.is_dir() else NpzPictures(path)
        if split is not None:
            raise DataError(f"{path} has no split {split!r}, and no splits at all: name none.")
        if size is not None and made.resolution != (size, size):
            raise DataError(
                f"{path} holds images of {made.resolution[0]} × {made.resolution[1]} pixels, which are taken "
                f"as they are: leave --size out, or pack the source again with --size {size}."
            )
        return made
    text = str(path) if path.exists() else str(place)
    labelled = True
    try:
        source = open_source(text, split)
    except DataError:
        # It may be a set without labels, or none at all, which the second try then says.
        labelled = False
        source = open_source(text, split, label_column=None)
    return SourcePictures(text, split, source, labelled=labelled, size=size, max_bad_share=max_bad_share)


def open_fitting(place: str | Path, side: int, *, max_bad_share: float = MAX_BAD_SHARE) -> Pictures:
    """Open a set of images for a model of `side` pixels: larger ones are cut and resized as `maskgit pack` does.

    Raises:
        DataError: there is nothing, or nothing that can be read.
    """
    made = open_pictures(place, max_bad_share=max_bad_share)
    if made.resolution == (side, side) or min(made.resolution) < side:
        return made
    return open_pictures(place, size=side, max_bad_share=max_bad_share)


class PackedPictures:
    """A packed image cache, at its own size or a smaller one."""

    def __init__(self, path: Path, size: int | None = None) -> None:
        self._cache = ImageCache.open(path)
        self.name = str(path)
        self._size = self._cache.size if size is None else min(size, self._cache.size)
        self.fingerprint = self._cache.fingerprint
        if self._size != self._cache.size:
            described = json.dumps([self.fingerprint, self._size])
            self.fingerprint = hashlib.sha256(described.encode()).hexdigest()
        self.resolution = (self._size, self._size)
        self.num_classes = self._cache.num_classes
        self.class_names: tuple[str, ...] | None = self._cache.class_names
        self.left_out: tuple[str, ...] = ()
        # What could not be read was left out when it was packed.
        self.max_bad_share = 0.0

    def __len__(self) -> int:
        return len(self._cache)

    def read(self, numbers: Sequence[int]) -> Batch:
        chosen = np.asarray(numbers, np.int64)
        images = np.array(self._cache.images[chosen])
        if self._size != self._cache.size:
            small = [decode_square(image, self._size)[0] for image in images]
            images = np.array(small, np.uint8).reshape(-1, *self.resolution, 3)
        return Batch(images, self._cache.labels[chosen], chosen, [])

    def count_labels(self) -> NDArray[np.int64]:
        return np.bincount(self._cache.labels, minlength=self.num_classes)


class NpzPictures:
    """An `.npz` file of images in `arr_0`, and their classes in `arr_1` if it has them, read from its beginning."""

    def __init__(self, path: Path) -> None:
        self._file = open_samples(path)
        self.name = str(path)
        self.fingerprint = sha256(path)
        self.resolution = self._file.resolution
        self._labels = read_labels(path, self._file.num_images)
        self.num_classes = int(self._labels.max()) + 1
        self.class_names: tuple[str, ...] | None = None
        self.left_out: tuple[str, ...] = ()
        self.max_bad_share = 0.0
        self._rows: Iterator[NDArray[np.uint8]] | None = None
        self._next = 0

    def __len__(self) -> int:
        return self._file.num_images

    def read(self, numbers: Sequence[int]) -> Batch:
        images = []
        for number in numbers:
            if self._rows is None or number < self._next:
                self._rows, self._next = self._stream(), 0
            while self._next <= number:
                image = next(self._rows)
                self._next += 1
            images.append(image)
        chosen = np.asarray(numbers, np.int64)
        pixels = np.array(images, np.uint8).reshape(-1, *self.resolution, 3)
        return Batch(pixels, self._labels[chosen], chosen, [])

    def _stream(self) -> Iterator[NDArray[np.uint8]]:
        with open_npz(self._file.path) as archive:
            for rows in archive.rows("arr_0", 64):
                yield from rows

    def count_labels(self) -> NDArray[np.int64]:
        return np.bincount(self._labels[self._labels >= 0], minlength=self.num_classes)


@dataclass(frozen=True)
class _Decoder:
    """Turns encoded pictures of one size into pixels.

    Attributes:
        name: the set's, for messages.
        size: pixels a side that pictures are cut and resized to; None takes them as they are.
        resolution: (height, width) that all must have; None while it is not known.
    """

    name: str
    size: int | None
    resolution: tuple[int, int] | None = None

    def pixels(self, picture: Encoded) -> NDArray[np.uint8]:
        """Return a picture, uint8 (H, W, 3).

        Raises:
            ImageError: it cannot be read.
            DataError: it has another size than the rest.
        """
        if self.size is not None:
            return decode_square(picture, self.size)[0]
        array = np.asarray(decode(picture))
        found = (array.shape[0], array.shape[1])
        if self.resolution not in (None, found):
            assert self.resolution is not None
            raise DataError(
                f"{self.name} holds images of {self.resolution[0]} × {self.resolution[1]} and of {found[0]} "
                f"× {found[1]} pixels, but scores compare images of one size: bring them to one, with "
                "`--size N` of maskgit stats, compare or pack."
            )
        return array


def _find_resolution(decoder: _Decoder, pictures: Iterator[Encoded | None]) -> tuple[int, int]:
    """Return the size of the first picture that can be read."""
    tried = 0
    for picture in pictures:
        tried += 1
        try:
            if picture is not None:
                array = decoder.pixels(picture)
                return array.shape[0], array.shape[1]
        except (ImageError, OSError):
            continue
    raise DataError(
        f"{decoder.name} is empty: it has no images."
        if not tried
        else f"None of the {tried:,} images of {decoder.name} can be read: is it the right place?"
    )


class SourcePictures:
    """What training reads from its source: gone through once for its labels, then read by numbers.

    Pictures in a folder are read in any order, all else best in rising order.
    """

    def __init__(
        self,
        place: str,
        split: str | None,
        source: Source,
        *,
        labelled: bool,
        size: int | None,
        max_bad_share: float,
    ) -> None:
        self._source = source
        self.name, self.left_out, self.max_bad_share = source.name, source.left_out, max_bad_share
        rows: Iterable[Row] = source.rows()
        self._files: list[Row] | None = None
        if source.of_pictures:
            # In the order in which the fingerprints of before have them.
            rows = self._files = sorted(rows, key=lambda row: row.name.split(os.sep))
        names = source.class_names if labelled else None
        classes = ClassNumbers(names)
        found = [_class_of(row, classes) if labelled else -1 for row in rows]
        texts = sort_names({label for label in found if isinstance(label, str)})
        numbers = {text: number for number, text in enumerate(texts)}
        labels = [numbers[label] if isinstance(label, str) else label for label in found]
        self._labels = np.array(labels, np.int32)
        self.class_names: tuple[str, ...] | None = names or texts or None
        self.num_classes = len(self.class_names or ()) or int(self._labels.max(initial=-1)) + 1
        self.fingerprint = self._identify(place, split, size, texts)
        self._rows: Iterator[Row] | None = None
        self._next = 0
        decoder = _Decoder(self.name, size)
        self.resolution = _find_resolution(decoder, map(_picture, self._files or source.rows()))
        self._decoder = replace(decoder, resolution=self.resolution)

    def _identify(self, place: str, split: str | None, size: int | None, texts: tuple[str, ...]) -> str:
        """Return the SHA-256 of names, sizes and number of files; of classes too, where these are not as before."""
        described: list[Any]
        if self._files is not None:
            paths = [row.name for row in self._files]
            root = os.path.abspath(place)
            described = [[[os.path.relpath(path, root), os.path.getsize(path)] for path in paths], size]
            usual = sorted({os.path.basename(os.path.dirname(path)) for path in paths})
            names = list(self.class_names or ())
        else:
            files = [[file.name, file.stat().st_size] for file in sorted(_files(place))]
            described = [files or place, split, len(self._labels), size]
            usual, names = sorted(texts), list(texts)
        if names and names != usual:
            described += [names, self._labels.tolist()]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._labels)

    def read(self, numbers: Sequence[int]) -> Batch:
        rows = self._take(numbers) if self._files is None else [self._files[number] for number in numbers]
        with ThreadPoolExecutor(NUM_WORKERS) as pool:
            done = list(pool.map(self._decode, rows))
        return _batch(numbers, done, self._labels[np.asarray(numbers, np.int64)], self.resolution)

    def _take(self, numbers: Sequence[int]) -> list[Row]:
        rows = []
        for number in numbers:
            if self._rows is None or number < self._next:
                self._rows, self._next = self._source.rows(), 0
            while self._next <= number:
                row = next(self._rows)
                self._next += 1
            rows.append(row)
        return rows

    def _decode(self, row: Row) -> NDArray[np.uint8] | str:
        try:
            if isinstance(row.label, Unlabelled):
                raise ImageError(row.label.reason)
            return self._decoder.pixels(row.picture())
        except (ImageError, OSError) as error:
            return row.complaint(error)

    def count_labels(self) -> NDArray[np.int64]:
        return np.bincount(self._labels[self._labels >= 0], minlength=self.num_classes)


def _class_of(row: Row, classes: ClassNumbers) -> int | str:
    try:
        return classes.of(row)
    except ImageError:
        return -1


def _picture(row: Row) -> Encoded | None:
    try:
        return row.picture()
    except (ImageError, OSError):
        return None


def _files(place: str) -> list[Path]:
    path = Path(place)
    if path.is_dir():
        return [file for file in path.rglob("*") if file.is_file()]
    if path.is_file():
        return [path]
    try:
        return [file for file in Path().glob(place) if file.is_file()]
    except (NotImplementedError, ValueError, IndexError):
        return []


def _batch(
    numbers: Sequence[int],
    done: list[NDArray[np.uint8] | str],
    labels: NDArray[np.int32],
    resolution: tuple[int, int],
) -> Batch:
    good = [place for place, found in enumerate(done) if not isinstance(found, str)]
    images = np.array([done[place] for place in good], np.uint8).reshape(-1, *resolution, 3)
    skipped = [found for found in done if isinstance(found, str)]
    return Batch(images, labels[good], np.asarray(numbers, np.int64)[good], skipped)
