"""What stands before the application: who may come in, and how much they may bring; nothing is decoded.

These are plain ASGI wrappers, because a body must be counted while it arrives.
"""

import asyncio
import hmac
import ipaddress
import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from maskgit.apps.serving.errors import (
    OverloadedError,
    ServiceError,
    SlowBodyError,
    TooLargeError,
    UnauthorizedError,
)
from maskgit.errors import ConfigError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

log = logging.getLogger(__name__)

OPEN_PATHS = ("/healthz", "/readyz")
# A body that is refused is read for so long and thrown away: a client that only writes would never see the
# answer, and a connection that is closed on it may lose it.
_DRAIN_SECONDS, _DRAIN_BYTES = 2.0, 2**28
# All bodies together may be so many times as large as one.
_BODIES_AT_ONCE = 8


class ErrorAnswer(NamedTuple):
    """The status and the body of an error's answer."""

    status: int
    body: bytes


def error_answer(fault: ServiceError, *, openai: bool) -> ErrorAnswer:
    """Return what an error's answer says, in OpenAI's form or in our own."""
    if not openai:
        return ErrorAnswer(
            fault.status, json.dumps({"error": {"type": fault.kind, "message": str(fault)}}).encode()
        )
    status = 400 if fault.status == 422 else fault.status
    kind = (
        "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    )
    error = {"message": str(fault), "type": kind, "param": None, "code": fault.kind}
    return ErrorAnswer(status, json.dumps({"error": error}).encode())


def speaks_openai(scope: MutableMapping[str, Any]) -> bool:
    """Return whether a request is one of OpenAI's API."""
    return route_path(scope).startswith("/v1/images/")


def error_headers(fault: ServiceError) -> dict[str, str]:
    """Return the headers that belong to an error."""
    headers = {}
    if fault.retry_after is not None:
        headers["retry-after"] = str(fault.retry_after)
    if isinstance(fault, UnauthorizedError):
        headers["www-authenticate"] = "Bearer"
    return headers


async def refuse(fault: ServiceError, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
    """Answer with an error before a body was read, and end the connection."""
    status, body = error_answer(fault, openai=speaks_openai(scope))
    headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
    headers |= error_headers(fault)
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    try:
        async with asyncio.timeout(_DRAIN_SECONDS):
            drained, more = 0, True
            while more and drained < _DRAIN_BYTES:
                message = await receive()
                drained += len(message.get("body", b""))
                more = message["type"] == "http.request" and message.get("more_body", False)
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b""})


class KeyGate:
    """Lets in who has a key; how ready the server is may be asked without one."""

    def __init__(self, app: App, keys: Sequence[str]) -> None:
        """Wrap an application.

        Args:
            app: what is behind the gate.
            keys: any of them opens it; without keys it stands open. They may change.
        """
        self.app = app
        self.keys = keys

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or route_path(scope) in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        address = client_address(scope)
        key = self._known(header(scope, b"authorization"))
        if key is not None or not self.keys:
            scope["maskgit.client"] = address if key is None else f"key {key}"
            await self.app(scope, receive, send)
            return
        log.warning("%s sent no valid key.", address)
        await refuse(
            UnauthorizedError("Send a valid API key in the header `Authorization: Bearer KEY`."),
            scope,
            receive,
            send,
        )

    def _known(self, header: bytes) -> int | None:
        """Return which key a header shows, counted from 1, or None."""
        scheme, _, given = header.partition(b" ")
        # All are compared, each in a time that does not depend on where it differs.
        found = [hmac.compare_digest(given.strip(), key.encode()) for key in self.keys]
        return found.index(True) + 1 if scheme.lower() == b"bearer" and any(found) else None


class BodyGate:
    """Takes bodies whole, if they are small and come soon enough, before the application sees them."""

    def __init__(self, app: App, max_bytes: int, seconds: float) -> None:
        """Wrap an application.

        Args:
            app: what is behind the gate.
            max_bytes: of a body, with or without its length told before.
            seconds: in which it must have arrived.
        """
        self.app = app
        self.max_bytes = max_bytes
        self.seconds = seconds
        self._held = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            body = await self._take(scope, receive)
        except ServiceError as fault:
            await refuse(fault, scope, receive, send)
            return
        if body is None:
            return
        try:
            await self.app(scope, _replay(body, receive), send)
        finally:
            self._held -= len(body)

    async def _take(self, scope: MutableMapping[str, Any], receive: Receive) -> bytes | None:
        """Return a body, which is counted as held; None if the client has left.

        Raises:
            ServiceError: it is too large or too slow.
        """
        length = header(scope, b"content-length")
        if length.isdigit() and int(length[:20]) > self.max_bytes:
            raise self._too_large()
        parts: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(self.seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part, more = message.get("body", b""), message.get("more_body", False)
                    if size + len(part) > self.max_bytes:
                        raise self._too_large()
                    if self._held + len(part) > _BODIES_AT_ONCE * self.max_bytes:
                        raise OverloadedError("Too many request bodies are arriving at once; retry later.", 1)
                    parts.append(part)
                    size, self._held = size + len(part), self._held + len(part)
            body, size = b"".join(parts), 0
            return body
        except TimeoutError:
            raise SlowBodyError(
                f"The body did not arrive within {self.seconds:g} seconds; send it faster, or send a smaller image."
            ) from None
        finally:
            self._held -= size

    def _too_large(self) -> TooLargeError:
        return TooLargeError(f"The body is larger than {self.max_bytes:,} bytes; send a smaller image.")


def route_path(scope: MutableMapping[str, Any]) -> str:
    """Return a request's path as routes name it, without what a proxy put before it."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def client_address(scope: MutableMapping[str, Any]) -> str:
    """Return whom a request comes from; of IPv6 the network, as a single client has all its addresses."""
    try:
        address = ipaddress.ip_address((scope.get("client") or [""])[0])
    except ValueError:
        return "unknown"
    return str(ipaddress.ip_network((address, 64), strict=False)) if address.version == 6 else str(address)


def header(scope: MutableMapping[str, Any], name: bytes) -> bytes:
    """Return a request's header, empty if it has none of that name."""
    return next((value for key, value in scope["headers"] if key.lower() == name), b"")


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return what gives the body once, and then what the server has to say: that the client left."""
    left = [body]

    async def again() -> Message:
        if left:
            return {"type": "http.request", "body": left.pop(), "more_body": False}
        return await receive()

    return again


def read_keys(path: Path) -> tuple[str, ...]:
    """Return the keys of a file: one a line; empty lines and those that begin with # are left out.

    Raises:
        ConfigError: it cannot be read, holds none, or one that no header can carry.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The key file {path} cannot be read: {error}.") from error
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"The key file {path} holds no keys; write one per line.")
    for number, key in enumerate(keys, 1):
        # The key itself is not shown.
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(f"Key {number} of {path} must be printable ASCII without spaces.")
    return tuple(keys)
