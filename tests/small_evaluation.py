"""An evaluation of a second: the tiny golden model, a feature net of a few numbers, forty real images.

As a program, `python small_evaluation.py OUT [SECONDS]`, it is one of the processes that share the work, of
which each unit takes SECONDS longer.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch

from maskgit.convert import load_official
from maskgit.data.picture_sets import Batch
from maskgit.evaluation.networks.features import FeatureNet, Features
from maskgit.evaluation.runs.evaluate import EvaluationConfig, SampleEvaluation
from maskgit.evaluation.runs.sampling import SampleConfig
from maskgit.evaluation.scores.references import Reference

GOLDEN = Path(__file__).parent / "golden"
DIM = 6


def toy_net(device: str = "cpu", seed: int = 0) -> FeatureNet:
    """Return a net whose features are squashed mixtures of an image's blocks."""
    mix = torch.randn(48, DIM, generator=torch.Generator().manual_seed(seed)).to(device)

    def compute(images: torch.Tensor) -> Features:
        blocks = torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)
        return Features(torch.tanh(blocks @ mix), spatial=blocks[:, :5])

    return FeatureNet("Toy", DIM, 4, "average", f"{seed}" * 64, compute, mix.device)


class ArrayPictures:
    """Real images in memory; those whose numbers are in `bad` cannot be read."""

    def __init__(self, images, labels=None, bad=(), max_bad_share=0.01, class_names=None):
        self.images, self.bad, self.max_bad_share = images, set(bad), max_bad_share
        self.labels = np.full(len(images), -1, np.int32) if labels is None else np.asarray(labels, np.int32)
        self.name, self.fingerprint = "arrays", f"{images.astype(np.int64).sum():064}"
        self.resolution = images.shape[1:3]
        self.num_classes = 0 if labels is None else int(max(labels)) + 1
        self.class_names, self.left_out = class_names, ()

    def __len__(self):
        return len(self.images)

    def read(self, numbers):
        good = np.array([n for n in numbers if n not in self.bad], np.int64)
        skipped = [f"image {n}: it is torn" for n in numbers if n in self.bad]
        return Batch(self.images[good], self.labels[good], good, skipped)

    def count_labels(self):
        return np.bincount(self.labels, minlength=self.num_classes)


def real_images(count=40, seed=0, side=32):
    """Return smooth random images with labels, of which class c is brightest at c tenths."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)
    return ArrayPictures(coarse.repeat(side // 4, 1).repeat(side // 4, 2), np.arange(count) % 10)


def evaluation(model, *, num_images=24, training=True, **changes) -> SampleEvaluation:
    """Return the evaluation, with fields of `SampleConfig` and of `SampleEvaluation` in place of its own."""
    pictures = real_images()
    own = {key: changes.pop(key) for key in ("labels", "seed", "unit_size", "keep_images") if key in changes}
    images = SampleConfig(num_images=num_images, batch_size=4, **({"unit_size": 4} | own))
    settings = {
        "model": model,
        "name": "tiny",
        "weights": {"tokenizer": "a" * 64, "transformer": "b" * 64},
        "net": toy_net(),
        "features": "toy",
        "reference": Reference("real images", None, pictures, pictures.fingerprint),
        "images": images,
        "sampler": {"steps": 2},
        "config": EvaluationConfig(splits=2, num_training=30, curve_images=8, num_examples=1),
        "training": real_images(seed=1) if training is True else training or None,
    }
    return SampleEvaluation(**(settings | changes))


def main() -> None:
    """Take part in an evaluation: its folder, seconds to wait before each batch, and what ends all work once it is there."""
    torch.set_num_threads(1)
    pause = float(sys.argv[2]) if len(sys.argv) > 2 else 0.0
    end = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    model = load_official(GOLDEN / "tiny_tokenizer.msgpack", GOLDEN / "tiny_transformer.msgpack")
    generate = model.generate

    def slowly(*arguments, **settings):
        time.sleep(600 if end is not None and end.exists() else pause)
        return generate(*arguments, **settings)

    model.generate = slowly
    print(evaluation(model).run(sys.argv[1]))


if __name__ == "__main__":
    main()
