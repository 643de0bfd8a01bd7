"""What scores are called, and how they are read: FID only where it is one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from maskgit.evaluation.metrics.intervals import Interval
from maskgit.evaluation.networks.features import FeatureNet


class Baseline(NamedTuple):
    """The same score of other images, which says what a score can be at best, or what loses it.

    Attributes:
        value: of them, in the same features and against the same reference.
        interval: 95 %; None where there is none.
        num_images: how many they are.
    """

    value: float
    interval: Interval | None
    num_images: int


# Beginnings of the names of scores whose intervals hold the value less often than 93 % or more often than 97 %.
NARROW = ("inception_score", "perplexity", "feature_distance", "lpips")
WIDE = ("fd_", "fid", "kd_", "kid", "class_agreement", "coverage", "codebook_usage")
# Real images that the model did not make, and such images through its tokenizer.
BASELINES = {"real": "real images", "reconstructions": "reconstructions"}


def level(name: str) -> str:
    """Return how often a score's interval holds the value of new samples, as benchmarks/coverage.py measures it."""
    if name.startswith(NARROW):
        return "90 %"
    return "≥ 95 %" if name.startswith(WIDE) else "95 %"


@dataclass(frozen=True)
class Score:
    """One number of a report.

    Attributes:
        name: what it is called, such as "fid" or "fd_effnet-lite0".
        value: of all images.
        interval: where the value would lie for other samples, at `level`; None where there were too few images or
            no method is known to hold that.
        title: what people call it.
        better: "lower", "higher", or "" where neither is.
        about: what it says, in a sentence.
        num_images: how many images it is of; 0 where a file of before does not say.
        features: the feature net by its name in `FEATURE_NETS`; "" where none is used.
        baselines: the same score of other images, by names of `BASELINES`; empty where it has none.
    """

    name: str
    value: float
    interval: Interval | None
    title: str
    better: str
    about: str
    num_images: int = 0
    features: str = ""
    baselines: Mapping[str, Baseline] = field(default_factory=dict)

    @property
    def level(self) -> str:
        """How often the interval holds the value of new samples."""
        return level(self.name)


def with_baselines(scores: Sequence[Score], baselines: Mapping[str, Sequence[Score]]) -> list[Score]:
    """Return scores, each with those of the same name of other images beside it.

    Args:
        scores: of what is judged.
        baselines: scores of other images by names of `BASELINES`.
    """
    by_name = {name: {score.name: score for score in theirs} for name, theirs in baselines.items()}
    return [
        replace(
            score,
            baselines={
                name: Baseline(
                    theirs[score.name].value, theirs[score.name].interval, theirs[score.name].num_images
                )
                for name, theirs in by_name.items()
                if score.name in theirs
            },
        )
        for score in scores
    ]


class Kind(NamedTuple):
    """How a kind of score is called and read; see `Score`."""

    title: str
    inception: str
    better: str
    about: str


KINDS = {
    "fd": Kind(
        "FD",
        "FID",
        "lower",
        "Fréchet distance of the samples’ features to the reference’s.",
    ),
    "fd_infinity": Kind(
        "FD∞",
        "FID∞",
        "lower",
        "The same of infinitely many samples, extrapolated: rough with few images a dimension.",
    ),
    "sfd": Kind(
        "sFD",
        "sFID",
        "lower",
        "The same of features that keep their places: layout.",
    ),
    "kd": Kind(
        "KD",
        "KID",
        "lower",
        "Kernel distance; unbiased, so it may be compared across numbers of images.",
    ),
    "cmmd": Kind(
        "CMMD",
        "CMMD",
        "lower",
        "Maximum mean discrepancy of CLIP’s embeddings, times 1,000.",
    ),
    "inception_score": Kind(
        "Inception Score",
        "Inception Score",
        "higher",
        "How sure and varied Inception's classes are.",
    ),
    "precision": Kind(
        "Precision",
        "Precision",
        "higher",
        "Share of samples that lie where real images do: fidelity.",
    ),
    "recall": Kind(
        "Recall",
        "Recall",
        "higher",
        "Share of real images that samples reach: variety.",
    ),
    "density": Kind(
        "Density",
        "Density",
        "higher",
        "How deep samples lie among real images; about 1 for real ones.",
    ),
    "coverage": Kind(
        "Coverage",
        "Coverage",
        "higher",
        "Share of real images that have a sample next to them.",
    ),
    "authenticity": Kind(
        "Authenticity",
        "Authenticity",
        "",
        "Share of samples that do not look like copies of training images.",
    ),
    "copies": Kind(
        "Copies",
        "Copies",
        "lower",
        "Share of samples that look like a training image in features and in pixels.",
    ),
    "class_agreement": Kind(
        "Class agreement",
        "Class agreement",
        "higher",
        "Share of samples that a linear probe of real images takes for their class.",
    ),
    "rfd": Kind(
        "rFD",
        "rFID",
        "lower",
        "Fréchet distance of reconstructions to their originals.",
    ),
    "psnr": Kind(
        "PSNR",
        "PSNR",
        "higher",
        "Nearness of reconstructions to originals, in decibels.",
    ),
    "ssim": Kind(
        "SSIM",
        "SSIM",
        "higher",
        "Structural similarity of reconstructions and originals.",
    ),
    "lpips": Kind(
        "LPIPS",
        "LPIPS",
        "lower",
        "Perceptual distance of reconstructions and originals.",
    ),
    "codebook_usage": Kind(
        "Codes in use",
        "Codes in use",
        "higher",
        "Share of the codes that the images use.",
    ),
    "perplexity": Kind(
        "Perplexity",
        "Perplexity",
        "higher",
        "How many codes used equally often would be as varied.",
    ),
}
# These do not depend on a feature net, and keep their names.
PLAIN = frozenset(("psnr", "ssim", "codebook_usage", "perplexity", "lpips"))
_INCEPTION = {"fd": "fid", "fd_infinity": "fid_infinity", "sfd": "sfid", "kd": "kid", "rfd": "rfid"}


class Names:
    """What scores made with a feature net are called: FID only where it is one."""

    def __init__(self, features: str, net: FeatureNet) -> None:
        """Take the net's name in `FEATURE_NETS` and the net."""
        self.features, self.net = features, net
        # Other weights, or another resize, make another number than the FID of papers.
        self.is_inception = features == "inception" and net.published is True
        self.is_pytorch_fid = features == "inception-pytorch-fid" and net.published is True

    def name(self, kind: str) -> str:
        """Return a score's name in a report."""
        if kind in PLAIN or kind == "cmmd":
            return kind
        if self.is_inception:
            return _INCEPTION.get(kind, kind)
        if self.is_pytorch_fid:
            return f"{_INCEPTION.get(kind, kind)}_pytorch-fid"
        return f"{kind}_{self.features}"

    def title(self, kind: str) -> str:
        """Return what people call a score; the distances say by which net, unless it is that of FID."""
        known = KINDS[kind]
        if kind not in _INCEPTION or self.is_inception:
            return known.inception
        if self.is_pytorch_fid:
            return f"{known.inception} (pytorch-fid)"
        if self.features in ("dinov2", "clip"):
            return f"{known.title}-{self.net.name}"
        return f"{self.net.name.removesuffix('-Lite0')}-{known.title}"

    def score(self, kind: str, value: float, interval: Interval | None = None, *, num_images: int) -> Score:
        """Return a score of a kind, of so many images."""
        about, features = KINDS[kind], "" if kind in PLAIN else self.features
        return Score(
            self.name(kind),
            value,
            interval,
            self.title(kind),
            about.better,
            about.about,
            num_images,
            features,
        )
