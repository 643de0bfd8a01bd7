"""Work cut into units that any number of processes share through a folder, without talking to each other.

    FOLDER/plan.json            all that decides the work's numbers
    FOLDER/unit-00000/          arrays.npz, more files if the work makes any, and manifest.json: their SHA-256
    FOLDER/unit-00001.lock      who makes the unit now; its time is renewed while that process lives

A unit is a pure function of the plan and its range of indices. It appears whole, by the renaming of its
folder, so that a process may be killed at any moment; two that make the same unit harm nobody, since the
second finds the first's in place and throws its own away. What has changed on the disk since is found by its
hash and made again.
"""

import hashlib
import io
import json
import os
import shutil
import socket
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from maskgit.errors import ConfigError, DataError
from maskgit.foundation.checks import check_range
from maskgit.foundation.files import expand, output_error, write_bytes

FORMAT = 1
PLAN, MANIFEST, ARRAYS = "plan.json", "manifest.json", "arrays.npz"
MAX_PLAN_BYTES = 2**26
# A lock whose time has not been renewed for so long was left by a process that is gone.
STALE_SECONDS = 300.0
POLL_SECONDS = 2.0

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

    def __init__(self, folder: str | Path, work: Work, *, stale_seconds: float = STALE_SECONDS) -> None:
        """Begin the folder, or go on with it.

        Args:
            folder: made if needed; each work needs its own.
            work: what is made.
            stale_seconds: the age at which another host's lock counts as left behind; above 0.

        Raises:
            ConfigError: the folder was begun with another plan.
            OutputError: it cannot be written.
        """
        check_range("stale_seconds", stale_seconds, 0.01, 1e6)
        self.folder = expand(folder)
        self.work = work
        self.stale_seconds = stale_seconds
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
        missing = list(range(len(self)))
        while True:
            missing = [number for number in missing if not self.done(number)]
            if report is not None:
                report(len(self) - len(missing), len(self))
            if not missing:
                return
            made, done = False, len(self) - len(missing)
            for number in missing:
                own = self._try(number)
                made = made or own
                done += own or self.done(number)
                if report is not None and made:
                    report(done, len(self))
            if not made:
                time.sleep(POLL_SECONDS)

    def mend(self, report: Callable[[int, int], None] | None = None) -> int:
        """Read all units, make those again that are not what was written, and return how many they were."""
        damaged = [number for number in range(len(self)) if not self._intact(number)]
        for number in damaged:
            self._discard(self.path(number))
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
        """Remove the locks and half-written folders that killed processes left, once all units are there."""
        for path in self.folder.iterdir():
            if path.name.startswith(".unit-"):
                shutil.rmtree(path, ignore_errors=True)
            elif path.name.endswith(".lock"):
                path.unlink(missing_ok=True)

    def _join(self) -> None:
        found = agree(self.folder / PLAN, self.plan)
        if found != self.plan:
            raise ConfigError(
                f"{self.folder} was begun with other settings ({_difference(found, self.plan)}): give those "
                "again to go on, or choose another folder."
            )

    def path(self, number: int) -> Path:
        """Return the folder of a unit."""
        return self.folder / f"unit-{number:05}"

    def _try(self, number: int) -> bool:
        """Make a unit unless another process does; return whether it was made."""
        with claim(self.folder / f"unit-{number:05}.lock", self.stale_seconds) as own:
            # It may have been finished between the look at the folder and the lock.
            if not own or self.done(number):
                return False
            if self.path(number).exists():
                # Only a unit that somebody took apart lacks its manifest.
                self._discard(self.path(number))
            began = time.perf_counter()
            made = self.work.make(*self.bounds(number))
            self._commit(number, made, round(time.perf_counter() - began, 3))
        return True

    def _commit(self, number: int, made: Made, seconds: float) -> None:
        path = self.path(number)
        temporary: Path | None = None
        try:
            temporary = Path(tempfile.mkdtemp(dir=self.folder, prefix=f".{path.name}."))
            # One inside it, for mkdtemp makes folders private.
            new = temporary / "new"
            new.mkdir()
            data = io.BytesIO()
            np.savez(data, **made.arrays)  # type: ignore[arg-type]
            contents = {ARRAYS: data.getvalue(), **made.files}
            for name, content in contents.items():
                (new / name).write_bytes(content)
            hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
            manifest = {"plan": self.digest, "files": hashes, "notes": made.notes, "seconds": seconds}
            (new / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
            new.rename(path)
        except OSError as error:
            # Another process has made the same unit meanwhile.
            if not self.done(number):
                raise output_error(path, error) from error
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)

    def _manifest(self, number: int) -> dict[str, Any] | None:
        try:
            manifest = json.loads((self.path(number) / MANIFEST).read_text("utf-8"))
            whole = manifest["plan"] == self.digest and ARRAYS in manifest["files"]
            return manifest if whole and isinstance(manifest["notes"], dict) else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
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

    def _discard(self, path: Path) -> None:
        """Take a unit's folder away in one step, so that no process sees half of it."""
        grave = Path(tempfile.mkdtemp(dir=self.folder, prefix=f".{path.name}."))
        try:
            if path.exists():
                path.rename(grave / "old")
        except OSError as error:
            raise output_error(path, error) from error
        finally:
            shutil.rmtree(grave, ignore_errors=True)


