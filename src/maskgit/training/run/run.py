"""What both training loops share: processes, the run directory, stopping.

A run directory belongs to one run; the same command goes on where it stopped.

    run.lock          while the run is at work; says by which process
    run.json          the config and the data's fingerprint: a run of another config or data is refused
    checkpoints/      see `checkpoint`
    scalars.jsonl     one JSON object a line: {"step": …, name: value, …}
    samples/          image grids by step
    tensorboard/      the same for TensorBoard, if it is installed
    model/            the trained model, written when the run is done

Exit codes: 0 the run is done; 2 an error that the user can mend; 75 (EX_TEMPFAIL) it was stopped by SIGTERM or
SIGINT after writing a checkpoint, and the same command goes on.
"""

import json
import math
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from maskgit.data.caches import ImageCache, TokenCache
from maskgit.engine.host import has_bfloat16_units
from maskgit.errors import ConfigError, DataError, MaskGITError, OutputError
from maskgit.foundation.checks import Config, check_choice
from maskgit.foundation.devices import copies_aside
from maskgit.foundation.files import expand, write_bytes
from maskgit.foundation.locks import locked
from maskgit.training.distributed import Distributed
from maskgit.training.run.checkpoint import Checkpoints
from maskgit.training.run.progress import Logger, Throughput, peak_flops

__all__ = [
    "EXIT_INTERRUPTED",
    "Logger",
    "StopSignal",
    "Throughput",
    "TrainingError",
    "UpdateGate",
    "autocast",
    "choose_precision",
    "held_run",
    "peak_flops",
    "seed_step",
    "setup_run",
]

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# A processor hashes as much in a few seconds.
MAX_VERIFIED_BYTES = 2 << 30
# Steps after which the host asks whether all of them were finite, where asking makes it wait.
FINITE_EVERY = 50
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: try again later


class TrainingError(MaskGITError, RuntimeError):
    """A run cannot go on, for example because its loss is not a number."""


@contextmanager
def held_run(run_dir: str | Path, distributed: Distributed) -> Iterator[None]:
    """Keep other runs out of a run directory during the block; all processes call it, and the main one holds it.

    Raises:
        OutputError: another run holds it, or it cannot be written.
    """
    run_dir = expand(run_dir)

    def refuse(holder: str) -> None:
        raise OutputError(
            f"{run_dir} is the folder of a run that {holder} is at. Wait for its end or stop it, or choose another "
            "folder for this run."
        )

    is_new = not run_dir.exists()
    with ExitStack() as held:
        failure: MaskGITError | None = None
        if distributed.is_main:
            try:
                held.enter_context(locked(run_dir / "run.lock", refuse))
            except MaskGITError as error:
                failure = error
        if distributed.any(failure is not None):
            raise failure or OutputError(f"{run_dir} cannot be used for this run; the main process says why.")
        try:
            yield
        finally:
            held.close()
            if is_new and distributed.is_main:
                # A run that was refused before it wrote anything leaves nothing.
                with suppress(OSError):
                    run_dir.rmdir()


