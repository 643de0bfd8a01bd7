"""Where images come from: folders, Parquet, WebDataset tars, IDX files and the hub, as one stream of rows."""

import glob
import itertools
import json
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from maskgit.config import check_choice
from maskgit.errors import ConfigError, DataError, ImageError, MaskGITError
from maskgit.training.idx import SPLITS, find_idx, read_idx

if TYPE_CHECKING:
    from datasets import IterableDataset

AUTO = "auto"
IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "cls", "class")
IMAGE_SUFFIXES = frozenset((
    ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".pnm", ".tif", ".tiff", ".webp",
))  # fmt: skip
# What `datasets` calls the readers of each kind of file.
READERS = {".parquet": "parquet", ".tar": "webdataset"}
# A Parquet file is otherwise read a row group at a time, which may be all of it.
OPTIONS = {"parquet": {"batch_size": 256}}
REMOTE = frozenset(("hf", "zip", "tar", "gzip"))
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

MAX_CLASSES = 1_000_000
# The class of images without labels.
UNLABELLED = ("image",)
T = TypeVar("T")

# Bytes of an image file, a path to one, or pixels, uint8 (H, W) or (H, W, 3).
Picture = bytes | Path | np.ndarray


@dataclass(frozen=True)
class Row:
    """One image of a source, not yet decoded.

    Attributes:
        value: what the source holds for it.
        label: its class as a number or as text, or whatever else the source holds.
        name: what to call it in a message.
        local: whether its source lies here, so that it may name files here.
    """

    value: Any
    label: Any
    name: str
    local: bool = False

    def picture(self) -> Picture:
        """Return what can be decoded, fetching it if it lies elsewhere.

        Raises:
            ImageError: the source holds no image here.
            OSError: it cannot be fetched.
        """
        value = self.value
        if isinstance(value, dict):
            value = value["bytes"] if value.get("bytes") is not None else value.get("path")
            if isinstance(value, str):
                return _fetch(value, self.local)
        if isinstance(value, list | np.ndarray):
            return _pixels(value)
        if isinstance(value, bytes):
            return value
        raise ImageError("there is no image")

    def complaint(self, error: Exception) -> str:
        """Return why this row cannot be used, with its name."""
        text = str(error).rstrip(".")
        return text if self.name in text else f"{self.name}: {text}"


@dataclass(frozen=True)
class Source:
    """A data set to be read once, from its beginning.

    Attributes:
        name: what it is, in words.
        rows: its images in a fixed order.
        class_names: the names of its integer labels, or None if it has none.
    """

    name: str
    rows: Iterable[Row]
    class_names: tuple[str, ...] | None


def class_number(row: Row, class_names: Sequence[str] | None) -> int | str:
    """Return a row's class: a number, or text where nothing says which number it has.

    Raises:
        ImageError: the row has no label, or one that is no class.
    """
    label = row.label
    if isinstance(label, str):
        if class_names is None:
            return label
        if label in class_names:
            return class_names.index(label)
    limit = MAX_CLASSES if class_names is None else len(class_names)
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < limit:
        raise ImageError(
            f"its label is {label!r}, which is no class name and no class number below {limit:,}"
        )
    return label


def open_source(
    source: str | Path,
    split: str | None = None,
    config: str | None = None,
    image_column: str = AUTO,
    label_column: str | None = AUTO,
) -> Source:
    """Open a data set for reading; see `ingest.pack_images` for the arguments.

    Raises:
        DataError: it is missing or empty, or lacks the split or a column.
    """
    path = Path(source)
    if path.is_dir() and any(find_idx(path, name) for name in SPLITS):
        return _open_idx(path, split or "train", label_column)
    stream = load_stream(source, split, config, folder_labels=label_column is not None)
    columns = Columns.find(stream.dataset, stream.name, image_column, label_column)
    names = columns.class_names or schema_names(source, columns)
    return Source(stream.name, read_rows(stream.dataset, columns, stream.name, stream.local), names)


def _open_idx(folder: Path, split: str, label_column: str | None) -> Source:
    check_choice("split", split, SPLITS)
    files = find_idx(folder, split)
    if files is None:
        raise DataError(f"{folder} lacks the IDX files of the split {split!r}.")
    rows = (
        Row(image, 0 if label_column is None else label, f"image {i}")
        for i, (image, label) in enumerate(read_idx(*files))
    )
    return Source(f"{folder} ({split})", rows, None if label_column is not None else UNLABELLED)


