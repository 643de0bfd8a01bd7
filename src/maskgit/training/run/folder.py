"""A run's folder: of one run, held by one process at a time; the same command goes on where it stopped.

    run.lock          while the run is at work; says by which process
    run.json          the config, the data's fingerprints, and the events: what was changed at which step
    checkpoints/      see `checkpoint`
    scalars.jsonl     one JSON object a line: {"step": …, name: value, …}
    losses.png        the same as curves, redrawn at each test and at the end
    samples/          image grids by step
    tensorboard/      the same for TensorBoard, if it is installed
    model/            the model, as of the newest checkpoint, with a card
    adapter/          in its place, where an adapter is trained
    data/             the images and tokens of `maskgit finetune`

Exit codes: 0 the run is done; 2 an error that the user can mend; 75 (EX_TEMPFAIL) it was stopped by SIGTERM or
SIGINT after writing a checkpoint, and the same command goes on.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from maskgit.data.image_cache import ImageCache
from maskgit.data.token_cache import TokenCache
from maskgit.errors import ConfigError, DataError, MaskGITError, OutputError
from maskgit.foundation.checks import Config
from maskgit.foundation.files import expand, write_bytes
from maskgit.foundation.locks import locked
from maskgit.training.distributed import Distributed
from maskgit.training.optim import LR_SCHEDULES
from maskgit.training.run.checkpoint import Checkpoints

AnyConfig = TypeVar("AnyConfig", bound=Config)
# `maskgit finetune` keeps what it made of the photos in the run's own folder.
RUN, LOCK, DATA = "run.json", "run.lock", "data"
# A processor hashes as much in a few seconds.
MAX_VERIFIED_BYTES = 2 << 30
# Settings that need no --change, but decide how a run is tested and ended, so that a change is an event too.
RECORDED = (
    "evaluate_every", "checkpoint_every", "num_test_images", "feature_net", "patience", "max_diverged_steps",
)  # fmt: skip


@contextmanager
def held_run(run_dir: str | Path, distributed: Distributed) -> Iterator[None]:
    """Keep other runs out of a run directory during the block; all processes call it, and the main one holds it.

    Raises:
        OutputError: another run holds it, it holds something else than a run, or it cannot be written.
    """
    run_dir = expand(run_dir)
    check_run_folder(run_dir)

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
                held.enter_context(locked(run_dir / LOCK, refuse))
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


def check_run_folder(run_dir: Path) -> None:
    """Raise an `OutputError` if a folder holds something else than a run, such as the pictures to train on."""
    if not run_dir.is_dir() or (run_dir / RUN).is_file():
        return
    # A run that was killed at once leaves its lock alone.
    found = sorted(path.name for path in run_dir.iterdir() if path.name not in (LOCK, DATA))
    if found:
        listed = ", ".join(found[:3]) + (", …" if len(found) > 3 else "")
        raise OutputError(
            f"{run_dir} is not empty and holds no run ({listed}). Set `out` to a new folder, such as "
            f"{Path('runs') / run_dir.name}."
        )


def setup_run(
    run_dir: str | Path,
    config: Config,
    data: Mapping[str, str],
    distributed: Distributed,
    *,
    may_change: Iterable[str] = (),
    changeable: Iterable[str] = (),
    change: bool = False,
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
        changeable: keys that may differ too, if `change` is set: from the newest checkpoint on the run computes
            with their new values, and an event in run.json says so.
        change: whether the user asks for that. The data by the name of "test" may then be others as well.
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
    path = run_dir / RUN
    given: dict[str, Any] = {"config": config.to_dict(), "data": dict(data)}
    # Without a checkpoint there is nothing to lose, and the run begins anew.
    if checkpoints := Checkpoints(run_dir).committed():
        try:
            stored = json.loads(path.read_text("utf-8"))
            before, fingerprints = flat(_completed(config, stored["config"])), dict(stored["data"])
            events = list(stored.get("events", []))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{path} cannot be read; choose another folder for this run.") from error
        now = flat(given["config"])
        made = checkpoints[-1].step
        free, steerable = set(may_change), set(changeable)
        # A run whose learning rate does not look at the end may end later, or sooner if it is not there yet.
        if now.get("lr_schedule") == "constant" and not now.get("decay_steps"):
            free.add("steps")
        differing = [
            key
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and not {key, key.split(".")[0]} & free
        ]
        fixed = [key for key in differing if key not in steerable]
        if differing and (fixed or not change):
            described = [f"{key} (was {before.get(key)!r}, is {now.get(key)!r})" for key in differing]
            advice = (
                f"{', '.join(fixed)} cannot change in the middle of a run: set back to go on, or choose another folder."
                if fixed
                else f"Set back to go on as before, say --change to go on from step {made} with the new values, or "
                "choose another folder."
            )
            raise ConfigError(f"{run_dir} holds a run of another config: {'; '.join(described)}. {advice}")
        if now.get("steps", made) < made:
            raise ConfigError(
                f"The run in {run_dir} has made {made} steps already, but steps is {now['steps']}. Give at least "
                f"{made}, or choose another folder."
            )
        # A test set that the run did not have before changes nothing that was computed.
        changed = sorted(
            n for n in given["data"] if n in fingerprints and fingerprints[n] != given["data"][n]
        )
        recorded = [key for key in RECORDED if before.get(key) != now.get(key)]
        changes = {key: [before.get(key), now.get(key)] for key in (*differing, *recorded)}
        if change and changed == ["test"]:
            changes["test_data"], changed = [before.get("test_data"), now.get("test_data")], []
        # A run whose newest checkpoint was lost goes on from the one before, with what was changed since.
        events = [{**event, "step": min(event["step"], made)} for event in events]
        if changes:
            events.append({"step": made, "changed": changes})
        if events:
            given["events"] = events
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


def annealed(run_dir: str | Path, config: AnyConfig, steps: int) -> AnyConfig:
    """Return a run's config with an end: from its newest checkpoint, the learning rate falls to zero.

    Args:
        run_dir: the run's folder.
        config: the run's, with `steps`, `decay_steps` and `schedule_steps`.
        steps: how many more to make. Where the run is in such a decay of so many steps, or at its end, it stays as it
            is, so that the same command goes on.

    Raises:
        ConfigError: there is no checkpoint to go on from, or the rate is 0 already.
        OutputError: the folder does not hold a run that can be read.
    """
    path = expand(run_dir) / RUN
    committed = Checkpoints(path.parent).committed()
    if not committed:
        raise ConfigError(
            f"{path.parent} holds no checkpoint to anneal from: begin the run without --anneal."
        )
    try:
        stored = json.loads(path.read_text("utf-8"))["config"]
        total, decay, schedule = (stored.get(name) for name in ("steps", "decay_steps", "schedule_steps"))
        before = int(schedule or total)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OutputError(f"{path} cannot be read; choose another folder for this run.") from error
    made = committed[-1].step
    if decay != steps or made < total - steps:
        _check_falls(config, path.parent, made, before)
        total, schedule = made + steps, before
    return dataclasses.replace(config, **{"steps": total, "decay_steps": steps, "schedule_steps": schedule})


def _check_falls(config: Config, run_dir: Path, made: int, end: int) -> None:
    """Raise a `ConfigError` if a schedule that ended at step `end` has left no learning rate to fall."""
    values = config.to_dict()
    if made >= end and LR_SCHEDULES[values["lr_schedule"]](1.0) == 0:
        raise ConfigError(
            f"The learning rate of the run in {run_dir} is 0 since step {end}, where its {values['lr_schedule']} "
            "schedule ended, so it cannot fall any further. To train on, give a rate to fall from: --set "
            "lr_schedule=constant learning_rate=1e-4, with --anneal."
        )


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


def flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted keys, such as {"model.filters": 64}."""
    if not isinstance(values, dict):
        return {prefix: values}
    return {k: v for key, item in values.items() for k, v in flat(item, f"{prefix}.{key}".strip(".")).items()}
