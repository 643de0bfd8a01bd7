"""Doing an evaluation's works together with other processes, until one of them writes the report.

OUT/work/NAME/…             the units of each work (see `units`): samples, reference, training, curve-…
OUT/work/engine.json        how the model runs, as the first process measured it to be the fastest
OUT/report.json, .html      written by the first process that finds all units done
"""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from maskgit.engine import DTYPES, Engine, alternatives, choose
from maskgit.engine.layers import PATHS, ways
from maskgit.errors import ConfigError
from maskgit.evaluation.report.page import write_report
from maskgit.evaluation.report.report import JSON_NAME, Report
from maskgit.foundation.files import check_writable, read_json
from maskgit.foundation.locks import HeldError, give_up, locked
from maskgit.foundation.units import MAX_PLAN_BYTES, PLAN, Units, Work, agree

WORK, ENGINE = "work", "engine.json"
# Called with a work's name and its units done and in all.
Progress = Callable[[str, int, int], None]


def agreed_engine(out: Path, mode: str, **choices: Any) -> Engine:
    """Return how the model runs in all processes of an evaluation, which decides the last bits of its images.

    The first process stores what it measured to be the fastest of what was asked for; the others use that,
    whatever they would measure themselves.

    Args:
        out: the folder of the evaluation.
        mode, **choices: what is asked for; see `maskgit.engine.alternatives`.

    Raises:
        ConfigError: a choice is not allowed, or this machine lacks what the evaluation was begun with.
    """
    found = {json.dumps(engine.numbers()): engine for engine in alternatives(mode, **choices)}
    path = out / WORK / ENGINE
    before = out / WORK / "samples" / PLAN
    stored: Any = None
    if not path.exists() and before.exists():
        # Earlier versions kept the engine in this plan alone.
        with suppress(ConfigError):
            stored = read_json(before, ConfigError, limit=MAX_PLAN_BYTES).get("engine")
    else:
        check_writable(out)
        stored = agree(path, lambda: choose(mode, **choices).numbers())
    if json.dumps(stored) in found:
        return found[json.dumps(stored)]
    engine = choose(mode, **choices)
    wanted = stored if isinstance(stored, dict) else {}
    kind, way = wanted.get("dtype"), wanted.get("quantize") or wanted.get("linear")
    if engine.device == "cpu" and kind in DTYPES and way in PATHS and way not in ways(getattr(torch, kind)):
        raise ConfigError(
            f"{out} was begun with {way} products of {kind}, which this machine does not have: go on with it on a "
            "machine like the first, or choose another folder."
        )
    # What else differs, the works' own plans name.
    return engine


def run_works(
    out: Path,
    works: dict[str, Work],
    write: Callable[[dict[str, Units]], Report],
    *,
    progress: Progress | None = None,
) -> Path | None:
    """Do works together with other processes, and write the report unless another does.

    Args:
        out: the folder of the evaluation.
        works: by their folders' names.
        write: makes the report once all units are there and intact.
        progress: called as units are done.

    Returns:
        The path of report.json, or None where another process writes it or has just written it.

    Raises:
        ConfigError: the folder was begun with other settings.
    """
    began = time.time()
    check_writable(out)
    units = {name: Units(out / WORK / name, work) for name, work in works.items()}

    def reporter(name: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(name, done, total)

    for name, one in units.items():
        one.run(reporter(name))
    path = out / JSON_NAME
    try:
        with locked(out / "report.lock", give_up):
            if path.is_file() and path.stat().st_mtime > began:
                return None
            for name, one in units.items():
                one.mend(reporter(name))
                one.tidy()
            if progress is not None:
                progress("report", 0, 1)
            write_report(write(units), out)
    except HeldError:
        return None
    return path