def agree(path: Path, value: Any) -> Any:
    """Store a JSON value, unless another process was first, and return the one that is stored.

    Raises:
        ConfigError: what is stored cannot be read.
        OutputError: the file cannot be written.
    """
    if not path.exists():
        # Written whole and then linked, which fails where another process was first.
        draft = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
        write_bytes(draft, json.dumps(value, indent=1).encode() + b"\n")
        try:
            with suppress(FileExistsError):
                os.link(draft, path)
        except OSError as error:
            raise output_error(path, error) from error
        finally:
            draft.unlink(missing_ok=True)
    try:
        return json.loads(path.read_text("utf-8")) if path.stat().st_size < MAX_PLAN_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: remove {path.parent} to begin anew.") from error


@contextmanager
def claim(lock: Path, stale_seconds: float = STALE_SECONDS) -> Iterator[bool]:
    """Hold a lock file during the block, if no living process holds it; yield whether it is held.

    A lock is left behind when its process on this host is gone, or when its time has not been renewed for
    `stale_seconds`. Two processes that find one at the same moment may both hold it: what is done under a
    lock must be harmless when it is done twice.
    """
    own = _create(lock)
    if not own and _left_behind(lock, stale_seconds):
        lock.unlink(missing_ok=True)
        own = _create(lock)
    if not own:
        yield False
        return
    over = threading.Event()

    def renew() -> None:
        while not over.wait(stale_seconds / 5):
            try:
                os.utime(lock)
            except OSError:
                return

    beating = threading.Thread(target=renew, daemon=True)
    beating.start()
    try:
        yield True
    finally:
        over.set()
        beating.join()
        lock.unlink(missing_ok=True)


def _create(lock: Path) -> bool:
    try:
        handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    except FileExistsError:
        return False
    except OSError as error:
        raise output_error(lock, error) from error
    with os.fdopen(handle, "w") as file:
        file.write(json.dumps({"host": socket.gethostname(), "process": os.getpid()}))
    return True


def _left_behind(lock: Path, stale_seconds: float) -> bool:
    try:
        if time.time() - lock.stat().st_mtime > stale_seconds:
            return True
        holder = json.loads(lock.read_text("utf-8"))
        if holder["host"] != socket.gethostname():
            return False
        # A lock of this very process's number was left by an earlier one, as where containers restart.
        return holder["process"] == os.getpid() or not _alive(int(holder["process"]))
    except FileNotFoundError:
        return True
    except (OSError, ValueError, KeyError, TypeError):
        # It is being written, or was when its process died: its age decides.
        return False


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _difference(found: Any, wanted: dict[str, Any]) -> str:
    """Say where two plans differ, the first three places."""
    if not isinstance(found, dict):
        return "its plan is damaged"
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
