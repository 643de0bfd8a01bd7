"""Clients of `maskgit serve`: `Client` blocks, `AsyncClient` is awaited.

with Client("http://127.0.0.1:8000") as client:
    client.generate("frog", seed=1).images[0].save("frog.png")

async with AsyncClient("http://127.0.0.1:8000") as client:
    frogs = await client.generate("frog", num_images=4)
"""

import asyncio
import inspect
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

import httpx

from maskgit.apps.client import calls as client_calls
from maskgit.apps.client.answers import EventReader, Picture, Pictures, Preview, RequestError, check
from maskgit.apps.client.calls import Call, Making, Source
from maskgit.errors import ConfigError
from maskgit.foundation import __version__
from maskgit.foundation.checks import check_count, check_range
from maskgit.foundation.forks import resets
from maskgit.foundation.proxies import missing_socks, proxy_for

__all__ = [
    "AsyncClient",
    "Client",
    "Making",
    "Picture",
    "Pictures",
    "Preview",
    "RequestError",
    "Source",
]

T = TypeVar("T")
P = ParamSpec("P")
Http = TypeVar("Http", httpx.Client, httpx.AsyncClient)

KEY_VARIABLE = "MASKGIT_API_KEY"
_CONNECT_SECONDS = 10.0
# The server itself ends late requests with an error that says so.
_GRACE_SECONDS = 5.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 15.0
# Failures worth a retry. A late answer is not among them: sent again, the request would only add to the load.
_PASSING = (httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout)


class _Connected(Generic[Http]):
    """What both clients share: the server's address, the connection and the limits on retries."""

    _http_class: type[Http]
    _transport_class: type[httpx.HTTPTransport] | type[httpx.AsyncHTTPTransport]

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 120.0,
        retries: int = 5,
        max_wait: float = 60.0,
    ) -> None:
        """Connect to nothing yet; the first request does.

        Args:
            url: the server's address, such as http://127.0.0.1:8000.
            api_key: key to send; None uses $MASKGIT_API_KEY if that is set.
            timeout: seconds that an answer may take, 0.01 to 86,400; the server is told, and drops late requests.
            retries: how often a request is sent again after a 429 or 503, or when it does not reach the server,
                0 to 1000. The same request has the same answer, so retries are safe.
            max_wait: total seconds to wait between the attempts of a request, 0 to 86,400. Retry-After is
                respected; if it exceeds what is left, the error is raised at once.

        Raises:
            ConfigError: the URL or the key cannot be sent, a number is out of range, or the environment names a
                proxy that cannot be used.
        """
        self.url = _check_url(url)
        timeout = check_range("timeout", timeout, 0.01, 86_400)
        max_wait = check_range("max_wait", max_wait, 0, 86_400)
        self.timeout = timeout
        self.retries = check_count("retries", retries, 0, 1000)
        self.max_wait = max_wait
        key = os.environ.get(KEY_VARIABLE, "").strip() if api_key is None else api_key
        self._http: Http = self._connect({"user-agent": f"maskgit/{__version__}", **_authorization(key)})
        resets(self)

    def _connect(self, headers: Mapping[str, str]) -> Http:
        return self._http_class(
            base_url=self.url,
            headers=headers,
            # No limit on waiting for a connection, since many threads may share the client.
            timeout=httpx.Timeout(self.timeout + _GRACE_SECONDS, connect=_CONNECT_SECONDS, pool=None),
            # With a transport, httpx does not look for proxies itself.
            transport=self._transport(),
        )

    def after_fork(self) -> None:
        """Open connections of this process's own: on those of its parent, both would read each other's answers."""
        self._http = self._connect(self._http.headers)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def _transport(self) -> Any:
        try:
            return self._transport_class(proxy=proxy_for(self.url))
        except ImportError as error:
            failure = missing_socks(error)
            if failure is None:
                raise
            raise failure from error
        except (ValueError, httpx.InvalidURL):
            # What the variable holds may be a password.
            raise ConfigError(
                f"The proxy that the environment names for {self.url} must be http, https, socks5 or socks5h."
            ) from None

    def _attempts(self, patient: bool) -> "_Attempts":
        return _Attempts(self.url, self.timeout, self.retries if patient else 0, self.max_wait)


