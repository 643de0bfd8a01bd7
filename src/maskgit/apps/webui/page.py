"""The page as part of a server: plain files, which ask the server's public endpoints for everything else."""

import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from html import escape
from importlib import resources
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from maskgit.apps.cli.flags import Marking
from maskgit.apps.serving.app import create_app
from maskgit.apps.serving.errors import NotFoundError
from maskgit.apps.serving.service import Service
from maskgit.pipeline import MaskGIT

_TYPES = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml", "html": "text/html"}
# Nothing is loaded from elsewhere, and no text becomes a script. Results and chosen files are data: and blob: URLs.
_HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cache-control": "no-cache",
}


def add_page(app: FastAPI) -> FastAPI:
    """Put the page at / of a server from `create_app`."""
    folder = resources.files("maskgit").joinpath("assets/webui")
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    index = files.pop("index.html").decode()

    async def show(http: Request) -> Response:
        root = http.scope.get("root_path", "")
        # The page's own addresses are relative to the base, so that it works below a proxy's path.
        base = f'<base href="{escape(root)}/">' if root else ""
        filled = index.replace("{base}", base).replace("{url}", escape(str(http.base_url)))
        return _answer(http, filled.encode(), "html")

    async def file(http: Request, name: str) -> Response:
        if name not in files:
            raise NotFoundError(f"The page has no file {name!r:.80}.")
        return _answer(http, files[name], name.rpartition(".")[2])

    methods = ["GET", "HEAD"]
    app.add_api_route("/", show, methods=methods, include_in_schema=False)
    app.add_api_route("/page/{name}", file, methods=methods, include_in_schema=False)
    return app


def _answer(http: Request, data: bytes, ending: str) -> Response:
    tag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
    headers = _HEADERS | {"etag": tag}
    if http.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return Response(data, media_type=_TYPES[ending], headers=headers)


def mount(
    app: FastAPI, pipe: MaskGIT, name: str, *, path: str = "/", marking: Marking | None = None
) -> FastAPI:
    """Put a model's page, and the endpoints that it uses, into a server.

    Args:
        app: the server; whatever else answers below `path` must have been added before.
        pipe: the model; nobody else may use it from now on.
        name: what the model was loaded by; pictures say so.
        path: where the page is.
        marking: what files say of where their pictures come from; None is the defaults.
    """
    inner = create_app(Service(pipe, name, marking=marking), page=add_page)
    outer = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(given: Any) -> AsyncIterator[Any]:
        async with outer(given) as state, inner.router.lifespan_context(inner):
            yield state

    app.router.lifespan_context = lifespan
    app.mount(path.rstrip("/"), inner)
    return app
