"""Sources of images: their rows, still encoded, their classes, and how rows are decoded."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from maskgit.data.augment import resize_and_centre_crop
from maskgit.errors import DataError, ImageError
from maskgit.images.reading import read_image

MAX_CLASSES = 1_000_000
# The class of images without labels.
UNLABELLED = ("image",)
AUTO = "auto"
LABEL_COLUMNS = ("label", "labels", "cls", "class")
REMOTE = frozenset(("hf", "zip", "tar", "gzip"))

# The bytes of an image file, a path to one, or pixels, uint8 (H, W) or (H, W, 3).
Picture = bytes | Path | np.ndarray


class Unlabelled(NamedTuple):
    """The label of an image without a label, among images that have one.

    Attributes:
        reason: why, phrased to follow the image's name.
    """

    reason: str


@dataclass(frozen=True)
class Row:
    """One image of a source, still encoded.

    Attributes:
        value: the source's value for it.
        label: its class as a number or text, `Unlabelled`, or any other value in the source.
        name: its name in messages.
        local: whether its source is local, so that it may refer to local files.
    """

    value: Any
    label: Any
    name: str
    local: bool = False

    def picture(self) -> Picture:
        """Return the encoded picture, fetching it if it is remote.

        Raises:
            ImageError: the row holds no image.
            OSError: it cannot be fetched.
        """
        value = self.value
        if isinstance(value, Path):
            return value
        if isinstance(value, dict):
            value = value["bytes"] if value.get("bytes") is not None else value.get("path")
            if isinstance(value, str):
                return _fetch(value, self.local)
        if isinstance(value, list | np.ndarray):
            return _pixels(value)
        if isinstance(value, bytes):
            return value
        raise ImageError("it holds no image")

    def complaint(self, error: Exception) -> str:
        """Return why this row cannot be used, including its name."""
        text = str(error).rstrip(".")
        return text if self.name in text else f"{self.name}: {text}"


@dataclass(frozen=True)
class Source:
    """A data set that can be read repeatedly.

    Attributes:
        name: what it is, in words.
        class_names: the names of its integer labels, or None.
        read: yields the images of one shard, or of all for None, in a fixed order.
        num_shards: parts that can be read in parallel.
        files: the files it is read from: paths, or URLs on the Hub, which name the commit.
        of_pictures: whether each of these files is one image.
        left_out: a sentence for each reason why some files are not read.
    """

    name: str
    class_names: tuple[str, ...] | None
    read: Callable[[int | None], Iterator[Row]]
    num_shards: int = 1
    files: tuple[str, ...] = ()
    of_pictures: bool = False
    left_out: tuple[str, ...] = ()

    def rows(self, shard: int | None = None) -> Iterator[Row]:
        """Yield the images of one shard or of all, once, from the beginning."""
        return self.read(shard)


class Wanted(NamedTuple):
    """What to read of a source; see `sources.open_source`."""

    split: str | None
    config: str | None
    image_column: str
    label_column: str | None


class ClassNumbers:
    """Maps the labels of rows to classes."""

    def __init__(self, class_names: Sequence[str] | None) -> None:
        """Take the class names, or None if text labels have no numbers yet."""
        self._numbers: dict[str, int] | None = None
        self._limit = MAX_CLASSES
        if class_names is not None:
            self._limit = len(class_names)
            # For equal names, the first counts.
            self._numbers = {name: i for i, name in reversed(list(enumerate(class_names)))}

    def of(self, row: Row) -> int | str:
        """Return a row's class: a number, or text if class names are not known.

        Raises:
            ImageError: the row has no label, or its label is not a class.
        """
        label = row.label
        if isinstance(label, Unlabelled):
            raise ImageError(label.reason)
        if isinstance(label, str):
            if self._numbers is None:
                return label
            if label in self._numbers:
                return self._numbers[label]
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < self._limit:
            raise ImageError(
                f"its label is {label!r}, which is neither a class name nor a class number below {self._limit:,}"
            )
        return label


def decode(picture: Picture) -> Image.Image:
    """Return a picture in RGB.

    Raises:
        ImageError: it cannot be read.
    """
    return Image.fromarray(picture).convert("RGB") if isinstance(picture, np.ndarray) else read_image(picture)


def decode_square(picture: Picture, size: int) -> tuple[np.ndarray, bool]:
    """Return a picture's middle square, uint8 (S, S, 3), and whether it had to be enlarged.

    Raises:
        ImageError: it cannot be read.
    """
    image = decode(picture)
    return np.asarray(resize_and_centre_crop(image, size)), min(image.size) < size


def check_share(
    name: str, total: int, skipped: Sequence[str], max_bad_share: float, *, num_skipped: int | None = None
) -> None:
    """Refuse a source of which too many images are bad.

    Args:
        name: the source's.
        total: how many images it has.
        skipped: a sentence for each bad one, or for the first of them.
        max_bad_share: the largest share that is allowed.
        num_skipped: how many are bad, where not all are listed.

    Raises:
        DataError: more than the allowed share are bad, or all.
    """
    num_skipped = len(skipped) if num_skipped is None else num_skipped
    if num_skipped == total or num_skipped > max_bad_share * total:
        listed = "; ".join(skipped[:5]) + ("; …" if num_skipped > 5 else "")
        raise DataError(
            f"{num_skipped:,} of the {total:,} images of {name} cannot be used, more than the allowed share of "
            f"{max_bad_share:g}: {listed}. Mend or remove them, or allow a larger share."
        )


def pick_column(
    what: str, wanted: str, usual: Iterable[str], columns: list[str], name: str, flag: str
) -> str:
    """Return the column that holds images or labels; see `Columns.find`."""
    found = next((column for column in usual if column in columns), None) if wanted == AUTO else wanted
    if found not in columns:
        lacking = f"no column of {what}" if found is None else f"no column {wanted!r}"
        hint = "" if what == "images" else ", or none to give all images one class"
        raise DataError(
            f"{name} has {lacking}. Its columns are: {', '.join(columns)}. Name one with {flag}{hint}."
        )
    assert found is not None
    return found


def _fetch(path: str, local: bool) -> Picture:
    """Return a file named by `datasets`: a local path, or a file on the Hub or in an archive there."""
    kinds = {part.split("://")[0] for part in path.split("::") if "://" in part}
    # A row may contain any URL, and must not make this machine fetch it.
    if not kinds <= REMOTE:
        raise ImageError(f"it refers to {path}, which is not fetched")
    # Another person's data set must not pull in private pictures of this machine.
    if not local and not path.split("::")[-1].startswith("hf://"):
        raise ImageError(f"it refers to {path}, a local file that is not part of the data set")
    if not kinds:
        return Path(path)
    import fsspec  # type: ignore[import-untyped]

    with fsspec.open(path, "rb") as file:
        return file.read()


def _pixels(value: list | np.ndarray) -> np.ndarray:
    """Return the pixels of an array column, uint8 (H, W) or (H, W, 3)."""
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ImageError("its rows differ in length") from error
    if array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)) or array.size == 0:
        raise ImageError(f"its shape is {array.shape}, not (H, W) or (H, W, 3)")
    if array.dtype.kind not in "iu" or array.min() < 0 or array.max() > 255:
        raise ImageError("its values are not whole numbers from 0 to 255")
    return array.astype(np.uint8)
