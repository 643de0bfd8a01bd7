"""The HTTP application: routes, answers and errors, around a `Service`."""

import asyncio
import dataclasses
import inspect
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import torch
from fastapi import FastAPI
from fastapi.exceptions import StarletteHTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response
from torch import Tensor

from maskgit.apps.serving import openai_api, outputs, samples, schemas
from maskgit.apps.serving import openapi_docs as describing
from maskgit.apps.serving.answering import Emit, as_fault, client_of, cost_of, stream, wait
from maskgit.apps.serving.errors import FailedError, InvalidRequestError, NotFoundError
from maskgit.apps.serving.handlers import MAKERS, Maker, inspect_file, recipe, tokenize
from maskgit.apps.serving.inputs import EVENTS, JSON, answer_type, read_body
from maskgit.apps.serving.metrics import MEDIA_TYPE, Counted, Metrics
from maskgit.apps.serving.middleware import BodyGate, KeyGate, error_answer, error_headers, speaks_openai
from maskgit.apps.serving.network import place
from maskgit.apps.serving.options import Network
from maskgit.apps.serving.outputs import Answer
from maskgit.apps.serving.request_model import SharedModel
from maskgit.apps.serving.service import Service
from maskgit.apps.settings import SETTINGS
from maskgit.errors import MaskGITError
from maskgit.foundation import __version__
from maskgit.foundation.notes import listening
from maskgit.images import provenance
from maskgit.pipeline import MaskGIT
from maskgit.results import Callback
from maskgit.sampler.policies import POLICIES
from maskgit.sampler.schedules import MASK_SCHEDULES

log = logging.getLogger(__name__)
# Share of a request's time that previews after the first may take.
_PREVIEW_SHARE = 0.05
_STATUS_KINDS = {404: "not_found", 405: "method_not_allowed"}


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
    openai_api.add_routes(app)
    describing.add_post(app, "tokenize", schemas.Tokenize, "Encode an image to tokens.", _tokenize)
    describing.add_post(
        app,
        "inspect",
        schemas.Inspect,
        "Read an image file's size and settings.",
        _inspect,
        plain=schemas.Inspected,
    )
    describing.add_get(app, "/v1/models", schemas.Models, "List the models that are served.", _models)
    app.add_api_route(
        "/v1/models/{name:path}",
        _model,
        summary="Describe a model, as in OpenAI's API.",
        include_in_schema=False,
    )
    describing.add_get(app, "/v1/classes", schemas.Classes, "List the model's classes.", _classes)
    describing.add_get(app, "/v1/policies", schemas.Policies, "List the decoding policies.", _policies)
    describing.add_get(app, "/v1/samples", schemas.Samples, "List images that come with the model.", _samples)
    app.add_api_route("/v1/samples/{name}", _sheet, methods=["GET", "HEAD"], include_in_schema=False)
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
        cost = await asyncio.to_thread(cost_of, service, body)

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
            return await stream(
                http,
                lambda model, emit: work(model, Previews(model, emit, count, source)),
                cost,
                last=lambda answer: outputs.event("result", answer.body),
                fail=lambda fault: outputs.event("error", error_answer(fault, openai=False).body),
                queued=lambda place: outputs.event("queued", {"place": place}),
            )
        return await wait(http, service.submit(work, client=client_of(http), **cost))

    return answer


async def _tokenize(http: Request) -> Response:
    service: Service = http.app.state.service
    body = await read_body(http, schemas.Tokenize)
    cost = await asyncio.to_thread(cost_of, service, body)

    def work(model: MaskGIT) -> Answer:
        return outputs.to_json({"model": service.name, "tokens": tokenize(model, body)})

    return await wait(http, service.submit(work, client=client_of(http), **cost))


