"""What reusing context features saves, and what it costs in quality.

    maskgit stats data/cifar10/test --out REFERENCE.npz
    python benchmarks/reuse.py --mode fast --batch 16 --quality REFERENCE.npz --json FILE
    python benchmarks/reuse.py --size 256 --steps 8 --json FILE

Rows of one number of steps are timed in turns, images with their pixels; on a CPU it is processor time, so that other
load counts little (with OMP_NUM_THREADS=1: of one core). `computed` is the share of positions that the
transformer computed, of those that full evaluations would. EffNet-FD is against all test images (a Fréchet distance on
EfficientNet-Lite0's features: not an FID), every row with the same seeds; equal tokens are shares of an image's, against
the same steps without reuse. Random weights (every size but `bundled`) are for times only.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import models
import timing
from maskgit import MaskGIT
from maskgit.evaluation.networks.features import FeatureNet, load_feature_net
from maskgit.evaluation.scores.statistics import Collector, ImageStatistics, compare, read_statistics

SEED = 5000


@dataclass
class Judge:
    """What images are scored by: features and real images' statistics, on so many images."""

    net: FeatureNet
    reference: ImageStatistics
    num_images: int
    batch: int


class Counted:
    """Counts positions that go through a model's first layer."""

    def __init__(self, model: MaskGIT) -> None:
        self.positions = 0
        for transformer in {model.transformer, model.local_transformer}:
            transformer.layers[0].mlp.activation.register_forward_pre_hook(self._count)

    def _count(self, module: Any, args: tuple) -> None:
        self.positions += args[0].shape[0] * args[0].shape[1]


def clocked(model: MaskGIT, steps: int, batch: int, classes: models.NewClasses) -> Callable[[], float]:
    """Return what makes one batch, of ever other classes, and returns its seconds."""

    def work() -> None:
        model.generate(classes.take(batch), steps=steps, seed=SEED, batch_size=batch)

    def processor() -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    return processor if model.device.type == "cpu" else timing.clock(work, model.device)


def judged(model: MaskGIT, steps: int, judge: Judge) -> tuple[float, torch.Tensor]:
    """Return the distance of a row's images from real ones, and their tokens."""
    labels = torch.arange(judge.num_images) % model.config.transformer.num_classes
    collector, tokens = Collector(judge.net, keep=0), []
    for made in model.generate_batches(labels, steps=steps, seed=SEED, batch_size=judge.batch):
        collector.add(made.images)
        tokens.append(made.tokens)
    return compare(judge.reference, collector.finish()).pooled.distance, torch.cat(tokens)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time and judge every row and return the record."""
    bundled = options.size == "bundled"
    plain = MaskGIT.from_pretrained() if bundled else models.random_model(models.SIZES[options.size]())
    by_reuse = {
        reuse: plain.optimize(options.mode, device=options.device, reuse=reuse) for reuse in options.reuse
    }
    classes = {reuse: models.NewClasses(plain.config) for reuse in options.reuse}
    counters = {reuse: Counted(model) for reuse, model in by_reuse.items()}
    judge = None
    if options.quality:
        net, reference = load_feature_net("effnet-lite0"), read_statistics(options.quality)
        judge = Judge(net, reference, options.num_images, options.quality_batch)
    rows = []
    for steps in options.steps:
        works = {
            str(reuse): clocked(model, steps, options.batch, classes[reuse])
            for reuse, model in by_reuse.items()
        }
        times = {name: timing.spread(t) for name, t in timing.in_turns(works, options.rounds).items()}
        full: dict[str, Any] = {}
        for reuse, model in by_reuse.items():
            counters[reuse].positions = 0
            works[str(reuse)]()
            row: dict[str, Any] = {"steps": steps, "reuse": reuse, "batch": options.batch}
            row |= {"positions": counters[reuse].positions} | times[str(reuse)]
            if judge is not None:
                row["effnet_fd"], tokens = judged(model, steps, judge)
                full.setdefault("tokens", tokens)
                row["equal_tokens"] = (tokens == full["tokens"]).float().mean().item()
            full.setdefault("row", row)
            row["computed"] = row["positions"] / full["row"]["positions"]
            row["speedup"] = full["row"]["seconds"] / row["seconds"]
            rows.append(row)
            print(told(row), flush=True)
    return {
        "environment": timing.environment(options.device),
        "size": options.size,
        "num_images": options.num_images if judge else None,
        "engine": by_reuse[1].engine.to_dict(),
        "rows": rows,
    }


def told(row: dict[str, Any]) -> str:
    """Return a row as a line."""
    line = f"{row['steps']:3} steps, reuse {row['reuse']:2}: {row['seconds'] / row['batch']:.4f} s an image, "
    line += f"{row['computed']:.0%} computed, {row['speedup']:.2f}×"
    return line + (f", EffNet-FD {row['effnet_fd']:.1f}" if "effnet_fd" in row else "")


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="bundled", choices=["bundled", *models.SIZES])
    parser.add_argument("--mode", default="exact", choices=[m for m in models.MODES if m != "eager"])
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 12, 16, 24])
    parser.add_argument("--reuse", type=int, nargs="+", default=[1, 2, 3], help="begins with 1")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quality", type=Path, metavar="REFERENCE", help="statistics of real images")
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--quality-batch", type=int, default=40)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.reuse[0] != 1:
        parser.error("--reuse begins with 1, which the others are held against.")
    if options.quality and options.size != "bundled":
        parser.error("Random weights have no quality; leave out --size or --quality.")
    record = measure(options)
    if options.json:
        timing.write_json(options.json, record)


if __name__ == "__main__":
    main()
