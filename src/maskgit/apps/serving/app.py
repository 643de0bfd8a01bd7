"""The HTTP application: routes, answers and errors, around a `Service`."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import StarletteHTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse
from torch import Tensor

from maskgit.apps.serving import openapi_docs as describing
from maskgit.apps.serving import outputs, schemas
from maskgit.apps.serving.errors import ClientGoneError, FailedError, InvalidRequestError, ServiceError
from maskgit.apps.serving.handlers import MAKERS, Maker, check_limits, count_steps, recipe, tokenize
from maskgit.apps.serving.inputs import EVENTS, JSON, answer_type, read_body
from maskgit.apps.serving.metrics import MEDIA_TYPE, Counted, Metrics
from maskgit.apps.serving.middleware import BodyGate, KeyGate, error_body, error_headers
from maskgit.apps.serving.network import place
from maskgit.apps.serving.options import Network
from maskgit.apps.serving.outputs import Answer
from maskgit.apps.serving.request_model import SharedModel
from maskgit.apps.serving.service import Accepted, Service
from maskgit.errors import ConfigError, ImageError, MaskGITError, RegionError
from maskgit.foundation.notes import listening
from maskgit.foundation.version import __version__
from maskgit.images import provenance
from maskgit.pipeline import MaskGIT
from maskgit.results import Callback

log = logging.getLogger(__name__)
# Previews that a slow reader has not taken yet, and their share of a request's time; further ones are left out.
_MAX_PREVIEWS, _PREVIEW_SHARE = 16, 0.05
# Seconds of silence after which a stream sends a comment, so that nobody between takes the connection for dead.
_HEARTBEAT = 5.0
_STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
_STATUS_KINDS = {404: "not_found", 405: "method_not_allowed"}
_CLIENTS_FAULTS = (ConfigError, ImageError, RegionError)


def create_app(
    service: Service,
    keys: Sequence[str] = (),
    page: Callable[[FastAPI], object] | None = None,
    network: Network | None = None,
) -> FastAPI:
    """Return the application; it starts the service when it starts, and closes it when it ends.

    Args:
        service: answers the requests; not started yet.
        keys: of which a client must show one; without any, everybody is let in.
        page: adds a page at /, behind all other routes.
        network: what stands in front of the server; None is nothing.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.close)

    app = bare_app(lifespan)
    app.state.service = service
    app.state.metrics = Metrics(service)
    # The last one added is the outermost.
    limits = service.limits
    app.add_middleware(BodyGate, max_bytes=limits.max_body, seconds=limits.body_seconds)
    app.add_middleware(KeyGate, keys=keys)
    app.add_middleware(Counted, metrics=app.state.metrics)
    place(app, network or Network())
    if page is not None:
        page(app)
    return app


def bare_app(lifespan: Any = None) -> FastAPI:
    """Return the routes without a service behind them, which is enough to describe them."""
    # FastAPI's own pages load scripts from elsewhere.
    app = FastAPI(
        title="maskgit",
        version=__version__,
        description="Generate and edit images with a masked generative transformer.",
        docs_url=None,
        redoc_url=None,
        # A redirection would repeat whatever host was named.
        redirect_slashes=False,
        lifespan=lifespan,
    )
    for command, maker in MAKERS.items():
        describing.add_post(app, command, maker.schema, maker.summary, _maker_route(command, maker))
    describing.add_post(app, "tokenize", schemas.Tokenize, "Encode an image to tokens.", _tokenize)
    describing.add_get(app, "/v1/models", schemas.Models, "List the models that are served.", _models)
    describing.add_get(app, "/v1/classes", schemas.Classes, "List the model's classes.", _classes)
    describing.add_get(app, "/healthz", schemas.Health, "Answer while the process lives.", _healthz)
    describing.add_get(app, "/readyz", schemas.Health, "Say whether requests are accepted.", _readyz)
    app.add_api_route("/metrics", _metrics, include_in_schema=False)
    app.add_api_route("/docs", _docs, include_in_schema=False)
    app.add_exception_handler(MaskGITError, _tell_error)
    app.add_exception_handler(StarletteHTTPException, _tell_http_error)
    app.add_exception_handler(Exception, _tell_mistake)
    return app


def _maker_route(command: str, maker: Maker) -> Callable[[Request], Any]:
    """Return what answers requests for pictures."""

    async def answer(http: Request) -> Response:
        service: Service = http.app.state.service
        body = await read_body(http, maker.schema)
        media_type = answer_type(http.headers.get("accept"), getattr(body, "stream", False))
        count = getattr(body, "num_images", 1)
        if media_type not in (JSON, EVENTS) and count > 1:
            raise InvalidRequestError(
                f"{media_type} holds one image, but num_images is {count}; send Accept: {JSON}."
            )
        cost = await asyncio.to_thread(_cost, service, body)

        def work(model: MaskGIT, told: Callback | None = None) -> Answer:
            notes: list[str] = []
            with listening(notes.append):
                made = maker.make(model, body, told)
                how = recipe(model, service.recorded | {"command": command}, body, made)
                writing = service.marking.writing(getattr(body, "image", None))
                if media_type in outputs.PICTURES:
                    return outputs.one_picture(made, media_type, how, writing)
                return outputs.pictures(
                    model,
                    service.name,
                    made,
                    body.format,
                    how,
                    writing,
                    with_tokens=body.return_tokens,
                    notes=notes,
                )

        if media_type == EVENTS:
            begun = provenance.EDITED if hasattr(body, "image") else provenance.GENERATED
            source = begun if service.marking.mark else None
            return await _stream(http, work, source, cost)
        accepted = service.submit(work, client=_client(http), **cost)
        return await _wait(http, accepted)

    return answer


