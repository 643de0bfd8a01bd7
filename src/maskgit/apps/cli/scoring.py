"""What the commands that score images share: progress, and scores as text."""

import json
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskgit.evaluation.scores.names import Score

# What was typed, which a report repeats.
COMMAND: ContextVar[str] = ContextVar("command", default="")


class Bars:
    """A progress bar for each work, on the terminal alone."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._name = ""

    def __enter__(self) -> "Bars":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, name: str, done: int, total: int) -> None:
        from maskgit.foundation.notes import bar

        if self._bar is None or name != self._name:
            self.__exit__()
            self._bar, self._name = bar(desc=name, total=total), name
        self._bar.n = done
        self._bar.refresh()


def print_report(out: Path, path: Path | None) -> None:
    """Print what a report says and where it is."""
    from maskgit.evaluation.report.report import JSON_NAME, PAGE_NAME

    if path is None:
        print(f"The work in {out} is done; another process writes its report.")
        return
    report = json.loads((out / JSON_NAME).read_text("utf-8"))
    width = max(map(len, report["metrics"]))
    for name, value in report["metrics"].items():
        interval = report["intervals"].get(name)
        print(
            f"{name:{width}}  {value:10.4g}"
            + (f"  [{interval[0]:.4g}, {interval[1]:.4g}]" if interval else "")
            + "".join(
                f"  {other} {found['value']:.4g}"
                for other, found in report.get("baselines", {}).get(name, {}).items()
                if found["value"] is not None
            )
        )
    for line in (*_edit_lines(report.get("edits", [])), *_repeat_lines(report.get("repeats"))):
        print(line)
    for caution in report["cautions"]:
        print(caution)
    for line in complaints(report["skipped"]["first"], report["skipped"]["count"]):
        print(line)
    print(out / JSON_NAME)
    print(out / PAGE_NAME)


def _edit_lines(edits: list[dict[str, Any]]) -> list[str]:
    """Return the table of edits as report.json has them."""
    if not edits:
        return []
    rows = [
        (edited["mask"], name, *(_short(value) for value in values.values()))
        for edited in edits
        for name, values in edited["metrics"].items()
    ]
    head = ("edits", "score", *next(iter(edits[0]["metrics"].values())))
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in (head, *rows)]


def _repeat_lines(repeats: dict[str, Any] | None) -> list[str]:
    """Return the spread over seeds as report.json has it."""
    if repeats is None:
        return []
    width = max(map(len, repeats["metrics"]))
    lines = [f"over the seeds {', '.join(map(str, repeats['seeds']))}:"]
    for name, found in repeats["metrics"].items():
        lines.append(f"{name:{width}}  {_short(found['mean'])} ± {_short(found['deviation'])}")
    return lines


def _short(value: float | None) -> str:
    return "—" if value is None else f"{value:.4g}"


def score_table(scores: "list[Score]") -> str:
    width = max(len(score.name) for score in scores)
    lines = [f"{'score':{width}}  {'value':>10}  {'interval':30}  better"]
    for score in scores:
        ends = (
            ""
            if score.interval is None
            else f"{score.interval.low:.4g} to {score.interval.high:.4g} ({score.level})"
        )
        lines.append(f"{score.name:{width}}  {score.value:10.4g}  {ends:30}  {score.better}".rstrip())
    return "\n".join(lines)


def complaints(skipped: list[str], count: int | None = None) -> list[str]:
    count = len(skipped) if count is None else count
    if not count:
        return []
    return [f"{count:,} images could not be read and were left out:", *(f"  {line}" for line in skipped[:5])]
