"""Flags that several commands share: which model, and how it decodes."""

import json
import os
import sys
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, arg

from maskgit.apps.settings import SETTINGS
from maskgit.errors import ConfigError
from maskgit.foundation import __version__

if TYPE_CHECKING:
    from maskgit.apps.cli.signing import Signer
    from maskgit.pipeline import MaskGIT


def about(name: str, *, metavar: str | None = None, hint: str | None = None) -> Any:
    """Describe a flag by its entry in `settings.SETTINGS`."""
    return arg(metavar=metavar, help=SETTINGS[name].help, help_behavior_hint=hint)


def _own(name: str, metavar: str) -> Any:
    """Describe a flag that leaves the choice to the model when it is not given."""
    return about(name, metavar=metavar, hint="(default: the model's)")


FAST_NOTE = (
    "maskgit: running in bfloat16 on this GPU (--fast); --exact gives the same tokens on every machine."
)

Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    arg(metavar="{float32,bfloat16,float16}", help_behavior_hint="(default: float32, or as --fast chooses)"),
]


@dataclass(frozen=True)
class Speed:
    """Speed against exactness: at most one of these."""

    exact: FlagCreatePairsOff[bool] = False
    """float32; the same tokens on every machine. The default on CPUs, and for commands that score images."""
    fast: FlagCreatePairsOff[bool] = False
    """Compiled bfloat16 on GPUs (the default there), bfloat16 or int8 on CPUs. Images differ slightly."""
    int8: FlagCreatePairsOff[bool] = False
    """int8 layers, on CPUs. Images differ slightly."""

    @property
    def asked(self) -> str | None:
        """The mode that was asked for, a name in `engine.MODES`, or None.

        Raises:
            ConfigError: two were given.
        """
        given = [name for name in ("exact", "fast", "int8") if getattr(self, name)]
        if len(given) > 1:
            raise ConfigError(f"Choose one of --{' and --'.join(given)}.")
        return given[0] if given else None

    @property
    def mode(self) -> str:
        """The mode, a name in `engine.MODES`; exact by default."""
        return self.asked or "exact"


@dataclass(frozen=True)
class Model:
    """The model, and where it runs."""

    model: str = "cifar10"
    """Name (`maskgit info` lists them), folder, or Hugging Face id such as user/model or user/model@revision."""
    device: str = "auto"
    """cuda, mps or cpu; auto picks the first available."""
    dtype: Dtype = None
    """Precision of the networks. In float32 an image's tokens do not depend on its batch."""
    speed: Speed = field(default_factory=Speed)
    adapter: Annotated[str | None, arg(metavar="FOLDER|ID", help_behavior_hint="")] = None
    """What `maskgit finetune` made of the model: the folder of an adapter or its run, or a Hugging Face id."""
    adapter_scale: float = 1.0
    """How much of the adapter is added; 0 is the model without it."""
    guide: Annotated[str | None, arg(metavar="MODEL", help_behavior_hint="")] = None
    """A weaker model of the same tokens, such as an earlier checkpoint's, to guide away from by --guidance-scale."""

    def load(self, size: tuple[int, int] | None = None) -> "MaskGIT":
        """Return the model on its device, ready to run, for images of (width, height) pixels if given."""
        mode = self.mode()
        plain = self.plain()
        if size is not None:
            plain = plain.resized(*size)
        if self.speed.asked is None and mode == "fast":
            print(FAST_NOTE, file=sys.stderr)
        return plain.optimize(mode, dtype=self.dtype)

    def mode(self) -> str:
        """Return how fast it runs: what was asked for, else fast on a CUDA GPU and exact elsewhere.

        Raises:
            ConfigError: two modes were given, or the device is not there.
        """
        from maskgit.foundation import devices

        asked = self.speed.asked
        # Who asks for float32 wants the same tokens everywhere.
        if asked is not None or self.dtype == "float32":
            return asked or "exact"
        return "fast" if devices.choose_device(self.device).type == "cuda" else "exact"

    def plain(self) -> "MaskGIT":
        """Return the model on its device as it was saved, in float32."""
        from maskgit import hub
        from maskgit.engine.host import limit_threads
        from maskgit.foundation.devices import own_device

        limit_threads()
        return hub.from_pretrained(
            self.model,
            device=own_device(self.device),
            adapter=self.adapter,
            adapter_scale=self.adapter_scale,
            guide=self.guide,
        )

    def recorded(self, command: str) -> dict[str, Any]:
        """Return what a picture's metadata says of the model and of what made it."""
        mode = self.mode()
        # What the fast mode computes in is the machine's choice.
        dtype = self.dtype or ("auto" if mode == "fast" else "float32")
        recorded: dict[str, Any] = {
            "maskgit": __version__,
            "command": command,
            "model": self.model,
            "mode": mode,
            "dtype": dtype,
        }
        if self.adapter is not None:
            recorded |= {"adapter": self.adapter, "adapter_scale": self.adapter_scale}
        if self.guide is not None:
            recorded["guide"] = self.guide
        return recorded


