"""Flags that several commands share: which model, and how it decodes."""

import json
import re
import sys
from dataclasses import dataclass, field, fields
from functools import cached_property
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, arg

from maskgit.errors import ConfigError
from maskgit.foundation.version import __version__

if TYPE_CHECKING:
    from maskgit.apps.cli.signing import Signer
    from maskgit.pipeline import MaskGIT


def _own(metavar: str) -> Any:
    """Describe a flag that, when it is not given, leaves the choice to the model."""
    return arg(metavar=metavar, help_behavior_hint="(default: the model's own)")


FAST_NOTE = "maskgit: bfloat16 on this GPU (--fast); --exact makes the same tokens as on any other machine."

Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    arg(metavar="{float32,bfloat16,float16}", help_behavior_hint="(default: float32, or as --fast has it)"),
]


@dataclass(frozen=True)
class Speed:
    """How fast, and how exactly: one of these modes."""

    exact: FlagCreatePairsOff[bool] = False
    """float32, with the same tokens as plain networks. If nothing is said, this is done on CPUs, and by commands that
    score images everywhere."""
    fast: FlagCreatePairsOff[bool] = False
    """On GPUs bfloat16, compiled, which other commands do there if nothing is said; on CPUs bfloat16 or int8,
    whichever this one is faster at. Images differ a little."""
    int8: FlagCreatePairsOff[bool] = False
    """int8 layers, on CPUs. Images differ a little."""

    @property
    def asked(self) -> str | None:
        """A name in `engine.MODES`, or None if nothing is said.

        Raises:
            ConfigError: two were given.
        """
        given = [name for name in ("exact", "fast", "int8") if getattr(self, name)]
        if len(given) > 1:
            raise ConfigError(f"Choose one of --{' and --'.join(given)}.")
        return given[0] if given else None

    @property
    def mode(self) -> str:
        """A name in `engine.MODES`; exact if nothing is said."""
        return self.asked or "exact"


@dataclass(frozen=True)
class Model:
    """Which model, and where and how it runs."""

    model: str = "cifar10"
    """A model's name (see `maskgit info`), its folder, or a Hugging Face id such as user/model or
    user/model@revision."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first that is there."""
    dtype: Dtype = None
    """The type the networks compute in; in float32 an image's tokens do not depend on its batch."""
    speed: Speed = field(default_factory=Speed)

    def load(self) -> "MaskGIT":
        """Return the model on its device, ready to run."""
        mode = self.mode()
        plain = self.plain()
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
        return hub.from_pretrained(self.model, device=own_device(self.device))

    def recorded(self, command: str) -> dict[str, Any]:
        """Return what a picture's metadata says of the model and of what made it."""
        mode = self.mode()
        # What the fast mode computes in is the machine's choice.
        dtype = self.dtype or ("auto" if mode == "fast" else "float32")
        return {
            "maskgit": __version__,
            "command": command,
            "model": self.model,
            "mode": mode,
            "dtype": dtype,
        }


# A path that a proxy may show a server under.
PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+){1,16}")
_ALLOWED = re.compile(r"(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_ORIGIN = re.compile(r"https?://([A-Za-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")


@dataclass(frozen=True)
class Network:
    """What stands in front of a server."""

    root_path: Annotated[str, arg(metavar="PATH", help_behavior_hint="(default: at the root)")] = ""
    """The path that a proxy shows the server under, such as /mg; it wins over X-Forwarded-Prefix."""
    trusted_proxies: Annotated[
        tuple[str, ...], arg(metavar="ADDRESS", help_behavior_hint="(default: nobody)")
    ] = ()
    """Proxies, as addresses or networks such as 10.0.0.0/8, whose X-Forwarded-For, -Proto, -Host and -Prefix are
    believed. They must set all four, or pass on none that they were sent."""

    allowed_hosts: Annotated[
        tuple[str, ...], arg(metavar="NAME", help_behavior_hint="(default: this machine)")
    ] = ()
    """Names that the server may be called by, such as images.example.org, or *.example.org for all below it. What it
    is called by this machine, and addresses, are always allowed: no other site can point those at the server."""
    cors_origins: Annotated[tuple[str, ...], arg(metavar="ORIGIN", help_behavior_hint="(default: none)")] = ()
    """Other sites whose pages may use the server, such as https://app.example.org."""

    def check(self) -> None:
        """Check what was given.

        Raises:
            ConfigError: something cannot be meant.
        """
        if self.root_path and not PREFIX.fullmatch(self.root_path):
            raise ConfigError(
                f"root_path must be like /mg: it begins with /, does not end with one, and holds letters, digits and "
                f"-._~, but is {self.root_path!r:.200}."
            )
        self.proxies()
        for name in self.allowed_hosts:
            if not _ALLOWED.fullmatch(name):
                raise ConfigError(
                    "allowed_hosts are names such as images.example.org or *.example.org, without a port, but one is "
                    f"{name!r:.200}."
                )
        for origin in self.cors_origins:
            if not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    "cors_origins are written like https://app.example.org or http://localhost:3000, without a path, "
                    f"but one is {origin!r:.200}."
                )

    def proxies(self) -> list[IPv4Network | IPv6Network]:
        """Return the trusted proxies as networks.

        Raises:
            ConfigError: one is none.
        """
        try:
            return [ip_network(one, strict=False) for one in self.trusted_proxies]
        except ValueError as error:
            raise ConfigError(
                f"trusted_proxies are addresses or networks such as 127.0.0.1 or 10.0.0.0/8, but: {error}."
            ) from error


