"""Scores move when images are damaged: each measure that ought to see it, and further with more of it.

Real images are crops of seven photographs, which stand for classes; samples are other crops of them.
"""

import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from maskgit.evaluation.metrics import (
    FeatureStatistics,
    authenticity,
    density_coverage,
    frechet_report,
    inception_score,
    kernel_distance,
    precision_recall,
    psnr,
    ssim,
)
from maskgit.evaluation.metrics.vectors import nearest_neighbours
from maskgit.evaluation.networks.features import load_feature_net

pytest.importorskip("efficientnet_lite_pytorch")
data = pytest.importorskip("skimage.data")

PHOTOGRAPHS = (
    "astronaut",
    "chelsea",
    "coffee",
    "rocket",
    "immunohistochemistry",
    "hubble_deep_field",
    "retina",
)
PER_CLASS = 16
SIZE = 64


def crops(seed):
    """Return PER_CLASS crops of each photograph: uint8 (N, SIZE, SIZE, 3), the classes one after another."""
    random = np.random.default_rng(seed)
    made = []
    for name in PHOTOGRAPHS:
        photograph = getattr(data, name)()
        height, width = photograph.shape[:2]
        # Small enough that the scene stays recognisable in a crop.
        scale = 160 / min(height, width)
        small = Image.fromarray(photograph).resize(
            (round(width * scale), round(height * scale)), Image.LANCZOS
        )
        for _ in range(PER_CLASS):
            left, top = (
                random.integers(0, small.width - SIZE + 1),
                random.integers(0, small.height - SIZE + 1),
            )
            made.append(np.asarray(small.crop((left, top, left + SIZE, top + SIZE))))
    return np.stack(made)


def as_tensor(images):
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def each(images, change):
    return np.stack([np.asarray(change(Image.fromarray(image))) for image in images])


def blur(images, radius):
    return each(images, lambda image: image.filter(ImageFilter.GaussianBlur(radius)))


def noise(images, sigma):
    random = np.random.default_rng(0)
    return (images + random.normal(0, sigma, images.shape)).round().clip(0, 255).astype(np.uint8)


def jpeg(images, quality):
    def compressed(image):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return each(images, compressed)


DAMAGE = {"blur": (blur, (0.7, 1.5, 3)), "noise": (noise, (8, 20, 50)), "jpeg": (jpeg, (60, 20, 5))}


@pytest.fixture(scope="module")
def net():
    return load_feature_net(size=64)


@pytest.fixture(scope="module")
def real(net):
    return net(as_tensor(crops(0)))


@pytest.fixture(scope="module")
def samples(net):
    images = crops(1)
    return images, net.outputs(as_tensor(images))


# Few enough that the covariances of the few images are not singular, and roots are quick.
PROJECTION = np.linalg.qr(np.random.default_rng(0).normal(size=(1280, 48)))[0]


def frechet(real, features):
    sides = []
    for x in (real.numpy() @ PROJECTION, features.numpy() @ PROJECTION):
        statistics = FeatureStatistics(x.shape[1])
        statistics.update(x)
        sides.append(statistics.gaussian())
    return frechet_report(*sides).distance


def scores(real, features):
    return {
        "frechet": frechet(real, features),
        "kernel": kernel_distance(real, features, subsets=20, subset_size=50).mean,
        "precision": precision_recall(real, features).precision,
        "coverage": density_coverage(real, features).coverage,
    }


def rises(values):
    return all(after > before for before, after in pairwise(values))


@pytest.mark.parametrize("kind", DAMAGE)
def test_worse_images_have_worse_scores(net, real, samples, kind):
    change, amounts = DAMAGE[kind]
    images, clean = samples
    damaged = [change(images, amount) for amount in amounts]
    rows = [scores(real, clean.pooled)] + [scores(real, net(as_tensor(x))) for x in damaged]
    assert rises([row["frechet"] for row in rows])
    assert rises([row["kernel"] for row in rows])
    assert rises([-row["coverage"] for row in rows])
    # Much noise draws all features together, between the real ones, which precision takes for good.
    assert rises([-rows[i]["precision"] for i in (0, -1)])
    pairs = [(as_tensor(images), as_tensor(x)) for x in damaged]
    assert rises([-psnr(*pair).mean() for pair in pairs])
    assert rises([-ssim(*pair).mean() for pair in pairs])


def test_losing_classes_is_seen_by_the_measures_of_variety(real, samples):
    _, clean = samples
    rows, inception = [], []
    for classes in (7, 4, 2, 1):
        kept = torch.arange(len(PHOTOGRAPHS) * PER_CLASS) % (classes * PER_CLASS)
        features = clean.pooled[kept]
        rows.append(scores(real, features) | {"recall": precision_recall(real, features).recall})
        inception.append(inception_score(clean.logits[kept], splits=1).mean)
    assert rises([row["frechet"] for row in rows])
    assert rises([row["kernel"] for row in rows])
    assert rises([-row["recall"] for row in rows])
    assert rises([-row["coverage"] for row in rows])
    assert rises([-score for score in inception])
    # What is left is as good as before.
    assert rows[-1]["precision"] > 0.8 * rows[0]["precision"]


def test_copies_of_training_images_are_seen_by_authenticity_and_by_nothing_else(real, samples):
    _, clean = samples
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(real)))
    rows = []
    for share in (0.0, 0.3, 0.6, 1.0):
        copied = order[: round(share * len(real))]
        features = clean.pooled.clone()
        features[copied] = real[copied]
        nearest = nearest_neighbours(features, real).distances
        rows.append((authenticity(real, features), np.median(nearest), frechet(real, features)))
    assert rises([-authentic for authentic, _, _ in rows])
    assert rows[-1][0] == 0
    assert rows[-1][1] == 0 < rows[0][1]
    # The Fréchet distance takes copies for the better images.
    assert rises([-distance for _, _, distance in rows])
