"""How fast images are scored: each part of `maskgit evaluate` in images a second, beside generation itself.

    python benchmarks/evaluate_throughput.py [--model cifar10] [--images 128] [--scored 5000] [--json FILE]

Features, the 8-bit rounding and the committing of units are timed on the model's own samples; the metrics on
random features, whose values do not change the time. It prints what scoring adds to generating, and how
much faster a split's Fréchet distance is than the whole one.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskgit import MaskGIT
from maskgit.data.picture_sets import as_floats
from maskgit.evaluation.metrics import FeatureStatistics, frechet_report, kernel_distance, precision_recall
from maskgit.evaluation.metrics.vectors import nearest_neighbours
from maskgit.evaluation.networks.features import BUNDLED_NETS, load_feature_net
from maskgit.evaluation.runs.sampling import SampleConfig, Samples, measured
from maskgit.evaluation.scores.scores import split_distance
from maskgit.foundation.devices import choose_device
from maskgit.foundation.units import Units


def seconds(work: Callable[[], Any], runs: int) -> float:
    """Return the least wall time of a few runs."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def images_a_second(options: argparse.Namespace, model: MaskGIT) -> dict[str, float]:
    """Return the images a second of generation, of features, and of whole units."""
    net = load_feature_net(options.features, options.device)
    config = SampleConfig(num_images=options.images, batch_size=options.batch_size, unit_size=options.images)
    work = Samples(model, net, config, weights={}, sampler=model.sampler_config())
    made = work.pictures(0, options.images)
    rates = {
        "generated": seconds(lambda: work.pictures(0, options.images), options.runs),
        "through the feature net": seconds(lambda: measured(net, as_floats(made)), options.runs),
    }
    times = []
    for _ in range(options.runs):
        with tempfile.TemporaryDirectory() as folder:
            units = Units(Path(folder) / "work", work)
            times.append(seconds(units.run, 1))
    rates["as finished units"] = min(times)
    return {name: options.images / value for name, value in rates.items()}


def metric_seconds(options: argparse.Namespace, dim: int) -> dict[str, float]:
    """Return how long each metric takes for as many images as are to be scored."""
    rng = np.random.default_rng(0)
    count = options.scored
    samples = rng.normal(size=(count, dim)).astype(np.float32)
    real = rng.normal(size=(count, dim)).astype(np.float32)
    statistics = FeatureStatistics(dim)
    statistics.update(real)
    reference = statistics.gaussian()

    def whole() -> float:
        ours = FeatureStatistics(dim)
        ours.update(samples)
        return frechet_report(reference, ours.gaussian()).distance

    split = samples[: count // 10]
    return {
        "Fréchet distance": seconds(whole, options.runs),
        "Fréchet distance of a tenth": seconds(lambda: split_distance(split, reference), options.runs),
        "kernel distance": seconds(
            lambda: kernel_distance(real, samples, subset_size=min(1000, count)), options.runs
        ),
        "precision and recall": seconds(lambda: precision_recall(real, samples), 1),
        "nearest neighbours": seconds(lambda: nearest_neighbours(samples, real, k=10), 1),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="cifar10")
    parser.add_argument("--features", default="effnet-lite0", choices=BUNDLED_NETS)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--scored", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.device = choose_device(options.device)
    model = MaskGIT.from_pretrained(options.model, device=options.device)
    rates = images_a_second(options, model)
    metrics = metric_seconds(options, load_feature_net(options.features).dim)
    machine = (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} of {os.cpu_count()} threads"
    )
    print(f"{options.model} with {options.features} on {options.device} ({machine})")
    for name, rate in rates.items():
        print(f"  {rate:8.1f} images/s {name}")
    print(f"metrics of {options.scored:,} images against as many:")
    for name, value in metrics.items():
        print(f"  {value:8.2f} s {name}")
    ratios = {
        "a finished unit takes / generating alone": rates["generated"] / rates["as finished units"],
        "all metrics / generating the images": sum(metrics.values()) * rates["generated"] / options.scored,
        "whole Fréchet distance / that of a tenth": metrics["Fréchet distance"]
        / metrics["Fréchet distance of a tenth"],
    }
    for name, value in ratios.items():
        print(f"  {value:8.2f} × {name}")
    if options.json:
        row = {"device": str(options.device), "machine": machine, "images_a_second": rates}
        options.json.write_text(json.dumps(row | {"seconds": metrics, "ratios": ratios}, indent=2) + "\n")


if __name__ == "__main__":
    main()
