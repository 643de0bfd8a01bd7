"""Tokenizers and transformers side by side, at equal cost, as docs/recipe.md shows them.

    python benchmarks/recipe.py --train PACKED --test PACKED --out DIR [--minutes 60] [--arms NAME ...] [--seeds 0 1] \\
        [--num-images 2000]

An arm is a tokenizer and a transformer on its tokens; arms share tokenizers. Each of the two networks is trained for
`--minutes` of processor time, all threads together: some steps tell what a step takes, and the number of steps is kept,
so that a busy machine changes nothing. Decoding has equal compute too: as many steps as the first arm's 12 cost.
Images are equally many of all classes, guided, from the same seeds.

Everything goes on where it was stopped with the same command; finished arms are rows of DIR/rows.jsonl. Writes DIR/table.md.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from maskgit import MaskGIT, hub
from maskgit.checkpoints.weights import weights_fingerprint
from maskgit.data.image_cache import ImageCache
from maskgit.data.token_cache import TokenCache, write_token_cache
from maskgit.networks.config import TokenizerConfig, TransformerConfig
from maskgit.sampler.config import SamplerConfig
from maskgit.sampler.noise import uniform
from maskgit.training.tokenizer_config import TokenizerTrainingConfig
from maskgit.training.train_tokenizer import train_tokenizer
from maskgit.training.train_transformer import flops_per_image, train_transformer
from maskgit.training.transformer_config import TransformerTrainingConfig
from tables import markdown

# What differs from `tokenizer_run`: of the model, and of training.
Choice = tuple[dict[str, Any], dict[str, Any]]
BITS = {"quantizer": "bsq", "embedding_dim": 12, "codebook_size": 2**12}
TOKENIZERS: dict[str, Choice] = {
    "vq 1024": ({}, {}),
    "vq 4096": ({"codebook_size": 4096}, {}),
    "vq 4096, normalized": ({"codebook_size": 4096, "normalize_codes": True, "embedding_dim": 16}, {}),
    "simvq 4096": ({"quantizer": "simvq", "codebook_size": 4096}, {}),
    "ibq 4096": ({"quantizer": "ibq", "codebook_size": 4096}, {}),
    "fsq 4096": ({"quantizer": "fsq", "levels": (8, 8, 8, 8), "embedding_dim": 4, "codebook_size": 4096}, {}),
    "lfq 4096": (BITS | {"quantizer": "lfq"}, {}),
    "bsq 4096": (BITS, {}),
    "bsq 2^18": (BITS | {"embedding_dim": 18, "codebook_size": 2**18}, {"entropy_groups": 2}),
    "vq 1024, stem 2": ({"stem": 2, "channel_multipliers": (1, 2, 4)}, {}),
    "vq 1024, patchgan": (
        {},
        {"discriminator": "patchgan", "adversarial_loss": "hinge", "lecam_weight": 1e-3},
    ),
}
MODERN = {"block": "modern", "positions": "rotary", "conditioning": "adaln", "intermediate_size": 512}
TRANSFORMERS: dict[str, Choice] = {
    "official": ({}, {}),
    "modern": (MODERN, {}),
    "modern, class token": (MODERN | {"conditioning": "token"}, {}),
    "modern, registers": (MODERN | {"registers": 4}, {}),
    "modern, Muon": (MODERN, {"optimizer": "muon"}),
    "modern, 2 groups": (MODERN | {"groups": 2}, {}),
    "official, 2 groups": ({"groups": 2}, {}),
}
ARMS = [
    *((name, "official") for name in TOKENIZERS if name != "bsq 2^18"),
    *(("vq 1024", name) for name in TRANSFORMERS if name.startswith("modern") and "groups" not in name),
    *((name, f"{block}, 2 groups") for name in ("bsq 4096", "bsq 2^18") for block in ("modern", "official")),
    ("fsq 4096", "modern, 2 groups"),
]
STEPS, PROBE_STEPS, MASKS_STREAM = 12, 12, 91
SAMPLER = SamplerConfig(steps=STEPS, guidance_scale=2.0)


def tokenizer_run(args: argparse.Namespace, name: str, seed: int, out: Path) -> TokenizerTrainingConfig:
    """Return the run of a tokenizer but for its steps."""
    model, training = TOKENIZERS[name]
    shape = {"filters": 32, "num_res_blocks": 1, "channel_multipliers": (1, 1, 2, 4), "embedding_dim": 32}
    run = TokenizerTrainingConfig(
        out=str(out),
        data=str(args.train),
        test_data=str(args.test),
        model=TokenizerConfig(**(shape | model)),
        batch_size=32,
        seed=seed,
        learning_rate=1e-3,
        discriminator_learning_rate=2e-4,
        lr_schedule="cosine",
        warmup_steps=50,
        betas=(0.5, 0.99),
        max_gradient_norm=1.0,
        ema_decay=0.995,
        l2_weight=4.0,
        perceptual_depth=3,
        entropy_weight=0.02,
        adversarial_weight=0.01,
        discriminator_filters=32,
        usage_window=100,
        num_test_images=500,
        tracker="none",
    )
    return replace(run, **training)


def transformer_run(
    args: argparse.Namespace, name: str, seed: int, out: Path, tokens: Path, tokenizer: Path
) -> TransformerTrainingConfig:
    """Return the run of a transformer but for its steps; decoding costs what the first arm's does."""
    model, training = TRANSFORMERS[name]
    cache = TokenCache.open(tokens / "train")
    shape = {"hidden_size": 256, "num_layers": 8, "num_heads": 8, "intermediate_size": 768}
    shape |= {"num_classes": cache.num_classes, "grid_size": cache.grid_size}
    first = TransformerConfig(**shape, num_codes=1024)
    network = TransformerConfig(**(shape | model), num_codes=cache.num_codes)
    steps = max(1, round(STEPS * flops_per_image(first) / flops_per_image(network)))
    run = TransformerTrainingConfig(
        out=str(out),
        data=str(tokens / "train"),
        test_data=str(tokens / "test"),
        tokenizer=str(tokenizer),
        model=network,
        batch_size=64,
        seed=seed,
        learning_rate=1e-3,
        lr_schedule="cosine",
        warmup_steps=100,
        ema_decay=0.998,
        sampler=replace(SAMPLER, steps=steps),
        tracker="none",
    )
    return replace(run, **training)