def setup_run(
    run_dir: str | Path,
    config: Config,
    data: Mapping[str, str],
    distributed: Distributed,
    *,
    may_change: Iterable[str] = (),
    caches: Iterable[ImageCache | TokenCache] = (),
) -> Path:
    """Make a run directory, or check that the one there is of the same run; all processes call it.

    Args:
        run_dir: the folder.
        config: the run's.
        data: fingerprints by name, such as {"train": "…"}.
        distributed: the processes.
        may_change: keys of the config that do not change what is computed, such as "num_workers" or
            "stream.source".
        caches: what is read. When a run goes on, those of at most `MAX_VERIFIED_BYTES` are read whole by the
            main process and compared with their fingerprints; of larger ones opening them compared the sizes.

    Returns:
        The folder.

    Raises:
        ConfigError: the folder holds a run of another config, whose keys that differ are named, or one that has
            made more steps than the config asks for.
        DataError: the data have changed since the run's checkpoint.
        OutputError: it cannot be written, or holds something else.
    """
    run_dir = expand(run_dir)
    path = run_dir / "run.json"
    given = {"config": config.to_dict(), "data": dict(data)}
    # Without a checkpoint there is nothing to lose, and the run begins anew.
    if checkpoints := Checkpoints(run_dir).committed():
        try:
            stored = json.loads(path.read_text("utf-8"))
            before, fingerprints = _flat(_completed(config, stored["config"])), dict(stored["data"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{path} cannot be read; choose another folder for this run.") from error
        now = _flat(given["config"])
        allowed = set(may_change)
        changed = [
            f"{key} (was {before.get(key)!r}, is {now.get(key)!r})"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and not {key, key.split(".")[0]} & allowed
        ]
        if changed:
            raise ConfigError(
                f"{run_dir} holds a run of another config: {'; '.join(changed)}. Set these back to go on, or "
                "choose another folder."
            )
        made = checkpoints[-1].step
        if now.get("steps", made) < made:
            raise ConfigError(
                f"The run in {run_dir} has made {made} steps already, but steps is {now['steps']}. Give at least "
                f"{made}, or choose another folder."
            )
        # A test set that the run did not have before changes nothing that was computed.
        changed = sorted(
            n for n in given["data"] if n in fingerprints and fingerprints[n] != given["data"][n]
        )
        if changed:
            raise DataError(
                f"The data ({', '.join(changed)}) changed since the checkpoint in {run_dir}. Bring them back to go "
                "on, or choose another folder."
            )
        _verify(caches, run_dir, distributed)
    distributed.barrier()
    if distributed.is_main:
        write_bytes(path, json.dumps(given, indent=2).encode() + b"\n")
    distributed.barrier()
    return run_dir


def _verify(caches: Iterable[ImageCache | TokenCache], run_dir: Path, distributed: Distributed) -> None:
    failure: DataError | None = None
    if distributed.is_main:
        try:
            for cache in caches:
                if cache.num_bytes <= MAX_VERIFIED_BYTES:
                    cache.verify()
        except DataError as error:
            failure = error
    if distributed.any(failure is not None):
        told = failure or "the main process says which."
        raise DataError(f"The data changed since the checkpoint in {run_dir}: {told}") from failure


def _completed(config: Config, stored: Any) -> Any:
    """Return a stored config with the defaults of settings that are newer than it."""
    try:
        return type(config).from_dict(stored).to_dict()
    except ConfigError:
        return stored


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(values, dict):
        return {prefix: values}
    return {
        k: v for key, item in values.items() for k, v in _flat(item, f"{prefix}.{key}".strip(".")).items()
    }


class StopSignal:
    """SIGTERM or SIGINT as a request to stop after the step, agreed over all processes.

    A second SIGINT stops at once.
    """

    def __init__(self, distributed: Distributed) -> None:
        self.requested = False
        self._distributed = distributed
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Python allows handlers in the main thread alone.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            # None stands for one that was not set from Python, and cannot be set again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def agreed(self) -> bool:
        """Return whether any process was asked to stop; all must call it."""
        return self._distributed.any(self.requested)


class UpdateGate:
    """Stops a run before a number that is none can spoil its weights.

    On a CPU each step is looked at before its update. Elsewhere looking would make the host wait, so the optimizers are
    told on the device to leave their weights and averages as they are, at such a step and at all after it, and the
    host looks every `FINITE_EVERY` steps and whenever `read` is called, which is before anything is kept or shown.
    """

    def __init__(
        self, device: torch.device, *optimizers: torch.optim.Optimizer, every: int | None = None
    ) -> None:
        """Watch some optimizers, which off the CPU must be fused.

        Args:
            device: where the quantities will be.
            optimizers: what is not to be spoilt.
            every: steps between two looks; None is 1 on a CPU (and on MPS, whose optimizers cannot be told), and
                `FINITE_EVERY` elsewhere.
        """
        self._every = every or (FINITE_EVERY if copies_aside(device) else 1)
        self._unread: list[tuple[int, tuple[str, ...], Tensor]] = []
        self._closed: Tensor | None = None
        if self._every > 1:
            self._closed = torch.zeros((), device=device)
            for optimizer in optimizers:
                # As GradScaler tells them: 1 passes over a step.
                optimizer.grad_scale = None  # type: ignore[attr-defined]
                optimizer.found_inf = self._closed  # type: ignore[attr-defined]

    def check(self, step: int, quantities: Mapping[str, Tensor]) -> None:
        """Look at a step's scalars, before its update, or let the device do so.

        Args:
            step: the step at hand.
            quantities: scalars by name. Give means over all processes, so that all stop.

        Raises:
            TrainingError: one is NaN or infinite, at this step or at one since the last look.
        """
        values = torch.stack([value.detach().float() for value in quantities.values()])
        if self._closed is not None:
            torch.maximum(self._closed, (~values.isfinite()).any().float(), out=self._closed)
        self._unread.append((step, tuple(quantities), values))
        if len(self._unread) == self._every:
            self.read()

    def read(self) -> None:
        """Look at all steps since the last look.

        Raises:
            TrainingError: a quantity was NaN or infinite.
        """
        unread, self._unread = self._unread, []
        numbers = torch.cat([values for _, _, values in unread]).tolist() if unread else []
        for step, names, values in unread:
            own, numbers = numbers[: len(values)], numbers[len(values) :]
            bad = [
                f"{name} is {value}"
                for name, value in zip(names, own, strict=True)
                if not math.isfinite(value)
            ]
            if bad:
                raise TrainingError(
                    f"Stopped at step {step} before its update: {', '.join(bad)}. The last checkpoint is whole; "
                    "lower the learning rate or look at the data, and start the same command again."
                )


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """Return the type that networks compute in: "float32", "bfloat16", or "auto", bfloat16 where it is fast."""
    if name != "auto":
        check_choice("precision", name, PRECISIONS)
        return PRECISIONS[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and has_bfloat16_units()
    return torch.bfloat16 if fast else torch.float32


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Return the context in which networks compute in `precision`; their weights stay float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16)


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seed torch's global generators, which dropout reads, from (seed, step, rank).

    So a resumed run draws what an uninterrupted one would. Differs: dropout depends on the rank, since torch's
    dropout cannot count by sample; runs of 1 and 2 processes agree exactly where dropout is 0.
    """
    state = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state) % 2**63)
