"""Whether the search for copies finds training images that were planted among a model's samples.

    maskgit pack DATA train --size 32 …          # the bundled model's data: CIFAR-10, both parts
    python benchmarks/planted_copies.py --train TRAIN --test TEST [--model cifar10] [--num-training 10000] [--json FILE]

Twenty training images are changed in one way (as they are, brighter, mirrored, shifted, cropped, as JPEG, or through the
model's tokenizer, which is what a model that knows an image by heart returns) and put among samples. It prints how many are
flagged, how many stand among the first 24 shown, and how many training images are the right ones; and the shares
of samples and of real test images that are flagged without a copy among them.
"""

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from maskgit import MaskGIT
from maskgit.data.picture_sets import Pictures, as_floats, open_pictures
from maskgit.evaluation.metrics.copies import SUSPICIOUS
from maskgit.evaluation.networks.features import FeatureNet, load_feature_net
from maskgit.evaluation.runs.sampling import measured, rebuild
from maskgit.evaluation.scores.memorisation import NUM_NEAREST, Gallery
from maskgit.images import to_uint8

PLANTED = 20
Images = np.ndarray


def jpeg(image: Images, quality: int = 50) -> Images:
    """Return an image as JPEG keeps it."""
    data = io.BytesIO()
    Image.fromarray(image).save(data, "JPEG", quality=quality)
    return np.array(Image.open(data).convert("RGB"))


def cropped(image: Images) -> Images:
    """Return the middle of an image without a sixteenth at each side, enlarged."""
    height, width = image.shape[:2]
    edge = height // 16
    middle = Image.fromarray(image[edge : height - edge, edge : width - edge])
    return np.array(middle.resize((width, height), Image.Resampling.BICUBIC))


def shifted(image: Images) -> Images:
    """Return an image moved by a sixteenth down and right; the border repeats."""
    by = image.shape[0] // 16
    return np.pad(image, ((by, 0), (by, 0), (0, 0)), "edge")[: image.shape[0], : image.shape[1]]


CHANGES: dict[str, Callable[[Images], Images]] = {
    "as it is": lambda image: image,
    "brighter": lambda image: np.clip(image.astype(int) + 25, 0, 255).astype(np.uint8),
    "mirrored": lambda image: image[:, ::-1],
    "shifted": shifted,
    "cropped": cropped,
    "JPEG, quality 50": jpeg,
}


class Search:
    """Samples, real images and planted copies, searched for training images."""

    def __init__(self, gallery: Gallery, net: FeatureNet, samples: Images) -> None:
        """Take what is searched and the samples, uint8 (N, H, W, 3), among which copies are planted."""
        self.gallery, self.net, self.samples = gallery, net, samples
        self.features = self.measure(samples)

    def measure(self, images: Images) -> np.ndarray:
        """Return the features of images, float32 (N, D)."""
        parts = [
            measured(self.net, as_floats(images[i : i + 64]))["pooled"] for i in range(0, len(images), 64)
        ]
        return np.concatenate(parts)

    def flagged(self, images: Images, features: np.ndarray) -> float:
        """Return the share of images that look like copies."""
        found = self.gallery.search(features)[0]
        return float((self.gallery.suspicion(found, lambda row: images[row]) < SUSPICIOUS).mean())

    def plant(self, copies: Images, rows: np.ndarray) -> dict[str, int]:
        """Return how many copies of gallery rows are flagged, shown first, and found to be of the right image."""
        images = np.concatenate([copies, self.samples[: -len(copies)]])
        features = np.concatenate([self.measure(copies), self.features[: -len(copies)]])
        found = self.gallery.search(features)[0]
        suspicions = self.gallery.suspicion(found, lambda row: images[row])
        first = np.argsort(suspicions, kind="stable")[:NUM_NEAREST]
        return {
            "flagged": int((suspicions[: len(copies)] < SUSPICIOUS).sum()),
            "among the first 24": int((first < len(copies)).sum()),
            "right image": int((found.rows[: len(copies), 0] == rows).sum()),
        }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", required=True)
    parser.add_argument("--test", required=True)
    parser.add_argument("--model", default="cifar10")
    parser.add_argument("--num-training", type=int, default=10_000)
    parser.add_argument("--num-samples", type=int, default=500, help="with the planted ones")
    parser.add_argument("--seed", type=int, default=1000, help="of the samples")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    train, test = open_pictures(options.train), open_pictures(options.test)
    model, net = MaskGIT.from_pretrained(options.model), load_feature_net()
    asked = torch.arange(options.num_samples) % model.config.transformer.num_classes
    samples = to_uint8(model.generate(asked.tolist(), seed=options.seed, batch_size=50).images)

    def rebuilt(images: Images) -> Images:
        return rebuild(model.tokenizer, as_floats(images))[0]

    numbers = np.arange(options.num_training) * len(train) // options.num_training
    pixels = read(train, numbers)
    search = Search(gallery_of(train, numbers, pixels, net, rebuilt), net, samples)
    found = table(search, pixels, rebuilt)
    real = read(test, np.arange(min(2000, len(test))))
    alarms = {
        "samples": search.flagged(samples, search.features),
        "real test images": search.flagged(real, search.measure(real)),
    }
    for name, row in found.items():
        print(f"{name:20} " + "  ".join(f"{key} {value}" for key, value in row.items()))
    print(f"flagged without planted copies: {alarms}")
    if options.json:
        record = {name: getattr(options, name) for name in ("model", "num_training", "num_samples", "seed")}
        options.json.write_text(json.dumps(record | {"planted": found, "flagged": alarms}, indent=1) + "\n")


def read(data: Pictures, numbers: np.ndarray) -> Images:
    """Return the images of some numbers, uint8 (n, H, W, 3)."""
    return data.read(numbers.tolist()).images


def gallery_of(
    data: Pictures,
    numbers: np.ndarray,
    pixels: Images,
    net: FeatureNet,
    rebuilt: Callable[[Images], Images],
) -> Gallery:
    """Return the gallery of images and their reconstructions."""
    plain, through = [], []
    for start in range(0, len(pixels), 64):
        part = pixels[start : start + 64]
        plain.append(measured(net, as_floats(part))["pooled"])
        through.append(measured(net, as_floats(rebuilt(part)))["pooled"])
    arrays = {"pooled": np.concatenate(plain), "numbers": numbers}
    return Gallery(data, arrays, {"pooled": np.concatenate(through)}, rebuilt)


def table(
    search: Search, pixels: Images, rebuilt: Callable[[Images], Images], seed: int = 0
) -> dict[str, dict[str, int]]:
    """Return what `Search.plant` says of twenty gallery images, drawn by the seed, by how they were changed."""
    rows = np.random.default_rng(seed).permutation(len(pixels))[:PLANTED]
    copies = {name: np.stack([change(image) for image in pixels[rows]]) for name, change in CHANGES.items()}
    copies["reconstructed"] = rebuilt(pixels[rows])
    return {name: search.plant(images, rows) for name, images in copies.items()}


if __name__ == "__main__":
    main()
