"""What OpenAPI says of the routes, and a page that shows it without loading anything from elsewhere."""

import copy
from collections.abc import Callable
from html import escape
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from maskgit.apps.serving import schemas
from maskgit.apps.serving.inputs import EVENTS, FORM, JSON, PICTURES

_REFERENCE = "#/components/schemas/{model}"
_BINARY = {"type": "string", "format": "binary"}
_ERRORS = {
    401: "The key is missing or wrong.",
    403: "The server is called by a name that is not allowed, or used by another site's page.",
    406: "The client accepts nothing that can be made.",
    408: "The body came too slowly.",
    413: "The body or a picture is too large.",
    415: "The body is neither JSON nor a form.",
    422: "The request is not understood, or a value is not allowed.",
    429: "The queue is full; the header Retry-After says when to come again.",
    500: "The server failed.",
    503: "The server is not ready yet, or stopping.",
    504: "The request was not done in time.",
}
_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>maskgit</title>
<style>body{{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}}
code{{background:#eee;padding:0 .2em}}td{{vertical-align:top;padding:.2em .8em .2em 0}}</style>
<h1>maskgit {version}</h1><p>The whole description is <a href="openapi.json">openapi.json</a>.</p>
{parts}</html>
"""


def add_post(
    app: FastAPI, command: str, schema: type[schemas.Request], summary: str, route: Callable[..., Any]
) -> None:
    """Add a route that takes a body; the route reads it itself, because it may be JSON or a form."""
    shows = issubclass(schema, schemas.Shown)
    content: dict[str, Any] = {kind: {"schema": _BINARY} for kind in PICTURES} if shows else {}
    if issubclass(schema, schemas.Sampled):
        content[EVENTS] = {}
    answers: dict[int | str, dict[str, Any]] = {
        200: {"model": schemas.Pictures if shows else schemas.Tokens, "content": content}
    }
    answers |= {
        status: {"model": schemas.ErrorAnswer, "description": about} for status, about in _ERRORS.items()
    }
    name = schema.__name__
    body: dict[str, Any] = {JSON: {"schema": {"$ref": _REFERENCE.format(model=name)}}}
    body[FORM] = {"schema": {"$ref": _REFERENCE.format(model=f"{name}Form")}}
    app.add_api_route(
        f"/v1/{command}",
        route,
        methods=["POST"],
        summary=summary,
        operation_id=command,
        responses=answers,
        response_model=None,
        openapi_extra={"requestBody": {"required": True, "content": body}},
    )


def add_get(
    app: FastAPI, path: str, answer: type[BaseModel], summary: str, route: Callable[..., Any]
) -> None:
    """Add a route without a body."""
    answers: dict[int | str, dict[str, Any]] = {200: {"model": answer}}
    if path.startswith("/v1/"):
        answers[401] = {"model": schemas.ErrorAnswer, "description": _ERRORS[401]}
    if path == "/readyz":
        answers[503] = {"model": schemas.Health, "description": _ERRORS[503]}
    name = path.rpartition("/")[2]
    app.add_api_route(path, route, summary=summary, operation_id=name, responses=answers, response_model=None)
    # Those who watch servers often ask for the head alone.
    app.add_api_route(path, route, methods=["HEAD"], include_in_schema=False, response_model=None)


def describe_bodies(app: FastAPI) -> None:
    """Put the schemas of bodies, which FastAPI does not see, into the application's OpenAPI document."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        made = app.openapi_schema is None
        document = plain()
        if made:
            known = document.setdefault("components", {}).setdefault("schemas", {})
            for model in _all_requests(schemas.Request):
                _, top = models_json_schema([(model, "validation")], ref_template=_REFERENCE)
                whole = top["$defs"][model.__name__]
                known[model.__name__] = whole
                known[f"{model.__name__}Form"] = _as_form(whole)
            scheme = {"type": "http", "scheme": "bearer"}
            document["components"]["securitySchemes"] = {"key": scheme}
            # A server without keys asks for none.
            document["security"] = [{}, {"key": []}]
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _all_requests(base: type[schemas.Request]) -> list[type[schemas.Request]]:
    """Return the schemas that no other derives from."""
    below = base.__subclasses__()
    return [leaf for child in below for leaf in _all_requests(child)] if below else [base]


def _as_form(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema with files in place of base64."""
    form = copy.deepcopy(schema)
    for name in ("image", "mask"):
        if name in form["properties"]:
            form["properties"][name] = _BINARY
    return form


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
                name = body["content"][JSON]["schema"]["$ref"].rpartition("/")[2]
                parts.append(_fields(document["components"]["schemas"][name]))
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
