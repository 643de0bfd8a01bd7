"""What statistics must have been made with that do not name their feature net.

Means and covariances of the same images differ with the network and with how it resizes images, and most tools
write neither into their files. What is known of a file is its tool's format, its name and its dimensions.
"""

import re
from typing import NamedTuple

import numpy as np

from maskgit.evaluation.metrics.frechet import Gaussian


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
