"""What is kept of a set of images so that others can be compared with it, and the files that hold it.

These files are read:

- ADM's (Dhariwal and Nichol, NeurIPS 2021; evaluations/evaluator.py): `mu`, `sigma`, `mu_s` and `sigma_s`
  over the whole data set, beside a sample of its images in `arr_0`.
- `mu` and `sigma` alone: pytorch-fid's, clean-fid's, EDM's and TTUR's.
- features, float (N, D), in `pool_3`, `reps` (dgm-eval's) or `feats`.
- the same in a file `….npy`, such as CMMD's embeddings.
- torch-fidelity's cache, `….pt`: features, or `mu` and `sigma`; nothing else is unpickled.
- our own `.npz`: `format`, `mean`, `covariance`, `count`, `identity` (of the feature net), `resolution`, and, where
  the net has them or they were asked for, `spatial_mean`, `spatial_covariance`, `features`, `labels` and
  `class_names` (JSON).

Means and covariances of the same images differ with the network and with how it resizes images, and most tools
write neither into their files. What is known of a file is its tool's format, its name and its dimensions.

Shapes: B batch, N images, D feature dimensions, S spatial dimensions, H × W pixels.
"""

import json
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maskgit.data.npz import MAX_SIDE, Archive, open_npz
from maskgit.data.npz import open_samples as open_samples
from maskgit.errors import DataError, ImageError, OutputError
from maskgit.evaluation.metrics.frechet import FeatureStatistics, FrechetReport, Gaussian, frechet_report
from maskgit.evaluation.networks.features import FeatureNet
from maskgit.foundation.checks import check_count
from maskgit.foundation.files import expand, replacing
from maskgit.foundation.units import Arrays

FORMAT = 1
MAX_DIM = 8192
MAX_FEATURE_BYTES = 2**32
MAX_NAMES_BYTES = 2**28
# What others call the features of images in their `.npz` files.
FEATURE_ARRAYS = ("pool_3", "reps", "feats")
# Of so many images others' features are kept, as of those that are measured here.
KEPT_FEATURES = 10_000
# Vectors that are gathered before they are added up, since each addition costs D² however few they are.
_GATHERED = 512


class Origin(NamedTuple):
    """Which feature nets a file's statistics can belong to.

    Attributes:
        whose: the tools that write such files.
        nets: names in `FEATURE_NETS` that they can belong to; none where no net here is the right one.
        identities: how the identities of these nets begin.
        advice: what a reader has to make sure of; empty where the file leaves no doubt.
    """

    whose: str
    nets: tuple[str, ...]
    identities: tuple[str, ...]
    advice: str = ""


_TF1, _HALF_PIXEL = ("inception",), ("inception-pytorch-fid",)
ADM = Origin("ADM's evaluator", _TF1, ("Inception, tf1 ",))
INCEPTION = Origin(
    "Inception's",
    (*_TF1, *_HALF_PIXEL),
    ("Inception, ",),
    "pytorch-fid's files belong to the feature net inception-pytorch-fid; those of TTUR, EDM, StyleGAN and "
    "torch-fidelity to inception; clean-fid's own resize to none.",
)
# By the number of dimensions, where nothing else is known.
_DIMENSIONS = {
    2048: INCEPTION,
    1024: Origin(
        "DINOv2's (ViT-L/14)",
        ("dinov2",),
        ("DINOv2, ",),
        "edm2's files belong to the feature net dinov2; those of dgm-eval, which resizes with Pillow, are near to "
        "it but not the same.",
    ),
    768: Origin("CLIP's (ViT-L/14 at 224 pixels, or not of length 1)", (), ()),
}
CMMD = Origin(
    "CMMD's (CLIP ViT-L/14)",
    ("clip",),
    ("CLIP, ",),
    "CMMD's embeddings, of CLIP at 336 pixels, belong to the feature net clip; others to none.",
)
_CLEAN_FID = {
    "legacy_tensorflow": Origin("clean-fid's (legacy_tensorflow)", _TF1, ("Inception, tf1 ",)),
    "legacy_pytorch": Origin("clean-fid's (legacy_pytorch)", _HALF_PIXEL, ("Inception, half-pixel ",)),
    "clean": Origin("clean-fid's (of images that Pillow resized)", (), ()),
}
_TORCH_FIDELITY = {
    "inception-v3-compat": Origin("torch-fidelity's", _TF1, ("Inception, tf1 ",)),
    "dinov2-vit-l-14": _DIMENSIONS[1024]._replace(whose="torch-fidelity's (DINOv2)"),
}


