"""Generate images with ONNX Runtime alone: numpy, onnxruntime and Pillow are all that this needs.

    maskgit export cifar10 --out exported
    python examples/onnx_generate.py exported --class frog --num-images 4 --seed 1 --out frogs

An image has the tokens that `maskgit generate` gives it for the same seed and index: the noise is the same,
counter by counter. Only the policy `confidence` is here, with its usual curves.

Shapes: B batch, N image tokens, S = N + 1 the sequence with its class token, K codes.
"""

import argparse
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

BATCH = 16
MASK32 = 0xFFFFFFFF
TOKENS, CHOICE = 0, 1  # streams of noise; a step has 256
USUAL = {
    "policy": "confidence",
    "mask_schedule": "cosine",
    "choice_schedule": "linear",
    "temperature_schedule": "constant",
    "guidance_schedule": "constant",
}


def gumbel(seed: int, indices: np.ndarray, step: int, stream: int, count: int) -> np.ndarray:
    """Return Gumbel noise of images, float32 (B, count): Philox4x32-10 of (seed; block, step, image index).

    Source: Salmon et al.: Parallel Random Numbers: As Easy as 1, 2, 3 (SC 2011).
    """
    blocks = -(-count // 4)
    shape = (len(indices), blocks)
    images = indices.astype(np.uint64)[:, None]
    a = np.broadcast_to(np.arange(blocks, dtype=np.uint64), shape)
    b = np.full(shape, 256 * step + stream, np.uint64)
    c, d = np.broadcast_to(images & MASK32, shape), np.broadcast_to(images >> 32, shape)
    k0, k1 = seed & MASK32, seed >> 32
    for _ in range(10):
        p, q = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (q >> 32) ^ b ^ k0, q & MASK32, (p >> 32) ^ d ^ k1, p & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    words = np.stack([a, b, c, d], axis=-1).reshape(len(indices), -1)[:, :count]
    uniform = ((words >> 9).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-23)
    return -np.log(-np.log(uniform))


def num_masked_after(step: int, steps: int, num_tokens: int) -> int:
    """Return how many tokens the cosine schedule leaves masked, ⌊cos(π/2 · (t + 1)/T) · N⌋ in float32."""
    progress = np.float32(step + 1) / np.float32(steps)
    ratio = np.float32(math.cos(progress * np.float32(math.pi / 2)))
    return int(np.floor(np.clip(ratio, np.float32(1e-6), np.float32(1)) * np.float32(num_tokens)))


def decode(
    predict: Callable[[np.ndarray], np.ndarray],
    sequence: np.ndarray,
    indices: np.ndarray,
    seed: int,
    mask: int,
    settings: dict,
) -> np.ndarray:
    """Fill in the masked tokens, a part of them at each step.

    Args:
        predict: int64 (B, S) → logits float32 (B, S, K).
        sequence: int64 (B, S), the class token, then `mask` everywhere.
        indices: int64 (B,), the images' indices, which decide their noise.
        seed: in [0, 2⁶⁴).
        mask: the number that stands for "masked".
        settings: steps, temperature, choice_temperature and guidance_scale.

    Returns:
        int64 (B, N) codes.

    Source: MaskGIT (arXiv 2202.04200) §3.2.
    """
    num_tokens = sequence.shape[1] - 1
    steps = min(settings["steps"], num_tokens)  # each step keeps a token
    guidance = np.float32(settings["guidance_scale"])
    for step in range(steps):
        unknown = sequence == mask
        unknown[:, 0] = False
        if guidance == 1:
            logits = predict(sequence)
        else:
            without = sequence.copy()
            without[:, 0] = mask
            with_class, open_class = np.split(predict(np.concatenate([sequence, without])), 2)
            logits = with_class + (guidance - 1) * (with_class - open_class)
        noise = gumbel(seed, indices, step, TOKENS, logits[0].size).reshape(logits.shape)
        sampled = (logits + np.float32(settings["temperature"]) * noise).argmax(-1)
        tokens = np.where(unknown, sampled, sequence)
        if step == steps - 1:
            break
        # The log-probability of what was sampled, with falling noise; the least sure are masked again.
        top = logits.max(-1)
        chosen = np.take_along_axis(logits, sampled[..., None], -1)[..., 0]
        sureness = chosen - top - np.log(np.exp(logits - top[..., None]).sum(-1))
        falling = settings["choice_temperature"] * (1 - float(np.float32(step + 1) / np.float32(steps)))
        sureness += np.float32(falling) * gumbel(seed, indices, step, CHOICE, sequence.shape[1])
        sureness[~unknown] = np.inf
        count = np.minimum(num_masked_after(step, steps, num_tokens), unknown.sum(-1, keepdims=True) - 1)
        threshold = np.take_along_axis(np.sort(sureness, -1), np.maximum(count, 1), -1)
        sequence = np.where(sureness < threshold, mask, tokens)
    return tokens[:, 1:]


def class_number(name: str, names: list[str] | None, num_classes: int) -> int:
    """Return the number of a class given by name or number; −1 for "none"."""
    if name == "none":
        return -1
    if name.isdecimal() and int(name) < num_classes:
        return int(name)
    for number, synonyms in enumerate(names or []):
        if name.casefold() in [synonym.strip().casefold() for synonym in (synonyms, *synonyms.split(","))]:
            return number
    known = f" ({', '.join(names[:10])}{', …' if num_classes > 10 else ''})" if names else ""
    raise SystemExit(f"Unknown class {name!r}: give a name or a number from 0 to {num_classes - 1}{known}.")


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Generate images with ONNX Runtime alone.")
    parser.add_argument("folder", type=Path, help="what `maskgit export` wrote")
    parser.add_argument("--class", dest="name", required=True, help='name or number; "none" for no class')
    parser.add_argument("--num-images", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="with the index, decides an image")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures")
    own = {"steps": int, "temperature": float, "choice_temperature": float, "guidance_scale": float}
    for setting, kind in own.items():
        parser.add_argument(f"--{setting.replace('_', '-')}", type=kind, help="default: the model's own")
    args = parser.parse_args()
    if args.num_images < 1 or (args.steps is not None and args.steps < 1) or not 0 <= args.seed < 2**64:
        parser.error("--num-images and --steps must be at least 1, and --seed from 0 to 2^64 - 1")
    return args


def sampler_settings(model: dict, args: argparse.Namespace) -> dict:
    """Return the model's own settings with those that were given in their place."""
    settings = dict(model["sampler"])
    for name, usual in USUAL.items():
        if settings[name] != usual:
            raise SystemExit(
                f"This example knows the {name} {usual} alone, but the model's is {settings[name]}."
            )
    if any(settings["tables"].values()):
        raise SystemExit("This example knows no tables of values for each step, but the model has them.")
    settings |= {name: value for name, value in vars(args).items() if name in settings and value is not None}
    if (args.name == "none" or settings["guidance_scale"] != 1) and not model["label_dropout"]:
        raise SystemExit(
            "This model was trained with classes only: name one, and leave out the guidance scale."
        )
    return settings


def picture_paths(args: argparse.Namespace) -> list[Path]:
    """Return a path for each picture, none of which is there yet."""
    stem = "-".join(re.findall(r"\w+", args.name.casefold()))
    paths = [args.out / f"{stem}-{args.seed}-{index:05}.png" for index in range(args.num_images)]
    for path in paths:
        if path.exists():
            raise SystemExit(f"{path} is there already; choose another --out.")
    args.out.mkdir(parents=True, exist_ok=True)
    return paths


def read_export(folder: Path) -> tuple[dict, list[onnxruntime.InferenceSession]]:
    """Return the config of an export, and what runs its transformer and its decoder."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        graphs = config["graphs"]
        paths = [folder / graphs[part]["file"] for part in ("transformer", "decoder")]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SystemExit(
            f"{folder} is no transformer and decoder from `maskgit export` ({type(error).__name__}: {error})."
        ) from error
    if config["format"] != "onnx":
        raise SystemExit(f"{folder} is an export to {config['format']}; this example runs --format onnx.")
    return config, [onnxruntime.InferenceSession(path) for path in paths]


def main() -> None:
    """Read the export, generate, write PNGs."""
    args = arguments()
    config, (transformer, decoder) = read_export(args.folder)
    model, vocabulary = config["model"], config["vocabulary"]
    settings = sampler_settings(model, args)
    label = class_number(args.name, model["class_names"], vocabulary["num_classes"])
    paths = picture_paths(args)

    def predict(sequence: np.ndarray) -> np.ndarray:
        return transformer.run(["logits"], {"sequence": sequence})[0]

    mask, side = vocabulary["mask"], vocabulary["grid_size"]
    for start in range(0, len(paths), BATCH):
        indices = np.arange(start, min(start + BATCH, len(paths)))
        sequence = np.full((len(indices), 1 + side * side), mask, np.int64)
        sequence[:, 0] = mask if label < 0 else vocabulary["num_codes"] + label
        tokens = decode(predict, sequence, indices, args.seed, mask, settings).reshape(-1, side, side)
        images = decoder.run(["images"], {"tokens": tokens})[0]
        pixels = np.rint(images.clip(0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)
        for index, picture in zip(indices, pixels, strict=True):
            Image.fromarray(picture).save(paths[index])
            print(paths[index])


if __name__ == "__main__":
    main()
