"""Waiting for a request's answer, whole or in events, while its client is there and its time is not over."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from maskgit.apps.serving import schemas
from maskgit.apps.serving.errors import ClientGoneError, FailedError, InvalidRequestError, ServiceError
from maskgit.apps.serving.handlers import check_limits, count_steps
from maskgit.apps.serving.inputs import EVENTS
from maskgit.apps.serving.outputs import Answer
from maskgit.apps.serving.request_model import SharedModel
from maskgit.apps.serving.service import Accepted, Service
from maskgit.errors import ConfigError, ImageError, MaskGITError, RegionError
from maskgit.pipeline import MaskGIT

log = logging.getLogger(__name__)
# Events that a slow reader has not taken yet.
_MAX_WAITING = 64
# Seconds of silence after which a stream sends a comment, so that no proxy takes the connection for dead.
_HEARTBEAT = 5.0
# How often it is looked where a request stands that has not begun.
_LOOK = 0.5
_STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
_CLIENTS_FAULTS = (ConfigError, ImageError, RegionError)


def cost_of(service: Service, body: schemas.Request) -> dict[str, Any]:
    """Check what a request asks for, and return what `Service.submit` is to know of it."""
    model = service.model
    return {
        "images": getattr(body, "num_images", 1),
        "pixels": check_limits(body, service.limits, model.config.image_size),
        "steps": count_steps(model, body),
        "timeout": body.timeout,
        "low": getattr(body, "priority", None) == "low",
    }


def client_of(http: Request) -> str:
    """Return who asks: a key, or else an address."""
    client: str = http.scope["maskgit.client"]
    return client


async def wait(http: Request, accepted: Accepted[Answer]) -> Response:
    """Return the answer when it is there; stop the work if its time is over or the client has left."""
    done = asyncio.wrap_future(accepted.future)
    # Its error is told below, or nobody is left to be told.
    done.add_done_callback(lambda future: future.cancelled() or future.exception())
    gone = asyncio.create_task(_gone(http))
    try:
        waited: set[asyncio.Future[Any]] = {done, gone}
        await asyncio.wait(waited, timeout=accepted.ticket.left(), return_when=asyncio.FIRST_COMPLETED)
        if done.done():
            body, media_type = _result(done)
            return Response(body, media_type=media_type)
        if gone.done():
            raise ClientGoneError("The client left.")
        raise accepted.ticket.late()
    finally:
        accepted.ticket.cancel()
        gone.cancel()


class Emit:
    """Puts events into a stream, from a request's thread."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[bytes | asyncio.Future[Answer]] = asyncio.Queue()

    def __call__(self, event: bytes) -> None:
        self._loop.call_soon_threadsafe(self.queue.put_nowait, event)

    @property
    def full(self) -> bool:
        """Whether the reader is slow: further events are better left out."""
        return self.queue.qsize() >= _MAX_WAITING


async def stream(
    http: Request,
    work: Callable[[SharedModel, Emit], Answer],
    cost: dict[str, Any],
    *,
    last: Callable[[Answer], bytes],
    fail: Callable[[ServiceError], bytes],
    queued: Callable[[int], bytes] | None = None,
) -> Response:
    """Return an answer in events. Whatever goes wrong from here on is an event, too: the head is sent at once.

    Args:
        http: the request.
        work: makes the answer, and may emit events before.
        cost: see `cost_of`.
        last, fail: the last event, of an answer or an error.
        queued: the event that tells a place in line; see `Service.place`.
    """
    emit = Emit()

    def working(model: MaskGIT) -> Answer:
        assert isinstance(model, SharedModel), "of the service"
        return work(model, emit)

    service: Service = http.app.state.service
    accepted = service.submit(working, client=client_of(http), **cost)
    done = asyncio.wrap_future(accepted.future)
    done.add_done_callback(lambda future: future.cancelled() or future.exception() or None)
    done.add_done_callback(emit.queue.put_nowait)
    gone = asyncio.create_task(_gone(http))
    gone.add_done_callback(lambda _: accepted.ticket.cancel())

    async def events() -> AsyncIterator[bytes]:
        silent, told = 0.0, 0
        try:
            while True:
                place = service.place(accepted.ticket)
                # Who begins at the next step waits for nobody.
                if queued is not None and place != told and max(place, told) > 1:
                    told = place
                    yield queued(place)
                try:
                    item = await asyncio.wait_for(emit.queue.get(), _LOOK if place else _HEARTBEAT)
                except TimeoutError:
                    silent += _LOOK if place else _HEARTBEAT
                    if silent >= _HEARTBEAT:
                        silent = 0.0
                        yield b": still working\n\n"
                    continue
                if isinstance(item, bytes):
                    yield item
                    continue
                try:
                    yield last(_result(item))
                except MaskGITError as error:
                    yield fail(as_fault(error))
                return
        finally:
            accepted.ticket.cancel()
            gone.cancel()

    return StreamingResponse(events(), media_type=EVENTS, headers=_STREAM_HEADERS)


def _result(done: "asyncio.Future[Answer]") -> Answer:
    """Return a request's answer.

    Raises:
        MaskGITError: as the request's work did; what else it raised is logged and told as `FailedError`.
    """
    error = done.exception()
    if error is None:
        return done.result()
    if isinstance(error, (ServiceError, *_CLIENTS_FAULTS)):
        raise error
    log.error("A request failed.", exc_info=error)
    raise FailedError("The server failed on this request; its log says why.") from error


async def _gone(http: Request) -> None:
    """Wait until the client has left."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def as_fault(error: Exception) -> ServiceError:
    return error if isinstance(error, ServiceError) else InvalidRequestError(str(error))