@dataclass(frozen=True)
class Columns:
    """Which columns of a stream hold the images and labels.

    Attributes:
        image: the column of images.
        label: the column of labels, or None if all images have class 0.
        class_names: the names that the stream itself gives for integer labels.
    """

    image: str
    label: str | None
    class_names: tuple[str, ...] | None

    @classmethod
    def find(cls, dataset: "IterableDataset", name: str, image: str, label: str | None) -> "Columns":
        """Find the columns, by name if one is asked for and by kind and usual names if it is "auto".

        Raises:
            DataError: there is no such column; those that there are are listed.
        """
        import datasets

        features = dataset.features or dict.fromkeys(_guard(name, lambda: next(iter(dataset), {})))
        pictures = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
        image = _pick("images", image, pictures + list(IMAGE_COLUMNS), list(features), name, "--image-column")
        if label is None:
            return cls(image, None, UNLABELLED)
        label = _pick("labels", label, LABEL_COLUMNS, list(features), name, "--label-column")
        kind = features[label]
        return cls(image, label, tuple(kind.names) if isinstance(kind, datasets.ClassLabel) else None)


@dataclass(frozen=True)
class Stream:
    """A data set opened for reading in parts, whose images are not decoded.

    Attributes:
        dataset: its rows.
        name: what it is, in words.
        files: what it is read from: paths, or addresses on the hub, which name the commit.
        of_pictures: whether each of these files is one image.
        local: whether it lies here, not on the hub.
    """

    dataset: "IterableDataset"
    name: str
    files: tuple[str, ...]
    of_pictures: bool
    local: bool


