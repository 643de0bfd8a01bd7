"""Folders of images: which files are images, which folders are splits and classes, and what is left out.

Subfolders are classes, unless the top-level folders are splits. File names carry no meaning. Hidden files are ignored;
everything else that is not read is counted and listed.
"""

import csv
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from maskgit.errors import DataError
from maskgit.networks.classes import sort_names

PICTURE_SUFFIXES = frozenset((
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm",
    ".pnm", ".tif", ".tiff", ".webp",
))  # fmt: skip
# Folders with these names, in upper or lower case, are splits; each name maps to the one it is a synonym of.
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
# What operating systems leave in folders, in lower case, besides names that begin with a dot.
JUNK = frozenset(("__macosx", "@eadir", "thumbs.db", "desktop.ini"))
METADATA = ("metadata.csv", "metadata.jsonl")
_LISTED = 10


class Scan(NamedTuple):
    """The contents of a folder and its subfolders, as sorted relative paths with /.

    Attributes:
        pictures: files with an image suffix.
        others: all other files.
        lost: what cannot be followed or opened, by reason.
    """

    pictures: list[str]
    others: list[str]
    lost: dict[str, list[str]]

    def ending_in(self, suffix: str) -> list[str]:
        """Return the other files with a suffix, in upper or lower case."""
        return [path for path in self.others if path.lower().endswith(suffix)]


def scan(folder: Path) -> Scan:
    """List a folder recursively, following links.

    Raises:
        DataError: the folder cannot be opened.
    """
    pictures: list[str] = []
    others: list[str] = []
    lost: defaultdict[str, list[str]] = defaultdict(list)
    # Folders to visit, each with its ancestors, by which a cyclic link is detected.
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while waiting:
        home, above = waiting.pop()
        try:
            about = os.stat(folder / home)
            if (about.st_dev, about.st_ino) in above:
                lost["a link back to a folder above it"].append(home.rstrip("/"))
                continue
            with os.scandir(folder / home) as found:
                entries = [entry for entry in found if not _is_junk(entry.name)]
        except OSError as error:
            if not home:
                raise DataError(f"{folder} cannot be opened: {error.strerror or error}.") from error
            lost[f"cannot be opened ({error.strerror or error})"].append(home.rstrip("/"))
            continue
        above |= {(about.st_dev, about.st_ino)}
        if home and not entries:
            lost["an empty folder"].append(home.rstrip("/"))
        for entry in entries:
            path = home + entry.name
            if _is(entry.is_dir):
                waiting.append((path + "/", above))
            elif not _is(entry.is_file):
                lost["a link to nothing, or not a regular file"].append(path)
            else:
                (pictures if os.path.splitext(path)[1].lower() in PICTURE_SUFFIXES else others).append(path)
    return Scan(sorted(pictures), sorted(others), {reason: sorted(lost[reason]) for reason in sorted(lost)})


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name.lower() in JUNK


def _is(asked: Any) -> bool:
    """Return the answer of a directory entry; a link to itself is neither file nor folder."""
    try:
        return bool(asked())
    except OSError:
        return False


@dataclass(frozen=True)
class PictureFolder:
    """The images of a folder, or of one of its splits.

    Attributes:
        name: its name, for messages.
        root: the folder.
        files: its images, as sorted paths with / relative to `root`.
        labels: their classes; −1 for those in no class folder.
        class_names: the classes of all splits; empty if no image is in a subfolder.
        left_out: a sentence for each reason why a file was not read, or a folder is not a class.
    """

    name: str
    root: Path
    files: tuple[str, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]
    left_out: tuple[str, ...]


def read_folder(
    folder: Path, found: Scan, split: str | None = None, *, labelled: bool = True
) -> PictureFolder:
    """Tell splits, classes and images apart.

    Args:
        folder: the folder.
        found: what `scan` found there.
        split: which split; None means the only one, or "train".
        labelled: whether subfolders are classes; if not, they may be splits without classes.

    Raises:
        DataError: there is no such split.
    """
    home, splits = _find_splits(found.pictures, sure=split is not None or not labelled)
    chosen = _choose_split(folder, split, splits, found.pictures)
    parts = {name: f"{home}{name}/" for name in splits}
    start = parts[chosen] if chosen is not None else ""
    files = [path for path in found.pictures if path.startswith(start)]
    # The classes of all splits, so that their numbers agree.
    beginnings = tuple(parts.values()) or ("",)
    everything = [
        path[len(beginning) :]
        for beginning in beginnings
        for path in found.pictures
        if path.startswith(beginning)
    ]
    level, repeated = _class_level(everything)
    names = sort_names({path.split("/")[level - 1] for path in everything if "/" in path})
    numbers = {name: number for number, name in enumerate(names)}
    labels = [
        numbers[path.split("/")[level - 1]] if "/" in path else -1
        for path in (file[len(start) :] for file in files)
    ]
    other_parts = tuple(part for name, part in parts.items() if name != chosen)
    return PictureFolder(
        str(folder) if chosen is None else f"{folder} ({chosen})",
        folder,
        tuple(files),
        tuple(labels),
        names,
        (*_left_out(found, other_parts), *repeated),
    )


