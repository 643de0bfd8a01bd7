"""Work cut into units that any number of processes share through a folder, without talking to each other.

    FOLDER/plan.json            all that decides the work's numbers
    FOLDER/unit-00000/          arrays.npz, more files if the work makes any, and manifest.json: their SHA-256
    FOLDER/unit-00001.lock      held by the process that makes the unit now; free as soon as that process is gone

A unit is a pure function of the plan and its range of indices. It appears whole, by the renaming of its
folder, so that a process may be killed at any moment. On a file system without locks, processes may make the
same unit twice, which does no harm: the first one's stays. Whatever has changed on the disk since is found by its
hash and made again.
"""

import hashlib
import io
import json
import secrets
import shutil
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from maskgit.errors import ConfigError, DataError, OutputError
from maskgit.foundation.devices import rank_and_world
from maskgit.foundation.files import expand, new_folder, output_error, read_json, write_bytes
from maskgit.foundation.locks import Busy, HeldError, give_up, locked, wait

FORMAT = 1
PLAN, MANIFEST, ARRAYS = "plan.json", "manifest.json", "arrays.npz"
MAX_PLAN_BYTES = 2**26

Arrays = dict[str, NDArray[Any]]


class Made(NamedTuple):
    """What a unit holds.

    Attributes:
        arrays: plain numbers by name.
        notes: JSON values that belong to it.
        files: further files by name.
    """

    arrays: Arrays
    notes: dict[str, Any]
    files: dict[str, bytes]


class Work(Protocol):
    """What can be cut into units.

    Attributes:
        plan: JSON values that decide every number; two works of equal plans make the same units.
        count: how many indices there are.
        unit_size: how many a unit holds; the last may hold fewer.
    """

    plan: dict[str, Any]
    count: int
    unit_size: int

    def make(self, first: int, stop: int) -> Made:
        """Return the unit of the indices first ≤ i < stop."""
        ...


