"""The works of an evaluation: samples, real images and reconstructions, and what is kept of each.

Shapes: n images of a unit, D feature dimensions, S spatial ones, C the feature net's own classes, K codes,
m of the unit's images that are shown, H × W pixels. Images are rounded to 8 bits before anything is measured,
as saved ones are.
"""

import io
import json
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskgit.data.npz import open_npz
from maskgit.data.picture_sets import Pictures, as_floats
from maskgit.errors import ConfigError
from maskgit.evaluation.metrics import SSIM_WINDOW, psnr, ssim
from maskgit.evaluation.networks.features import FeatureNet
from maskgit.evaluation.networks.lpips import LPIPS
from maskgit.foundation.checks import Config, check_choice, check_range
from maskgit.foundation.devices import upload, whole_float32
from maskgit.foundation.files import replacing
from maskgit.foundation.units import Arrays, Made, Units
from maskgit.images import to_pil, to_uint8
from maskgit.networks.tokenizer import Tokenizer
from maskgit.pipeline import MaskGIT
from maskgit.results import Callback
from maskgit.sampler import noise
from maskgit.sampler.config import SamplerConfig

LABEL_RULES = ("balanced", "dataset")
KEPT = ("none", "npz", "png")
NUM_SHOWN = 64
MAX_ABOUT_BYTES = 2**22
# What a feature net says of images, by the names of `Features`.
OUTPUTS = ("pooled", "spatial", "logits")
NONE: Mapping[str, FeatureNet] = MappingProxyType({})
# Equal images have no noise between them: their PSNR counts as this.
MAX_PSNR = 100.0


@dataclass(frozen=True)
class SampleConfig(Config):
    """Which images are made.

    Attributes:
        num_images: how many, 2 to 10,000,000.
        labels: "balanced" asks for image i's class i modulo the number of classes; "dataset" draws each
            image's class as often as a data set has it.
        seed: with an image's index decides its noise and, where it is drawn, its label.
        batch_size: images decoded together. Convolutions round differently at different batch sizes, so it
            belongs to what decides the numbers.
        unit_size: images of a unit of work.
        keep_images: what stays of the images besides their features: "none", "npz" (uint8 arrays as ADM's
            samples, at last joined to one file), or "png".
    """

    num_images: int = 50_000
    labels: str = "balanced"
    seed: int = 0
    batch_size: int = 64
    unit_size: int = 512
    keep_images: str = "none"

    def validate(self) -> None:
        check_range("num_images", self.num_images, 2, 10_000_000)
        check_choice("labels", self.labels, LABEL_RULES)
        check_range("seed", self.seed, 0, 2**64 - 1)
        check_range("batch_size", self.batch_size, 1, 65_536)
        check_range("unit_size", self.unit_size, 1, 1_000_000)
        check_choice("keep_images", self.keep_images, KEPT)


