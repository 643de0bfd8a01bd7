"""How often a score's 95 % interval holds the score's mean over other samples: 0.93 to 0.97 is as it should be.

    maskgit stats data/train --keep 20000 --out pool.npz        # or: samples of a model
    maskgit stats data/test --keep 2000 --out reference.npz
    python benchmarks/coverage.py --pool pool.npz --reference reference.npz [--trials 300] [--json FILE]

Many sets of `--num-images` are drawn from the pool's features without replacement, brought down to `--dim` dimensions by
a random projection, and scored against the reference; the mean over all sets is what an interval should hold. `--shift`
moves the pool away from the reference, as a model's samples are. Classes are drawn in equal numbers. Reconstructions are
the pool's features with noise, whose size stands for what is measured of pairs of images (PSNR, SSIM, LPIPS, the feature
distance and the seam ratio of edits); codes are drawn from a law of a few frequent and many rare ones; the images nearest
to a training image, one in fifty, stand for copies.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskgit.evaluation.metrics import FeatureStatistics, Gaussian, authenticity, wilson_interval
from maskgit.evaluation.metrics.vectors import nearest_neighbours
from maskgit.evaluation.networks.features import FeatureNet, Features
from maskgit.evaluation.scores.classwise import ClassJudge, Labelled
from maskgit.evaluation.scores.edits import EditScore, edit_scores
from maskgit.evaluation.scores.names import Names, Score
from maskgit.evaluation.scores.scores import distances, manifolds, reconstruction_scores
from maskgit.evaluation.scores.statistics import ImageStatistics, read_statistics

CODES, UNITS = 512, 20


def statistics_of(features: np.ndarray, labels: np.ndarray, net: FeatureNet) -> ImageStatistics:
    """Return the statistics of features (N, D) and labels (N,)."""
    seen = FeatureStatistics(features.shape[1])
    seen.update(features)
    return ImageStatistics(seen.gaussian(), None, net.identity, (32, 32), features, labels)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pool", type=Path, required=True, help="statistics with features and labels")
    parser.add_argument("--reference", type=Path, required=True, help="the same of the reference")
    parser.add_argument("--num-images", type=int, default=400)
    parser.add_argument("--dim", type=int, default=48)
    parser.add_argument("--shift", type=float, default=0.5, help="in standard deviations of a dimension")
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    pool, real = read_statistics(options.pool), read_statistics(options.reference)
    rows = measure(Labelled(*known(pool)), Labelled(*known(real)), options)
    print(f"{'score':18} {'mean':>10} {'spread':>10} {'half width':>10} {'holds':>7}")
    for name, row in rows.items():
        print(f"{name:18} {row['mean']:10.4g} {row['spread']:10.4g} {row['half']:10.4g} {row['holds']:7.3f}")
    if options.json:
        record = {name: getattr(options, name) for name in ("num_images", "dim", "shift", "trials", "seed")}
        options.json.write_text(json.dumps(record | {"scores": rows}, indent=1) + "\n")


def known(statistics: ImageStatistics) -> tuple[np.ndarray, np.ndarray]:
    """Return features and labels, which must be there."""
    if statistics.features is None or statistics.labels is None:
        raise SystemExit("The statistics must hold features and labels: make them with maskgit stats --keep.")
    return statistics.features, statistics.labels


def measure(pool: Labelled, real: Labelled, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return mean, spread, mean half width and share of intervals that hold the mean, by score."""
    rng, dim = np.random.default_rng(options.seed), options.dim
    mix = rng.normal(size=(pool.features.shape[1], dim)) / np.sqrt(pool.features.shape[1])
    theirs = (real.features @ mix).astype(np.float32)
    ours = (pool.features @ mix).astype(np.float32)
    ours = ours + options.shift * theirs.std(0).astype(np.float32) * (np.arange(dim) % 2)
    net = FeatureNet("Coverage", dim, 32, "none", "0" * 64, lambda x: Features(x), torch.device("cpu"))
    names, half = Names("inception", net), len(theirs) // 2
    reference = statistics_of(theirs[:half], real.labels[:half], net)
    reference = replace(reference, spatial=Gaussian(theirs[:half, :9].mean(0), np.cov(theirs[:half, :9].T)))
    clip, embeddings = Names("clip", net), statistics_of(unit(theirs[:half]), real.labels[:half], net)
    training, judge = theirs[half:], ClassJudge(reference, Labelled(theirs[half:], real.labels[half:]))
    near = nearest_neighbours(ours, training).distances[:, 0]
    copied = near < np.quantile(near, 0.02)
    by_class = [np.flatnonzero(pool.labels == label) for label in np.unique(pool.labels)]
    law = 1 / (1 + np.arange(CODES)) ** 2
    found: dict[str, list[tuple[float, Any]]] = {}
    for _ in range(options.trials):
        share = options.num_images // len(by_class)
        rows = np.concatenate([rng.choice(own, share, replace=False) for own in by_class])
        made, labels = ours[rows], pool.labels[rows]
        arrays = {"pooled": made, "spatial": made[:, :9], "logits": 3 * made[:, :10]}
        scores = distances(arrays, reference, names, strata=labels)[0]
        scores += manifolds(made, reference, names, device=net.device, strata=labels)
        scores.append(judge.score(judge.agrees(made, labels), names, labels))
        scores += [
            s
            for s in distances({"pooled": unit(made)}, embeddings, clip, strata=labels)[0]
            if s.name == "cmmd"
        ]
        scores.append(authentic(training, made, names))
        hits = int(copied[rows].sum())
        scores.append(
            names.score("copies", hits / len(rows), wilson_interval(hits, len(rows)), num_images=len(rows))
        )
        noise = rng.normal(0, 0.5 * ours.std(0), made.shape)
        sizes = np.square(noise).sum(1)
        pairs = {
            "original_pooled": made,
            "pooled": made + noise,
            "psnr": -10 * np.log10(sizes),
            "ssim": 1 / (1 + sizes / sizes.mean()),
            "lpips": sizes,
            "codes": rng.multinomial(64 * len(rows) // UNITS, law / law.sum(), UNITS),
        }
        scores += reconstruction_scores(pairs, names)[0]
        scores += edited(made, made + noise, sizes, names)
        for score in scores:
            if score.interval is not None:
                value = score.values["edits"] if isinstance(score, EditScore) else score.value
                found.setdefault(score.name, []).append((value, score.interval))
    return {name: summary(values) for name, values in found.items()}


def unit(features: np.ndarray) -> np.ndarray:
    """Return features (N, D) at length 1, as CLIP's embeddings are."""
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def edited(real: np.ndarray, made: np.ndarray, sizes: np.ndarray, names: Names) -> list[EditScore]:
    """Return the scores of edits that have intervals of their own, of features (N, D) and other values (N,)."""
    whole = {"region_others": real}
    for state, features in (("real", real), ("reconstructions", made), ("edits", made)):
        whole |= {f"region_{state}": features, f"whole_{state}": features, f"seam_{state}": sizes}
    arrays = {name: values[:, None] for name, values in whole.items()} | {"label": np.full(len(real), -1)}
    scores = edit_scores(arrays, ["any"], names, None)[0].scores
    return [score for score in scores if score.interval is not None]


def authentic(training: np.ndarray, made: np.ndarray, names: Names) -> Score:
    """Return the authenticity of samples with its interval."""
    share, total = authenticity(training, made), len(made)
    return names.score("authenticity", share, wilson_interval(round(share * total), total), num_images=total)


def summary(values: list[tuple[float, Any]]) -> dict[str, float]:
    """Return what is said of one score's values and intervals."""
    mean = float(np.mean([value for value, _ in values]))
    return {
        "mean": mean,
        "spread": float(np.std([value for value, _ in values])),
        "half": float(np.mean([(interval.high - interval.low) / 2 for _, interval in values])),
        "holds": float(np.mean([interval.low <= mean <= interval.high for _, interval in values])),
    }


if __name__ == "__main__":
    main()