class Previews:
    """A callback that emits the steps of a request's images, and as many previews as take a small share of its time."""

    def __init__(self, model: SharedModel, emit: Emit, num_images: int, source: str | None) -> None:
        """Begin to count the time; for `source` see `provenance.say`."""
        self._model, self._emit, self._num_images, self._source = model, emit, num_images, source
        self._started, self._allowance = time.monotonic(), outputs.Allowance(_PREVIEW_SHARE)
        # By index: the newest step, and its tokens.
        self._newest: dict[int, tuple[int, Tensor]] = {}

    def __call__(self, step: int, indices: Tensor, tokens: Tensor) -> None:
        for index, grid in zip(indices.tolist(), tokens, strict=True):
            if not self._emit.full:
                self._emit(outputs.event("progress", {"step": step, "index": index}))
            if index in self._newest:
                self._show()
            self._newest[index] = (step, grid)
        if len(self._newest) == self._num_images:
            self._show()

    def _show(self) -> None:
        """Emit previews of the newest tokens, decoded together."""
        if self._emit.full or not self._allowance.allows(time.monotonic() - self._started):
            return
        before = self._model.seconds_called
        pixels = self._model.decode_tokens(torch.stack([grid for _, grid in self._newest.values()]))
        self._allowance.spend(self._model.seconds_called - before)
        shown = outputs.previews(pixels, self._source)
        for (index, (step, _)), image in zip(self._newest.items(), shown, strict=True):
            self._emit(outputs.event("preview", {"step": step, "index": index, "image": image}))
        self._newest.clear()


async def _inspect(http: Request) -> Response:
    service: Service = http.app.state.service
    body = await read_body(http, schemas.Inspect)
    cost = await asyncio.to_thread(cost_of, service, body)

    def work(model: MaskGIT) -> Answer:
        return Answer(inspect_file(body.image).model_dump_json().encode())

    return await wait(http, service.submit(work, client=client_of(http), **cost))


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
    entry = schemas.OpenAIModel(id=service.name, created=service.created)
    return schemas.Models(models=[card], data=[entry])


async def _model(http: Request, name: str) -> schemas.OpenAIModel:
    service: Service = http.app.state.service
    if name != service.name:
        raise NotFoundError(f"There is no model {name!r:.200}; this server has {service.name!r}.")
    return schemas.OpenAIModel(id=service.name, created=service.created)


async def _classes(http: Request) -> schemas.Classes:
    model = http.app.state.service.model
    names = model.class_names or [None] * model.vocabulary.num_classes
    listed = [schemas.ClassName(number=number, name=name) for number, name in enumerate(names)]
    return schemas.Classes(classes=listed)


async def _policies(http: Request) -> schemas.Policies:
    model = http.app.state.service.model
    listed = []
    for name, policy in POLICIES.items():
        listed.append(
            schemas.PolicyCard(
                name=name,
                about=(inspect.getdoc(policy) or "").partition("\n")[0],
                parameters={field.name: field.default for field in dataclasses.fields(policy)},
                sampler=model.sampler_config(policy=name).to_dict(),
            )
        )
    settings = {
        name: schemas.SettingCard(help=setting.help, low=setting.low, high=setting.high)
        for name, setting in SETTINGS.items()
    }
    return schemas.Policies(policies=listed, mask_schedules=list(MASK_SCHEDULES), settings=settings)


async def _samples(http: Request) -> schemas.Samples:
    folder = http.app.state.service.samples
    return await asyncio.to_thread(samples.read, folder) if folder else schemas.Samples()


async def _sheet(http: Request, name: str) -> Response:
    folder = http.app.state.service.samples
    if name not in samples.SHEETS or folder is None or not (folder / name).is_file():
        raise NotFoundError(f"There is no sample {name!r:.80}.")
    return FileResponse(folder / name, media_type="image/webp", headers={"x-content-type-options": "nosniff"})


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


async def _tell_error(http: Request, error: Exception) -> Response:
    fault = as_fault(error)
    status, body = error_answer(fault, openai=speaks_openai(http.scope))
    return Response(body, status, error_headers(fault), JSON)


async def _tell_http_error(http: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    kind = _STATUS_KINDS.get(error.status_code, "invalid_request")
    message = f"{http.method} {http.url.path[:100]}: {error.detail}."
    body = outputs.to_json({"error": {"type": kind, "message": message}}).body
    return Response(body, error.status_code, error.headers, JSON)


async def _tell_mistake(http: Request, error: Exception) -> Response:
    fault = FailedError("The server failed on this request; its log says why.")
    status, body = error_answer(fault, openai=speaks_openai(http.scope))
    return Response(body, status, media_type=JSON)