def _find_splits(pictures: Sequence[str], *, sure: bool) -> tuple[str, tuple[str, ...]]:
    """Return the folder that holds splits, and their names; none if subfolders are classes.

    Args:
        pictures: paths.
        sure: whether folders named like splits are splits even if they hold only pictures.
    """
    home = ""
    while True:
        # For each folder, whether it has pictures in subfolders; and whether any folder has pictures of its own.
        nested: dict[str, bool] = {}
        direct = False
        for path in pictures:
            top, slash, rest = path[len(home) :].partition("/")
            if not slash:
                return "", ()
            nested[top] = nested.get(top, False) or "/" in rest
            direct = direct or "/" not in rest
        if nested and all(name.lower() in SPLITS for name in nested):
            ordered = tuple(name for split in SPLITS for name in sorted(nested) if name.lower() == split)
            return (home, ordered) if sure or any(nested.values()) else ("", ())
        if len(nested) != 1 or direct:
            return "", ()
        # A single folder that holds only folders is a wrapper.
        home += next(iter(nested)) + "/"


def _choose_split(
    folder: Path, split: str | None, splits: Sequence[str], pictures: Sequence[str]
) -> str | None:
    if not splits:
        if split is None:
            return None
        tops = sort_names({path.split("/")[0] for path in pictures if "/" in path})
        listed = ", ".join(tops[:5]) + (", …" if len(tops) > 5 else "")
        why = f"its folders ({listed}) are classes" if tops else "it holds only images"
        raise DataError(f"{folder} has no split {split!r}, and no splits at all: {why}. Leave the split out.")
    return pick_split(str(folder), split, splits)


def pick_split(name: str, split: str | None, splits: Sequence[str]) -> str:
    """Return the requested split, by name or synonym; None means the only one, or "train".

    Raises:
        DataError: there is no such split; the message lists the splits.
    """
    if split is None and len(splits) == 1:
        return splits[0]
    wanted = "train" if split is None else split
    if wanted in splits:
        return wanted
    same = [known for known in splits if _canonical(known) == _canonical(wanted)]
    if len(same) != 1:
        raise DataError(f"{name} has no split {wanted!r}. Choose from: {', '.join(splits)}.")
    return same[0]


def _canonical(split: str) -> str:
    return SPLITS.get(split.lower(), split)


def _class_level(paths: Iterable[str]) -> tuple[int, list[str]]:
    """Return how many levels down the class folders are, and a sentence if that may be surprising.

    It is the deepest level that all pictures in subfolders are below and at which no two folders have the same name:
    animals/cat and animals/dog are the classes cat and dog, and so are cat/indoor and dog/indoor.
    """
    homes = {path.rpartition("/")[0] for path in paths if "/" in path}
    parts = [home.split("/") for home in homes]
    level = min(map(len, parts), default=1)
    said: list[str] = []
    while level > 1:
        # The first folder of each name, and another that shares it.
        first: dict[str, str] = {}
        folders = sorted({"/".join(part[:level]) for part in parts})
        twice = next(
            (
                (one, folder)
                for folder in folders
                if (one := first.setdefault(_last(folder), folder)) != folder
            ),
            None,
        )
        if twice is None:
            break
        said = [
            f"Folders with the same name ({', '.join(twice)}) are not classes: the folders above them are."
        ]
        level -= 1
    return level, said


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def _left_out(found: Scan, elsewhere: tuple[str, ...]) -> Iterator[str]:
    """Yield a sentence for each reason why files are not read, except for files elsewhere."""
    others = [path for path in found.others if os.path.basename(path) not in METADATA]
    for reason, paths in (("not a supported image format", others), *found.lost.items()):
        yield from describe(reason, [path for path in paths if not path.startswith(elsewhere or ("\0",))])


def describe(reason: str, paths: Sequence[str]) -> list[str]:
    """Return a sentence that counts and lists what is left out for a reason; none if nothing is."""
    if not paths:
        return []
    listed = ", ".join(paths[:_LISTED]) + (", …" if len(paths) > _LISTED else "")
    return [f"Left out, {reason}: {len(paths):,} ({listed})."]


def read_metadata(folder: Path, found: Scan) -> dict[str, dict[str, Any]]:
    """Return the rows of `metadata.csv` and `metadata.jsonl` files by picture path; numbers are integers.

    Raises:
        DataError: a file is malformed, or has no file names.
    """
    table: dict[str, dict[str, Any]] = {}
    for path in found.others:
        if os.path.basename(path) not in METADATA:
            continue
        home = PurePosixPath(path).parent
        try:
            with open(folder / path, encoding="utf-8-sig", newline="") as file:
                rows = (
                    csv.DictReader(file)
                    if path.endswith(".csv")
                    else map(json.loads, filter(str.strip, file))
                )
                for row in rows:
                    name = row.pop("file_name")
                    table[(home / name).as_posix()] = {key: _number(value) for key, value in row.items()}
        except (OSError, ValueError, csv.Error, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{folder / path} is not a table of images with a column file_name: {error}. Repair or remove it."
            ) from error
    return table


def _number(value: Any) -> Any:
    return (
        int(value)
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 12
        else value
    )
