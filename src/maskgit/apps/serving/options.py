"""What the operator of a server sets: its limits, and how clients reach it. Shared by `maskgit serve` and Ray Serve."""

import re
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Annotated

from tyro.conf import arg

from maskgit.errors import ConfigError
from maskgit.foundation.checks import Config, check_count, check_range

MAX_QUEUE = 4096
MAX_SECONDS = 86_400


@dataclass(frozen=True)
class Limits(Config):
    """How much work is accepted at once, and how much one request may ask for."""

    queue_size: int = 64
    """Images accepted but not yet answered; further requests get 429."""
    queue_steps: int = 4096
    """Decoding steps, of all images together, accepted but not yet made; further requests get 429."""
    max_batch: int = 16
    """Images decoded together."""
    max_images: int = 16
    """Images per request."""
    max_per_client: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint="(default: the whole queue)")
    ] = None
    """Images accepted but not yet answered per client, that is, per API key or else per address."""
    max_steps: int = 256
    """Decoding steps per image."""
    max_pixels: int = 25_000_000
    """Pixels of an uploaded image, and of all images in one answer."""
    max_body: int = 32 * 2**20
    """Bytes of a request body."""
    body_seconds: float = 30.0
    """Seconds within which a request body must arrive."""
    timeout: float = 120.0
    """Seconds within which a request must be answered; a request may ask for less."""

    def validate(self) -> None:
        check_count("queue_size", self.queue_size, 1, MAX_QUEUE)
        check_count("queue_steps", self.queue_steps, 1, 10**9)
        check_count("max_batch", self.max_batch, 1, MAX_QUEUE)
        check_count("max_images", self.max_images, 1, MAX_QUEUE)
        if self.max_per_client is not None:
            check_count("max_per_client", self.max_per_client, 1, MAX_QUEUE)
        check_count("max_steps", self.max_steps, 1, 10_000)
        check_count("max_pixels", self.max_pixels, 1, 10**9)
        check_count("max_body", self.max_body, 1, 2**32)
        check_range("body_seconds", self.body_seconds, 0.01, MAX_SECONDS)
        check_range("timeout", self.timeout, 0.01, MAX_SECONDS)


# A path prefix.
PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+){1,16}")
_ALLOWED = re.compile(r"(\*\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_ORIGIN = re.compile(r"https?://([A-Za-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?")


@dataclass(frozen=True)
class Network:
    """How clients reach the server."""

    root_path: Annotated[str, arg(metavar="PATH", help_behavior_hint="(default: none)")] = ""
    """Path prefix under which a proxy exposes the server, such as /mg; overrides X-Forwarded-Prefix."""
    trusted_proxies: Annotated[
        tuple[str, ...], arg(metavar="ADDRESS", help_behavior_hint="(default: none)")
    ] = ()
    """Addresses or networks (10.0.0.0/8) of proxies to trust; each must set or strip all X-Forwarded headers."""
    allowed_hosts: Annotated[
        tuple[str, ...], arg(metavar="NAME", help_behavior_hint="(default: localhost)")
    ] = ()
    """Host names to answer to, such as *.example.org; localhost and IP addresses are always allowed."""
    cors_origins: Annotated[tuple[str, ...], arg(metavar="ORIGIN", help_behavior_hint="(default: none)")] = ()
    """Origins of other sites whose pages may call the server, such as https://app.example.org."""

    def check(self) -> None:
        """Check what was given.

        Raises:
            ConfigError: a value has the wrong form.
        """
        if self.root_path and not PREFIX.fullmatch(self.root_path):
            raise ConfigError(
                "root_path must start with / and not end with it, and hold only letters, digits and -._~, like /mg, but "
                f"is {self.root_path!r:.200}."
            )
        self.proxies()
        for name in self.allowed_hosts:
            if not _ALLOWED.fullmatch(name):
                raise ConfigError(
                    "allowed_hosts must be names such as images.example.org or *.example.org, without a port, but one is "
                    f"{name!r:.200}."
                )
        for origin in self.cors_origins:
            if not _ORIGIN.fullmatch(origin):
                raise ConfigError(
                    "cors_origins must look like https://app.example.org or http://localhost:3000, without a path, but "
                    f"one is {origin!r:.200}."
                )

    def proxies(self) -> list[IPv4Network | IPv6Network]:
        """Return the trusted proxies as networks.

        Raises:
            ConfigError: one is neither an address nor a network.
        """
        try:
            return [ip_network(one, strict=False) for one in self.trusted_proxies]
        except ValueError as error:
            raise ConfigError(
                f"trusted_proxies must be addresses or networks such as 127.0.0.1 or 10.0.0.0/8: {error}."
            ) from error