class Units:
    """The units of one work in one folder."""

    def __init__(self, folder: str | Path, work: Work) -> None:
        """Begin the folder, or go on with it.

        Args:
            folder: made if needed; each work needs its own.
            work: what is made.

        Raises:
            ConfigError: the folder was begun with another plan.
            OutputError: it cannot be written.
        """
        self.folder = expand(folder)
        self.work = work
        plan = {"format": FORMAT, "count": work.count, "unit_size": work.unit_size, **work.plan}
        # Through JSON, so that it compares equal with what is read back.
        self.plan: dict[str, Any] = json.loads(json.dumps(plan))
        self.digest = hashlib.sha256(json.dumps(self.plan, sort_keys=True).encode()).hexdigest()
        self._join()

    def __len__(self) -> int:
        return -(-self.work.count // self.work.unit_size)

    def bounds(self, number: int) -> tuple[int, int]:
        """Return the first index of a unit and the one after its last."""
        first = number * self.work.unit_size
        return first, min(first + self.work.unit_size, self.work.count)

    def done(self, number: int) -> bool:
        """Return whether a unit is there; its content is not read."""
        return (self.path(number) / MANIFEST).is_file()

    def run(self, report: Callable[[int, int], None] | None = None) -> None:
        """Make units until all are there, waiting at last for those that other processes are making.

        Args:
            report: called with the numbers of units that are done and of all, whenever they may have changed.

        Raises:
            OutputError: a unit cannot be written; whatever `Work.make` raises.
        """
        rank, world = rank_and_world()
        total = len(self)
        tell = report or (lambda done, total: None)
        # Its own share first, so that processes seldom meet even where there are no locks.
        missing = sorted((n for n in range(total) if not self.done(n)), key=lambda n: n % world != rank)
        tell(total - len(missing), total)
        # What others are making is waited for at last, and made here if they were killed.
        for busy in (give_up, wait):
            left = [number for number in missing if not self.done(number)]
            done = total - len(left)
            for number in left:
                with suppress(HeldError):
                    self._make(number, busy)
                    done += 1
                    tell(done, total)
        tell(total, total)

    def mend(self, report: Callable[[int, int], None] | None = None) -> int:
        """Read all units, make those again that are not what was written, and return how many they were."""
        damaged = [number for number in range(len(self)) if not self._intact(number)]
        for number in damaged:
            self._discard(number)
        self.run(report)
        return len(damaged)

    def read(self, number: int) -> Made:
        """Return a unit's arrays and notes; its further files stay where they are.

        Raises:
            DataError: it is not there or has changed since it was written.
        """
        path = self.path(number)
        manifest = self._manifest(number)
        try:
            data = (path / ARRAYS).read_bytes()
            if manifest is None or hashlib.sha256(data).hexdigest() != manifest["files"][ARRAYS]:
                raise DataError(f"{path} is damaged: run the same command again, which makes it anew.")
            with np.load(io.BytesIO(data), allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        except (OSError, zipfile.BadZipFile, ValueError, KeyError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path} cannot be read: run the same command again.") from error
        return Made(arrays, manifest["notes"], {})

    def seconds(self) -> float:
        """Return how long all units took together, on whatever machines made them."""
        manifests = [self._manifest(number) for number in range(len(self))]
        return sum(float(manifest.get("seconds", 0)) for manifest in manifests if manifest is not None)

    def tidy(self) -> None:
        """Remove the locks and half-written folders left by processes that were killed, once all units are there."""
        for path in self.folder.iterdir():
            if path.name.startswith(".unit-"):
                shutil.rmtree(path, ignore_errors=True)
            elif path.name.endswith(".lock"):
                path.unlink(missing_ok=True)

    def _join(self) -> None:
        found = agree(self.folder / PLAN, lambda: self.plan)
        if found != self.plan:
            raise ConfigError(
                f"{self.folder} was begun with other settings ({_difference(found, self.plan)}): give those "
                "again to go on, or choose another folder."
            )

    def path(self, number: int) -> Path:
        """Return the folder of a unit."""
        return self.folder / f"unit-{number:05}"

    def _make(self, number: int, busy: Busy) -> None:
        """Make a unit unless it is there; `busy` says whether to wait while another process makes it."""
        with locked(self.folder / f"unit-{number:05}.lock", busy):
            # It may have been finished between the look at the folder and the lock.
            if self.done(number):
                return
            if self.path(number).exists():
                # Only a unit that somebody took apart lacks its manifest.
                self._discard(number)
            began = time.perf_counter()
            made = self.work.make(*self.bounds(number))
            self._commit(number, made, round(time.perf_counter() - began, 3))

    def _commit(self, number: int, made: Made, seconds: float) -> None:
        data = io.BytesIO()
        np.savez(data, **made.arrays)  # type: ignore[arg-type]
        contents = {ARRAYS: data.getvalue(), **made.files}
        hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        manifest = {"plan": self.digest, "files": hashes, "notes": made.notes, "seconds": seconds}
        contents[MANIFEST] = json.dumps(manifest, indent=1).encode() + b"\n"
        try:
            with new_folder(self.path(number)) as new:
                for name, content in contents.items():
                    (new / name).write_bytes(content)
        except OutputError:
            # Another process may have made the same unit meanwhile.
            if not self.done(number):
                raise

    def _manifest(self, number: int) -> dict[str, Any] | None:
        try:
            manifest = read_json(self.path(number) / MANIFEST, DataError)
            whole = manifest["plan"] == self.digest and ARRAYS in manifest["files"]
            return manifest if whole and isinstance(manifest["notes"], dict) else None
        except (DataError, KeyError, TypeError):
            return None

    def _intact(self, number: int) -> bool:
        manifest = self._manifest(number)
        if manifest is None:
            return False
        try:
            return all(
                hashlib.sha256((self.path(number) / name).read_bytes()).hexdigest() == digest
                for name, digest in manifest["files"].items()
            )
        except OSError:
            return False

    def _discard(self, number: int) -> None:
        """Take a unit's folder away in one step, so that no process sees half of it."""
        path = self.path(number)
        away = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            with suppress(FileNotFoundError):
                path.rename(away)
        except OSError as error:
            raise output_error(path, error) from error
        shutil.rmtree(away, ignore_errors=True)


def agree(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Store the JSON object that `make` returns unless one is there, and return the one that is stored.

    Raises:
        ConfigError: what is stored cannot be read.
        OutputError: the file cannot be written.
    """
    if not path.exists():
        try:
            write_bytes(path, json.dumps(make(), indent=1).encode() + b"\n", overwrite=False)
        except OutputError:
            # Another process was first.
            if not path.exists():
                raise
    remedy = f"Remove {path.parent} to begin anew."
    return read_json(path, ConfigError, limit=MAX_PLAN_BYTES, remedy=remedy)


def _difference(found: dict[str, Any], wanted: dict[str, Any]) -> str:
    """Say where two plans differ, the first three places."""
    places = []
    for key in sorted(found.keys() | wanted.keys()):
        old, new = found.get(key), wanted.get(key)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            inner = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
            places += [f"{key}.{k} {_short(old.get(k))}, not {_short(new.get(k))}" for k in inner]
        else:
            places.append(f"{key} {_short(old)}, not {_short(new)}")
    return "; ".join(places[:3]) + ("; …" if len(places) > 3 else "")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:59] + "…"
