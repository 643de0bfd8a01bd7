"""The pictures of docs/editing.md, and how visible the seams of edits are.

    python benchmarks/editing.py --test TEST --out DIR [--num-images 200]

TEST is CIFAR-10's test part as `maskgit pack` writes it. A random box of each of its first images is replaced by
the image's own class; the seam ratio is the mean gradient across the mask's border over the mean gradient inside
the mask (1 is no seam; before editing it is what the photograph has there). The sheets are of scikit-image's
photographs. Writes DIR/seams.json and DIR/edit-*.png.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data
from torch import Tensor

from maskgit import MaskGIT, images
from maskgit.data.image_cache import ImageCache
from maskgit.evaluation.metrics import boundary_gradient_ratio

SEED = 3


def pixels_of(token_mask: Tensor, patch: int) -> Tensor:
    """Return a token mask (h, w) as a pixel mask (H, W)."""
    return token_mask.repeat_interleave(patch, 0).repeat_interleave(patch, 1)


def summary(before: list[float], after: list[float]) -> dict[str, float]:
    """Return the mean ratios and the standard error of the edited ones."""
    return {
        "before": float(np.mean(before)),
        "edited": float(np.mean(after)),
        "standard_error": float(np.std(after) / np.sqrt(len(after))),
        "images": len(after),
    }


def seams_of_cifar(model: MaskGIT, test: ImageCache, count: int) -> dict[str, float]:
    """Return the seam ratios of edits of test images at the model's own resolution."""
    rng = np.random.default_rng(0)
    before, after = [], []
    for i in range(count):
        width, height = rng.integers(8, 21, 2)
        left, top = rng.integers(0, 33 - width), rng.integers(0, 33 - height)
        box = (int(left), int(top), int(width), int(height))
        made = model.edit(Image.fromarray(np.array(test.images[i])), box, int(test.labels[i]), seed=i)
        assert made.token_mask is not None, "an edit returns its mask"
        assert made.before is not None, "and what it began with"
        mask = pixels_of(made.token_mask, model.tokenizer.patch_size)
        if mask.all():
            continue
        before.append(float(boundary_gradient_ratio(made.before, mask)))
        after.append(float(boundary_gradient_ratio(made.images, mask)))
    return summary(before, after)


def photographs() -> dict[str, Image.Image]:
    """Return scikit-image's photographs, at a size that shows what a model of 32 pixels does."""
    found = {"astronaut": data.astronaut, "cat": data.chelsea, "coffee": data.coffee, "rocket": data.rocket}
    small = {}
    for name, load in found.items():
        picture = Image.fromarray(load())
        scale = 96 / min(picture.size)
        small[name] = picture.resize([round(side * scale) for side in picture.size], Image.Resampling.LANCZOS)
    return small


def centre(picture: Image.Image, share: float) -> tuple[int, int, int, int]:
    """Return a box in the middle of a picture."""
    side = int(min(picture.size) * share)
    return ((picture.width - side) // 2, (picture.height - side) // 2, side, side)


def save(path: Path, rows: list[tuple[str, Image.Image]], columns: int, scale: int = 2) -> None:
    """Write a sheet of captioned pictures, brought to one size."""
    width, height = max(p.width for _, p in rows), max(p.height for _, p in rows)
    framed = []
    for _, picture in rows:
        canvas = Image.new("RGB", (width, height), "white")
        canvas.paste(picture.convert("RGB"), ((width - picture.width) // 2, (height - picture.height) // 2))
        framed.append(canvas)
    sheet = images.contact_sheet(framed, columns=columns, scale=scale, captions=[text for text, _ in rows])
    sheet.quantize(192).save(path, optimize=True)
    print(path, path.stat().st_size)


def sheets(model: MaskGIT, out: Path) -> dict[str, float]:
    """Write a sheet for every way to edit; return the seam ratios of the photographs."""
    photos = photographs()
    before, after = [], []
    rows = []
    for name, label in (("astronaut", "dog"), ("coffee", "frog"), ("cat", "dog")):
        made = model.edit(photos[name], centre(photos[name], 0.34), label, num_images=2, seed=SEED)
        mask = pixels_of(made.token_mask, model.tokenizer.patch_size)  # type: ignore[arg-type]
        before.append(float(boundary_gradient_ratio(made.before, mask)))  # type: ignore[arg-type]
        after += [float(boundary_gradient_ratio(image[None], mask)) for image in made.images]
        boxed = photos[name].copy()
        left, top, width, height = centre(boxed, 0.34)
        boxed.paste((200, 30, 30), (left, top, left + width, top + height))
        rows += [(name, photos[name]), ("box", boxed), *((label, p) for p in made.to_pil())]
    save(out / "edit-boxes.png", rows, 4)

    rows = []
    for name, label in (("cat", "cat"), ("rocket", "guess")):
        photo = photos[name]
        painted = Image.new("L", photo.size, 0)
        left, top, side, _ = centre(photo, 0.3)
        rows_, columns_ = np.mgrid[0 : photo.height, 0 : photo.width]
        inside = (rows_ - top - side / 2) ** 2 + (columns_ - left - side / 2) ** 2 < (side / 2) ** 2
        painted = Image.fromarray(inside.astype(np.uint8) * 255)
        made = model.inpaint(photo, painted, label, num_images=2, seed=SEED)
        shown = Image.composite(Image.new("RGB", photo.size, (200, 30, 30)), photo, painted)
        found = label
        if made.class_guess is not None:
            found = f"guess: {(model.class_names or ())[made.class_guess.label]}"
        rows += [(name, photo), ("mask", shown), *((found, p) for p in made.to_pil())]
    save(out / "edit-inpaint.png", rows, 4)

    ship = model.generate("ship", seed=4).to_pil()[0]
    wide = model.outpaint(ship, left=24, right=24, label="ship", num_images=2, seed=SEED)
    tall = model.outpaint(ship, canvas=(80, 48), label="ship", seed=SEED)
    rows = [("ship", ship), *(("24 pixels left and right", p) for p in wide.to_pil()),
            ("canvas 80 by 48", tall.to_pil()[0])]  # fmt: skip
    save(out / "edit-outpaint.png", rows, 2, scale=4)

    rows = [
        ("ship", model.panorama("ship", 160, seed=1).to_pil()[0]),
        ("ship to airplane", model.panorama(["ship", "airplane"], 160, seed=2).to_pil()[0]),
        ("horse", model.panorama("horse", 160, seed=3).to_pil()[0]),
    ]
    save(out / "edit-panorama.png", rows, 1, scale=4)

    car = model.generate("automobile", seed=6).to_pil()[0]
    rows = [("car", car)]
    for strength in (0.0, 0.25, 0.5, 0.75, 1.0):
        rows.append((f"strength {strength}", model.vary(car, strength, "automobile", seed=2).to_pil()[0]))
    for share in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
        made = model.interpolate_classes("horse", "truck", switch=share, seed=8)
        rows.append((f"horse for {share:.0%}", made.to_pil()[0]))
    save(out / "edit-vary.png", rows, 6, scale=4)
    return summary(before, after)


def main() -> None:
    """Measure and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="cifar10")
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--num-images", type=int, default=200)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = MaskGIT.from_pretrained(options.model)
    found = {"photographs": sheets(model, options.out)}
    found["cifar10"] = seams_of_cifar(model, ImageCache.open(options.test), options.num_images)
    (options.out / "seams.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