def origin_of(name: str, pooled: Gaussian, *, spatial: bool) -> Origin:
    """Return what statistics must have been made with.

    Args:
        name: the file's.
        pooled: mean and covariance of its features.
        spatial: whether it holds statistics of spatial features, too, as ADM's files do alone.
    """
    if spatial:
        return ADM
    for extractor, origin in _TORCH_FIDELITY.items():
        if name.endswith(".pt") and f"-{extractor}-" in name:
            return origin
    mean, covariance, count = pooled
    dim = len(mean)
    found = re.search(r"_(legacy_tensorflow|legacy_pytorch|clean)_", name)
    if found is not None and dim == 2048:
        return _CLEAN_FID[found.group(1)]
    # Vectors of length 1, as CMMD's are, have a mean square of 1.
    biased = 1.0 if count is None else 1 - 1 / count
    if dim == 768 and abs(float(mean @ mean + biased * np.trace(covariance)) - 1) < 0.01:
        return CMMD
    return _DIMENSIONS.get(dim, INCEPTION)


@dataclass(frozen=True)
class ImageStatistics:
    """What is kept of a set of images.

    Attributes:
        pooled: mean and covariance of the pooled features, for FID.
        spatial: those of the spatial features, for sFID; None where there are none.
        identity: `FeatureNet.identity` of the net that made them; None where the file does not say.
        resolution: (height, width) of the images in pixels; None where the file does not say.
        features: float32 (n, D), pooled features of the first n images, for kernel distances and neighbours;
            None where none were kept.
        labels: int32 (n,), the classes of those images; None where they are not known.
        class_names: a name for each class; None where classes are known by their numbers alone, or not at all.
        origin: what they must have been made with, where `identity` is None.
    """

    pooled: Gaussian
    spatial: Gaussian | None = None
    identity: str | None = None
    resolution: tuple[int, int] | None = None
    features: NDArray[np.float32] | None = None
    labels: NDArray[np.int32] | None = None
    class_names: tuple[str, ...] | None = None
    origin: Origin | None = None


