"""What an image costs against steps, batch, resolution and model size.

    python benchmarks/scaling.py [--size 256] [--mode eager] [--batches 1 2 4 8] [--json FILE]

Each axis starts from one image of the given size in 8 steps and changes one thing; its points are timed in
turns, from labels to pixels on the CPU. Weights are random.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import flops
import models
import timing
from maskgit import MaskGIT
from maskgit.config import ModelConfig
from maskgit.networks.config import TransformerConfig

AXES = ("steps", "batch", "resolution", "model")
GRIDS = (0.5, 1, 2)
# Width and depth of the transformer, relative to the size's own.
MODELS = ((0.5, 0.5), (0.5, 1), (1, 0.5), (1, 1), (1, 2))


class Point(NamedTuple):
    """One setting of an axis."""

    value: str
    config: ModelConfig
    steps: int = models.STEPS
    batch: int = 1


def resized(config: ModelConfig, scale: float) -> ModelConfig:
    """Return the same model with a grid of another size."""
    grid = max(1, round(config.transformer.grid_size * scale))
    transformer = replace(config.transformer, grid_size=grid)
    return replace(config, transformer=transformer, image_size=grid * config.tokenizer.patch_size)


def reshaped(config: ModelConfig, width: float, depth: float) -> ModelConfig:
    """Return the same model with a transformer of another width and depth; heads keep their size."""
    old = config.transformer
    heads = max(1, round(old.num_heads * width))
    transformer = replace(
        old,
        num_heads=heads,
        hidden_size=heads * (old.hidden_size // old.num_heads),
        intermediate_size=round(old.intermediate_size * width),
        num_layers=max(1, round(old.num_layers * depth)),
    )
    return replace(config, transformer=transformer)


def axes(options: argparse.Namespace) -> dict[str, list[Point]]:
    """Return the points of every axis."""
    config = models.SIZES[options.size]()
    grids = [resized(config, scale) for scale in GRIDS]
    shapes = [reshaped(config, *scales) for scales in MODELS]
    found = {
        "steps": [Point(str(steps), config, steps=steps) for steps in options.steps],
        "batch": [Point(str(batch), config, batch=batch) for batch in options.batches],
        "resolution": [Point(f"{grid.image_size} × {grid.image_size}", grid) for grid in grids],
        "model": [
            Point(f"{shape.transformer.hidden_size} wide, {shape.transformer.num_layers} layers", shape)
            for shape in shapes
        ],
    }
    return {axis: found[axis] for axis in options.axes}


def work(model: MaskGIT, point: Point, classes: models.NewClasses, device: str) -> Callable[[], float]:
    """Return what times the images of a point."""
    return timing.clock(
        lambda: model.generate(classes.take(point.batch), steps=point.steps, batch_size=point.batch), device
    )


def rows_of(axis: str, points: list[Point], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Time the points of an axis in turns and give their rows."""
    made: dict[TransformerConfig, MaskGIT] = {}  # the tokenizer is the same at every point
    for point in points:
        if point.config.transformer not in made:
            model = models.random_model(point.config)
            made[point.config.transformer] = models.in_mode(model, options.mode, options.device)
    classes = models.NewClasses(points[0].config)
    clocks = {
        point.value: work(made[point.config.transformer], point, classes, options.device) for point in points
    }
    times = timing.in_turns(clocks, options.rounds)
    for point in points:
        found = timing.spread(times[point.value])
        gflop = flops.generate(point.config, point.steps, point.batch) / 1e9
        yield {
            "axis": axis,
            "value": point.value,
            "device": options.device,
            "mode": options.mode,
            "batch": point.batch,
            "steps": point.steps,
            **found,
            "seconds_per_image": found["seconds"] / point.batch,
            "images_per_second": point.batch / found["seconds"],
            "gflop": gflop,
            "gflop_per_s": gflop / found["seconds"],
        }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="256", choices=list(models.SIZES))
    parser.add_argument("--mode", default="eager", choices=list(models.MODES))
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=AXES)
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 2, 4, 8, 12, 16])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    record: dict[str, Any] = {"environment": timing.environment(options.device), "rows": []}
    for axis, points in axes(options).items():
        for row in rows_of(axis, points, options):
            record["rows"].append(row)
            print(
                f"{axis:10} {row['value']:24} {row['seconds_per_image']:8.3f} s an image "
                f"{row['gflop_per_s']:9.1f} GFLOP/s",
                flush=True,
            )
    if options.json:
        timing.write_json(options.json, record)


if __name__ == "__main__":
    main()
