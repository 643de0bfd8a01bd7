"""How long a user waits for the first picture of the full-size 256 model, from the shell.

Writes a model folder of the official architecture (its weights are random: they do not change the time), runs

    maskgit generate --class 1 --steps 8 --model FOLDER

as a new process, as often as asked, and prints each wall time, with the start of Python and torch for scale.

    python benchmarks/first_image.py [--runs 3] [--device cpu] [--json FILE]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import models


def timed(command: list[str]) -> float:
    """Run a command and return its wall time in seconds."""
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models.random_model(models.SIZES["256"]()).save_pretrained(folder / "model")
        generate = [sys.executable, "-m", "maskgit", "generate", "--class", "1", "--steps", str(models.STEPS)]
        generate += ["--model", str(folder / "model"), "--device", options.device, "--overwrite"]
        generate += ["--out", str(folder / "out")]
        row = {
            "name": "first image, 256×256, 8 steps",
            "device": options.device,
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "import_torch_s": [timed([sys.executable, "-c", "import torch"]) for _ in range(options.runs)],
            "total_s": [timed(generate) for _ in range(options.runs)],
        }
    print(f"{row['name']} on {row['device']} ({row['machine']})")
    for run, (start, total) in enumerate(zip(row["import_torch_s"], row["total_s"], strict=True)):
        print(f"  run {run}: {total:.2f} s from the shell, of which starting Python and torch {start:.2f} s")
    if options.json:
        options.json.write_text(json.dumps(row, indent=2) + "\n")


if __name__ == "__main__":
    main()