def in_budget(run: Any, train: Callable[[Any], Path], minutes: float) -> tuple[Path, dict[str, float]]:
    """Train for some minutes of processor time; return the folder of the result, and what a step was found to take."""
    kept = Path(run.out).parent / f"{Path(run.out).name}.json"
    if not kept.exists():
        seconds = []
        with tempfile.TemporaryDirectory() as folder:
            for steps in (2, 2 + PROBE_STEPS):
                before = time.process_time()
                out = str(Path(folder) / str(steps))
                train(replace(run, out=out, steps=steps, test_data=None))
                seconds.append(time.process_time() - before)
        step = max(1e-3, (seconds[1] - seconds[0]) / PROBE_STEPS)
        steps = max(2, round(60 * minutes / step))
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"steps": steps, "images_per_second": run.batch_size / step}))
    plan = json.loads(kept.read_text())
    steps, often = plan["steps"], max(1, plan["steps"] // 10)
    changes = {"steps": steps, "evaluate_every": steps, "checkpoint_every": often, "keep_last": 1}
    if isinstance(run, TokenizerTrainingConfig):
        # The discriminator helps at the end; before, it costs time.
        changes |= {"adversarial_start": 3 * steps // 4}
    else:
        changes |= {"sample_every": steps}
    return train(replace(run, **changes)), plan


def tokens_of(args: argparse.Namespace, tokenizer: Path, out: Path) -> Path:
    """Write the tokens of both sets of images, and return their folder."""
    network = hub.load_tokenizer(tokenizer)
    for name, folder, views in (("train", args.train, "centre+flip"), ("test", args.test, "centre")):
        write_token_cache(
            ImageCache.open(folder),
            network,
            out / name,
            tokenizer_fingerprint=weights_fingerprint(network),
            num_codes=network.config.codebook_size,
            views=views,
        )
    return out


@torch.no_grad()
def bits_per_image(model: MaskGIT, tokens: TokenCache, num_images: int, draws: int = 4) -> float:
    """Return a bound on the bits that the model needs for an image's tokens, given its class.

    N times the mean cross-entropy of the masked tokens, their number uniform from 1 to N: the bound of an
    autoregressive model in a random order (Uria et al., arXiv 1310.1757), whatever the codes or their groups.
    """
    vocabulary, total = model.vocabulary, 0.0
    chosen = np.linspace(0, len(tokens) - 1, num_images).astype(np.int64)
    for i in chosen:
        codes = torch.from_numpy(tokens.take(np.array([i]), np.array([0])).astype(np.int64))
        labels = torch.from_numpy(tokens.labels[[i]].astype(np.int64)).expand(draws)
        sequence = vocabulary.sequence(labels, codes.expand(draws, -1, -1))
        numbers = uniform(
            0, torch.tensor([i * draws + d for d in range(draws)]), 0, MASKS_STREAM, vocabulary.num_tokens + 1
        )
        count = (numbers[:, :1] * vocabulary.num_tokens).floor() + 1
        masked = numbers[:, 1:].argsort(-1).argsort(-1) < count
        read = sequence.clone()
        read[:, 1:][masked] = vocabulary.mask
        logits = model.predict_logits(read)[:, 1:].log_softmax(-1)
        losses = -logits.gather(-1, sequence[:, 1:, None])[..., 0]
        means = (losses * masked).sum(-1) / count[:, 0]
        total += float(means.mean()) * vocabulary.num_tokens / math.log(2)
    return total / len(chosen)


def scores_of(out: Path, model: Path, reference: Path, *options: str) -> dict[str, Any]:
    """Evaluate, and return the scores by name, each with its interval."""
    command = [sys.executable, "-m", "maskgit", "evaluate", str(model), "--reference", str(reference)]
    subprocess.run([*command, "--out", str(out), *options], check=True)
    report = json.loads((out / "report.json").read_text())
    return {name: [value, report["intervals"].get(name)] for name, value in report["metrics"].items()}


def measure(args: argparse.Namespace, arm: tuple[str, str], seed: int) -> dict[str, Any]:
    """Train and score an arm, or go on with it, and return its row."""
    folder = args.out / f"seed-{seed}"
    first, second = (name.replace(" ", "-").replace(",", "") for name in arm)
    tokenizer, of_tokenizer = in_budget(
        tokenizer_run(args, arm[0], seed, folder / first / "tokenizer"), train_tokenizer, args.minutes
    )
    tokens = tokens_of(args, tokenizer, folder / first / "tokens")
    out = folder / first / second
    run = transformer_run(args, arm[1], seed, out / "run", tokens, tokenizer)
    model, of_transformer = in_budget(run, train_transformer, args.minutes)
    reference = args.out / "reference.npz"
    if not reference.exists():
        command = [sys.executable, "-m", "maskgit", "stats", str(args.test), "--out", str(reference)]
        subprocess.run(command, check=True)
    before = time.process_time()
    MaskGIT.from_pretrained(model).generate([0] * 16, seed=seed)
    sampled = 16 / (time.process_time() - before)
    return {
        "tokenizer": arm[0],
        "transformer": arm[1],
        "seed": seed,
        "minutes": args.minutes,
        "tokenizer_training": of_tokenizer,
        "transformer_training": of_transformer,
        "decoding_steps": run.sampler.steps,
        "images_per_second": sampled,
        "bits_per_image": bits_per_image(
            MaskGIT.from_pretrained(model), TokenCache.open(tokens / "test"), min(500, args.num_images)
        ),
        "reconstruction": scores_of(folder / first / "scores", tokenizer, args.test, "--reconstruction"),
        "generation": scores_of(
            out / "scores", model, reference, "--num-images", str(args.num_images), "--seed", str(seed)
        ),
    }


COLUMNS = {
    "PSNR": ("reconstruction", "psnr", 1),
    "SSIM": ("reconstruction", "ssim", 3),
    "EffNet-rFD": ("reconstruction", "rfd_effnet-lite0", 2),
    "usage": ("reconstruction", "codebook_usage", 3),
    "EffNet-FD": ("generation", "fd_effnet-lite0", 2),
    "precision": ("generation", "precision_effnet-lite0", 3),
    "recall": ("generation", "recall_effnet-lite0", 3),
    "class agreement": ("generation", "class_agreement_effnet-lite0", 3),
}


def table(rows: list[dict[str, Any]]) -> str:
    """Return all rows as a table, those of one arm one after the other, with intervals where there are any."""
    head = [
        "tokenizer",
        "transformer",
        "seed",
        *COLUMNS,
        "bits/image",
        "training images/s",
        "sampling images/s",
    ]

    def cell(row: dict[str, Any], part: str, name: str, digits: int) -> str:
        found = [score for key, score in row[part].items() if key == name]
        if not found or found[0][0] is None:
            return "–"
        value, interval = found[0]
        ends = "" if interval is None else " ({:.{d}f}–{:.{d}f})".format(*interval, d=digits)
        return f"{value:.{digits}f}{ends}"

    lines = []
    for row in sorted(rows, key=lambda row: ARMS.index((row["tokenizer"], row["transformer"]))):
        speeds = [row[f"{part}_training"]["images_per_second"] for part in ("tokenizer", "transformer")]
        lines.append(
            [
                row["tokenizer"],
                row["transformer"],
                str(row["seed"]),
                *(cell(row, *column) for column in COLUMNS.values()),
                f"{row['bits_per_image']:.0f}",
                " and ".join(f"{speed:.1f}" for speed in speeds),
                f"{row['images_per_second']:.1f}",
            ]
        )
    return markdown(head, lines, left=2)


def main() -> None:
    """Go on with all arms, each seed after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--arms", nargs="*", default=None, metavar="'TOKENIZER / TRANSFORMER'")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--num-images", type=int, default=2000)
    args = parser.parse_args()
    names = {" / ".join(arm): arm for arm in ARMS}
    wrong = [name for name in args.arms or () if name not in names]
    if wrong:
        parser.error(f"unknown arm {wrong[0]!r}; there are: {', '.join(names)}")
    args.out.mkdir(parents=True, exist_ok=True)
    kept = args.out / "rows.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    done = {(row["tokenizer"], row["transformer"], row["seed"]) for row in rows}
    for seed in args.seeds:
        for name in args.arms or names:
            if (*names[name], seed) in done:
                continue
            rows.append(measure(args, names[name], seed))
            with kept.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            (args.out / "table.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
