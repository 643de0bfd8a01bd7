"""Opening data sets of images: folders, Parquet files, WebDataset tars, IDX files and the Hugging Face Hub."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from maskgit.data import idx
from maskgit.data.folders import PictureFolder, describe, pick_split, read_folder, read_metadata, scan
from maskgit.data.huggingface import (
    OPTIONS,
    READERS,
    is_hub_name,
    open_stream,
    pattern_reader,
)
from maskgit.data.rows import AUTO, LABEL_COLUMNS, UNLABELLED, Row, Source, Unlabelled, Wanted, pick_column
from maskgit.errors import ConfigError, DataError
from maskgit.networks.classes import sort_names


def open_source(
    source: str | Path,
    split: str | None = None,
    config: str | None = None,
    image_column: str = AUTO,
    label_column: str | None = AUTO,
    revision: str | None = None,
) -> Source:
    """Open a data set for reading.

    Args:
        source: a folder, a file, a pattern of files, or a name on the Hub.
        split: which split, as the source names it; None means its only one, or "train".
        config: which configuration of a data set on the Hub.
        image_column: the column of images; "auto" finds it by its type or name.
        label_column: the column of labels; "auto" finds it by name, None gives all images class 0. In a folder
            of pictures it is "label", the folder that a picture is in, or a column of its metadata files.
        revision: a commit, tag or branch of a data set on the Hub.

    Raises:
        ConfigError: a revision of something that is not on the Hub.
        DataError: it is missing or empty, or lacks the split, a column or classes.
    """
    path, text = Path(source), str(source)
    reader = None if path.is_dir() else pattern_reader(text)
    local = path.is_dir() or reader is not None
    if revision is not None and local:
        raise ConfigError(
            f"revision applies to data sets on the Hub, but {source} is a local file or folder."
        )
    wanted = Wanted(split, config, image_column, label_column)
    if path.is_dir():
        return _open_folder(path, wanted)
    if reader is not None:
        return open_stream(text, *reader, wanted, local=True)
    if not is_hub_name(text):
        raise DataError(f"{source} does not exist.")
    return open_stream(text, text, {} if revision is None else {"revision": revision}, wanted, local=False)


def _open_folder(folder: Path, wanted: Wanted) -> Source:
    if any(idx.find_idx(folder, name) for name in idx.SPLITS):
        return _open_idx(folder, wanted)
    # The path may be relative, and the working directory may change while it is read.
    root = Path(os.path.abspath(folder))
    found = scan(root)
    for suffix, reader in READERS.items():
        files = [os.path.join(root, path) for path in found.ending_in(suffix)]
        if files:
            options = {"data_dir": str(folder), **OPTIONS.get(reader, {})}
            opened = open_stream(str(folder), reader, options, wanted, local=True, own_files=files)
            beside = describe(f"beside {suffix} files, which are read instead", found.pictures)
            return replace(opened, left_out=(*opened.left_out, *beside))
    here = read_folder(folder, found, wanted.split, labelled=wanted.label_column is not None)
    if not here.files:
        kinds, more = ", ".join(READERS), " ".join(here.left_out)
        raise DataError(
            f"{folder} is empty: it holds no images, and no {kinds} or IDX files. {more}".rstrip()
        )
    names, labels = _labels(here, read_metadata(root, found), wanted)
    paths = [os.path.join(root, file) for file in here.files]

    def read(shard: int | None) -> Iterator[Row]:
        for path, label in zip(paths, labels, strict=True):
            yield Row(Path(path), label, path, local=True)

    return Source(here.name, names, read, files=tuple(paths), of_pictures=True, left_out=here.left_out)


def _labels(
    here: PictureFolder, table: dict[str, dict[str, Any]], wanted: Wanted
) -> tuple[tuple[str, ...] | None, list[Any]]:
    """Return the class names and labels of a folder's pictures.

    Args:
        here: the folder.
        table: the rows of its metadata files, by picture.
        wanted: which columns hold images and labels.

    Raises:
        DataError: there is no such column, or no classes.
    """
    said = {column for row in table.values() for column in row}
    columns = ["image", *sort_names(said | {"label"})]
    pick_column("images", wanted.image_column, ["image"], ["image"], here.name, "--image-column")
    if wanted.label_column is None:
        return UNLABELLED, [0] * len(here.files)
    usual = [column for column in LABEL_COLUMNS if column in said] + ["label"]
    column = pick_column("labels", wanted.label_column, usual, columns, here.name, "--label-column")
    if column in said:
        missing = Unlabelled("no metadata file gives its label")
        labels = [table[file].get(column, missing) if file in table else missing for file in here.files]
        values = {row[column] for row in table.values() if column in row}
        return (sort_names(values) if all(isinstance(value, str) for value in values) else None), labels
    if max(here.labels) < 0:
        raise DataError(
            f"{here.name} holds pictures, but no class folders. Sort them into folders, such as "
            f"{here.root / 'cat'} and {here.root / 'dog'}, or give all images one class "
            "with --label-column none."
        )
    loose = Unlabelled("it is in none of the class folders")
    return here.class_names, [loose if label < 0 else label for label in here.labels]


def _open_idx(folder: Path, wanted: Wanted) -> Source:
    splits = [name for name in idx.SPLITS if idx.find_idx(folder, name)]
    split = pick_split(str(folder), wanted.split, splits)
    files = idx.find_idx(folder, split)
    assert files is not None
    labelled = wanted.label_column is not None

    def read(shard: int | None) -> Iterator[Row]:
        for i, (image, label) in enumerate(idx.read_idx(*files)):
            yield Row(image, label if labelled else 0, f"image {i}")

    return Source(f"{folder} ({split})", None if labelled else UNLABELLED, read, files=tuple(map(str, files)))
