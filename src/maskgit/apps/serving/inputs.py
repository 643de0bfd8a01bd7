"""Reading requests: JSON or a form, what is accepted of it, and how large its pictures claim to be."""

import asyncio
import json
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest

from maskgit.apps.serving import schemas
from maskgit.apps.serving.errors import (
    InvalidRequestError,
    TooLargeError,
    UnsupportedTypeError,
)
from maskgit.images import reading as imagefiles

Body = TypeVar("Body", bound=schemas.Request)

JSON, EVENTS = "application/json", "text/event-stream"
PICTURES = {"image/png": "png", "image/jpeg": "jpeg", "image/webp": "webp"}
FORM = "multipart/form-data"
_MAX_PARTS = 64
_MAX_SAID, _MAX_QUOTED = 3, 200


async def read_body(http: HttpRequest, schema: type[Body]) -> Body:
    """Return a request's body, from JSON or from a form whose fields have JSON's names.

    Raises:
        UnsupportedTypeError: it is neither.
        InvalidRequestError: it is not as the schema says.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in (FORM, JSON, ""):
        raise UnsupportedTypeError(f"The Content-Type must be {JSON} or {FORM}, but is {kind:.80}.")
    body = await http.body()

    def parse() -> Body:
        if kind == FORM:
            return schema.model_validate(asyncio.run(_read_form(http, body)))
        _check_amount(body)
        return schema.model_validate_json(body)

    try:
        # Others are answered meanwhile; a form is read in a loop of its own.
        return await asyncio.to_thread(parse)
    except ValidationError as error:
        raise InvalidRequestError(_say(error)) from error


def _check_amount(text: bytes) -> None:
    """Check that JSON holds no more values than any request needs, before it is parsed; base64 has none of these.

    Raises:
        InvalidRequestError: it holds more.
    """
    values = text.count(b",") + text.count(b"[") + text.count(b"{")
    if values > schemas.MAX_VALUES or text.count(b'"') > 2 * schemas.MAX_TEXTS:
        raise InvalidRequestError(
            f"The body holds more than {schemas.MAX_VALUES:,} values or {schemas.MAX_TEXTS:,} texts, the limits."
        )


async def _read_form(http: HttpRequest, body: bytes) -> dict[str, Any]:
    """Return a form's fields: files as bytes, texts as the JSON values that they are, or else as texts."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    values: dict[str, Any] = {}
    try:
        async with HttpRequest(http.scope, receive).form(max_files=2, max_fields=_MAX_PARTS) as form:
            for name, value in form.multi_items():
                if name in values:
                    raise InvalidRequestError(f"The form has the field {name[:80]!r} twice; send it once.")
                values[name] = await value.read() if isinstance(value, UploadFile) else _value(value)
    except HTTPException as error:
        raise InvalidRequestError(f"The form cannot be read: {str(error.detail).rstrip('.')}.") from error
    return values


def _value(text: str) -> Any:
    _check_amount(text.encode())
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _say(error: ValidationError) -> str:
    """Return what is wrong with a body, in a sentence that does not repeat it."""
    said = []
    for fault in error.errors(include_url=False, include_context=False, include_input=False):
        where = ".".join(str(part) for part in fault["loc"])[:80]
        reason = fault["msg"].removeprefix("Value error, ")[:_MAX_QUOTED]
        said.append(f"{where}: {reason}" if where else reason)
    more = len(said) - _MAX_SAID
    return "; ".join(said[:_MAX_SAID]) + (f"; and {more} more." if more > 0 else ".")


def answer_type(accept: str | None, stream: bool) -> str:
    """Return the media type to answer in: the first one in an Accept header that is made here, else JSON.

    Args:
        accept: the header, if there is one; weights (q=) are not read.
        stream: whether the request itself asks for events.
    """
    if stream:
        return EVENTS
    asked = [part.partition(";")[0].strip().lower() for part in (accept or "").split(",")]
    return next((kind for kind in asked if kind in (JSON, EVENTS, *PICTURES)), JSON)


def picture_size(data: bytes, max_pixels: int) -> tuple[int, int]:
    """Return a picture's width and height as its file claims, without decoding it.

    Raises:
        TooLargeError: it has more pixels than are taken.
        ImageError: it is no picture.
    """
    # The readers are asked for the size alone, whatever it is.
    with imagefiles.opened(data, 2**64) as (_, image):
        width, height = image.size
    if width * height > max_pixels:
        raise TooLargeError(
            f"The image has {width} × {height} pixels, but the limit is {max_pixels:,} pixels; scale it down first."
        )
    return width, height