class _Attempts:
    """The attempts at one request: decides whether and when to retry."""

    def __init__(self, url: str, timeout: float, retries: int, max_wait: float) -> None:
        self._url, self._timeout = url, timeout
        self._retries, self._waiting = retries, max_wait
        self._next = _FIRST_PAUSE

    def begun(self) -> None:
        """Stop retrying: part of the answer has been yielded, and would be yielded twice."""
        self._retries = 0

    def pause(self, error: RequestError | httpx.RequestError) -> float:
        """Return the seconds to wait before the next attempt.

        Raises:
            RequestError: no attempt is left, or a retry would not help.
        """
        failure = error if isinstance(error, RequestError) else self._understood(error)
        seconds = self._next if failure.retry_after is None else failure.retry_after
        # Jitter, so that clients that were refused together do not return together.
        seconds *= 1 + random.random() / 4
        if failure.may_pass and self._retries and seconds <= self._waiting:
            self._retries -= 1
            self._waiting -= seconds
            self._next = min(2 * self._next, _LONGEST_PAUSE)
            return seconds
        if failure is error:
            raise error
        raise failure from error

    def _understood(self, error: httpx.RequestError) -> RequestError:
        reason = str(error) or type(error).__name__
        if isinstance(error, _PASSING):
            return RequestError(
                f"{self._url} cannot be reached ({reason}); check the URL and that the server is running.",
                "unreachable",
            )
        if isinstance(error, httpx.TimeoutException):
            return RequestError(
                f"{self._url} did not answer within {self._timeout:g} seconds; ask for less, or give the "
                "client a longer timeout.",
                "timeout",
            )
        return RequestError(f"{self._url} sent an answer that cannot be read ({reason}).", "not_understood")


def _check_url(url: str) -> str:
    try:
        parts = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise ConfigError("The server's URL cannot be read; give one like http://127.0.0.1:8000.") from error
    # A user and password would appear wherever the URL is shown.
    if parts.scheme not in ("http", "https") or not parts.host or parts.userinfo or parts.query:
        raise ConfigError(
            "The server's URL must be like http://127.0.0.1:8000: http or https, without user or query."
        )
    return str(parts).rstrip("/")


def _authorization(key: str) -> dict[str, str]:
    """Return the header for a key; an invalid key is refused here, in a message that does not repeat it."""
    if not key:
        return {}
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError("The API key must be printable ASCII without spaces.")
    return {"authorization": f"Bearer {key}"}


def _looks_like(build: Callable[..., Any], method: Callable[..., Any], name: str | None = None) -> None:
    """Give a method the name, the docstring and, after self, the parameters of its function in `calls`."""
    own = inspect.signature(build)
    first = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    method.__name__ = name or build.__name__
    method.__doc__ = build.__doc__
    vars(method)["__signature__"] = own.replace(
        parameters=[first, *own.parameters.values()], return_annotation=inspect.Signature.empty
    )