class Collector:
    """Gathers the statistics of images, or of what was measured of them, that come in batches."""

    def __init__(
        self,
        net: FeatureNet,
        *,
        keep: int = 10_000,
        total: int | None = None,
        resolution: tuple[int, int] | None = None,
        class_names: tuple[str, ...] | None = None,
    ) -> None:
        """Begin with no images.

        Args:
            net: what their features are computed with.
            keep: of how many images the features are kept themselves; 0 to 1,000,000.
            total: how many images are to come, over which those kept are spread evenly, since images often lie
                class by class; None keeps the first.
            resolution: (height, width) in pixels, where only what was measured of the images is added.
            class_names: of the labels.
        """
        keep = check_count("keep", keep, 0, 1_000_000)
        self.net = net
        self.keep, self.total = keep, total
        self.resolution = resolution
        self.class_names = class_names
        self._pooled = FeatureStatistics(net.dim)
        self._spatial: FeatureStatistics | None = None
        self._waiting: list[Arrays] = []
        self._kept: list[NDArray[np.float32]] = []
        self._labels: list[NDArray[np.int32]] | None = []
        self._count = 0

    def add(self, images: Tensor) -> None:
        """Add images of one size.

        Args:
            images: float (B, 3, H, W) in [0, 1], RGB; rounded to 8 bits where scores are to be those of saved
                images.

        Raises:
            ImageError: the shape, type or range does not fit, or the size is not that of the images before.
        """
        outputs = self.net.outputs(images)
        resolution = (images.shape[2], images.shape[3])
        if self.resolution not in (None, resolution):
            raise ImageError(f"Images of {resolution} and {self.resolution} pixels cannot be one set.")
        self.resolution = resolution
        spatial = {} if outputs.spatial is None else {"spatial": outputs.spatial.cpu().numpy()}
        self.add_features({"pooled": outputs.pooled.cpu().numpy()} | spatial)

    def add_features(self, arrays: Arrays) -> None:
        """Add what was measured of images.

        Args:
            arrays: `pooled` float32 (B, D) and, where they are known, `spatial` float32 (B, S) and `labels` int32
                (B,), below 0 where an image has no class; nothing at all where no image could be read.
        """
        if "pooled" not in arrays:
            return
        pooled = arrays["pooled"]
        places = np.arange(self._count, self._count + len(pooled))
        chosen = places < self.keep
        if self.total is not None and self.keep < self.total:
            chosen = (places * self.keep) % self.total < self.keep
        if chosen.any():
            self._kept.append(pooled[chosen])
        labels = arrays.get("labels")
        if labels is None or (labels < 0).any():
            self._labels = None
        if self._labels is not None and labels is not None:
            self._labels.append(labels[chosen])
        self._count += len(pooled)
        self._waiting.append({name: arrays[name] for name in ("pooled", "spatial") if name in arrays})
        if sum(len(part["pooled"]) for part in self._waiting) >= _GATHERED:
            self._flush()

    def finish(self) -> ImageStatistics:
        """Return the statistics of all images so far.

        Raises:
            DataError: there were fewer than two.
        """
        self._flush()
        return ImageStatistics(
            self._pooled.gaussian(),
            None if self._spatial is None else self._spatial.gaussian(),
            self.net.identity,
            self.resolution,
            np.concatenate(self._kept) if self._kept else None,
            np.concatenate(self._labels) if self._kept and self._labels else None,
            self.class_names,
        )

    def _flush(self) -> None:
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        self._pooled.update(np.concatenate([part["pooled"] for part in waiting]))
        if "spatial" in waiting[0]:
            spatial = np.concatenate([part["spatial"] for part in waiting])
            self._spatial = self._spatial or FeatureStatistics(spatial.shape[1])
            self._spatial.update(spatial)


def merge_statistics(parts: Sequence[ImageStatistics]) -> ImageStatistics:
    """Return the statistics of several sets together, such as the shards of one.

    Args:
        parts: at least one, of one feature net and resolution, whose numbers of images are known.

    Returns:
        The same as if all images had been collected at once, but for float64 rounding; the features that were
        kept follow each other in the order of the parts.

    Raises:
        DataError: there are none, or they do not belong together.
    """
    if not parts:
        raise DataError("There are no statistics to merge: name at least one file.")
    first = parts[0]
    for part in parts[1:]:
        check_comparable(first, part)
    spatial = [part.spatial for part in parts if part.spatial is not None]
    if len(spatial) not in (0, len(parts)):
        raise DataError("Only some of the statistics have spatial features: make them with one feature net.")
    kept = [part.features for part in parts if part.features is not None]
    same = all(part.class_names == first.class_names for part in parts)
    # Numbers of classes with different names are not of one list.
    labels = [part.labels for part in parts if part.labels is not None and same]
    return ImageStatistics(
        _merged([part.pooled for part in parts]),
        _merged(spatial) if spatial else None,
        first.identity,
        first.resolution,
        np.concatenate(kept) if kept else None,
        np.concatenate(labels) if kept and len(labels) == len(kept) else None,
        first.class_names if same else None,
    )


def _merged(gaussians: Sequence[Gaussian]) -> Gaussian:
    merged = FeatureStatistics(len(gaussians[0].mean))
    for mean, covariance, count in gaussians:
        if count is None:
            raise DataError("Statistics that do not say how many images they are of cannot be merged.")
        state = {"count": np.array(count), "mean": mean, "scatter": covariance * (count - 1)}
        merged.merge(FeatureStatistics.from_state(state))
    return merged.gaussian()


class Comparison(NamedTuple):
    """The Fréchet distances of two sets of images.

    Attributes:
        pooled: with Inception features, FID.
        spatial: with Inception features, sFID; None where a side has no spatial features.
    """

    pooled: FrechetReport
    spatial: FrechetReport | None


