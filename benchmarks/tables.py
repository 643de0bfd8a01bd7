"""The tables of docs/performance.md, made from the benchmarks' JSON.

    python benchmarks/tables.py [--check]

A table stands between `<!-- table: KIND NAME -->` and `<!-- end -->`; KIND is one of `TABLES`, NAME a file
of benchmarks/results/ without its ending. Where there is no such file, the table says "not measured". With
--check nothing is written, and a table that differs from its JSON is an error.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maskgit.foundation import files

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "performance.md"
TABLE = re.compile(r"(<!-- table: (\S+) (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def markdown(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    """Return a table whose first columns are aligned left and the others right."""
    line = ["---" if i < left else "---:" for i in range(len(head))]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in [head, line, *rows])


def machine(record: dict[str, Any]) -> str:
    """Return the line that says where a record was made."""
    where = record["environment"]
    processor = f"{where['processor']} ({', '.join(where['features']) or 'no vector extensions named'})"
    parts = [where.get("gpu") or processor, f"{where['threads']} threads", f"torch {where['torch']}"]
    if "official" in record:
        parts.append(f"jax {record['official']['jax']}, flax {record['official']['flax']}")
        parts.append("TensorFlow" if record["official"].get("tensorflow") else "no TensorFlow")
    load = where["load_average"]
    parts.append("" if load is None else f"load average {load:.1f} at the start")
    return f"\n{'; '.join(part for part in parts if part)}.\n"


def share(value: float | None) -> str:
    """Return a share as a percentage, or a dash."""
    return "–" if value is None else f"{value:.2%}"


def mode(row: dict[str, Any]) -> str:
    """Return a row's mode, with the number type that its engine chose."""
    engine = row.get("engine") or {}
    kind = engine.get("quantize") or engine.get("dtype")
    return f"{row['mode']} ({kind})" if kind and kind != row["mode"] else row["mode"]


def against_official(record: dict[str, Any]) -> str:
    """Return the comparison with the official code."""
    rows = []
    for row in record["rows"]:
        difference = row.get("image_difference")
        rows.append(
            [
                f"`{row['name']}`",
                mode(row),
                str(row["batch"]),
                f"{row['official_s']:.3f}",
                f"{row['ours_s']:.3f}",
                f"{row['ratio']:.2f}",
                share(row.get("agreement")),
                "–" if difference is None else f"{difference:.1e}",
            ]
        )
    head = ["work", "mode", "batch", "official, s", "ours, s", "ratio", "equal tokens", "pixels' difference"]
    return markdown(head, rows, left=2) + machine(record)


def roofline(record: dict[str, Any]) -> str:
    """Return the rates beside what is attainable."""
    rows = [
        [
            f"`{row['name']}`",
            row["mode"],
            str(row["batch"]),
            f"{row['seconds']:.3f}",
            f"{row['gflop_per_s']:.0f}",
            f"{row['share']:.1%}",
            " and ".join(row["gflop"]),
        ]
        for row in record["rows"]
    ]
    head = ["work", "mode", "batch", "s", "GFLOP/s", "share of attainable", "in"]
    rates = (f"{kind} {rate:.0f}" for kind, rate in record["attainable_gflop_per_s"].items())
    return markdown(head, rows, left=2) + f"\nAttainable, GFLOP/s: {', '.join(rates)}.\n" + machine(record)


def scaling(record: dict[str, Any]) -> str:
    """Return the cost along each axis."""
    rows = [
        [
            row["axis"],
            row["value"],
            f"{row['seconds_per_image']:.3f}",
            f"{row['images_per_second']:.2f}",
            f"{row['gflop_per_s']:.0f}",
        ]
        for row in record["rows"]
    ]
    return markdown(["axis", "value", "s an image", "images/s", "GFLOP/s"], rows, left=2) + machine(record)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "against_official": against_official,
    "roofline": roofline,
    "scaling": scaling,
}


def filled(text: str, results: Path) -> str:
    """Return a document with every table made anew.

    Args:
        text: Markdown with the marks.
        results: the folder of JSON files.
    """

    def table(found: re.Match[str]) -> str:
        begin, kind, name, end = found.groups()
        path = results / f"{name}.json"
        made = TABLES[kind](json.loads(path.read_text())) if path.exists() else "Not measured.\n"
        return f"{begin}{made}{end}"

    return TABLE.sub(table, text)


def main() -> None:
    """Fill in or check the document."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text = DOCUMENT.read_text()
    made = filled(text, RESULTS)
    if options.check and made != text:
        raise SystemExit(f"{DOCUMENT} differs from its JSON; run python benchmarks/tables.py.")
    if not options.check:
        files.write_bytes(DOCUMENT, made.encode())


if __name__ == "__main__":
    main()
