"""Parquet files, WebDataset tars and data sets on the Hub, read by Hugging Face `datasets`."""

import glob
import itertools
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from maskgit.data.folders import describe, pick_split
from maskgit.data.rows import LABEL_COLUMNS, UNLABELLED, Row, Source, Wanted, pick_column
from maskgit.errors import DataError, MaskGITError, install_extra

if TYPE_CHECKING:
    from datasets import IterableDataset

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
# The names of the readers in `datasets` for each kind of file.
READERS = {".parquet": "parquet", ".tar": "webdataset"}
# By default a Parquet file is read by row groups, and one may be the whole file.
OPTIONS = {"parquet": {"batch_size": 256}}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
T = TypeVar("T")


@dataclass(frozen=True)
class Columns:
    """Which columns of a stream hold the images and labels.

    Attributes:
        image: the column of images.
        label: the column of labels, or None if all images have class 0.
        class_names: the stream's own names for integer labels.
    """

    image: str
    label: str | None
    class_names: tuple[str, ...] | None

    @classmethod
    def find(cls, dataset: "IterableDataset", name: str, image: str, label: str | None) -> "Columns":
        """Find the columns, by the given name, or for "auto" by type and usual names.

        Raises:
            DataError: there is no such column; the message lists the columns.
        """
        import datasets

        features = dataset.features or dict.fromkeys(guard(name, lambda: next(iter(dataset), {})))
        pictures = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
        image = pick_column(
            "images", image, pictures + list(IMAGE_COLUMNS), list(features), name, "--image-column"
        )
        if label is None:
            return cls(image, None, UNLABELLED)
        label = pick_column("labels", label, LABEL_COLUMNS, list(features), name, "--label-column")
        kind = features[label]
        return cls(image, label, tuple(kind.names) if isinstance(kind, datasets.ClassLabel) else None)


def open_stream(
    source: str,
    reader: str,
    options: dict[str, Any],
    wanted: Wanted,
    *,
    local: bool,
    own_files: Sequence[str] = (),
) -> Source:
    """Open files, or a data set on the Hub, as a stream of encoded images.

    Args:
        source: their name, for messages.
        reader: the name of the reader in `datasets`, and `options` its settings.
        wanted: what to read of them.
        local: whether they are local, so that rows may refer to local files.
        own_files: all local files to be read, from whose names `datasets` infers splits.

    Raises:
        DataError: it is missing, empty or unreadable, or has no such split or column.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"Reading data sets needs the package `datasets`: {install_extra('train')}."
        ) from error
    name = source if local else f"{source} is not a local file or folder, and on the Hub it"
    if not local and str(datasets.config.HF_DATASETS_CACHE).startswith("~"):
        raise DataError(
            f"This user has no home folder to cache {source} in; set the environment variable HF_HOME to a writable "
            "folder."
        )
    # `datasets` makes a cache for every source, even for local ones that are never copied to it.
    with tempfile.TemporaryDirectory() if local else nullcontext() as cache:
        builder = guard(
            name,
            lambda: datasets.load_dataset_builder(reader, wanted.config, cache_dir=cache, **options),
        )
        splits = guard(name, builder.as_streaming_dataset)
    parts = {str(part): tuple(map(str, files)) for part, files in (builder.config.data_files or {}).items()}
    left_out = _check_parts(source, own_files, parts, wanted.split)
    split = pick_split(source, wanted.split, list(splits))
    dataset, name = splits[split].decode(False), f"{source} ({split})"
    columns = Columns.find(dataset, name, wanted.image_column, wanted.label_column)

    def read(shard: int | None) -> Iterator[Row]:
        part = dataset if shard is None else dataset.shard(num_shards=dataset.num_shards, index=shard)
        return read_rows(part, columns, name, local)

    return Source(
        name,
        columns.class_names or schema_names(source, columns),
        read,
        dataset.num_shards,
        parts.get(split, ()),
        left_out=tuple(left_out),
    )


def _check_parts(
    source: str, files: Sequence[str], parts: dict[str, tuple[str, ...]], split: str | None
) -> list[str]:
    """Return a sentence about files that are in no split.

    Raises:
        DataError: there are some, and no split was requested.
    """
    known = {Path(file) for held in parts.values() for file in held}
    rest = [file for file in files if Path(file) not in known]
    if not rest:
        return []
    if split is None:
        raise DataError(
            f"Some files of {source} are named after splits ({', '.join(parts)}), but {rest[0]} is not. Choose a "
            f"split, or give the files by a pattern, such as '{source}/*{Path(rest[0]).suffix}', to read all."
        )
    return describe("in no split", rest)


def pattern_reader(source: str) -> tuple[str, dict[str, Any]] | None:
    """Return the reader for the files that match a path or pattern, and its settings; None if there are none.

    Raises:
        DataError: this kind of file is not supported.
    """
    files = [source] if Path(source).is_file() else sorted(glob.glob(source, recursive=True))
    suffixes = {Path(file).suffix.lower() for file in files}
    if files and len(suffixes) == 1 and suffixes <= READERS.keys():
        reader = READERS[suffixes.pop()]
        return reader, {"data_files": files, **OPTIONS.get(reader, {})}
    if files:
        raise DataError(
            f"{source} is not of a supported kind: give a folder of images, or {', '.join(READERS)} files."
        )
    return None


def is_hub_name(source: str) -> bool:
    """Return whether this can be the name of a data set on the Hub."""
    return _HUB_NAME.fullmatch(source) is not None and source.count("/") <= 1


def read_rows(dataset: "IterableDataset", columns: Columns, name: str, local: bool) -> Iterator[Row]:
    """Yield the rows of a stream once, from its beginning.

    Args:
        dataset: the stream.
        columns: which of its columns to read.
        name: its name, for messages.
        local: whether it is local, so that its rows may refer to local files.

    Raises:
        DataError: the stream breaks.
    """
    wanted = [columns.image] + ([columns.label] if columns.label is not None else [])
    if dataset.features is not None:
        # Read only these columns, and the sample names of WebDataset.
        dataset = dataset.select_columns(wanted + [key for key in ("__key__",) if key in dataset.features])
    rows = iter(dataset)
    for number in itertools.count():
        row = guard(name, lambda: next(rows, None))
        if row is None:
            return
        value = row.get(columns.image)
        label = 0 if columns.label is None else row.get(columns.label)
        path = row.get("__key__") or (value.get("path") if isinstance(value, dict) else None)
        yield Row(value, label, path or f"image {number}", local)


def schema_names(source: str | Path, columns: Columns) -> tuple[str, ...] | None:
    """Return the class names in a Parquet file's schema, `label_names`: JSON, or separated by commas."""
    path = Path(source)
    found = path.rglob("*.parquet") if path.is_dir() else map(Path, glob.glob(str(source), recursive=True))
    file = next(iter(sorted(found)), None)
    if columns.label is None or file is None or file.suffix.lower() != ".parquet":
        return None
    names = guard(str(file), lambda: _read_names(file))
    return tuple(str(name).strip() for name in names) or None


def _read_names(file: Path) -> list[Any]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    metadata = pyarrow.parquet.read_schema(file).metadata or {}
    text = metadata.get(b"label_names", b"").decode()
    if text.startswith("["):
        return list(json.loads(text))
    return text.split(",") if text else []


def guard(name: str, read: Callable[[], T]) -> T:
    """Return the result of `read`; any failure becomes a `DataError` that names the source."""
    try:
        return read()
    except MaskGITError:
        raise
    # Readers of a dozen formats and the network are involved, and raise errors of any kind.
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        raise DataError(f"{name} cannot be read: {type(error).__name__}: {text}") from error
