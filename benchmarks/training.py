"""What a dry run and a run's first 20 steps foretell, against what the run takes; and step time against another version.

    python benchmarks/training.py estimates recipes/photos_cpu/tokenizer.toml steps=200 adversarial_start=100
    python benchmarks/training.py step --against REVISION --rounds 5

Both count the processor's time, not the clock's, so that other work on the machine matters little. `estimates` runs a
recipe with changes as `--set` takes them. `step` trains the transformer of recipes/photos_cpu on noise, in turns with the
version of a git revision: twice each, for a few and for more steps, whose difference is the steps' own time.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[1]
FEW, MORE = 10, 40


def estimates(recipe: Path, changes: list[str]) -> None:
    """Print what was foretold of a run in this process, and what it took."""
    from maskgit.apps.cli.training import read_recipe
    from maskgit.training import dry_run, train_tokenizer, train_transformer
    from maskgit.training.inputs import completed, completed_tokenizer
    from maskgit.training.run.progress import Logger, peak_memory
    from maskgit.training.tokenizer_config import TokenizerTrainingConfig
    from maskgit.training.transformer_config import TransformerTrainingConfig

    values = read_recipe(recipe, tuple(changes))
    foretold: list[tuple[float, float]] = []
    time.perf_counter = time.process_time
    Logger.foretell = lambda self, left: foretold.append((time.process_time(), left))  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        only = {
            "out": f"{folder}/run",
            "num_workers": 0,
            "tracker": "none",
            "log_every": 2**30,
            "device": "cpu",
        }
        if "adversarial_start" in values:
            config = replace(TokenizerTrainingConfig.from_dict(completed_tokenizer(values)), **only)
            words = dry_run.dry_run_tokenizer(config)
            train_tokenizer.train_tokenizer(config)
        else:
            other = replace(TransformerTrainingConfig.from_dict(completed(values)), **only)
            words = dry_run.dry_run_transformer(other)
            train_transformer.train_transformer(other)
    (at, left), end = foretold[0], time.process_time()
    import torch

    memory, peak = float(re.findall(r"about ([0-9.]+) GiB", words)[0]), peak_memory(torch.device("cpu")) or 0
    print(
        f"time after 20 steps  foretold {left:.1f} s, taken {end - at:.1f} s ({left / (end - at) - 1:+.0%})"
    )
    print(
        f"memory               foretold {memory:.2f} GiB, taken {peak / 2**30:.2f} GiB ({memory * 2**30 / peak - 1:+.0%})"
    )


def command(source: Path, folder: Path, *arguments: object) -> float:
    """Run a command of a version in a folder, and return the processor's seconds that it took."""
    environment = os.environ | {"PYTHONPATH": str(source / "src"), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "maskgit", *map(str, arguments)],
        cwd=folder,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{source}: maskgit {' '.join(map(str, arguments))} failed")
    return usage.ru_utime + usage.ru_stime


def step_time(against: str, rounds: int) -> None:
    """Print the median seconds of a step of both versions, taken in turns."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(
            ["git", "-C", ROOT, "worktree", "add", "-q", "--detach", folder / "other", against], check=True
        )
        versions = {"this": ROOT, against: folder / "other"}
        for i in range(32):
            (folder / f"images/{i % 2}").mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"images/{i % 2}/{i}.png")
        recipes, none = ROOT / "recipes" / "photos_cpu", ("tracker=none", "num_workers=0", "device=cpu")
        for version, source in versions.items():
            own = folder / version.replace("/", "-")
            own.mkdir(exist_ok=True)
            command(source, own, "pack", folder / "images", "data/photos/train", "--size", 64)
            short = ("steps=1", "batch_size=2", "test_data=data/photos/train", "model.filters=32")
            command(source, own, "train", "tokenizer", recipes / "tokenizer.toml", "--set", *short, *none)
            model = "runs/photos-tokenizer/model"
            command(
                source, own, "tokenize", "data/photos/train", "data/photos/train-tokens", "--tokenizer", model
            )
        taken: dict[str, list[float]] = {version: [] for version in versions}
        for number in range(rounds):
            for version, source in versions.items():
                own, seconds = folder / version.replace("/", "-"), {}
                for steps in (FEW, MORE):
                    settings = (
                        f"out=runs/{number}-{steps}", f"steps={steps}", "test_data=data/photos/train-tokens", "evaluate_every=1000000",
                        "sample_every=1000000", "checkpoint_every=1000000", "batch_size=8", "num_samples=1", "model.num_classes=2",
                        "model.num_codes=256", "model.grid_size=16", "precision=float32", "sampler.steps=1", *none,
                    )  # fmt: skip
                    seconds[steps] = command(
                        source, own, "train", "transformer", recipes / "transformer.toml", "--set", *settings
                    )
                taken[version].append((seconds[MORE] - seconds[FEW]) / (MORE - FEW))
        subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", folder / "other"], check=True)
    medians = {version: statistics.median(values) for version, values in taken.items()}
    for version, median in medians.items():
        print(
            f"{version:12} {median:.4f} s a step, of {min(taken[version]):.4f} to {max(taken[version]):.4f}"
        )
    print(f"this version takes {medians['this'] / medians[against] - 1:+.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    foretell = commands.add_parser("estimates")
    foretell.add_argument("recipe", type=Path)
    foretell.add_argument("changes", nargs="*")
    compare = commands.add_parser("step")
    compare.add_argument("--against", required=True)
    compare.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.command == "estimates":
        estimates(arguments.recipe, arguments.changes)
    else:
        step_time(arguments.against, arguments.rounds)


if __name__ == "__main__":
    main()
