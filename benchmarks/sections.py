"""Sections of a long measurement, each a process with a time limit, whose results are kept as they come.

    FOLDER/NAME.json      what a section has found so far
    FOLDER/NAME.txt       what it printed
    FOLDER/results.json   all of them, and how each ended
    FOLDER/results.md     the same to read

A section that crashes, hangs or is cut short hides no other, and keeps what it had found.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskgit.foundation import files

# A measured figure below this share of the expected one is to be explained.
LEAST_SHARE = 0.7
KEPT_CHARACTERS = 2000


@dataclass(frozen=True)
class Section:
    """A part of a measurement.

    Attributes:
        name: by which it is chosen.
        seconds: the most that it may take.
        run: what it does, given the options and a record to fill.
        about: what it finds out, in a sentence.
    """

    name: str
    seconds: float
    run: Callable[[Any, "Record"], None]
    about: str


class Record:
    """What a section has found, written anew after each finding."""

    def __init__(self, path: Path) -> None:
        """Begin a file."""
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self._write()

    def add(
        self,
        what: str,
        measured: Any,
        unit: str = "",
        *,
        expected: tuple[float, float] | None = None,
        source: str = "",
    ) -> None:
        """Add a finding.

        Args:
            what: was measured.
            measured: a number, a text or a truth.
            unit: of the number.
            expected: the least and the most that arithmetic, or exactness, lets one expect.
            source: where the expectation is from.
        """
        row: dict[str, Any] = {"what": what, "measured": measured, "unit": unit}
        if expected is not None:
            row |= {"expected": list(expected), "source": source}
            row["low"] = bool(measured < LEAST_SHARE * expected[0])
        self.rows.append(row)
        print(_line(row), flush=True)
        self._write()

    def _write(self) -> None:
        _write_json(self.path, {"rows": self.rows})


def run_sections(
    sections: Sequence[Section],
    command: Callable[[Section], list[str]],
    out: Path,
    *,
    budget: float,
    title: str,
) -> bool:
    """Run sections one after the other and write their results after each.

    Args:
        sections: which.
        command: starts the process of one.
        out: the folder of the results.
        budget: seconds for all, of which each section has its share of what is left; those that it does not reach
            are named as such.
        title: of the page.

    Returns:
        Whether all of them ended well.
    """
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    ends: dict[str, dict[str, Any]] = {
        section.name: {"about": section.about, "end": "not run"} for section in sections
    }
    for section in sections:
        (out / f"{section.name}.json").unlink(missing_ok=True)
    for number, section in enumerate(sections):
        left = budget - (time.monotonic() - began)
        # By their limits, so that a slow one takes no time from those after it.
        share = section.seconds / sum(later.seconds for later in sections[number:])
        if left <= 0:
            ends[section.name]["end"] = "not run: the time was over"
        else:
            print(f"== {section.name}: {section.about}", flush=True)
            ends[section.name] |= _run(
                command(section), out / f"{section.name}.txt", min(section.seconds, share * left)
            )
            print(f"-- {ends[section.name]['end']}", flush=True)
        _write(out, ends, title)
    return all(end["end"] == "done" for end in ends.values())


def _run(command: list[str], printed: Path, seconds: float) -> dict[str, Any]:
    """Run a process and all that it starts, and say how it ended."""
    began = time.monotonic()
    with printed.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            code = process.wait(seconds)
            end = "done" if code == 0 else f"failed with exit code {code}"
        except subprocess.TimeoutExpired:
            end = f"cut short after {seconds:.0f} s"
        finally:
            # Whatever it started ends with it.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    found = {"end": end, "seconds": round(time.monotonic() - began, 1)}
    if end != "done":
        found["printed"] = printed.read_text("utf-8", "replace")[-KEPT_CHARACTERS:]
    return found


def _write(out: Path, ends: dict[str, dict[str, Any]], title: str) -> None:
    results = {}
    for name, end in ends.items():
        try:
            rows = json.loads((out / f"{name}.json").read_text())["rows"]
        except (OSError, ValueError, KeyError):
            rows = []
        results[name] = end | {"rows": rows}
    _write_json(out / "results.json", results)
    (out / "results.md").write_text(page(results, title), "utf-8")


def _write_json(path: Path, value: Any) -> None:
    # Whole or not at all: a process may end at any time.
    files.write_bytes(path, json.dumps(value, indent=2).encode() + b"\n")


def page(results: dict[str, dict[str, Any]], title: str) -> str:
    """Return results as Markdown."""
    lines = [f"# {title}"]
    for name, section in results.items():
        took = f", {section['seconds']} s" if "seconds" in section else ""
        lines += ["", f"## {name}", f"{section['about']} ({section['end']}{took})"]
        if section["rows"]:
            lines += ["", "| what | measured | expected | from |", "|---|---:|---:|---|"]
            lines += ["| " + " | ".join(_cells(row)) + " |" for row in section["rows"]]
        if "printed" in section:
            lines += ["", "```", section["printed"].strip(), "```"]
    return "\n".join(lines) + "\n"


def _cells(row: dict[str, Any]) -> list[str]:
    expected = row.get("expected")
    low = f" **under {LEAST_SHARE:.0%}: to be explained**" if row.get("low") else ""
    cells = [row["what"], f"{_number(row['measured'])} {row['unit']}".strip() + low]
    return [*cells, "–" if expected is None else _range(expected), row.get("source", "")]


def _line(row: dict[str, Any]) -> str:
    expected = row.get("expected")
    beside = "" if expected is None else f" (expected {_range(expected)})"
    return f"{row['what']}: {_number(row['measured'])} {row['unit']}".rstrip() + beside


def _range(expected: list[float]) -> str:
    low, high = expected
    return _number(low) if low == high else f"{_number(low)} to {_number(high)}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