def _sent(build: Callable[P, Call[T]]) -> Callable[Concatenate["Client", P], T]:
    def method(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self.send(build(*args, **kwargs))

    _looks_like(build, method)
    return method


def _streamed(
    build: Callable[P, Call[Pictures]],
) -> Callable[Concatenate["Client", P], Iterator[Preview | Pictures]]:
    def method(self: "Client", /, *args: P.args, **kwargs: P.kwargs) -> Iterator[Preview | Pictures]:
        return self.stream(build(*args, **kwargs))

    _looks_like(build, method, f"stream_{build.__name__}")
    return method


def _awaited(build: Callable[P, Call[T]]) -> Callable[Concatenate["AsyncClient", P], Awaitable[T]]:
    def method(self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs) -> Awaitable[T]:
        return self.send(build(*args, **kwargs))

    _looks_like(build, method)
    return method


def _streamed_async(
    build: Callable[P, Call[Pictures]],
) -> Callable[Concatenate["AsyncClient", P], AsyncIterator[Preview | Pictures]]:
    def method(
        self: "AsyncClient", /, *args: P.args, **kwargs: P.kwargs
    ) -> AsyncIterator[Preview | Pictures]:
        return self.stream(build(*args, **kwargs))

    _looks_like(build, method, f"stream_{build.__name__}")
    return method


class Client(_Connected[httpx.Client]):
    """A blocking client; threads may share it.

    Every method raises `RequestError` if the request fails, and `ImageError` if an image cannot be sent. The
    methods that begin with stream_ yield `Preview`s of the images as they form, then the `Pictures`.
    """

    _http_class = httpx.Client
    _transport_class = httpx.HTTPTransport

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def send(self, call: Call[T]) -> T:
        """Send a request and return its answer."""
        attempts = self._attempts(call.patient)
        while True:
            try:
                return call.read(self._http.request(**call.request(self.timeout)))
            except (RequestError, httpx.RequestError) as error:
                pause = attempts.pause(error)
            time.sleep(pause)

    def stream(self, call: Call[Pictures]) -> Iterator[Preview | Pictures]:
        """Yield a request's previews, then its answer; closing the iterator cancels the request on the server."""
        attempts = self._attempts(call.patient)
        while True:
            try:
                with self._http.stream(**call.request(self.timeout, stream=True)) as answer:
                    if not answer.is_success:
                        answer.read()
                    check(answer)
                    attempts.begun()
                    events = EventReader()
                    for line in answer.iter_lines():
                        event = events.feed(line)
                        if event is not None:
                            yield event
                    events.finish()
                return
            except (RequestError, httpx.RequestError) as error:
                pause = attempts.pause(error)
            time.sleep(pause)

    generate = _sent(client_calls.generate)
    edit = _sent(client_calls.edit)
    inpaint = _sent(client_calls.inpaint)
    outpaint = _sent(client_calls.outpaint)
    vary = _sent(client_calls.vary)
    reconstruct = _sent(client_calls.reconstruct)
    tokenize = _sent(client_calls.tokenize)
    detokenize = _sent(client_calls.detokenize)
    models = _sent(client_calls.models)
    classes = _sent(client_calls.classes)
    health = _sent(client_calls.health)
    stream_generate = _streamed(client_calls.generate)
    stream_edit = _streamed(client_calls.edit)
    stream_inpaint = _streamed(client_calls.inpaint)
    stream_outpaint = _streamed(client_calls.outpaint)
    stream_vary = _streamed(client_calls.vary)


class AsyncClient(_Connected[httpx.AsyncClient]):
    """A client for asyncio: the methods of `Client`, awaited."""

    _http_class = httpx.AsyncClient
    _transport_class = httpx.AsyncHTTPTransport

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def send(self, call: Call[T]) -> T:
        """Send a request and return its answer."""
        attempts = self._attempts(call.patient)
        while True:
            try:
                return call.read(await self._http.request(**call.request(self.timeout)))
            except (RequestError, httpx.RequestError) as error:
                pause = attempts.pause(error)
            await asyncio.sleep(pause)

    async def stream(self, call: Call[Pictures]) -> AsyncIterator[Preview | Pictures]:
        """Yield a request's previews, then its answer; closing the iterator cancels the request on the server."""
        attempts = self._attempts(call.patient)
        while True:
            try:
                async with self._http.stream(**call.request(self.timeout, stream=True)) as answer:
                    if not answer.is_success:
                        await answer.aread()
                    check(answer)
                    attempts.begun()
                    events = EventReader()
                    async for line in answer.aiter_lines():
                        event = events.feed(line)
                        if event is not None:
                            yield event
                    events.finish()
                return
            except (RequestError, httpx.RequestError) as error:
                pause = attempts.pause(error)
            await asyncio.sleep(pause)

    generate = _awaited(client_calls.generate)
    edit = _awaited(client_calls.edit)
    inpaint = _awaited(client_calls.inpaint)
    outpaint = _awaited(client_calls.outpaint)
    vary = _awaited(client_calls.vary)
    reconstruct = _awaited(client_calls.reconstruct)
    tokenize = _awaited(client_calls.tokenize)
    detokenize = _awaited(client_calls.detokenize)
    models = _awaited(client_calls.models)
    classes = _awaited(client_calls.classes)
    health = _awaited(client_calls.health)
    stream_generate = _streamed_async(client_calls.generate)
    stream_edit = _streamed_async(client_calls.edit)
    stream_inpaint = _streamed_async(client_calls.inpaint)
    stream_outpaint = _streamed_async(client_calls.outpaint)
    stream_vary = _streamed_async(client_calls.vary)
