"""Scores of the bundled model, as its card reports them.

    maskgit pack DATA train --size 32 …          # CIFAR-10, both parts
    python benchmarks/bundled_model.py --train TRAIN --test TEST --out DIR [--num-images 5000]

A classifier is trained on the real training images alone and must pass 85 % of the test images; then samples of
all classes in equal shares, with the model's own sampler settings, are asked whether they show their class.
EffNet-FD (a Fréchet distance on EfficientNet-Lite0's features: not an FID) is given against all test images for
the samples, for the tokenizer's reconstructions of test images, and for as many real training images. The nearest
training images of some samples (in feature space) show whether the model copies.

Writes DIR/scores.json, DIR/samples.png, DIR/reconstructions.png and DIR/neighbours.png.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from classifier import classify, train_classifier
from maskgit import MaskGIT, images
from maskgit.data.image_cache import ImageCache
from maskgit.evaluation.metrics import FeatureStatistics, codebook_usage, frechet_distance, psnr, ssim
from maskgit.evaluation.metrics.vectors import nearest_neighbours
from maskgit.evaluation.networks.features import FeatureNet, load_feature_net

MIN_ACCURACY = 0.85


def as_images(array: np.ndarray) -> Tensor:
    """Turn uint8 (N, H, W, 3) into float (N, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(array)).movedim(-1, 1).float() / 255


def features_of(net: FeatureNet, pictures: Tensor, name: str) -> Tensor:
    """Return features (N, D), in batches."""
    pieces = tqdm(pictures.split(250), desc=name, leave=False, disable=None)
    return torch.cat([net(piece).cpu() for piece in pieces])


def distance(a: Tensor, b: Tensor) -> float:
    """Return the Fréchet distance of two sets of features."""
    statistics = []
    for features in (a, b):
        statistics.append(FeatureStatistics(features.shape[1]))
        statistics[-1].update(features)
    first, second = statistics
    return frechet_distance(first.mean, first.covariance, second.mean, second.covariance)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="cifar10")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num-images", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--classifier", type=Path, help="file of the classifier's weights, made if missing")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=NUMBER", help="sampler settings to try")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    train, test = ImageCache.open(options.train), ImageCache.open(options.test)
    model = MaskGIT.from_pretrained(options.model)
    settings = {key: json.loads(value) for key, value in (text.split("=") for text in options.set)}
    sampler = model.sampler_config(**settings)
    scores: dict = {"sampler": sampler.to_dict(), "seed": options.seed, "num_images": options.num_images}

    real, labels = as_images(test.images), torch.from_numpy(np.array(test.labels)).long()
    classifier = trained(options, train)
    scores["classifier_accuracy"] = float((classify(classifier, real).argmax(1) == labels).float().mean())
    if scores["classifier_accuracy"] < MIN_ACCURACY:
        raise SystemExit(
            f"The classifier passes {scores['classifier_accuracy']:.1%}, below {MIN_ACCURACY:.0%}."
        )

    num_classes = model.config.transformer.num_classes
    asked = torch.arange(options.num_images) % num_classes
    start = time.perf_counter()
    made = model.generate(asked.tolist(), seed=options.seed, batch_size=options.batch_size, **settings).images
    scores["images_per_second"] = options.num_images / (time.perf_counter() - start)
    agreed = (classify(classifier, made).argmax(1) == asked).float()
    scores["agreement"] = float(agreed.mean())
    names = model.class_names or [str(i) for i in range(num_classes)]
    scores["agreement_by_class"] = {
        names[c].split(",")[0]: float(agreed[asked == c].mean()) for c in range(num_classes)
    }
    print(json.dumps(scores, indent=2))

    tokens = torch.cat([model.tokenizer.encode(batch) for batch in real.split(250)])
    rebuilt = torch.cat([model.tokenizer.decode(batch).clamp(0, 1) for batch in tokens.split(250)])
    scores["reconstruction_psnr"] = float(psnr(rebuilt, real).mean())
    scores["reconstruction_ssim"] = float(ssim(rebuilt, real).mean())
    scores["code_usage"] = codebook_usage(
        tokens.flatten().bincount(minlength=model.vocabulary.num_codes).numpy()
    )
    net = load_feature_net("effnet-lite0")
    chosen = np.sort(np.random.default_rng(0).permutation(len(train))[: options.num_images])
    expected = features_of(net, real, "test images")
    known = features_of(net, as_images(train.images[chosen]), "training images")
    seen = features_of(net, made, "samples")
    scores["effnet_fd"] = {
        "samples": distance(seen, expected),
        "reconstructions": distance(
            features_of(net, rebuilt[: options.num_images], "reconstructions"), expected
        ),
        "real": distance(known, expected),
    }
    (options.out / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    print(json.dumps(scores, indent=2))

    images.save_png(
        options.out / "samples.png",
        images.contact_sheet(made[: 10 * num_classes], columns=num_classes, scale=3),
    )
    pairs = torch.stack([real[:20], rebuilt[:20]], dim=1).flatten(0, 1)
    images.save_png(options.out / "reconstructions.png", images.contact_sheet(pairs, columns=10, scale=3))
    near = nearest_neighbours(seen[:16], known, k=3).indices
    rows = [
        torch.cat([made[i : i + 1], as_images(train.images[chosen[np.asarray(near[i])]])]) for i in range(16)
    ]
    images.save_png(options.out / "neighbours.png", images.contact_sheet(torch.cat(rows), columns=8, scale=3))


def trained(options: argparse.Namespace, train: ImageCache) -> torch.nn.Module:
    """Return the classifier, read from its file if there is one."""
    from classifier import SmallResNet

    if options.classifier and options.classifier.exists():
        net = SmallResNet(train.num_classes).eval()
        net.load_state_dict(torch.load(options.classifier, weights_only=True))
        return net
    net = train_classifier(train.images, train.labels, num_classes=train.num_classes, epochs=options.epochs)
    if options.classifier:
        torch.save(net.state_dict(), options.classifier)
    return net


if __name__ == "__main__":
    main()
