"""The official JAX code and ours, timed in turns: the same machine, weights, inputs and tokens out.

    git clone https://github.com/google-research/maskgit CHECKOUT
    python benchmarks/against_official.py --official CHECKOUT [--official-python PYTHON] [--json FILE]

PYTHON has jax, flax and ml_collections, and for the last rows what else the official requirements name; the
checkout's files are not touched. Both sides read one pair of official checkpoints with random weights. Rows:
`forward` (the transformer's logits of a half masked sequence), `decode` (tokens to pixels), `encode` (pixels
to tokens), `image8` (an image in 8 steps, sampled and decoded, with the noise that each side draws itself)
and `shell-…` (the same from a fresh process to a PNG file, with start-up, loading and compilation, the
official side in each run mode of official_worker.py). A second is wall time until the result is on the host;
ratio is official_s / ours_s of the medians.

Agreement is the share of equal tokens (of the likeliest tokens for `forward`), image_difference the mean
and the greatest difference of pixels in [0, 1]; `image8` is compared with the noise that JAX drew given to
our sampler.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import models
import timing
from workers import NO_CHECKOUT, OFFICIAL, Worker, use_threads

HERE = Path(__file__).parent
NAMES = ("forward", "decode", "encode", "image8")
RUNS = ("jit", "normal", "pmap")
SEED = 42  # the official demo's


def write_inputs(path: Path, config: Any, batch: int) -> None:
    """Write what both sides are given at one batch size."""
    rng = np.random.default_rng(batch)
    side, codes = config.transformer.grid_size, config.transformer.num_codes
    tokens = rng.integers(0, codes, (batch, side, side), dtype=np.int32)
    labels = rng.integers(0, config.transformer.num_classes, batch, dtype=np.int32)
    masked = np.where(rng.random(tokens.shape) < 0.5, -1, tokens).reshape(batch, -1)
    sequence = np.concatenate([labels[:, None] + codes, masked], axis=1).astype(np.int32)
    # A colour for each token and some noise: noise alone would look alike to all tokens.
    colours = np.kron(rng.random((batch, side, side, 3)), np.ones((1, *[config.image_size // side] * 2, 1)))
    image = (0.9 * colours + 0.1 * rng.random(colours.shape)).astype(np.float32)
    np.savez(path, tokens=tokens, labels=labels, sequence=sequence, image=image, seed=SEED)


def differences(name: str, official: Path, ours: Path) -> dict[str, float | None]:
    """Compare what the two sides made."""
    theirs, own = np.load(official), np.load(ours)
    found: dict[str, float | None] = dict.fromkeys(
        ("agreement", "image_difference", "image_difference_greatest", "logits_error")
    )
    if name == "forward":
        found["agreement"] = float((theirs["logits"].argmax(-1) == own["logits"].argmax(-1)).mean())
        error = np.sqrt(np.square(theirs["logits"] - own["logits"]).mean())
        found["logits_error"] = float(error / theirs["logits"].std())
    if "tokens" in theirs:
        tokens = own["tokens"].reshape(theirs["tokens"].shape)
        found["agreement"] = float((theirs["tokens"] == tokens).mean())
    if "images" in theirs:
        difference = np.abs(theirs["images"].clip(0, 1) - own["images"])
        found["image_difference"] = float(difference.mean())
        found["image_difference_greatest"] = float(difference.max())
    return found


def compare(
    name: str, batch: int, modes: list[str], official: Worker, ours: Worker, folder: Path, rounds: int
) -> list[dict[str, Any]]:
    """Time one work at one batch size on both sides, and return a row for each of our modes."""
    inputs = str(folder / f"inputs{batch}.npz")
    sides = {"official": (official, "")} | {mode: (ours, mode) for mode in modes}
    first = {
        side: worker.ask("prepare", name=name, batch=batch, inputs=inputs, mode=mode)
        for side, (worker, mode) in sides.items()
    }

    def turn(worker: Worker, mode: str) -> Callable[[], float]:
        return lambda: worker.ask("time", name=name, batch=batch, mode=mode)["seconds"]

    times = timing.in_turns({side: turn(*parts) for side, parts in sides.items()}, rounds)
    their_file, our_file = folder / "official.npz", folder / "ours.npz"
    official.ask("outputs", name=name, batch=batch, mode="", path=str(their_file))
    rows = []
    for mode in modes:
        ours.ask("outputs", name=name, batch=batch, mode=mode, path=str(our_file), noise=str(their_file))
        rows.append(
            row(name, batch, mode, times["official"], times[mode])
            | {"official_first_s": first["official"]["seconds"], "ours_first_s": first[mode]["seconds"]}
            | {"engine": first[mode].get("engine")}
            | differences(name, their_file, our_file)
        )
    return rows


def row(name: str, batch: int, mode: str, official: list[float], ours: list[float]) -> dict[str, Any]:
    """Return what every row has."""
    theirs, own = timing.spread(official), timing.spread(ours)
    return {
        "name": name,
        "batch": batch,
        "mode": mode,
        "official_s": theirs["seconds"],
        "ours_s": own["seconds"],
        "ratio": theirs["seconds"] / own["seconds"],
        "official_spread_s": [theirs["least_s"], theirs["greatest_s"]],
        "ours_spread_s": [own["least_s"], own["greatest_s"]],
        "rounds": own["rounds"],
    }


def shell(options: argparse.Namespace, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Time one image from the shell, each in a fresh process."""
    ours = [sys.executable, "-m", "maskgit", "generate", "--model", "model", "--class", "1", "--overwrite"]
    ours += ["--steps", str(models.STEPS), "--device", options.device, "--out", "out"]
    official = [*official_command(options), "--image", "official.png", "--run"]
    # The command line has no eager mode.
    modes = [mode for mode in options.modes if mode != "eager"]
    commands = {run: [*official, run] for run in RUNS} | {mode: [*ours, f"--{mode}"] for mode in modes}

    def turn(command: list[str]) -> Callable[[], float]:
        def timed() -> float:
            start = time.perf_counter()
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
            return time.perf_counter() - start

        return timed

    # Unrecorded once, so that both sides' files are in the page cache.
    times = timing.in_turns({side: turn(command) for side, command in commands.items()}, rounds)
    return [row(f"shell-{run}", 1, mode, times[run], times[mode]) for run in RUNS for mode in modes]


