"""Folders of pictures: which files are pictures, which folders are splits and classes, and what is left out.

Sub folders are classes, unless the folders at the top are splits. Names of files say nothing. What is hidden is
passed over; whatever else is not read is counted and listed.
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
# Folders of these names are splits, in any case; what stands behind a name is what it is a synonym of.
SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
# What systems leave in folders, in lower case, beside names that begin with a dot.
JUNK = frozenset(("__macosx", "@eadir", "thumbs.db", "desktop.ini"))
METADATA = ("metadata.csv", "metadata.jsonl")
_LISTED = 10


class Scan(NamedTuple):
    """What lies in a folder and below, by paths with / that begin there, sorted.

    Attributes:
        pictures: files whose names end as a picture's do.
        others: all other files.
        lost: what cannot be followed or opened, by reason.
    """

    pictures: list[str]
    others: list[str]
    lost: dict[str, list[str]]

    def ending_in(self, suffix: str) -> list[str]:
        """Return the other files that end so, in any case."""
        return [path for path in self.others if path.lower().endswith(suffix)]


def scan(folder: Path) -> Scan:
    """Look through a folder, following links.

    Raises:
        DataError: the folder cannot be opened.
    """
    pictures: list[str] = []
    others: list[str] = []
    lost: defaultdict[str, list[str]] = defaultdict(list)
    # Folders to look into, each with those above it, by which a link that leads back is known.
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
                lost["a link that leads nowhere, or no file"].append(path)
            else:
                (pictures if os.path.splitext(path)[1].lower() in PICTURE_SUFFIXES else others).append(path)
    return Scan(sorted(pictures), sorted(others), {reason: sorted(lost[reason]) for reason in sorted(lost)})


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name.lower() in JUNK


def _is(asked: Any) -> bool:
    """Return what a directory entry answers; a link that leads to itself is nothing."""
    try:
        return bool(asked())
    except OSError:
        return False


@dataclass(frozen=True)
class PictureFolder:
    """The pictures of a folder, or of one split of it.

    Attributes:
        name: what it is, in words.
        root: the folder.
        files: its pictures, as paths with / that begin at `root`, sorted.
        labels: their classes; −1 for those that lie in no class folder.
        class_names: of all splits; none where no picture lies in a sub folder.
        left_out: a sentence for each reason why something was not read, or no class.
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
    """Tell splits, classes and pictures apart.

    Args:
        folder: the folder.
        found: what `scan` found there.
        split: which part; when None the only one, or "train".
        labelled: whether sub folders are to be classes; where not, they may be splits that hold none.

    Raises:
        DataError: there is no such split.
    """
    home, splits = _find_splits(found.pictures, sure=split is not None or not labelled)
    chosen = _choose_split(folder, split, splits, found.pictures)
    parts = {name: f"{home}{name}/" for name in splits}
    start = parts[chosen] if chosen is not None else ""
    files = [path for path in found.pictures if path.startswith(start)]
    # The classes of all splits, so that their numbers are the same in each.
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
    """Return the folder that holds splits, and their names; none where sub folders are classes.

    Args:
        pictures: paths.
        sure: whether folders with the names of splits are splits though all hold pictures alone.
    """
    home = ""
    while True:
        # Of each folder, whether pictures lie in folders of it, and whether some lie in it.
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
        # A folder alone, that holds nothing but folders, is the wrapping of what it holds.
        home += next(iter(nested)) + "/"


def _choose_split(
    folder: Path, split: str | None, splits: Sequence[str], pictures: Sequence[str]
) -> str | None:
    if not splits:
        if split is None:
            return None
        tops = sort_names({path.split("/")[0] for path in pictures if "/" in path})
        listed = ", ".join(tops[:5]) + (", …" if len(tops) > 5 else "")
        why = f"its folders ({listed}) are classes" if tops else "it holds pictures alone"
        raise DataError(f"{folder} has no split {split!r}, and no splits at all: {why}. Name none.")
    return pick_split(str(folder), split, splits)


def pick_split(name: str, split: str | None, splits: Sequence[str]) -> str:
    """Return the split that is meant: of that name, or a synonym; when None the only one, or "train".

    Raises:
        DataError: there is none; those that there are are listed.
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
    """Return how many folders down classes lie, and a sentence if that may surprise; those at the top have none.

    It is the deepest level of folders that all pictures lie below, and at which no two folders have one name:
    animals/cat and animals/dog are cats and dogs, but cat/indoor and dog/indoor are too.
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
        said = [f"Folders of one name ({', '.join(twice)}) are no classes: the folders above them are."]
        level -= 1
    return level, said


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def _left_out(found: Scan, elsewhere: tuple[str, ...]) -> Iterator[str]:
    """Give a sentence for each reason why something is not read, but for what lies elsewhere."""
    others = [path for path in found.others if os.path.basename(path) not in METADATA]
    for reason, paths in (("no picture of a format that is read", others), *found.lost.items()):
        yield from describe(reason, [path for path in paths if not path.startswith(elsewhere or ("\0",))])


def describe(reason: str, paths: Sequence[str]) -> list[str]:
    """Return the sentence that counts and lists what is left out for a reason; none where nothing is."""
    if not paths:
        return []
    listed = ", ".join(paths[:_LISTED]) + (", …" if len(paths) > _LISTED else "")
    return [f"Left out, {reason}: {len(paths):,} ({listed})."]


def read_metadata(folder: Path, found: Scan) -> dict[str, dict[str, Any]]:
    """Return what `metadata.csv` and `metadata.jsonl` files say of pictures, by path; numbers are integers.

    Raises:
        DataError: a file is not of its format, or names no files.
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
                f"{folder / path} is not a table of pictures with a column file_name: {error}. Mend or remove it."
            ) from error
    return table


def _number(value: Any) -> Any:
    return (
        int(value)
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 12
        else value
    )
