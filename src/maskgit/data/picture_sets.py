"""Real images for evaluation, from wherever they lie: packed, in a folder, in an `.npz`, or in a stream.

Shapes: n images read, H × W pixels.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskgit.config import check_range
from maskgit.data.caches import META, ImageCache
from maskgit.data.npz import open_npz, open_samples
from maskgit.data.pack import decode_square
from maskgit.data.pictures import Batch, Pictures
from maskgit.data.sources import IMAGE_SUFFIXES, Row, class_number, open_source
from maskgit.data.sources import Picture as Encoded
from maskgit.download import sha256
from maskgit.errors import DataError, ImageError
from maskgit.files import expand
from maskgit.images import read_image

# Threads that decode.
NUM_WORKERS = 4
MAX_BAD_SHARE = 0.01


def open_pictures(
    place: str | Path,
    *,
    split: str | None = None,
    size: int | None = None,
    max_bad_share: float = MAX_BAD_SHARE,
) -> Pictures:
    """Open a set of images by where it lies.

    Args:
        place: a folder that `maskgit pack` made; a folder of pictures, of one class a sub folder or of none;
            an `.npz` file of images; or what `maskgit pack` reads: Parquet, WebDataset and IDX files, and
            names on the hub.
        split: which part of a source that has several.
        size: cut the middle square of each picture and resize it to so many pixels a side; None takes
            pictures as they are, which must then be of one size.
        max_bad_share: largest share of pictures that may be unreadable, in [0, 1].

    Raises:
        DataError: there is nothing, or nothing that can be read.
    """
    check_range("max_bad_share", max_bad_share, 0, 1)
    path = expand(place)
    if (path / META).is_file() or path.suffix == ".npz":
        made: Pictures = PackedPictures(path) if path.is_dir() else NpzPictures(path)
        if size is not None and made.resolution != (size, size):
            raise DataError(
                f"{path} holds images of {made.resolution[0]} × {made.resolution[1]} pixels, which are taken "
                f"as they are: leave --size out, or pack the source again with --size {size}."
            )
        return made
    loose = _loose_pictures(path) if path.is_dir() else []
    if loose:
        return FolderPictures(path, loose, size, max_bad_share)
    return StreamedPictures(str(place), split, size, max_bad_share)


class PackedPictures:
    """A packed image cache."""

    def __init__(self, path: Path) -> None:
        self._cache = ImageCache.open(path)
        self.name = str(path)
        self.fingerprint = self._cache.fingerprint
        self.resolution = (self._cache.size, self._cache.size)
        self.num_classes = self._cache.num_classes
        # What could not be read was left out when it was packed.
        self.max_bad_share = 0.0

    def __len__(self) -> int:
        return len(self._cache)

    def read(self, numbers: Sequence[int]) -> Batch:
        chosen = np.asarray(numbers, np.int64)
        return Batch(np.array(self._cache.images[chosen]), self._cache.labels[chosen], chosen, [])

    def count_labels(self) -> NDArray[np.int64]:
        return np.bincount(self._cache.labels, minlength=self.num_classes)


class NpzPictures:
    """An `.npz` file of images, which is read from its beginning."""

    def __init__(self, path: Path) -> None:
        self._file = open_samples(path)
        self.name = str(path)
        self.fingerprint = sha256(path)
        self.resolution = self._file.resolution
        self.num_classes = 0
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
        labels = np.full(len(images), -1, np.int32)
        return Batch(
            np.array(images, np.uint8).reshape(-1, *self.resolution, 3), labels, np.asarray(numbers), []
        )

    def _stream(self) -> Iterator[NDArray[np.uint8]]:
        with open_npz(self._file.path) as archive:
            for rows in archive.rows("arr_0", 64):
                yield from rows

    def count_labels(self) -> NDArray[np.int64]:
        return np.zeros(0, np.int64)


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
        if isinstance(picture, np.ndarray):
            array = np.asarray(Image.fromarray(picture).convert("RGB"))
        else:
            array = np.asarray(read_image(picture))
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


def _loose_pictures(folder: Path) -> list[Path]:
    """Return the pictures in a folder and below, unless it holds a data set of another kind."""
    found = []
    for path in sorted(folder.rglob("*")):
        suffix = path.suffix.lower()
        if suffix in (".parquet", ".tar"):
            return []
        if suffix in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file():
            found.append(path)
    return found


class FolderPictures:
    """Pictures in a folder; where all lie in sub folders, these are the classes."""

    def __init__(self, folder: Path, paths: list[Path], size: int | None, max_bad_share: float) -> None:
        self._paths = paths
        self.name, self.max_bad_share = str(folder), max_bad_share
        names = sorted({path.parent.name for path in paths})
        sorted_into_classes = all(path.parent != folder for path in paths)
        self.num_classes = len(names) if sorted_into_classes else 0
        self._labels = np.array(
            [names.index(path.parent.name) if sorted_into_classes else -1 for path in paths], np.int32
        )
        listed = [[path.relative_to(folder).as_posix(), path.stat().st_size] for path in paths]
        self.fingerprint = hashlib.sha256(json.dumps([listed, size]).encode()).hexdigest()
        self.resolution = _find_resolution(_Decoder(self.name, size), iter(paths))
        self._decoder = _Decoder(self.name, size, self.resolution)

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, numbers: Sequence[int]) -> Batch:
        with ThreadPoolExecutor(NUM_WORKERS) as pool:
            done = list(pool.map(self._decode, numbers))
        return _batch(numbers, done, self._labels[np.asarray(numbers, np.int64)], self.resolution)

    def _decode(self, number: int) -> NDArray[np.uint8] | str:
        try:
            return self._decoder.pixels(self._paths[number])
        except (ImageError, OSError) as error:
            text = str(error).rstrip(".")
            name = self._paths[number].name
            return text if name in text else f"{name}: {text}"

    def count_labels(self) -> NDArray[np.int64]:
        return np.bincount(self._labels[self._labels >= 0], minlength=self.num_classes)


class StreamedPictures:
    """What training reads as a stream: it is gone through once for its labels, then read in rising order."""

    def __init__(self, place: str, split: str | None, size: int | None, max_bad_share: float) -> None:
        self._place, self._split, self.max_bad_share = place, split, max_bad_share
        self._column: str | None = "auto"
        try:
            source = open_source(place, split)
        except DataError:
            # It may be a set without labels, or none at all, which the second try then says.
            self._column = None
            source = open_source(place, split, label_column=None)
        self.name = source.name
        labels: list[int | str] = []
        for row in source.rows:
            labels.append(-1 if self._column is None else self._label(row, source.class_names))
        texts = sorted({label for label in labels if isinstance(label, str)})
        numbers = [texts.index(label) if isinstance(label, str) else label for label in labels]
        self._labels = np.array(numbers, np.int32)
        known = source.class_names if self._column is not None else None
        self.num_classes = len(known or texts) or int(self._labels.max(initial=-1)) + 1
        files = [[file.name, file.stat().st_size] for file in sorted(_files(place))]
        described = [files or place, split, len(labels), size]
        self.fingerprint = hashlib.sha256(json.dumps(described).encode()).hexdigest()
        self._rows: Iterator[Row] | None = None
        self._next = 0
        self.resolution = _find_resolution(_Decoder(self.name, size), map(_picture, self._open()))
        self._decoder = _Decoder(self.name, size, self.resolution)

    def __len__(self) -> int:
        return len(self._labels)

    def _open(self) -> Iterator[Row]:
        return iter(open_source(self._place, self._split, label_column=self._column).rows)

    @staticmethod
    def _label(row: Row, class_names: tuple[str, ...] | None) -> int | str:
        try:
            return class_number(row, class_names)
        except ImageError:
            return -1

    def read(self, numbers: Sequence[int]) -> Batch:
        rows = []
        for number in numbers:
            if self._rows is None or number < self._next:
                self._rows, self._next = self._open(), 0
            while self._next <= number:
                row = next(self._rows)
                self._next += 1
            rows.append(row)
        with ThreadPoolExecutor(NUM_WORKERS) as pool:
            done = list(pool.map(self._decode, rows))
        return _batch(numbers, done, self._labels[np.asarray(numbers, np.int64)], self.resolution)

    def _decode(self, row: Row) -> NDArray[np.uint8] | str:
        try:
            return self._decoder.pixels(row.picture())
        except (ImageError, OSError) as error:
            return row.complaint(error)

    def count_labels(self) -> NDArray[np.int64]:
        return np.bincount(self._labels[self._labels >= 0], minlength=self.num_classes)


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