def compare(reference: ImageStatistics, samples: ImageStatistics) -> Comparison:
    """Return the Fréchet distances of samples to a reference.

    Raises:
        DataError: they were made by different nets or of images of different sizes.
    """
    check_comparable(reference, samples)
    names = ("reference", "sample")
    spatial = None
    if reference.spatial is not None and samples.spatial is not None:
        spatial = frechet_report(reference.spatial, samples.spatial, names)
    return Comparison(frechet_report(reference.pooled, samples.pooled, names), spatial)


def check_comparable(reference: ImageStatistics, samples: ImageStatistics) -> None:
    """Raise a `DataError` unless two statistics are of one feature net and of images of one size."""
    known = [side.identity for side in (reference, samples) if side.identity is not None]
    if len(known) == 2 and known[0] != known[1]:
        raise DataError(
            f"The statistics were made by different feature nets, {known[0]} and {known[1]}: "
            "make one of them again with the other's."
        )
    if len(known) == 1:
        unknown = reference if reference.identity is None else samples
        origin = unknown.origin or (INCEPTION if unknown.spatial is None else ADM)
        if not known[0].startswith(origin.identities):
            cure = f"use the feature net {' or '.join(origin.nets)}" if origin.nets else "no feature net fits"
            raise DataError(
                f"Statistics that do not name their feature net are {origin.whose} here, but the others were made by "
                f"{known[0]}: {cure}, or make your own reference with maskgit stats."
            )
    sizes = [side.resolution for side in (reference, samples) if side.resolution is not None]
    if len(sizes) == 2 and sizes[0] != sizes[1]:
        raise DataError(
            f"The reference is of {sizes[0][0]} × {sizes[0][1]} pixels and the samples of "
            f"{sizes[1][0]} × {sizes[1][1]}: scores compare images of one size."
        )
    if len(reference.pooled.mean) != len(samples.pooled.mean):
        raise DataError(
            f"The statistics have {len(reference.pooled.mean)} and {len(samples.pooled.mean)} dimensions: "
            "use one feature net."
        )


def read_statistics(path: str | Path) -> ImageStatistics:
    """Return the statistics in a file, our own or others'; see the top of this file.

    Args:
        path: `.npz`, `.npy` of features, or `.pt` of torch-fidelity's cache; images, if it holds any, are not read.

    Raises:
        DataError: there is no such file, it is damaged, holds no statistics, or impossible ones.
    """
    path = expand(path)
    if path.suffix in (".pt", ".npy"):
        if not path.is_file():
            raise DataError(f"{path} is not a file: check the path.")
        if path.stat().st_size > MAX_FEATURE_BYTES:
            raise DataError(f"{path} has more than {MAX_FEATURE_BYTES} bytes: is it the right file?")
    if path.suffix == ".pt":
        return _torch_fidelity(path)
    if path.suffix == ".npy":
        return _of_features(_array(path), path, "features")
    with open_npz(path) as archive:
        if "mu" in archive.names:
            spatial = _gaussian(archive, "mu_s", "sigma_s", None) if "mu_s" in archive.names else None
            size = archive.header("arr_0").shape[1:3] if "arr_0" in archive.names else ()
            resolution = (size[0], size[1]) if len(size) == 2 else None
            pooled = _gaussian(archive, "mu", "sigma", None)
            origin = origin_of(path.name, pooled, spatial=spatial is not None)
            return ImageStatistics(pooled, spatial, None, resolution, origin=origin)
        if "format" in archive.names:
            return _own(archive)
        for name in FEATURE_ARRAYS:
            if name in archive.names:
                return _of_features(archive.read(name, MAX_FEATURE_BYTES), path, name)
        hint = (
            "it holds images: measure them first"
            if "arr_0" in archive.names
            else f"it holds {', '.join(sorted(archive.names)[:8])}"
        )
        raise DataError(f"{path} holds no statistics ({hint}).")