def load_stream(
    source: str | Path,
    split: str | None = None,
    config: str | None = None,
    folder_labels: bool = True,
    revision: str | None = None,
) -> Stream:
    """Open a folder, file, pattern or name on the hub as a stream whose images are not decoded.

    Args:
        source: what to open.
        split: which part; when None the only one, or "train".
        config: which configuration of a data set on the hub.
        folder_labels: whether the folders that hold pictures are classes.
        revision: a commit, tag or branch of a data set on the hub.

    Raises:
        ConfigError: what is not on the hub has no revision.
        DataError: it is missing, empty or unreadable, or has no such split.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            "Reading data sets needs the package `datasets`: pip install 'maskgit-torch[train]'."
        ) from error
    reader, options = _reader(source, folder_labels)
    local = bool(options)
    name = str(source) if local else f"{source} is no file or folder here, and on the hub it"
    if not local and str(datasets.config.HF_DATASETS_CACHE).startswith("~"):
        raise DataError(
            f"This user has no home folder to keep what is read of {source}; name a folder that can be written with "
            "the environment variable HF_HOME."
        )
    if revision is not None:
        if local:
            raise ConfigError(f"revision is for data sets on the hub, but {source} is a file or folder here.")
        options = {"revision": revision}
    # `datasets` makes a cache for every source, also for those that lie here and are never copied to it.
    with tempfile.TemporaryDirectory() if local else nullcontext() as cache:
        builder = _guard(
            name, lambda: datasets.load_dataset_builder(reader, config, cache_dir=cache, **options)
        )
        splits = _guard(name, builder.as_streaming_dataset)
    if split is None:
        split = next(iter(splits)) if len(splits) == 1 else "train"
    if split not in splits:
        raise DataError(f"{source} has no split {split!r}. Choose from: {', '.join(splits)}.")
    files = tuple(str(file) for file in (builder.config.data_files or {}).get(split, ()))
    return Stream(splits[split].decode(False), f"{source} ({split})", files, reader == "imagefolder", local)


def _reader(source: str | Path, folder_labels: bool) -> tuple[str, dict[str, Any]]:
    """Return the name under which `datasets` reads a source, and the settings for it."""
    path, text = Path(source), str(source)
    if path.is_dir():
        return _folder_reader(path, folder_labels)
    files = [text] if path.is_file() else sorted(glob.glob(text, recursive=True))
    suffixes = {Path(file).suffix.lower() for file in files}
    if files and len(suffixes) == 1 and suffixes <= READERS.keys():
        reader = READERS[suffixes.pop()]
        return reader, {"data_files": files, **OPTIONS.get(reader, {})}
    if files:
        raise DataError(
            f"{source} is of a kind that is not read here: give a folder of images, "
            f"or {', '.join(READERS)} files."
        )
    if _HUB_NAME.fullmatch(text) is None or text.count("/") > 1:
        raise DataError(f"{source} does not exist.")
    return text, {}


def _folder_reader(folder: Path, folder_labels: bool) -> tuple[str, dict[str, Any]]:
    suffixes: Counter[str] = Counter()
    homes = set()
    for home, _, names in os.walk(folder):
        found = [Path(name).suffix.lower() for name in names if not name.startswith(".")]
        suffixes.update(found)
        if not IMAGE_SUFFIXES.isdisjoint(found):
            homes.add(Path(home).relative_to(folder))
    for suffix, reader in READERS.items():
        if suffixes[suffix]:
            return reader, {"data_dir": str(folder), **OPTIONS.get(reader, {})}
    if not homes:
        kinds = ", ".join(READERS)
        raise DataError(f"{folder} is empty: it holds no images, and no {kinds} or IDX files.")
    options: dict[str, Any] = {"data_dir": str(folder)}
    # A single folder of pictures below the top is a class too, which `datasets` would not take for one.
    if not folder_labels:
        options["drop_labels"] = True
    elif len({home.name for home in homes}) == 1 and Path() not in homes:
        options["drop_labels"] = False
    return "imagefolder", options


def _fetch(path: str, local: bool) -> Picture:
    """Return a file that `datasets` names: a path here, or a place on the hub or in an archive there."""
    kinds = {part.split("://")[0] for part in path.split("::") if "://" in part}
    # A row may name any address, and must not make this machine fetch it.
    if not kinds <= REMOTE:
        raise ImageError(f"it lies at {path}, which is not fetched")
    # A row of someone else's must not make private pictures part of a data set.
    if not local and not path.split("::")[-1].startswith("hf://"):
        raise ImageError(f"it is said to be {path}, which is a file here, not one of the data set's")
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


def _pick(what: str, wanted: str, usual: Iterable[str], columns: list[str], name: str, flag: str) -> str:
    found = next((column for column in usual if column in columns), None) if wanted == AUTO else wanted
    if found not in columns:
        lacking = f"no column of {what}" if found is None else f"no column {wanted!r}"
        hint = "" if what == "images" else ", or none to give all images one class"
        raise DataError(
            f"{name} has {lacking}. Its columns are: {', '.join(columns)}. Name one with {flag}{hint}."
        )
    assert found is not None
    return found


def read_rows(dataset: "IterableDataset", columns: Columns, name: str, local: bool) -> Iterator[Row]:
    """Give the rows of a stream once, from its beginning.

    Args:
        dataset: the stream.
        columns: which of its columns to read.
        name: what it is, in words.
        local: whether it lies here, so that its rows may name files here.

    Raises:
        DataError: the stream breaks.
    """
    wanted = [columns.image] + ([columns.label] if columns.label is not None else [])
    if dataset.features is not None:
        # Read no column but these, and the samples' names that WebDataset gives.
        dataset = dataset.select_columns(wanted + [key for key in ("__key__",) if key in dataset.features])
    rows = iter(dataset)
    for number in itertools.count():
        row = _guard(name, lambda: next(rows, None))
        if row is None:
            return
        value = row.get(columns.image)
        label = 0 if columns.label is None else row.get(columns.label)
        path = row.get("__key__") or (value.get("path") if isinstance(value, dict) else None)
        yield Row(value, label, path or f"image {number}", local)


def schema_names(source: str | Path, columns: Columns) -> tuple[str, ...] | None:
    """Return the class names that a Parquet file's schema holds as `label_names`: JSON, or between commas."""
    path = Path(source)
    found = path.rglob("*.parquet") if path.is_dir() else map(Path, glob.glob(str(source), recursive=True))
    file = next(iter(sorted(found)), None)
    if columns.label is None or file is None or file.suffix.lower() != ".parquet":
        return None
    names = _guard(str(file), lambda: _read_names(file))
    return tuple(str(name).strip() for name in names) or None


def _read_names(file: Path) -> list[Any]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    metadata = pyarrow.parquet.read_schema(file).metadata or {}
    text = metadata.get(b"label_names", b"").decode()
    if text.startswith("["):
        return list(json.loads(text))
    return text.split(",") if text else []


def _guard(name: str, read: Callable[[], T]) -> T:
    """Return what `read` does, any failure beneath it told as a `DataError` that names the source."""
    try:
        return read()
    except MaskGITError:
        raise
    # The readers of a dozen formats and of the network lie beneath, and raise errors of any kind.
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise DataError(f"{name} cannot be read: {type(error).__name__}: {text}") from error