@dataclass(frozen=True)
class Marking:
    """What files say of where their pictures come from."""

    mark: bool = True
    """Say in XMP that a picture is made by AI (IPTC's digital source type), and by this tool."""
    c2pa_cert: Annotated[
        Path | None, arg(metavar="FILE", help_behavior_hint="(default: MASKGIT_C2PA_CERT, or unsigned)")
    ] = None
    """Certificates, PEM, the signer's own first: sign every picture with a C2PA manifest."""
    c2pa_key: Annotated[
        Path | None, arg(metavar="FILE", help_behavior_hint="(default: MASKGIT_C2PA_KEY)")
    ] = None
    """The private key of the first certificate, PEM."""

    @cached_property
    def signer(self) -> "Signer | None":
        """What signs files, or None.

        Raises:
            ConfigError: only one of certificate and key is given, or they do not serve.
        """
        from maskgit.apps.cli import signing

        cert = self.c2pa_cert or signing.from_environment("MASKGIT_C2PA_CERT")
        key = self.c2pa_key or signing.from_environment("MASKGIT_C2PA_KEY")
        if cert is None and key is None:
            return None
        if cert is None or key is None:
            raise ConfigError("Signing takes both a certificate and its key: --c2pa-cert and --c2pa-key.")
        return signing.Signer(cert, key)

    def writing(self, photo: Path | bytes | None = None) -> dict[str, Any]:
        """Return the arguments `mark` and `sign` of what writes pictures made from a photo, or from nothing."""
        if self.signer is None:
            return {"mark": self.mark, "sign": None}
        data = photo.read_bytes() if isinstance(photo, Path) else photo
        return {"mark": self.mark, "sign": self.signer.of(data)}


@dataclass(frozen=True)
class Sampler:
    """How tokens are decoded; what is not given is the model's own choice."""

    steps: Annotated[int | None, _own("INT")] = None
    """Forward passes; more is slower and usually better. The limit of policies that adapt."""
    policy: Annotated[str | None, _own("NAME")] = None
    """Which tokens stay after a step; `maskgit policies` lists them."""
    policy_options: Annotated[tuple[str, ...], arg(metavar="NAME=VALUE", help_behavior_hint="")] = ()
    """The policy's parameters."""
    mask_schedule: Annotated[str | None, _own("NAME")] = None
    """cosine, uniform, square, cubic, sqrt, log, exp, arccos, or powX such as pow2.5."""
    temperature: Annotated[float | None, _own("FLOAT")] = None
    """Divides the logits; below 1 plays safe, 0 takes the likeliest token."""
    temperature_schedule: Annotated[str | None, _own("CURVE")] = None
    """What the temperature is multiplied by: constant, linear[:FROM,TO], cosine[:FROM,TO],
    power-cosine:POWER[,FROM,TO] or interval:LOW,HIGH, over progress from 0 to 1."""
    choice_temperature: Annotated[float | None, _own("FLOAT")] = None
    """Noise on the confidence that decides which tokens stay; more is more varied."""
    choice_schedule: Annotated[str | None, _own("CURVE")] = None
    """What it is multiplied by."""
    guidance_scale: Annotated[float | None, _own("FLOAT")] = None
    """Classifier-free guidance; 1 is none."""
    guidance_schedule: Annotated[str | None, _own("CURVE")] = None
    """How much of it is in force."""
    force_guidance: bool = False
    """Guide a model that was never trained without its class, too."""
    tables: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """A JSON file of values for each step in place of curves: mask_ratio, temperature, choice_temperature,
    guidance_scale."""
    preset: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")] = None
    """A JSON file of settings, as `maskgit tune` writes; flags given beside it win."""

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
        raise ConfigError(f"A policy's parameter is written NAME=VALUE, such as eta=0.1, but is {text!r}.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