async def _tokenize(http: Request) -> Response:
    service: Service = http.app.state.service
    body = await read_body(http, schemas.Tokenize)
    cost = await asyncio.to_thread(_cost, service, body)

    def work(model: MaskGIT) -> Answer:
        return outputs.to_json({"model": service.name, "tokens": tokenize(model, body)})

    accepted = service.submit(work, client=_client(http), **cost)
    return await _wait(http, accepted)


def _cost(service: Service, body: schemas.Request) -> dict[str, Any]:
    """Check what a request asks for, and return what `Service.submit` is to know of it."""
    model = service.model
    return {
        "images": getattr(body, "num_images", 1),
        "pixels": check_limits(body, service.limits, model.config.image_size),
        "steps": count_steps(model, body),
        "timeout": body.timeout,
        "low": getattr(body, "priority", None) == "low",
    }


def _client(http: Request) -> str:
    """Return who asks: a key, or else an address."""
    client: str = http.scope["maskgit.client"]
    return client


async def _wait(http: Request, accepted: Accepted[Answer]) -> Response:
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


async def _stream(
    http: Request,
    work: Callable[[MaskGIT, Callback], Answer],
    source: str | None,
    cost: dict[str, Any],
) -> Response:
    """Return an answer in events: previews of steps, then the result; for `source` see `provenance.say`.

    Whatever goes wrong from here on is an event, too: the head of the answer is sent at once.
    """
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[bytes | asyncio.Future[Answer]] = asyncio.Queue()

    def previewing(model: MaskGIT) -> Answer:
        assert isinstance(model, SharedModel), "of the service"
        started, allowance = time.monotonic(), outputs.Allowance(_PREVIEW_SHARE)

        def told(step: int, indices: Tensor, tokens: Tensor) -> None:
            for index, grid in zip(indices.tolist(), tokens, strict=True):
                if queue.qsize() < _MAX_PREVIEWS and allowance.allows(time.monotonic() - started):
                    before = model.seconds_called
                    image = outputs.preview(model.decode_tokens(grid[None]), source)
                    allowance.spend(model.seconds_called - before)
                    data = {"step": step, "index": index, "image": image}
                    loop.call_soon_threadsafe(queue.put_nowait, outputs.event("preview", data))

        return work(model, told)

    service: Service = http.app.state.service
    accepted = service.submit(previewing, client=_client(http), **cost)
    done = asyncio.wrap_future(accepted.future)
    done.add_done_callback(lambda future: future.cancelled() or future.exception() or None)
    done.add_done_callback(queue.put_nowait)
    gone = asyncio.create_task(_gone(http))
    gone.add_done_callback(lambda _: accepted.ticket.cancel())

    async def events() -> AsyncIterator[bytes]:
        try:
            while True:
                try:
                    item = await asyncio.wait_for(queue.get(), _HEARTBEAT)
                except TimeoutError:
                    yield b": still working\n\n"
                    continue
                if not isinstance(item, bytes):
                    yield _last_event(item)
                    return
                yield item
        finally:
            accepted.ticket.cancel()
            gone.cancel()

    return StreamingResponse(events(), media_type=EVENTS, headers=_STREAM_HEADERS)


def _last_event(done: "asyncio.Future[Answer]") -> bytes:
    try:
        return outputs.event("result", _result(done).body)
    except MaskGITError as error:
        return outputs.event("error", error_body(_as_fault(error)))


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


async def _models(http: Request) -> schemas.Models:
    service: Service = http.app.state.service
    config = service.model.config
    card = schemas.ModelCard(
        name=service.name,
        image_size=config.image_size,
        grid_size=config.transformer.grid_size,
        num_codes=config.transformer.num_codes,
        num_classes=config.transformer.num_classes,
        without_class=bool(config.label_dropout),
        sampler=config.sampler.to_dict(),
    )
    return schemas.Models(models=[card])


async def _classes(http: Request) -> schemas.Classes:
    model = http.app.state.service.model
    names = model.class_names or [None] * model.vocabulary.num_classes
    listed = [schemas.ClassName(number=number, name=name) for number, name in enumerate(names)]
    return schemas.Classes(classes=listed)


async def _healthz() -> schemas.Health:
    return schemas.Health(status="alive")


async def _readyz(http: Request) -> Response:
    ready = http.app.state.service.ready
    body, media_type = outputs.to_json({"status": "ready" if ready else "not ready"})
    return Response(body, 200 if ready else 503, media_type=media_type)


async def _metrics(http: Request) -> Response:
    return Response(http.app.state.metrics.text(), media_type=MEDIA_TYPE)


async def _docs(http: Request) -> Response:
    return HTMLResponse(describing.page(http.app))


def _as_fault(error: Exception) -> ServiceError:
    return error if isinstance(error, ServiceError) else InvalidRequestError(str(error))


async def _tell_error(http: Request, error: Exception) -> Response:
    fault = _as_fault(error)
    return Response(error_body(fault), fault.status, error_headers(fault), JSON)


async def _tell_http_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    kind = _STATUS_KINDS.get(error.status_code, "invalid_request")
    message = f"{http.method} {http.url.path[:100]}: {error.detail}."
    body = outputs.to_json({"error": {"type": kind, "message": message}}).body
    return Response(body, error.status_code, error.headers, JSON)


async def _tell_mistake(http: Request, error: Exception) -> Response:
    fault = FailedError("The server failed on this request; its log says why.")
    return Response(error_body(fault), fault.status, media_type=JSON)
