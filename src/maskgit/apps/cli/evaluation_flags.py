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
    """What compares the images."""

    features: Annotated[str, arg(metavar="NET")] = "effnet-lite0"
    """effnet-lite0, inception, inception-pytorch-fid or dinov2; scores are named after it, and only
    Inception's are FID."""
    weights: Annotated[str | None, arg(metavar="PATH|URL", help_behavior_hint="")] = None
    """Its weights, where they do not come with a package."""
    feature_size: Annotated[int | None, arg(metavar="INT", help_behavior_hint="")] = None
    """Pixels a side that effnet-lite0 sees."""

    def load(self, device: "torch.device") -> "FeatureNet":
        """Return the net on a device."""
        from maskgit.evaluation.networks.features import load_feature_net

        return load_feature_net(self.features, device, size=self.feature_size, weights=self.weights)


@dataclass(frozen=True)
class SampleFlags:
    """What is asked about samples."""

    labels: Literal["balanced", "dataset"] = "balanced"
    """Classes in equal numbers, or drawn as often as the training data (else the reference) has them."""
    training_data: Place = None
    """The images that the model was trained on, which are searched for copies."""
    num_training: int = 50_000
    """So many of them, spread evenly over them."""
    show_training: bool = True
    """Show the training images that samples are nearest to; leave them out of a page that is published."""
    curve: Annotated[tuple[str, ...], arg(metavar="KEY=A,B,…", help_behavior_hint="")] = ()
    """Further, smaller runs with other sampler settings, such as steps=4,8,12 policy=confidence,halton: all
    combinations."""
    curve_images: int = 1000
    """Images of each of these runs."""
    keep_images: Literal["none", "npz", "png"] = "none"
    """Keep the samples in OUT/work/samples, as arrays or as PNG."""

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
            "curve": self.curve,
        }
        for name, value in asked.items():
            if value:
                raise ConfigError(f"--{name} is about samples: leave it out with --reconstruction.")


@dataclass(frozen=True)
class ReconstructionFlags:
    """What is asked about reconstructions."""

    reconstruction: bool = False
    """Score the tokenizer's reconstructions of the reference images instead of samples."""
    lpips: Annotated[str | None, arg(metavar="{alex,vgg}", help_behavior_hint="")] = None
    """Measure LPIPS too, with this network."""
    lpips_weights: Annotated[tuple[str, ...], arg(metavar="PATH|URL", help_behavior_hint="")] = ()
    """Its two weights files: the network's and LPIPS's own."""

    def measure(self, device: "torch.device") -> "tuple[LPIPS | None, str | None]":
        """Return the LPIPS network and what it is called with its weights, if any is asked for.

        Raises:
            ConfigError: weights are given without a network.
        """
        if self.lpips is None:
            if self.lpips_weights:
                raise ConfigError(
                    "--lpips-weights are given, but no --lpips: say which network, alex or vgg."
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
    """How the work is done."""

    num_images: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint="(default: 50000; all with --reconstruction)")
    ] = None
    """How many images."""
    seed: int = 0
    """With an image's index decides it."""
    splits: int = 10
    """Parts of the images that intervals are taken over."""
    max_bad_share: float = 0.01
    """Largest share of real images that may be unreadable."""
    batch_size: int = 64
    """Images decoded together; part of what decides their last bit."""
    unit_size: int = 512
    """Images of a unit of work, which is lost when a process is killed."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first that is there."""
    dtype: Dtype = None
    """The type the networks compute in."""
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