@dataclass(frozen=True)
class Marking:
    """What image files say about their origin."""

    mark: bool = True
    """Record in XMP that an image was made by AI (IPTC digital source type) with this tool."""
    c2pa_cert: Annotated[
        Path | None, arg(metavar="FILE", help_behavior_hint="(default: $MASKGIT_C2PA_CERT, or unsigned)")
    ] = None
    """Sign every image with a C2PA manifest, using this PEM certificate chain, the signer's certificate first."""
    c2pa_key: Annotated[
        Path | None, arg(metavar="FILE", help_behavior_hint="(default: $MASKGIT_C2PA_KEY)")
    ] = None
    """PEM private key of the signer's certificate."""

    @cached_property
    def signer(self) -> "Signer | None":
        """What signs files, or None.

        Raises:
            ConfigError: only one of certificate and key is given, or they do not serve.
        """
        cert = self.c2pa_cert or _named_path("MASKGIT_C2PA_CERT")
        key = self.c2pa_key or _named_path("MASKGIT_C2PA_KEY")
        if cert is None and key is None:
            return None
        if cert is None or key is None:
            raise ConfigError("Signing needs both a certificate and its key: --c2pa-cert and --c2pa-key.")
        from maskgit.apps.cli.signing import Signer

        return Signer(cert, key)

    def writing(self, photo: Path | bytes | None = None) -> dict[str, Any]:
        """Return the arguments `mark` and `sign` of what writes pictures made from a photo, or from nothing."""
        if self.signer is None:
            return {"mark": self.mark, "sign": None}
        data = photo.read_bytes() if isinstance(photo, Path) else photo
        return {"mark": self.mark, "sign": self.signer.of(data)}


@dataclass(frozen=True)
class Sampler:
    """How tokens are decoded; by default as the model's config says."""

    steps: Annotated[int | None, _own("steps", "INT")] = None
    policy: Annotated[str | None, _own("policy", "NAME")] = None
    policy_options: Annotated[tuple[str, ...], about("policy_options", metavar="NAME=VALUE", hint="")] = ()
    mask_schedule: Annotated[str | None, _own("mask_schedule", "NAME")] = None
    temperature: Annotated[float | None, _own("temperature", "FLOAT")] = None
    temperature_schedule: Annotated[str | None, _own("temperature_schedule", "CURVE")] = None
    choice_temperature: Annotated[float | None, _own("choice_temperature", "FLOAT")] = None
    choice_schedule: Annotated[str | None, _own("choice_schedule", "CURVE")] = None
    guidance_scale: Annotated[float | None, _own("guidance_scale", "FLOAT")] = None
    guidance_schedule: Annotated[str | None, _own("guidance_schedule", "CURVE")] = None
    top_k: Annotated[int | None, _own("top_k", "INT")] = None
    top_p: Annotated[float | None, _own("top_p", "FLOAT")] = None
    force_guidance: Annotated[bool, about("force_guidance")] = False
    tables: Annotated[
        Path | None, arg(metavar="FILE", help_behavior_hint="", help=f"JSON file. {SETTINGS['tables'].help}")
    ] = None
    preset: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """JSON file of settings, as `maskgit tune` writes it; flags override it."""

    def given(self) -> dict[str, Any]:
        """Return the settings that were given, by their names in `SamplerConfig`.

        Raises:
            ConfigError: a file cannot be read, or an option is not NAME=VALUE.
        """
        from maskgit.sampler.presets import read_preset, read_tables

        settings = read_preset(self.preset) if self.preset else {}
        if self.policy is not None and self.policy != settings.get("policy"):
            settings.pop("policy_options", None)
        if self.tables:
            settings["tables"] = read_tables(self.tables)
            settings["steps"] = settings["tables"].num_steps
        if self.policy_options:
            settings["policy_options"] = dict(_option(text) for text in self.policy_options)
        plain = [f.name for f in fields(self) if f.name not in ("tables", "preset", "policy_options")]
        values = {name: getattr(self, name) for name in plain}
        # 0 is a value, where False is a flag that was not given.
        settings |= {
            name: value for name, value in values.items() if value is not None and value is not False
        }
        return settings


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"--policy-options takes NAME=VALUE, such as eta=0.1, but was given {text!r}.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _named_path(variable: str) -> Path | None:
    """Return the path that an environment variable names, if it is set."""
    value = os.environ.get(variable)
    return Path(value) if value else None
