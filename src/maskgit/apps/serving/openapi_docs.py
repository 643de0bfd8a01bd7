"""The routes as OpenAPI describes them, and a page of them that loads nothing from elsewhere."""

from collections.abc import Callable
from html import escape
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from pydantic import BaseModel

from maskgit.apps.serving import schemas
from maskgit.apps.serving.inputs import EVENTS, FORM, JSON, PICTURES

_BINARY = {"type": "string", "format": "binary"}
_ERRORS = {
    401: "The API key is missing or wrong.",
    403: "The server does not answer to this host name, or the request comes from another site's page.",
    408: "The body did not arrive in time.",
    413: "The body, an image or the result is too large.",
    415: "The body is neither JSON nor a form.",
    422: "A field, value or image is invalid.",
    429: "The queue is full; Retry-After says when to try again.",
    500: "The server failed; its log says why.",
    503: "The server is not ready yet, or is shutting down.",
    504: "The request was not finished in time.",
}
_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>maskgit</title>
<style>body{{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}}
code{{background:#eee;padding:0 .2em}}td{{vertical-align:top;padding:.2em .8em .2em 0}}</style>
<h1>maskgit {version}</h1><p>In full: <a href="openapi.json">openapi.json</a>.</p>
{parts}</html>
"""


# Only described here: `KeyGate` has checked the key before a route is reached.
KEY = Depends(HTTPBearer(auto_error=False, description="API key, if the server was started with keys."))


def add_post(
    app: FastAPI,
    command: str,
    schema: type[schemas.Request],
    summary: str,
    route: Callable[..., Any],
    answer: type[BaseModel] | None = None,
    plain: type[BaseModel] = schemas.Tokens,
) -> None:
    """Add a route that takes a body; the route reads it itself, because it may be JSON or a form.

    Args:
        app: the application.
        command: the path below /v1.
        schema, answer: of the body and of the answer in OpenAI's form; None is our own.
        plain: our own answer, of what returns no images.
        summary: for the documentation.
        route: reads the request and answers it.
    """
    shows = issubclass(schema, schemas.Shown) and answer is None
    content: dict[str, Any] = {kind: {"schema": _BINARY} for kind in PICTURES} if shows else {}
    if issubclass(schema, schemas.Sampled):
        content[EVENTS] = {}
    answers: dict[int | str, dict[str, Any]] = {
        200: {"model": answer or (schemas.Pictures if shows else plain), "content": content}
    }
    for status, about in _ERRORS.items():
        # OpenAI's own API has 400 for this.
        shown = 400 if answer is not None and status == 422 else status
        answers[shown] = {"model": schemas.ErrorAnswer, "description": about}
    fields = schema.model_json_schema()
    form = fields | {
        "properties": {name: _as_part(name, field) for name, field in fields["properties"].items()}
    }
    app.add_api_route(
        f"/v1/{command}",
        route,
        methods=["POST"],
        summary=summary,
        operation_id=command.replace("/", "_"),
        responses=answers,
        response_model=None,
        dependencies=[KEY],
        openapi_extra={
            "requestBody": {"required": True, "content": {JSON: {"schema": fields}, FORM: {"schema": form}}}
        },
    )


def _as_part(name: str, field: dict[str, Any]) -> dict[str, Any]:
    """Return a field as a part of a form: a file in place of base64."""
    return _BINARY if name in ("image", "mask") else field


def add_get(
    app: FastAPI, path: str, answer: type[BaseModel], summary: str, route: Callable[..., Any]
) -> None:
    """Add a route without a body."""
    answers: dict[int | str, dict[str, Any]] = {200: {"model": answer}}
    keyed = path.startswith("/v1/")
    if keyed:
        answers[401] = {"model": schemas.ErrorAnswer, "description": _ERRORS[401]}
    if path == "/readyz":
        answers[503] = {"model": schemas.Health, "description": _ERRORS[503]}
    app.add_api_route(
        path,
        route,
        summary=summary,
        operation_id=path.rpartition("/")[2],
        responses=answers,
        response_model=None,
        dependencies=[KEY] if keyed else None,
    )
    # Monitors often ask for the head alone.
    app.add_api_route(path, route, methods=["HEAD"], include_in_schema=False, response_model=None)


def page(app: FastAPI) -> str:
    """Return the routes and the fields of their bodies as HTML."""
    document = app.openapi()
    parts = []
    for path, methods in document["paths"].items():
        for method, about in methods.items():
            parts.append(
                f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(about['summary'])}"
            )
            body = about.get("requestBody")
            if body:
                parts.append(_fields(body["content"][JSON]["schema"]))
    return _PAGE.format(version=escape(document["info"]["version"]), parts="\n".join(parts))


def _fields(schema: dict[str, Any]) -> str:
    rows = []
    for name, field in schema["properties"].items():
        kinds = field.get("type") or " or ".join(
            part.get("type", "value") for part in field.get("anyOf", [{}])
        )
        needed = "required" if name in schema.get("required", ()) else f"default {field.get('default')}"
        about = field.get("description", "")
        rows.append(
            f"<tr><td><code>{escape(name)}</code><td>{escape(kinds)}<td>{escape(needed)}<td>{escape(about)}"
        )
    return "<table>" + "".join(rows) + "</table>"
