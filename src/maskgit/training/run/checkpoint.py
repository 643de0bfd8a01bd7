"""A run's own checkpoints: whole or absent, resumed exactly, the oldest removed.

    run_dir/checkpoints/step-00001000/    written by torch.distributed.checkpoint, one part a process
    run_dir/checkpoints/step-00001000/COMMITTED    written last: {"step", "score", "files": {name: bytes}}

A folder without its marker is the rest of a save that was cut short, and counts for nothing.

torch.distributed.checkpoint pickles its metadata: read only run directories of your own. The weights that
travel are written by `maskgit.hub`.
"""

import errno
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful

from maskgit.errors import CheckpointError, OutputError
from maskgit.foundation.files import output_error

T = TypeVar("T")
FOLDER, MARKER = "checkpoints", "COMMITTED"


class Committed(NamedTuple):
    """A checkpoint that is whole."""

    step: int
    score: float | None
    path: Path


class ModelAndOptimizer:
    """A network with its optimizers as one `Stateful`, named by parameter, sharded or not."""

    def __init__(self, model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizers = optimizers

    def state_dict(self) -> dict[str, Any]:
        """Return both states; an optimizer that has not stepped yet gets its zeros first."""
        model, optimizer = get_state_dict(self.model, self.optimizers)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set both states; what the config or the present device says of the optimizer stays."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, saved in zip(groups, state["optimizer"]["param_groups"], strict=True):
            saved |= {name: group[name] for name in ("fused", "foreach", "weight_decay") if name in group}
        set_state_dict(
            self.model,
            self.optimizers,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )


class Checkpoints:
    """The checkpoints of one run directory."""

    def __init__(
        self, run_dir: str | Path, *, keep_last: int = 2, keep_best: int = 0, asynchronous: bool = False
    ) -> None:
        """Describe them; nothing is read or written yet.

        Args:
            run_dir: the run's folder.
            keep_last: how many of the newest stay, at least one.
            keep_best: how many with the highest score stay besides.
            asynchronous: whether `save` returns once the state is copied, and a thread writes it. All
                processes must make this object then, for they make a process group of their own.
        """
        self.folder = Path(run_dir) / FOLDER
        self.keep_last = max(1, keep_last)
        self.keep_best = keep_best
        self._parallel = dist.is_available() and dist.is_initialized()
        self._is_main = not self._parallel or dist.get_rank() == 0
        self._thread: ThreadPoolExecutor | None = None
        self._group: dist.ProcessGroup | None = None
        self._pending: Future[Any] | None = None
        # Where to say that a checkpoint could not be written while an older one stands; None raises then too.
        self.report: Callable[[str], None] | None = None
        # A single process is a single process. For good, and not around each call: the filters belong to the whole
        # process, and a thread that set them back would set back what others did meanwhile.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        if asynchronous:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
            # Its collectives run beside the training's, so they need a group of their own.
            self._group = dist.new_group(backend="gloo") if self._parallel else None

    def save(self, step: int, state: Mapping[str, Any], score: float | None = None) -> Path | None:
        """Write a checkpoint, then remove those that are no longer to be kept; all processes call it.

        One that cannot be written is removed, for its rest would keep a full disk full.

        Args:
            step: training steps done; a step that is already there is left as it is.
            state: nested dicts of tensors, plain values and `Stateful`s (objects with `state_dict` and
                `load_state_dict`). What is not sharded must be the same on all processes.
            score: higher is better; only `keep_best` reads it.

        Returns:
            The checkpoint's folder; None if it could not be written, which `report` was told.

        Raises:
            OutputError: it cannot be written, the ones before it are untouched, and there is none, or no `report`.
        """
        self._tell(self.wait)
        path = self.folder / f"step-{step:08d}"
        if any(found.path == path for found in self.committed()):
            return path
        return self._tell(lambda: self._save(step, path, state, score))

    def _save(self, step: int, path: Path, state: Mapping[str, Any], score: float | None) -> Path:
        self._on_main(path, self._sweep)
        # Not overwritten in place: the folder is fresh, so that a cut-off save leaves nothing that looks whole.
        writer = dcp.FileSystemWriter(path, single_file_per_rank=True, sync_files=True, overwrite=False)
        options: dict[str, Any] = {"storage_writer": writer, "no_dist": not self._parallel}
        expanded = _expand(state)
        needed = _num_bytes(expanded)
        self._on_main(path, lambda: _check_room(path, needed))
        if self._thread is None:
            try:
                _guard(path, lambda: dcp.save(expanded, **options))
                self._on_main(path, lambda: self._commit(step, path, score))
            except OutputError as error:
                self._on_main(path, lambda: shutil.rmtree(path, ignore_errors=True))
                raise _with_room(error, path, needed) from error
            return path
        written = _guard(path, lambda: dcp.async_save(expanded, process_group=self._group, **options))
        future = written if isinstance(written, Future) else written.upload_completion

        def finish() -> None:
            try:
                # The main process's future is done only after every process has written its part.
                _guard(path, future.result)
                if self._is_main:
                    _guard(path, lambda: self._commit(step, path, score))
            except OutputError as error:
                if self._is_main:
                    shutil.rmtree(path, ignore_errors=True)
                raise _with_room(error, path, needed) from error

        self._pending = self._thread.submit(finish)
        return path

    def wait(self) -> None:
        """Wait until the last save is whole; all processes call it.

        Raises:
            OutputError: it could not be written, by whichever process.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        failures: list[OutputError | None] = [None]
        try:
            pending.result()
        except OutputError as error:
            failures = [error]
        if self._parallel:
            # One process alone that raised would leave the others waiting for it in their next exchange.
            own, failures = failures[0], [None] * dist.get_world_size()
            dist.all_gather_object(failures, own, group=self._group)
        for failure in failures:
            if failure is not None:
                raise failure

    def close(self) -> None:
        """Wait for the last save, then end the thread that writes and its group; all processes call it."""
        try:
            self._tell(self.wait)
        finally:
            if self._thread is not None:
                self._thread.shutdown()
            if self._group is not None:
                dist.destroy_process_group(self._group)
                self._group = None

    def latest(self) -> Path | None:
        """Return the newest checkpoint that is whole, or None."""
        committed = self.committed()
        return committed[-1].path if committed else None

    def committed(self) -> list[Committed]:
        """Return all checkpoints that are whole, by step."""
        found = [_read_marker(path) for path in sorted(self.folder.glob("step-*"))]
        return sorted((entry for entry in found if entry is not None), key=lambda entry: entry.step)

    def best(self) -> Committed | None:
        """Return the whole checkpoint of the highest score, or None where none has a score."""
        scored = [entry for entry in self.committed() if entry.score is not None]
        return max(scored, key=lambda entry: (entry.score, entry.step), default=None)

    def load(self, path: Path, state: Mapping[str, Any], *, newer: tuple[str, ...] = ()) -> dict[str, Any]:
        """Read a checkpoint into tensors and `Stateful`s that are there; all processes call it.

        Args:
            path: a folder that `latest` returned.
            state: of the structure that was saved, or a part of it. Tensors are filled in place and `Stateful`s
                loaded.
            newer: names in `state` that the checkpoint may lack, in whole or in part, because settings were changed
                or an older version wrote it; what is lacking stays as it is.

        Returns:
            The state, with the plain values that were saved in place of those given.

        Raises:
            CheckpointError: it is damaged, or is of another structure.
        """
        if _read_marker(path) is None:
            raise CheckpointError(
                f"{path} is incomplete or damaged. Remove it; the run goes on from the one before."
            )
        expanded = _expand(state)
        try:
            reader = dcp.FileSystemReader(path)
            if newer:
                stored = reader.read_metadata().state_dict_metadata
                for name in expanded.keys() & set(newer):
                    expanded[name] = _stored_part(expanded[name], name, stored)
                expanded = {name: value for name, value in expanded.items() if name not in newer or value}
            dcp.load(expanded, storage_reader=reader, no_dist=not self._parallel)
        # Derived from BaseException; it holds each process's own error.
        except dcp.CheckpointException as error:
            reasons = "; ".join(str(_cause(failure)) for failure in error.failures.values())
            raise CheckpointError(f"{path} does not belong to this run: {reasons}") from error
        except (OSError, RuntimeError, ValueError, EOFError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        return _restore(state, expanded)

    def _tell(self, action: Callable[[], T]) -> T | None:
        """Do something that may fail to write; where an older checkpoint stands, say so and go on."""
        try:
            return action()
        except OutputError as error:
            standing = self.committed()
            if self.report is None or not standing:
                raise
            self.report(
                f"{error} Training goes on; until the next checkpoint, a run that is stopped starts again from step "
                f"{standing[-1].step}."
            )
            return None

    def _sweep(self) -> None:
        """Remove what saves that were cut short left behind."""
        whole = {entry.path for entry in self.committed()}
        for path in self.folder.glob("step-*"):
            if path not in whole:
                shutil.rmtree(path, ignore_errors=True)

    def _on_main(self, path: Path, action: Callable[[], None]) -> None:
        """Let the main process do something while the others wait for it."""
        failure: list[Exception | None] = [None]
        if self._is_main:
            try:
                action()
            except OSError as error:
                failure = [output_error(path, error)]
        if self._parallel:
            dist.broadcast_object_list(failure)
        if failure[0] is not None:
            raise failure[0]

    def _commit(self, step: int, path: Path, score: float | None) -> None:
        files = {file.name: file.stat().st_size for file in sorted(path.iterdir())}
        temporary = path / f".{MARKER}"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump({"step": step, "score": score, "files": files}, file)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(path)
        os.replace(temporary, path / MARKER)
        _sync_folder(path)
        _sync_folder(path.parent)
        self._prune()

    def _prune(self) -> None:
        committed = self.committed()
        scored = [entry for entry in committed if entry.score is not None and not math.isnan(entry.score)]
        best = sorted(scored, key=lambda entry: (entry.score, entry.step))[::-1][: self.keep_best]
        keep = {entry.path for entry in (*committed[-self.keep_last :], *best)}
        for path in self.folder.glob("step-*"):
            if path not in keep:
                # The marker goes first, so that a removal that is cut short leaves nothing that looks whole.
                (path / MARKER).unlink(missing_ok=True)
                shutil.rmtree(path, ignore_errors=True)


def _read_marker(path: Path) -> Committed | None:
    try:
        marker = json.loads((path / MARKER).read_text("utf-8"))
        whole = all((path / name).stat().st_size == size for name, size in marker["files"].items())
        return Committed(int(marker["step"]), marker["score"], path) if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _expand(value: Any) -> Any:
    """Replace `Stateful`s by their states, at every depth."""
    if isinstance(value, Mapping):
        return {key: _expand(item) for key, item in value.items()}
    return value.state_dict() if isinstance(value, Stateful) else value


def _stored_part(state: Any, prefix: str, stored: Mapping[str, Any]) -> Any:
    """Return what a checkpoint holds of a nested state, given the dotted names of all that it holds."""
    if not isinstance(state, Mapping):
        return state
    return {
        key: _stored_part(item, f"{prefix}.{key}", stored)
        for key, item in state.items()
        if any(f"{name}.".startswith(f"{prefix}.{key}.") for name in stored)
    }


def _restore(given: Any, loaded: Any) -> Any:
    """Give `Stateful`s their loaded states, and return the rest as loaded."""
    if isinstance(given, Mapping):
        return {key: _restore(item, loaded[key]) if key in loaded else item for key, item in given.items()}
    if isinstance(given, Stateful):
        given.load_state_dict(loaded)
        return given
    return loaded


def _guard(path: Path, action: Callable[[], T]) -> T:
    """Do something that writes, with the library's errors turned into ours."""
    try:
        return action()
    except dcp.CheckpointException as error:
        causes = [_cause(failure) for failure in error.failures.values()]
        for cause in causes:
            if isinstance(cause, OSError):
                raise output_error(path, cause) from error
            if not isinstance(cause, Exception):
                raise cause from error
        raise OutputError(f"{path} cannot be written: {'; '.join(map(str, causes))}.") from error
    except OSError as error:
        raise output_error(path, error) from error
    # How the library reports a zip stream whose disk is full.
    except RuntimeError as error:
        raise OutputError(f"{path} cannot be written: {error}.") from error


def _num_bytes(value: Any) -> int:
    """Return the bytes of all tensors in nested dicts, sharded ones whole."""
    if isinstance(value, Mapping):
        return sum(map(_num_bytes, value.values()))
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def _check_room(path: Path, needed: int) -> None:
    """Raise an `OutputError` if a checkpoint does not fit onto the disk, before anything of it is written."""
    if _disk(path)[1] < needed:
        raise _with_room(output_error(path, OSError(errno.ENOSPC, "")), path, needed)


def _with_room(error: OutputError, path: Path, needed: int) -> OutputError:
    """Return the error with what a checkpoint needs, and what is free on which disk."""
    disk, free = _disk(path)
    if free < needed:
        # torch's writer reports a full disk as a position that it did not expect.
        error = output_error(path, OSError(errno.ENOSPC, ""))
    return OutputError(
        f"{error} A checkpoint needs {_size(needed)}, and {_size(free)} are free on the disk at {disk}."
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def _disk(path: Path) -> tuple[Path, int]:
    """Return where the disk that a path lies on is mounted, and the bytes that are free there."""
    place = Path(os.path.realpath(path))
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    while not os.path.ismount(place):
        place = place.parent
    return place, free


def _cause(failure: Any) -> BaseException:
    cause = failure[0] if isinstance(failure, tuple) else failure
    return cause if isinstance(cause, BaseException) else RuntimeError(str(cause))


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