def _array(path: Path) -> NDArray[Any]:
    """Return the array of numbers in a file, of which nothing is in memory yet."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as an array of numbers: is it the right file?") from error


def _torch_fidelity(path: Path) -> ImageStatistics:
    """Return what a file of torch-fidelity's cache holds: features, or a mean and a covariance."""
    try:
        # Means and covariances are NumPy arrays there, whose parts alone are allowed beside tensors.
        with torch.serialization.safe_globals(_array_types()):
            held = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} cannot be read as torch-fidelity's cache: is it the right file?") from error
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} holds more than numbers, and is not read: is it torch-fidelity's cache?"
        ) from error
    if isinstance(held, Tensor):
        return _of_features(held.numpy(), path, "features")
    parts = [held.get(name) for name in ("mu", "sigma")] if isinstance(held, dict) else []
    if len(parts) != 2 or not all(isinstance(part, np.ndarray | Tensor) for part in parts):
        raise DataError(f"{path} holds neither features nor 'mu' and 'sigma': is it the right file?")
    mu, sigma = (np.asarray(part) for part in parts)
    pooled = _checked(mu, sigma, None, path, "'mu' or 'sigma'")
    return ImageStatistics(pooled, origin=origin_of(path.name, pooled, spatial=False))


def _array_types() -> list[Any]:
    """Return the types by which a NumPy array of plain numbers is stored."""
    kinds = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8")]
    return [np.ndarray, np.dtype, np._core.multiarray._reconstruct, *kinds]  # type: ignore[attr-defined]


def _of_features(features: NDArray[Any], path: Path, name: str) -> ImageStatistics:
    """Return the statistics of features, float (N, D) or with sides of 1 behind."""
    if features.ndim > 2:
        features = features.reshape(len(features), -1)
    fits = features.ndim == 2 and len(features) >= 2 and 1 <= features.shape[1] <= MAX_DIM
    if not fits or features.dtype.kind != "f" or not np.isfinite(features).all():
        raise DataError(
            f"{path}: {name!r} must be finite features, float (N, D) of two images at least, but is {features.dtype} "
            f"of {features.shape}: is it the right file?"
        )
    whole = FeatureStatistics(features.shape[1])
    for start in range(0, len(features), _GATHERED):
        whole.update(features[start : start + _GATHERED])
    places = np.arange(len(features))
    kept = features[(places * KEPT_FEATURES) % len(features) < KEPT_FEATURES]
    pooled = whole.gaussian()
    origin = origin_of(path.name, pooled, spatial=False)
    return ImageStatistics(pooled, features=kept.astype(np.float32), origin=origin)


def _own(archive: Archive) -> ImageStatistics:
    version = int(_vector(archive, "format", 1)[0])
    if version != FORMAT:
        raise DataError(f"{archive.path} has the format {version}, not {FORMAT}: make it again.")
    height, width = (int(side) for side in _vector(archive, "resolution", 2))
    count = int(_vector(archive, "count", 1)[0])
    if count < 2 or not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise DataError(f"{archive.path} holds impossible values: make it again.")
    identity = archive.read("identity", 4096)
    if identity.dtype.kind != "U" or identity.shape != ():
        raise DataError(f"{archive.path}: 'identity' is not text: make it again.")
    spatial = None
    if "spatial_mean" in archive.names:
        spatial = _gaussian(archive, "spatial_mean", "spatial_covariance", count)
    pooled = _gaussian(archive, "mean", "covariance", count)
    features = None
    if "features" in archive.names:
        features = archive.read("features", MAX_FEATURE_BYTES)
        if features.ndim != 2 or features.dtype != np.float32 or features.shape[1] != len(pooled.mean):
            raise DataError(f"{archive.path}: 'features' has the wrong shape or type: make it again.")
    labels = None
    if features is not None and "labels" in archive.names:
        labels = archive.read("labels", 4 * len(features))
        if labels.shape != (len(features),) or labels.dtype != np.int32:
            raise DataError(f"{archive.path}: 'labels' has the wrong shape or type: make it again.")
    names = None if labels is None else _class_names(archive, int(labels.max(initial=-1)) + 1)
    return ImageStatistics(pooled, spatial, str(identity), (height, width), features, labels, names)


