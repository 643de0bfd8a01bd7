"""Flags of the commands that score images, in groups."""

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from maskgit.apps.cli.flags import Dtype, Speed
from maskgit.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from maskgit.evaluation.networks.features import FeatureNet
    from maskgit.evaluation.networks.lpips import LPIPS

Place = Annotated[str | None, arg(metavar="DATA", help_behavior_hint="")]


@dataclass(frozen=True)
class Net:
    """The network that compares images."""

    features: Annotated[str, arg(metavar="NET")] = "effnet-lite0"
    """effnet-lite0, inception, inception-pytorch-fid, dinov2 or clip. Scores carry its name; only Inception's are
    FID."""
    weights: Annotated[str | None, arg(metavar="PATH|URL", help_behavior_hint="")] = None
    """Its weights, if no installed package provides them."""
    feature_size: Annotated[int | None, arg(metavar="INT", help_behavior_hint="")] = None
    """Side in pixels of the input to effnet-lite0."""

    def load(self, device: "torch.device") -> "FeatureNet":
        """Return the net on a device."""
        from maskgit.evaluation.networks.features import load_feature_net

        return load_feature_net(self.features, device, size=self.feature_size, weights=self.weights)


Also = Annotated[tuple[str, ...], arg(metavar="NET=PATH|URL", help_behavior_hint="")]


def load_also(given: tuple[str, ...], features: str, device: "torch.device") -> "dict[str, FeatureNet]":
    """Return the nets of --also by name.

    Raises:
        ConfigError: one is not NET=PATH|URL, or named twice.
    """
    from maskgit.evaluation.networks.features import load_feature_net

    nets: dict[str, FeatureNet] = {}
    for text in given:
        name, _, weights = text.partition("=")
        if name in nets or name == features:
            raise ConfigError(f"--also names {name} twice, or --features does; name each network once.")
        nets[name] = load_feature_net(name, device, weights=weights or None)
    return nets


@dataclass(frozen=True)
class SampleFlags:
    """Scores of generated samples."""

    labels: Literal["balanced", "dataset"] = "balanced"
    """Classes in equal numbers, or at their frequency in the training data (else in the reference)."""
    training_data: Place = None
    """The model's training images, to search for copies."""
    num_training: int = 50_000
    """How many of them to search, evenly spaced."""
    show_training: bool = True
    """Show real images: the nearest training images, and those that are edited; turn off before publishing the
    report."""
    also: Also = ()
    """Further networks, for distances by their features in the same pass: dinov2=FILE for FD-DINOv2, clip=FILE for
    CMMD."""
    curve: Annotated[tuple[str, ...], arg(metavar="KEY=A,B,…", help_behavior_hint="")] = ()
    """Also score every combination of these settings: steps=4,8,12 policy=confidence,halton."""
    curve_images: int = 1000
    """Images for each combination."""
    neighbours: int = 3
    """The k of precision, recall, density and coverage."""
    neighbour_images: int = 2000
    """At most how many samples and real images these four compare; recall and coverage depend on it."""
    edits: bool = False
    """Also mask parts of real images of the reference, fill them in, and score that; takes --lpips."""
    edit_images: int = 500
    """How many images to edit, at most half of the reference."""
    seeds: int = 1
    """Repeat the evaluation with so many seeds, from --seed on, for the spread of each score."""
    keep_images: Literal["none", "npz", "png"] = "none"
    """Keep the samples in OUT/work/samples as arrays or PNG files."""

    def axes(self) -> dict[str, tuple[Any, ...]]:
        """Return the curve's sampler settings with their values.

        Raises:
            ConfigError: one is not KEY=A,B.
        """
        return dict(_axis(text) for text in self.curve)

    def refuse(self) -> None:
        """Raise a `ConfigError` if anything is asked about samples."""
        asked = {
            "training-data": self.training_data,
            "also": self.also,
            "curve": self.curve,
            "edits": self.edits,
            "seeds": self.seeds > 1,
        }
        for name, value in asked.items():
            if value:
                raise ConfigError(f"--{name} applies to samples only; leave it out with --reconstruction.")


@dataclass(frozen=True)
class ReconstructionFlags:
    """Scores of reconstructions."""

    reconstruction: bool = False
    """Score the tokenizer's reconstructions of the reference images instead of samples."""
    lpips: Annotated[str | None, arg(metavar="{alex,vgg}", help_behavior_hint="")] = None
    """Also measure LPIPS of reconstructions or edits, with this network."""
    lpips_weights: Annotated[tuple[str, ...], arg(metavar="PATH|URL", help_behavior_hint="")] = ()
    """The two weight files: the network's and LPIPS's own."""

    def measure(self, device: "torch.device") -> "tuple[LPIPS | None, str | None]":
        """Return the LPIPS network and what it is called with its weights, if any is asked for.

        Raises:
            ConfigError: weights are given without a network.
        """
        if self.lpips is None:
            if self.lpips_weights:
                raise ConfigError(
                    "--lpips-weights needs --lpips alex or --lpips vgg, the network they belong to."
                )
            return None, None
        from maskgit.evaluation.networks.lpips import load_lpips
        from maskgit.evaluation.networks.weights import local_file
        from maskgit.foundation.download import sha256

        network = load_lpips(self.lpips, weights=self.lpips_weights, device=device)
        digests = "+".join(sha256(local_file(place))[:12] for place in self.lpips_weights)
        return network, f"{self.lpips}, weights {digests}"


@dataclass(frozen=True)
class WorkFlags:
    """How the images are made and scored."""

    num_images: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint="(default: 50000; all with --reconstruction)")
    ] = None
    """Number of images."""
    seed: int = 0
    """Random seed; seed and index together determine an image."""
    splits: int = 10
    """Parts the images are split into to estimate confidence intervals."""
    max_bad_share: float = 0.01
    """Share of real images that may be unreadable, 0 to 1."""
    batch_size: int = 64
    """Images decoded together; may change their last bit."""
    unit_size: int = 512
    """Images per unit of work; a killed process loses at most one unit."""
    device: str = "auto"
    """cuda, mps or cpu; auto picks the first available."""
    dtype: Dtype = None
    """Precision of the networks."""
    speed: Speed = field(default_factory=Speed)


def _axis(text: str) -> tuple[str, tuple[Any, ...]]:
    """Return a sampler setting and its values of "key=a,b,…"."""
    name, equals, values = text.partition("=")
    if not equals or not name or not all(values.split(",")):
        raise ConfigError(f"--curve takes KEY=A,B,…, such as steps=4,8,12, but was given {text!r}.")

    def value(word: str) -> Any:
        try:
            return json.loads(word)
        except ValueError:
            return word

    return name.replace("-", "_"), tuple(value(word) for word in values.split(","))
