"""Runs beside each other: how far each is, what it reached, and in which settings they differ."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from maskgit.errors import DataError
from maskgit.foundation.files import expand
from maskgit.training.run.curves import Logged, comparison_charts, draw_charts
from maskgit.training.run.folder import flat
from maskgit.training.run.progress import duration, read_scalars

# What a run is called and where it lies makes no difference.
SAME_RUN = ("out",)


class Compared(NamedTuple):
    """One run of a comparison.

    Attributes:
        name: its folder's, or the whole path where two have the same.
        config: its settings, by dotted keys.
        logged: what it logged so far.
    """

    name: str
    config: dict[str, Any]
    logged: Logged


def read_runs(folders: Sequence[str | Path]) -> list[Compared]:
    """Read what runs have logged so far.

    Raises:
        DataError: a folder holds no run.
    """
    paths = [expand(folder) for folder in folders]
    names = [path.resolve().name for path in paths]
    runs = []
    for path, name in zip(paths, names, strict=True):
        file = path / "run.json"
        try:
            config = flat(json.loads(file.read_text("utf-8"))["config"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path} holds no run ({file.name} is missing or damaged). Give the folder that a recipe calls out."
            ) from error
        logged = Logged(read_scalars(path / "scalars.jsonl"), int(config.get("batch_size") or 0))
        runs.append(Compared(name if names.count(name) == 1 else str(path), config, logged))
    return runs


def table_of_runs(runs: Sequence[Compared]) -> str:
    """Return how far runs are and what they reached, a line each under a head."""
    head = (
        "run",
        "step",
        "loss",
        "test loss",
        "best",
        "test PSNR",
        "best",
        "lr",
        "images/s",
        "hours",
        "left",
    )
    rows = [head]
    for run in runs:
        logged, steps = run.logged, run.config.get("steps", 0)
        rates = _last(logged, "learning_rate", ".2g")
        done = int(max((line["step"] for line in logged.lines), default=0))
        hours = float(logged.hours(logged.series(logged.loss)[0][-1:]).sum())
        left = hours / done * (steps - done) if done else float("nan")
        rows.append(
            (
                run.name,
                f"{done:,}/{steps:,}",
                _last(logged, logged.loss, ".4f"),
                *_last_and_best(logged, "test_loss", ".4f", lower_is_better=True),
                *_last_and_best(logged, "test_psnr", ".2f", lower_is_better=False),
                rates,
                _last(logged, "images_per_second", ",.1f"),
                f"{hours:.2f}",
                duration(3600 * left) if done < steps else "done",
            )
        )
    return _table(rows)


def table_of_settings(runs: Sequence[Compared]) -> str:
    """Return the settings in which runs differ, a line each; nothing where they differ in none."""
    counts = Counter(key for run in runs for key in run.config)
    # What one run alone has, such as a setting of its stage, is no difference.
    keys = sorted(key for key, count in counts.items() if count > 1 and key not in SAME_RUN)
    rows = [("setting", *(run.name for run in runs))]
    for key in keys:
        values = [_shown(run.config[key]) if key in run.config else "–" for run in runs]
        if len(set(values)) > 1:
            rows.append((key, *values))
    return _table(rows) if len(rows) > 1 else ""


def draw_comparison(runs: Sequence[Compared], path: Path) -> None:
    """Write the runs' losses over steps and over hours as a PNG.

    Raises:
        OutputError: it cannot be written.
    """
    draw_charts(comparison_charts({run.name: run.logged for run in runs}), path)


def _last(logged: Logged, name: str, form: str) -> str:
    values = logged.series(name)[1]
    return format(values[-1], form) if len(values) else "–"


def _last_and_best(logged: Logged, name: str, form: str, *, lower_is_better: bool) -> tuple[str, str]:
    steps, values = logged.series(name)
    if not len(values):
        return "–", "–"
    best = values.argmin() if lower_is_better else values.argmax()
    return format(values[-1], form), f"{values[best]:{form}} at {int(steps[best]):,}"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows in columns, without those columns that hold nothing but their head."""
    used = [column for column in zip(*rows, strict=True) if any(cell != "–" for cell in column[1:])]
    widths = [max(map(len, column)) for column in used]
    lines = zip(*used, strict=True)
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