class Samples:
    """The work of making a model's images: each a function of (weights, settings, index)."""

    def __init__(
        self,
        model: MaskGIT,
        net: FeatureNet,
        config: SampleConfig,
        *,
        weights: dict[str, str],
        sampler: SamplerConfig,
        class_counts: NDArray[np.int64] | None = None,
        show: bool = True,
        also: Mapping[str, FeatureNet] = NONE,
    ) -> None:
        """Describe the work; nothing is made yet.

        Args:
            model: the model.
            net: what features are computed with.
            config: which images.
            weights: SHA-256 of the model's networks by name, to which the units belong.
            sampler: how they are decoded.
            class_counts: int64 (classes,), how many images of each class the data set has, for the label rule
                "dataset".
            show: whether the pictures of the random sheet are kept.
            also: by name, other nets whose features are computed too.

        Raises:
            ConfigError: the label rule needs class counts that are not given or do not fit the model.
        """
        self.model, self.net, self.config, self.sampler, self.also = model, net, config, sampler, also
        self.count, self.unit_size = config.num_images, config.unit_size
        num_classes = model.config.transformer.num_classes
        self._shares: NDArray[np.float64] | None = None
        if config.labels == "dataset":
            if class_counts is None or len(class_counts) != num_classes or not class_counts.sum():
                raise ConfigError(
                    "Labels drawn as in the data set need one with the model's classes: give "
                    f"--training-data or a reference of images in {num_classes} classes, or take balanced "
                    "labels."
                )
            self._shares = np.cumsum(class_counts) / class_counts.sum()
        self.shown = shown_indices(config.num_images, config.seed) if show else np.empty(0, np.int64)
        self.plan: dict[str, Any] = {
            "work": "samples",
            "weights": weights,
            "engine": engine_numbers(model),
            "sampler": sampler.to_dict(),
            "images": config.to_dict(),
            "class_counts": None if class_counts is None or self._shares is None else class_counts.tolist(),
            **identities(net, also),
            "shown": len(self.shown),
        }

    def labels(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the classes of images, int64, a function of their indices."""
        if self._shares is None:
            return indices % self.model.config.transformer.num_classes
        drawn = noise.uniform(self.config.seed, torch.from_numpy(indices), 0, noise.LABELS, 1)[:, 0]
        return np.searchsorted(self._shares, drawn.double().numpy(), side="right")

    def pictures(self, first: int, stop: int, callback: Callback | None = None) -> NDArray[np.uint8]:
        """Return the images first ≤ i < stop, uint8 (n, H, W, 3), decoded together."""
        made = self.model.generate(
            self.labels(np.arange(first, stop)),
            seed=self.config.seed,
            first_index=first,
            batch_size=stop - first,
            callback=callback,
            **self.sampler.to_dict(),
        )
        return to_uint8(made.images)

    def make(self, first: int, stop: int) -> Made:
        """Return the unit of the images first ≤ i < stop; see `maskgit.foundation.units.Work`."""
        kept: list[Arrays] = []
        shown, pictures = [], []
        steps, seconds = 0, 0.0

        def count(step: int, indices: Tensor, tokens: Tensor) -> None:
            nonlocal steps
            steps += len(indices)

        for start in range(first, stop, self.config.batch_size):
            end = min(start + self.config.batch_size, stop)
            began = time.perf_counter()
            images = self.pictures(start, end, count)
            seconds += time.perf_counter() - began
            kept.append(measured(self.net, as_floats(images), self.also))
            shown += [images[i - start] for i in self.shown if start <= i < end]
            if self.config.keep_images != "none":
                pictures.append(images)
        arrays = joined(kept)
        arrays["labels"] = self.labels(np.arange(first, stop)).astype(np.int32)
        if shown:
            arrays["shown"] = np.stack(shown)
        files = self._files(np.concatenate(pictures), arrays["labels"], first) if pictures else {}
        return Made(arrays, {"steps": steps, "seconds": round(seconds, 3)}, files)

    def _files(self, images: NDArray[np.uint8], labels: NDArray[np.int32], first: int) -> dict[str, bytes]:
        data = io.BytesIO()
        if self.config.keep_images == "npz":
            np.savez(data, arr_0=images, arr_1=labels)
            return {"images.npz": data.getvalue()}
        files = {}
        for number, picture in enumerate(to_pil(as_floats(images)), first):
            data = io.BytesIO()
            picture.save(data, "PNG")
            files[f"{number:08}.png"] = data.getvalue()
        return files


def shown_indices(num_images: int, seed: int) -> NDArray[np.int64]:
    """Return which images the sheet shows: drawn before any is made, sorted, the same for every model."""
    chosen = np.random.default_rng([seed % 2**32, 0]).permutation(num_images)[:NUM_SHOWN]
    return np.sort(chosen)


def spread(index: int, count: int, total: int) -> int:
    """Return the number of the image at one of `count` places spread evenly over `total`."""
    return index * total // count


def engine_numbers(model: MaskGIT) -> dict[str, Any]:
    """Return what of the way a model runs decides the last bits; which of several devices does not."""
    if model.engine is None:
        return {"dtype": str(next(model.transformer.parameters()).dtype).removeprefix("torch.")}
    return model.engine.numbers()


class RealImages:
    """The work of measuring real images."""

    def __init__(
        self,
        pictures: Pictures,
        net: FeatureNet,
        *,
        num_images: int | None = None,
        batch_size: int = 64,
        unit_size: int = 1024,
        through: Tokenizer | None = None,
        weights: str = "",
        also: Mapping[str, FeatureNet] = NONE,
    ) -> None:
        """Describe the work.

        Args:
            pictures: the images.
            net: what features are computed with.
            num_images: how many of them, spread evenly over the set; None takes all.
            batch_size: images that are read together.
            unit_size: images of a unit.
            through: measures the images' reconstructions by this tokenizer in their place, and `weights` is the
                tokenizer's SHA-256.
            also: by name, other nets whose features are computed too.
        """
        self.data, self.net, self.through, self.also = pictures, net, through, also
        self.batch_size, self.unit_size = batch_size, unit_size
        total = len(pictures)
        self.count = total if num_images is None else min(total, num_images)
        self.plan: dict[str, Any] = {
            "work": "real images",
            "data": pictures.fingerprint,
            "images_of_data": total,
            **identities(net, also),
        }
        if through is not None:
            dtype = str(through.dtype).removeprefix("torch.")
            self.plan |= {"reconstructed_by": weights, "dtype": dtype, "batch_size": batch_size}

    def number(self, index: int) -> int:
        """Return the number in the set of the image at an index of the work."""
        return spread(index, self.count, len(self.data))

    def make(self, first: int, stop: int) -> Made:
        """Return the unit of the images first ≤ i < stop; see `maskgit.foundation.units.Work`."""
        kept: list[Arrays] = []
        skipped: list[str] = []
        for start in range(first, stop, self.batch_size):
            batch = self.data.read([self.number(i) for i in range(start, min(start + self.batch_size, stop))])
            skipped += batch.skipped
            if len(batch.images):
                about: Arrays = {"labels": batch.labels, "numbers": batch.numbers}
                images = batch.floats
                if self.through is not None:
                    images = as_floats(rebuild(self.through, images)[0])
                kept.append(measured(self.net, images, self.also) | about)
        return Made(joined(kept), {"skipped": skipped}, {})


class Reconstructions:
    """The work of encoding real images to tokens and decoding them again."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        pictures: Pictures,
        net: FeatureNet,
        *,
        weights: dict[str, str],
        lpips: LPIPS | None = None,
        lpips_name: str | None = None,
        num_images: int | None = None,
        batch_size: int = 64,
        unit_size: int = 512,
    ) -> None:
        """Describe the work.

        Args:
            tokenizer: the tokenizer.
            pictures: the images, whose sides must be multiples of its patch size.
            net: what features are computed with.
            weights: the tokenizer's SHA-256 by name.
            lpips: computes LPIPS, if it is wanted, and `lpips_name` says which it is.
            num_images, batch_size, unit_size: as for `RealImages`.

        Raises:
            ConfigError: the images do not fit the tokenizer.
        """
        if any(side % tokenizer.patch_size for side in pictures.resolution):
            raise ConfigError(
                f"The tokenizer needs images whose sides are multiples of {tokenizer.patch_size} pixels, but "
                f"those of {pictures.name} have {pictures.resolution[0]} × {pictures.resolution[1]}: pack "
                "them with another size."
            )
        self.tokenizer, self.data, self.net, self.lpips = tokenizer, pictures, net, lpips
        self.batch_size, self.unit_size = batch_size, unit_size
        total = len(pictures)
        self.count = total if num_images is None else min(total, num_images)
        self.shown = shown_indices(self.count, 0)[: NUM_SHOWN // 2]
        self.plan: dict[str, Any] = {
            "work": "reconstructions",
            "weights": weights,
            "dtype": str(tokenizer.dtype).removeprefix("torch."),
            "data": pictures.fingerprint,
            "images_of_data": total,
            "batch_size": batch_size,
            "features": net.identity,
            "lpips": lpips_name,
        }

    def make(self, first: int, stop: int) -> Made:
        """Return the unit of the images first ≤ i < stop; see `maskgit.foundation.units.Work`."""
        kept: list[Arrays] = []
        skipped: list[str] = []
        shown: list[Any] = []
        counts = torch.zeros(self.tokenizer.config.codebook_size, dtype=torch.int64)
        for start in range(first, stop, self.batch_size):
            indices = range(start, min(start + self.batch_size, stop))
            batch = self.data.read([spread(i, self.count, len(self.data)) for i in indices])
            skipped += batch.skipped
            if not len(batch.images):
                continue
            rebuilt, tokens = rebuild(self.tokenizer, batch.floats)
            counts += tokens.flatten().bincount(minlength=len(counts))
            kept.append(self._compare(batch.floats, as_floats(rebuilt)) | {"labels": batch.labels})
            wanted = {spread(int(i), self.count, len(self.data)) for i in self.shown if i in indices}
            places = [place for place, number in enumerate(batch.numbers) if number in wanted]
            shown += [[batch.images[place], rebuilt[place]] for place in places]
        arrays = joined(kept)
        arrays["codes"] = counts.numpy()
        if shown:
            arrays["shown"] = np.array(shown).reshape(-1, *batch.images.shape[1:])
        return Made(arrays, {"skipped": skipped}, {})

    @torch.no_grad()
    def _compare(self, images: Tensor, rebuilt: Tensor) -> Arrays:
        arrays = measured(self.net, rebuilt)
        arrays |= {f"original_{name}": part for name, part in measured(self.net, images).items()}
        arrays["psnr"] = psnr(images, rebuilt).clamp(max=MAX_PSNR).numpy()
        if min(images.shape[2:]) >= SSIM_WINDOW:
            arrays["ssim"] = ssim(images, rebuilt).numpy()
        if self.lpips is not None:
            device = next(self.lpips.parameters()).device
            with whole_float32(device):
                distances = self.lpips(upload(images, device), upload(rebuilt, device))
            arrays["lpips"] = distances.cpu().numpy()
        return arrays


@torch.no_grad()
def rebuild(tokenizer: Tokenizer, images: Tensor) -> tuple[NDArray[np.uint8], Tensor]:
    """Return the reconstructions of images float (B, 3, H, W), uint8 (B, H, W, 3), and their tokens."""
    tokens = tokenizer.encode(upload(images, next(tokenizer.parameters()).device))
    return to_uint8(tokenizer.decode(tokens).float()), tokens.cpu()


def join_samples(units: Units, path: Path, about: dict[str, Any]) -> None:
    """Write samples kept as npz as one file, as other projects' evaluators read it.

    Args:
        units: finished.
        path: the `.npz` file: `arr_0` uint8 (N, H, W, 3), `arr_1` int64 (N,), and `about`, which they ignore.
        about: JSON values that say how the images were made.

    Raises:
        OutputError: it cannot be written.
    """
    folders = [units.path(number) for number in range(len(units))]
    labels = []
    with (
        replacing(path, overwrite=True) as temporary,
        zipfile.ZipFile(temporary, "w") as archive,
    ):
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            for number, folder in enumerate(folders):
                with np.load(folder / "images.npz", allow_pickle=False) as part:
                    images, classes = part["arr_0"], part["arr_1"]
                if not number:
                    header = np.lib.format.header_data_from_array_1_0(images)
                    header["shape"] = (units.work.count, *images.shape[1:])
                    np.lib.format.write_array_header_1_0(member, header)
                # One unit at a time, since all may be larger than memory.
                member.write(images.tobytes())
                labels.append(classes.astype(np.int64))
        for name, array in (("arr_1", np.concatenate(labels)), ("about", np.array(json.dumps(about)))):
            with archive.open(f"{name}.npy", "w") as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def about_samples(path: str | Path) -> dict[str, Any]:
    """Return what a file of `join_samples` says of how its images were made; nothing where it says nothing.

    Raises:
        DataError: it cannot be read.
    """
    if Path(path).suffix != ".npz":
        return {}
    with open_npz(path) as archive:
        text = archive.read("about", MAX_ABOUT_BYTES) if "about" in archive.names else None
    if text is None or text.dtype.kind != "U" or text.shape != ():
        return {}
    try:
        about = json.loads(str(text))
    except (ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def measured(net: FeatureNet, images: Tensor, also: Mapping[str, FeatureNet] = NONE) -> Arrays:
    """Return all that a feature net says of images, as arrays named as in `Features`.

    What others say has their names behind, such as pooled_dinov2.
    """
    arrays: Arrays = {}
    for name, one in {"": net, **also}.items():
        outputs = one.outputs(images)
        parts = {part: getattr(outputs, part) for part in OUTPUTS}
        found = {part: values.cpu().numpy() for part, values in parts.items() if values is not None}
        arrays |= {f"{part}_{name}" if name else part: values for part, values in found.items()}
    return arrays


def identities(net: FeatureNet, also: Mapping[str, FeatureNet]) -> dict[str, Any]:
    """Return what a plan says of the feature nets."""
    others = {name: one.identity for name, one in also.items()}
    return {"features": net.identity} | ({"also": others} if others else {})


def joined(pieces: Sequence[Arrays]) -> Arrays:
    """Return pieces' arrays one after the other, by name; nothing where there are no pieces."""
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in (pieces[0] if pieces else ())}


class Gathered(NamedTuple):
    """What all units of a work hold together.

    Attributes:
        arrays: one after the other; `codes` is int64 (units, K), the counts of each unit.
        skipped: a sentence for each image that could not be read.
    """

    arrays: Arrays
    skipped: list[str]


def gather(units: Units) -> Gathered:
    """Return the units of a work together, in their order whoever made them.

    Raises:
        DataError: a unit is missing or damaged.
    """
    pieces: dict[str, list[NDArray[Any]]] = {}
    skipped: list[str] = []
    for number in range(len(units)):
        made = units.read(number)
        skipped += made.notes.get("skipped", [])
        for name, array in made.arrays.items():
            pieces.setdefault(name, []).append(array)
    arrays = {
        name: np.stack(parts) if name == "codes" else np.concatenate(parts) for name, parts in pieces.items()
    }
    return Gathered(arrays, skipped)
