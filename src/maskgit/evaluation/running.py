"""Doing an evaluation's works together with other processes, until one of them writes the report.

OUT/work/NAME/…             the units of each work (see `units`): samples, reference, training, curve-…
OUT/report.json, .html      written by the first process that finds all units done
"""

import time
from collections.abc import Callable
from pathlib import Path

from maskgit.evaluation.report import JSON_NAME, Report, write_report
from maskgit.evaluation.units import Units, Work, claim
from maskgit.files import check_writable

WORK = "work"
# Called with a work's name and its units done and in all.
Progress = Callable[[str, int, int], None]


def run_works(
    out: Path,
    works: dict[str, Work],
    write: Callable[[dict[str, Units]], Report],
    *,
    stale_seconds: float,
    progress: Progress | None = None,
) -> Path | None:
    """Do works together with other processes, and write the report unless another does.

    Args:
        out: the folder of the evaluation.
        works: by their folders' names.
        write: makes the report once all units are there and intact.
        stale_seconds: see `EvaluationConfig`.
        progress: called as units are done.

    Returns:
        The path of report.json, or None where another process writes it or has just written it.

    Raises:
        ConfigError: the folder was begun with other settings.
    """
    began = time.time()
    check_writable(out)
    units = {
        name: Units(out / WORK / name, work, stale_seconds=stale_seconds) for name, work in works.items()
    }

    def reporter(name: str) -> Callable[[int, int], None] | None:
        return None if progress is None else lambda done, total: progress(name, done, total)

    for name, one in units.items():
        one.run(reporter(name))
    path = out / JSON_NAME
    with claim(out / "report.lock", stale_seconds) as own:
        if not own or (path.is_file() and path.stat().st_mtime > began):
            return None
        for name, one in units.items():
            one.mend(reporter(name))
            one.tidy()
        if progress is not None:
            progress("report", 0, 1)
        write_report(write(units), out)
    return path