def _class_names(archive: Archive, least: int) -> tuple[str, ...] | None:
    """Return the names of at least so many classes; files of before have none."""
    if "class_names" not in archive.names:
        return None
    text = archive.read("class_names", MAX_NAMES_BYTES)
    try:
        names = json.loads(str(text)) if text.dtype.kind == "U" and text.shape == () else None
    except (ValueError, RecursionError):
        names = None
    if not isinstance(names, list) or len(names) < least or not all(isinstance(name, str) for name in names):
        raise DataError(f"{archive.path}: 'class_names' is no list of a name for each class: make it again.")
    return tuple(names)


def _vector(archive: Archive, name: str, size: int) -> NDArray[np.int64]:
    values = archive.read(name, 64)
    if values.size != size or values.dtype.kind not in "iu":
        raise DataError(f"{archive.path}: {name!r} has the wrong shape or type: make it again.")
    return values.reshape(size).astype(np.int64)


def _gaussian(archive: Archive, mean: str, covariance: str, count: int | None) -> Gaussian:
    shape = archive.header(mean).shape
    dim = shape[0] if len(shape) == 1 else 0
    if not 1 <= dim <= MAX_DIM or archive.header(covariance).shape != (dim, dim):
        raise DataError(
            f"{archive.path}: {mean!r} of {shape} and {covariance!r} of {archive.header(covariance).shape} "
            f"are not a mean and covariance of at most {MAX_DIM} dimensions: is it the right file?"
        )
    mu, sigma = archive.read(mean, 16 * dim), archive.read(covariance, 16 * dim * dim)
    return _checked(mu, sigma, count, archive.path, f"{covariance!r} or {mean!r}")


def _checked(mu: NDArray[Any], sigma: NDArray[Any], count: int | None, path: Path, names: str) -> Gaussian:
    """Return a mean and covariance, if they can be ones."""
    fits = mu.ndim == 1 and 1 <= len(mu) <= MAX_DIM and sigma.shape == 2 * mu.shape
    plain = fits and all(x.dtype.kind == "f" and np.isfinite(x).all() for x in (mu, sigma))
    if (
        not plain
        or not np.allclose(sigma, sigma.T, atol=1e-5 * np.abs(sigma).max())
        or (np.diag(sigma) < 0).any()
    ):
        raise DataError(f"{path}: {names} holds impossible values: make it again.")
    return Gaussian(mu.astype(np.float64), sigma.astype(np.float64), count)


def write_statistics(path: str | Path, statistics: ImageStatistics, *, overwrite: bool = False) -> None:
    """Write statistics to an `.npz` file, whole or not at all.

    Args:
        path: ends in `.npz`.
        statistics: of a known feature net and resolution.
        overwrite: whether a file that exists is replaced.

    Raises:
        OutputError: the file exists or cannot be written, or its name ends in something else.
        DataError: the statistics do not name their feature net, or not their number of images.
    """
    path = expand(path)
    if path.suffix != ".npz":
        raise OutputError(f"Statistics are written as .npz, but the path is {path}: choose another name.")
    if path.exists() and not overwrite:
        raise OutputError(f"{path} exists: choose another name, or allow it to be overwritten.")
    pooled, spatial = statistics.pooled, statistics.spatial
    if statistics.identity is None or statistics.resolution is None or pooled.num_images is None:
        raise DataError("Only statistics whose feature net, resolution and count are known can be written.")
    arrays: dict[str, NDArray[Any]] = {
        "format": np.array(FORMAT, np.int64),
        "identity": np.array(statistics.identity),
        "resolution": np.array(statistics.resolution, np.int64),
        "count": np.array(pooled.num_images, np.int64),
        "mean": pooled.mean,
        "covariance": pooled.covariance,
    }
    if spatial is not None:
        arrays |= {"spatial_mean": spatial.mean, "spatial_covariance": spatial.covariance}
    if statistics.features is not None:
        arrays["features"] = statistics.features
        if statistics.labels is not None:
            arrays["labels"] = statistics.labels
            if statistics.class_names is not None:
                arrays["class_names"] = np.array(json.dumps(statistics.class_names))
    with replacing(path, overwrite=overwrite) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