def official_command(options: argparse.Namespace) -> list[str]:
    """Return the command of the official side."""
    command = [options.official_python, str(HERE / "official_worker.py"), str(options.official.resolve())]
    return [*command, "--size", options.size, "--device", options.device]


def missing(checkout: Path, python: str) -> str | None:
    """Return what the official side lacks to run at all, or None."""
    if not (checkout / OFFICIAL).is_file():
        return NO_CHECKOUT.format(checkout)
    needed = "import jax, flax, ml_collections"
    try:
        done = subprocess.run([python, "-c", needed], capture_output=True, text=True)
    except OSError as error:
        return f"{python} cannot be run: {error.strerror}."
    if done.returncode:
        last = done.stderr.strip().rpartition("\n")[2]
        return f"{python} cannot {needed} ({last}): name another by --official-python."
    return None


def show(row: dict[str, Any]) -> None:
    """Print a row."""
    parts = [
        f"{row['name']:8} batch {row['batch']:<3} {row['mode']:6}",
        f"official {row['official_s']:7.3f} s  ours {row['ours_s']:7.3f} s  ratio {row['ratio']:5.2f}",
    ]
    if row.get("agreement") is not None:
        parts.append(f"agreement {row['agreement']:.2%}")
    if row.get("logits_error") is not None:
        parts.append(f"logits' error {row['logits_error']:.1e}")
    if row.get("image_difference") is not None:
        parts.append(f"pixels' difference {row['image_difference']:.1e}")
    print("  ".join(parts), flush=True)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Make the models, run both sides and return the record."""
    config = models.SIZES[options.size]()
    model = models.random_model(config)
    models.write_official(model, folder / "checkpoints")
    if "shell" in options.names:
        model.save_pretrained(folder / "model")
    del model
    for batch in options.batches:
        write_inputs(folder / f"inputs{batch}.npz", config, batch)
    ours_command = [sys.executable, str(HERE / "our_worker.py"), "--device", options.device]
    record: dict[str, Any] = {"rows": []}

    def add(rows: list[dict[str, Any]]) -> None:
        for made in rows:
            record["rows"].append({"device": options.device} | made)
            show(made)

    with Worker(official_command(options), folder) as official, Worker(ours_command, folder) as ours:
        record["official"] = official.ask("describe")
        record["environment"] = ours.ask("describe")
        for batch in options.batches:
            for name in NAMES:
                if name in options.names:
                    add(compare(name, batch, options.modes, official, ours, folder, options.rounds))
    if "shell" in options.names:
        add(shell(options, folder, options.shell_rounds))
    record["load_average_after"] = os.getloadavg()[0]
    return record


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--official", type=Path, required=True, help="checkout of google-research/maskgit")
    parser.add_argument("--official-python", default=sys.executable, help="a Python with jax and flax")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--names", nargs="+", default=[*NAMES, "shell"], choices=[*NAMES, "shell"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--modes", nargs="+", default=list(models.MODES), choices=models.MODES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shell-rounds", type=int, default=3)
    parser.add_argument("--size", default="256", choices=["256", "512"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="processors in use; 0 is all")
    options = parser.parse_args()
    if problem := missing(options.official, options.official_python):
        parser.error(problem)
    use_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        record = measure(options, Path(name))
    if options.json:
        timing.write_json(options.json, record)


if __name__ == "__main__":
    main()
