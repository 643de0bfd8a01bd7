"""How a server stands in its network: behind which proxies, under which path. Plain ASGI; nothing is decoded."""

import ipaddress
import re
from collections.abc import MutableMapping
from typing import Any
from urllib.parse import urlsplit

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from maskgit.apps.serving.errors import ForeignError, ServiceError
from maskgit.apps.serving.middleware import App, Receive, Send, header, refuse
from maskgit.apps.serving.options import PREFIX, Network
from maskgit.foundation.proxies import is_loopback

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_HOST = re.compile(r"[A-Za-z0-9._-]{1,255}(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]{2,45}\](:[0-9]{1,5})?")
# What only proxies may say. Libraries behind us believe some of it, whoever says it.
_PROXIES_WORDS = re.compile(rb"x-forwarded-.*")


def place(app: FastAPI, network: Network) -> None:
    """Let an application see its requests as the clients in front of trusted proxies sent them, and no others'."""
    # The last one added is the outermost.
    if network.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=network.cors_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
            expose_headers=["retry-after"],
        )
    app.add_middleware(OriginGate, network=network)
    app.add_middleware(Forwarded, network=network)


class Forwarded:
    """Takes a client's address, the scheme, the host and the path's prefix from trusted proxies, and from nobody else.

    What others say in the same words is taken out, so that nothing behind believes it.
    """

    def __init__(self, app: App, network: Network) -> None:
        network.check()
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
            prefix = prefix or _last(told, b"x-forwarded-prefix", PREFIX, strip="/")
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


class OriginGate:
    """Refuses what is called by a name that is not ours, and what another site's page asks for.

    The first keeps out sites that point a name of their own at this machine; the second, their forms.
    Source: as net/http's CrossOriginProtection in Go 1.25 tells a browser's requests from other sites.
    """

    def __init__(self, app: App, network: Network) -> None:
        self.app = app
        self._names = [name.lower() for name in network.allowed_hosts]
        self._origins = [origin.lower() for origin in network.cors_origins]

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        fault = self._fault(scope) if scope["type"] == "http" else None
        if fault is None:
            await self.app(scope, receive, send)
        else:
            await refuse(fault, scope, receive, send)

    def _fault(self, scope: MutableMapping[str, Any]) -> ServiceError | None:
        host = header(scope, b"host").decode("latin-1").lower()
        name = urlsplit(f"//{host}").hostname if _HOST.fullmatch(host) else None
        if name is None or not self._allows(name):
            return ForeignError(
                f"The server does not answer to the host name {host!r:.200}; its operator can allow it with --allowed-hosts."
            )
        origin = header(scope, b"origin").decode("latin-1").lower()
        site = header(scope, b"sec-fetch-site")
        if scope["method"] in ("GET", "HEAD", "OPTIONS") or origin in self._origins:
            return None
        # Older browsers say the origin alone; programs neither.
        own = site in (b"same-origin", b"none") if site else origin.partition("://")[2] in ("", host)
        if own and origin != "null":
            return None
        return ForeignError(
            f"Pages of {origin!r:.200} may not use this server; its operator can allow them with --cors-origins."
        )

    def _allows(self, name: str) -> bool:
        return (
            is_loopback(name)
            or _address(name) is not None
            or name in self._names
            or any(name.endswith(one[1:]) for one in self._names if one.startswith("*."))
        )
