"""Decoding policies side by side, as docs/samplers.md shows them.

    maskgit stats data/cifar10/test --out REFERENCE.npz
    python benchmarks/samplers.py --reference REFERENCE.npz --classifier FILE --out DIR [--num-images 2000] \\
        [--dtype bfloat16]

FILE is the classifier that benchmarks/bundled_model.py keeps. Every row makes the same number of images of all
classes from the same seed, with the model's own guidance and temperatures where the row does not say otherwise. Columns: steps asked for; network evaluations that an image
took (of two sequences each where there is guidance); EffNet-FD against all test images (a Fréchet distance on
EfficientNet-Lite0's features: not an FID); share of images that the classifier finds of their class; images/s of
processor time with the pixels, in turns (so: of one core, with OMP_NUM_THREADS=1 and without a GPU).

Rows are kept in DIR/rows.jsonl: the same command goes on. Writes DIR/table.md and DIR/order.png.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from classifier import SmallResNet, classify
from maskgit import MaskGIT, images
from maskgit.evaluation.networks.features import load_feature_net
from maskgit.evaluation.scores.statistics import Collector, compare, read_statistics
from maskgit.explain import step_map

SEED = 5000
ROWS: list[dict[str, Any]] = [
    {"policy": "confidence", "steps": 4},
    {"policy": "confidence", "steps": 8},
    {"policy": "confidence", "steps": 12},
    {"policy": "random", "steps": 12},
    {"policy": "halton", "steps": 12},
    {"policy": "mdlm", "steps": 16},
    {"policy": "remdm", "steps": 16, "policy_options": {"form": "rescale", "eta": 0.05}},
    {"policy": "entropy_bounded", "steps": 64, "policy_options": {"gamma": 20.0}},
    {"policy": "stable", "steps": 12, "policy_options": {"confidence": 0.1, "kl": 0.1}},
    {"policy": "moment", "steps": 12},
    {"policy": "self_critic", "steps": 5},
]
# For the picture, in the order of the rows of the table.
PICTURED = (
    "confidence",
    "random",
    "halton",
    "mdlm",
    "remdm",
    "entropy_bounded",
    "stable",
    "moment",
    "self_critic",
)


def named(row: dict[str, Any]) -> str:
    """Return a row's policy with its parameters."""
    options = ", ".join(f"{key} {value}" for key, value in row.get("policy_options", {}).items())
    return f"{row['policy']}" + (f" ({options})" if options else "")


def same(row: dict[str, Any], old: dict[str, Any]) -> bool:
    """Return whether a kept result is of a row's settings."""
    return all(old.get(key) == row.get(key) for key in ("policy", "steps", "policy_options"))


class Counted:
    """A transformer that counts how often it is asked for an image."""

    def __init__(self, model: MaskGIT) -> None:
        self.sequences = 0
        model.transformer.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: tuple, kwargs: dict) -> None:
        self.sequences += len(args[0])


def score(
    model: MaskGIT, counted: Counted, row: dict, options: argparse.Namespace, judge: "Judge"
) -> dict[str, Any]:
    """Make a row's images and score them."""
    asked = torch.arange(options.num_images) % model.config.transformer.num_classes
    collector = Collector(judge.net, keep=0)
    counted.sequences, right = 0, 0
    for start in range(0, len(asked), options.batch_size):
        labels = asked[start : start + options.batch_size]
        made = model.generate(
            labels, seed=SEED, first_index=start, batch_size=options.batch_size, **row
        ).images
        collector.add(made)
        right += int((classify(judge.classifier, made).argmax(1) == labels).sum())
    guided = 2 if model.sampler_config(**row).guides() else 1
    return row | {
        "evaluations": counted.sequences / guided / len(asked),
        "effnet_fd": compare(judge.reference, collector.finish()).pooled.distance,
        "agreement": right / len(asked),
    }


class Judge:
    """What scores images: a feature net, the statistics of real images, and a classifier."""

    def __init__(self, options: argparse.Namespace, num_classes: int) -> None:
        self.net = load_feature_net("effnet-lite0")
        self.reference = read_statistics(options.reference)
        self.classifier = SmallResNet(num_classes).eval()
        self.classifier.load_state_dict(torch.load(options.classifier, weights_only=True))


def speeds(model: MaskGIT, rows: list[dict[str, Any]], batch_size: int = 40, rounds: int = 4) -> list[float]:
    """Return images per second of processor time for each row, the best of rounds in which rows take turns."""
    best = [float("inf")] * len(rows)
    for turn in range(rounds):
        for i, row in enumerate(rows):
            before = time.process_time()
            model.generate([3] * batch_size, seed=turn, batch_size=batch_size, **row)
            # The first round only warms up.
            best[i] = min(best[i], time.process_time() - before) if turn else best[i]
    return [batch_size / seconds for seconds in best]


def picture(model: MaskGIT, path: Path, cell: int = 22) -> None:
    """Draw at which step each policy fixes each token: one image, and the mean over 64."""
    columns = []
    for policy in PICTURED:
        steps = 24 if policy in ("mdlm", "remdm") else 12
        made = model.generate([8] * 64, seed=2, batch_size=64, return_steps=True, policy=policy, steps=steps)
        assert made.trace is not None, "asked for"
        fixed, count = made.trace.fixed_at, made.trace.unknown.shape[1]
        mean = fixed.float().mean(0).round().long()
        columns.append((policy, [step_map(fixed[0], count, cell), step_map(mean, count, cell)]))
    side, gap, head = columns[0][1][0].width, 16, 34
    sheet = Image.new("RGB", (gap + len(columns) * (side + gap), head + 2 * (side + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (policy, maps) in enumerate(columns):
        left = gap + i * (side + gap)
        draw.text(
            (left + side / 2, head / 2), policy, "black", images.ImageFont.load_default(15), anchor="mm"
        )
        for j, made_map in enumerate(maps):
            sheet.paste(made_map, (left, head + j * (side + gap)))
    sheet.quantize(128).save(path, optimize=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows in Markdown."""
    lines = [
        "| policy | steps | evaluations | EffNet-FD | class agreement | images/s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| `{row['policy']}`{named(row)[len(row['policy']) :]} | {row['steps']} | {row['evaluations']:.1f} "
            f"| {row['effnet_fd']:.0f} | {row['agreement']:.1%} | {row['images_per_second']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="cifar10")
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--classifier", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num-images", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument(
        "--only", nargs="*", metavar="ROW", type=int, help="numbers of rows, for one of several runs"
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    kept = options.out / "rows.jsonl"
    done = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    model = MaskGIT.from_pretrained(options.model).to(dtype=getattr(torch, options.dtype))
    counted, judge = Counted(model), Judge(options, model.config.transformer.num_classes)
    for number, row in enumerate(ROWS):
        if options.only is not None and number not in options.only:
            continue
        if any(same(row, old) for old in done):
            continue
        found = score(model, counted, row, options, judge)
        done.append(found)
        with kept.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(json.dumps(found), flush=True)
    if options.only is not None:
        return
    done.sort(key=lambda old: next(i for i, row in enumerate(ROWS) if same(row, old)))
    for row, found in zip(done, speeds(model, ROWS), strict=True):
        row["images_per_second"] = found
    (options.out / "table.md").write_text(table(done))
    print(table(done))
    picture(model, options.out / "order.png")


if __name__ == "__main__":
    main()
