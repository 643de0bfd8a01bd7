"""How a server stands in its network: behind which proxies, under which path. Plain ASGI; nothing is decoded."""

import ipaddress
import re
from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import FastAPI
from tyro.conf import arg

from maskgit.apps.serving.gates import App, Receive, Send
from maskgit.errors import ConfigError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Range = ipaddress.IPv4Network | ipaddress.IPv6Network

_PREFIX = re.compile(r"(/[A-Za-z0-9._~-]+){1,16}")
_HOST = re.compile(r"[A-Za-z0-9._-]{1,255}(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]{2,45}\](:[0-9]{1,5})?")
# What only proxies may say. Libraries behind us believe some of it, whoever says it.
_PROXIES_WORDS = re.compile(rb"x-forwarded-.*|x-gradio-server")


@dataclass(frozen=True)
class Network:
    """Where the server stands behind proxies."""

    root_path: Annotated[str, arg(metavar="PATH", help_behavior_hint="(default: at the root)")] = ""
    """The path that a proxy shows the server under, such as /mg; it wins over X-Forwarded-Prefix."""
    trusted_proxies: Annotated[
        tuple[str, ...], arg(metavar="ADDRESS", help_behavior_hint="(default: nobody)")
    ] = ()
    """Proxies, as addresses or networks such as 10.0.0.0/8, whose X-Forwarded-For, -Proto, -Host and -Prefix are
    believed. They must set all four, or pass on none that they were sent."""

    def __post_init__(self) -> None:
        if self.root_path and not _PREFIX.fullmatch(self.root_path):
            raise ConfigError(
                f"root_path must be like /mg: it begins with /, does not end with one, and holds letters, digits and "
                f"-._~, but is {self.root_path!r:.200}."
            )
        self.proxies()

    def proxies(self) -> list[Range]:
        """Return the trusted proxies as networks.

        Raises:
            ConfigError: one is none.
        """
        try:
            return [ipaddress.ip_network(one, strict=False) for one in self.trusted_proxies]
        except ValueError as error:
            raise ConfigError(
                f"trusted_proxies are addresses or networks such as 127.0.0.1 or 10.0.0.0/8, but: {error}."
            ) from error


def place(app: FastAPI, network: Network) -> None:
    """Let an application see its requests as the clients in front of trusted proxies sent them."""
    app.add_middleware(Forwarded, network=network)


def route_path(scope: MutableMapping[str, Any]) -> str:
    """Return a request's path as routes name it, without what a proxy put before it."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


class Forwarded:
    """Takes a client's address, the scheme, the host and the path's prefix from trusted proxies, and from nobody else.

    What others say in the same words is taken out, so that nothing behind believes it.
    """

    def __init__(self, app: App, network: Network) -> None:
        self.app = app
        self._prefix = network.root_path
        self._proxies = network.proxies()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            scope = self._seen(scope)
        await self.app(scope, receive, send)

    def _seen(self, scope: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        kept: list[tuple[bytes, bytes]] = []
        told: dict[bytes, list[str]] = {}
        for name, value in scope["headers"]:
            if _PROXIES_WORDS.fullmatch(name.lower()):
                said = [part.strip() for part in value.decode("latin-1").split(",")]
                told.setdefault(name.lower(), []).extend(said)
            else:
                kept.append((name, value))
        scope = {**scope, "headers": kept}
        prefix = self._prefix
        peer = scope.get("client")
        if peer is not None and self._trusts(_address(peer[0])):
            self._believe(scope, told)
            prefix = prefix or _last(told, b"x-forwarded-prefix", _PREFIX, strip="/")
        if prefix:
            _put_below(scope, prefix)
        return scope

    def _trusts(self, address: Address | None) -> bool:
        return address is not None and any(address in network for network in self._proxies)

    def _believe(self, scope: MutableMapping[str, Any], told: dict[bytes, list[str]]) -> None:
        """Take over what the nearest proxy said; what stands before that, anybody may have written."""
        for said in reversed(told.get(b"x-forwarded-for", [])):
            address = _address(said)
            if address is None:
                break
            scope["client"] = (str(address), 0)
            # The first that is no proxy of ours is the client; it may claim what it likes of others.
            if not self._trusts(address):
                break
        scheme = _last(told, b"x-forwarded-proto", re.compile("https?"))
        if scheme:
            secure = {"http": "ws", "https": "wss"}
            scope["scheme"] = secure[scheme] if scope["type"] == "websocket" else scheme
        host = _last(told, b"x-forwarded-host", _HOST)
        if host:
            others = [(name, value) for name, value in scope["headers"] if name.lower() != b"host"]
            scope["headers"] = [(b"host", host.encode()), *others]


def _last(told: dict[bytes, list[str]], name: bytes, form: re.Pattern[str], strip: str = "") -> str:
    """Return what the nearest proxy said, or nothing if it is not well formed."""
    said = told.get(name, [""])[-1]
    said = said.rstrip(strip) if strip else said
    return said if form.fullmatch(said) else ""


def _put_below(scope: MutableMapping[str, Any], prefix: str) -> None:
    """Set a request's path as ASGI has it: with its prefix, which a proxy may have left out or not."""
    scope["root_path"] = prefix + scope.get("root_path", "")
    path = scope["path"]
    if path != prefix and not path.startswith(f"{prefix}/"):
        scope["path"] = prefix + path
        if scope.get("raw_path") is not None:
            scope["raw_path"] = prefix.encode() + scope["raw_path"]


def _address(text: str) -> Address | None:
    """Return the address that a hop is named by, with or without a port; an IPv4 address inside IPv6 as itself."""
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address
