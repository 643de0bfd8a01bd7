"""Reading images and packing them into the cache that training reads.

A source is a folder (with a subfolder for each class, or Parquet files, WebDataset tars or IDX files), one such file, a
pattern of files, or the name of a data set on the Hub. It is read as a stream: memory stays bounded, nothing but the
cache is written, and an unreadable image is skipped.
"""

import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from maskgit.data.image_cache import MAX_SIDE, ImageCache, new_image_cache
from maskgit.data.rows import AUTO, MAX_CLASSES, ClassNumbers, Row, check_share, decode_square
from maskgit.data.sources import open_source
from maskgit.errors import DataError, ImageError
from maskgit.foundation.checks import check_count, check_range
from maskgit.foundation.files import expand
from maskgit.foundation.notes import bar
from maskgit.networks.classes import sort_names

_CHUNK = 256
_LISTED = 100


def pack_images(
    source: str | Path,
    out: str | Path,
    *,
    size: int,
    split: str | None = None,
    config: str | None = None,
    image_column: str = AUTO,
    label_column: str | None = AUTO,
    class_names: Sequence[str] | None = None,
    max_bad_share: float = 0.01,
    num_workers: int = 4,
    progress: bool = False,
) -> ImageCache:
    """Write every image of a data set, cropped to a square, into a folder.

    An image's shorter side is scaled to `size` and the centre is kept; an image of `size` × `size` pixels is kept
    exactly. To train on random crops, pack at a larger size. Images that cannot be read, or have no usable label, are
    skipped, counted and listed.

    Args:
        source: a folder, a file, a pattern of files, or a name on the Hub.
        out: the folder to make.
        size: pixels a side, S.
        split: which split, as the source names it; None means its only one, or "train".
        config: which configuration of a data set on the Hub.
        image_column: the column of images; "auto" finds it by its type or name.
        label_column: the column of labels; "auto" finds it by name, None gives all images class 0.
        class_names: names for integer labels, overriding those of the source.
        max_bad_share: largest share of images that may be skipped, in [0, 1].
        num_workers: decoding threads.
        progress: show a bar.

    Returns:
        The cache, opened.

    Raises:
        DataError: the source is missing, empty or without labels, or more than the allowed share is bad.
        OutputError: the folder exists or cannot be written. Whatever fails, nothing is left behind.
    """
    size = check_count("size", size, 1, MAX_SIDE)
    max_bad_share = check_range("max_bad_share", max_bad_share, 0, 1)
    num_workers = check_count("num_workers", num_workers, 1, 256)
    source = expand(source) if str(source).startswith("~") else source
    opened = open_source(source, split, config, image_column, label_column)
    names = opened.class_names if class_names is None else tuple(class_names)
    labels, classes = _Labels(names), ClassNumbers(names)
    with (
        new_image_cache(out, size) as writer,
        ThreadPoolExecutor(num_workers) as pool,
        bar(desc="packing", unit=" images", shown=progress) as shown,
    ):
        skipped: list[str] = []
        num_skipped = num_enlarged = 0
        rows = opened.rows()
        while chunk := list(itertools.islice(rows, _CHUNK)):
            done = list(pool.map(lambda row: _decode(row, size, classes), chunk))
            good = [found for found in done if isinstance(found, _Found)]
            bad = [reason for reason in done if isinstance(reason, str)]
            if good:
                writer.add(np.stack([found.pixels for found in good]))
                labels.add([found.label for found in good])
            num_enlarged += sum(found.enlarged for found in good)
            num_skipped += len(bad)
            skipped += bad[: _LISTED - len(skipped)]
            shown.update(len(chunk))
        total = writer.count + num_skipped
        if not total:
            raise DataError(f"{opened.name} is empty: it has no images.")
        check_share(opened.name, total, skipped, max_bad_share, num_skipped=num_skipped)
        writer.finish(
            *labels.finish(),
            source=opened.name,
            num_enlarged=num_enlarged,
            num_skipped=num_skipped,
            skipped=skipped,
            left_out=list(opened.left_out),
        )
    return ImageCache.open(out)


@dataclass(frozen=True)
class _Found:
    pixels: np.ndarray
    label: int | str
    enlarged: bool


def _decode(row: Row, size: int, classes: ClassNumbers) -> _Found | str:
    """Return the contents of a row, or why it is skipped."""
    try:
        label = classes.of(row)
        pixels, enlarged = decode_square(row.picture(), size)
    except (ImageError, OSError) as error:
        return row.complaint(error)
    return _Found(pixels, label, enlarged)


class _Labels:
    """The labels so far; text labels are numbered as they appear, and sorted at the end."""

    def __init__(self, names: tuple[str, ...] | None) -> None:
        self._names = names
        self._numbers: list[int] = []
        self._texts: dict[str, int] = {}

    def add(self, labels: Sequence[int | str]) -> None:
        """Add labels.

        Raises:
            DataError: numbers and text are mixed, or there are too many different labels.
        """
        for label in labels:
            if self._numbers and isinstance(label, str) != bool(self._texts):
                raise DataError(
                    f"Some labels are numbers and some are text, such as {label!r}: use one kind."
                )
            if isinstance(label, str):
                label = self._texts.setdefault(label, len(self._texts))
            self._numbers.append(label)
        if len(self._texts) > MAX_CLASSES:
            raise DataError(
                f"There are more than {MAX_CLASSES:,} different labels: this is not a column of classes."
            )

    def finish(self) -> tuple[np.ndarray, tuple[str, ...]]:
        """Return the labels, int64 (N,), and the class names."""
        labels = np.array(self._numbers, np.int64)
        if self._texts:
            names = sort_names(self._texts)
            new = np.empty(len(names), np.int64)
            new[[self._texts[name] for name in names]] = np.arange(len(names))
            return new[labels], names
        return labels, self._names or tuple(str(i) for i in range(labels.max() + 1))
