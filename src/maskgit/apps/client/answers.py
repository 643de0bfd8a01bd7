"""Reading a server's answers, without a connection."""

import base64
import binascii
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from time import time
from typing import Any, TypeVar

import httpx
from PIL import Image
from pydantic import BaseModel, ValidationError

from maskgit.apps.serving import schemas
from maskgit.apps.serving.schemas import ClassName
from maskgit.errors import MaskGITError
from maskgit.images import reading as imagefiles

Body = TypeVar("Body", bound=BaseModel)

# Largest image that is decoded.
_MAX_PIXELS = 100_000_000
# Characters quoted of an answer that is not from a maskgit server.
_MAX_SAID = 300
# Statuses worth a retry, and the kinds they get when a proxy sends them without one.
_KINDS = {429: "overloaded", 503: "unavailable"}


class RequestError(MaskGITError):
    """A request failed; the message is the server's, if it sent one.

    Attributes:
        kind: the error's type: the server's (docs/serving.md), or "unreachable", "timeout",
            "not_understood".
        status: HTTP status, or None if there was no answer.
        retry_after: seconds to wait before a retry, as the server says, or None.
    """

    def __init__(
        self, message: str, kind: str, status: int | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.status = status
        self.retry_after = retry_after

    @property
    def may_pass(self) -> bool:
        """Whether the same request may succeed later."""
        return self.kind == "unreachable" or self.status in _KINDS


@dataclass(frozen=True)
class Picture:
    """One image of an answer.

    Attributes:
        image: mode RGB or RGBA.
        data: the file as received; a PNG holds its settings (`maskgit.images.read_settings`).
        media_type: the file's media type, such as image/png.
        seed, index: those of the image, or None where nothing was sampled.
        tokens: rows of the token grid, if asked for.
        trace: how the image was decoded, if asked for.
    """

    image: Image.Image
    data: bytes = field(repr=False)
    media_type: str
    seed: int | None = None
    index: int | None = None
    tokens: list[list[int]] | None = field(default=None, repr=False)
    trace: schemas.Trace | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Pictures:
    """The answer to a request for images.

    Attributes:
        pictures: the images with their files, in order of index.
        model: the model's name.
        settings: the settings that the images were made with.
        class_guess: the class that the model chose, if it was asked to guess, or None.
        notes: the server's remarks on how the request was understood.
    """

    pictures: list[Picture]
    model: str
    settings: dict[str, Any]
    class_guess: ClassName | None = None
    notes: tuple[str, ...] = ()

    @property
    def images(self) -> list[Image.Image]:
        """The images as PIL images."""
        return [picture.image for picture in self.pictures]


@dataclass(frozen=True)
class Preview:
    """An image after a decoding step.

    Attributes:
        step: number of the step, from 0.
        index: index of the image.
        image: mode RGB, scaled down.
    """

    step: int
    index: int
    image: Image.Image


def check(answer: httpx.Response) -> None:
    """Raise the error that an answer reports, if any.

    Args:
        answer: if its status is an error's, its body has been read.

    Raises:
        RequestError: the status is an error's; the message is the server's, or the start of the body.
    """
    if answer.is_success:
        return
    status = answer.status_code
    retry_after = _seconds(answer.headers.get("retry-after"))
    try:
        fault = schemas.ErrorAnswer.model_validate_json(answer.content).error
    except ValidationError:
        said = answer.text.strip()[:_MAX_SAID] or answer.reason_phrase
        message = f"{answer.url.host} answered {answer.request.url.path} with status {status}: {said}"
        raise RequestError(message, _KINDS.get(status, "not_understood"), status, retry_after) from None
    raise RequestError(fault.message, fault.type, status, retry_after)


class EventReader:
    """Reads server-sent events, line by line."""

    def __init__(self) -> None:
        self._name = ""
        self._data: list[str] = []
        self._done = False

    def feed(self, line: str) -> Preview | Pictures | None:
        """Take a line, and return the event it completes, if any.

        Raises:
            RequestError: the event is an error, or cannot be read.
        """
        if line.startswith("event:"):
            self._name = line[6:].strip()
        elif line.startswith("data:"):
            self._data.append(line[5:].strip())
        elif not line and self._data:
            name, data = self._name, "\n".join(self._data)
            self._name, self._data = "", []
            return self._read(name, data)
        return None

    def finish(self) -> None:
        """Check, after the last line, that the result has arrived.

        Raises:
            RequestError: the result is missing.
        """
        if not self._done:
            raise RequestError("The server closed the stream before the result; try again.", "unreachable")

    def _read(self, name: str, data: str) -> Preview | Pictures | None:
        if name == "result":
            self._done = True
            return _pictures(_validated(data, schemas.Pictures))
        if name == "preview":
            shown = _validated(data, _PreviewData)
            return Preview(shown.step, shown.index, _decoded(shown.image)[0])
        if name == "error":
            fault = _validated(data, schemas.ErrorAnswer).error
            raise RequestError(fault.message, fault.type)
        # Newer servers may send further events.
        return None


class _PreviewData(BaseModel):
    step: int
    index: int
    image: str


def _seconds(header: str | None) -> float | None:
    """Return the seconds to wait by the header Retry-After, a number or a date, or None."""
    text = (header or "").strip()
    if text.isdecimal() and len(text) < 10:
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time())
    except (ValueError, TypeError, OverflowError):
        return None


def _validated(data: str | bytes, schema: type[Body]) -> Body:
    try:
        return schema.model_validate_json(data)
    except ValidationError as error:
        raise _not_understood() from error


def _not_understood() -> RequestError:
    return RequestError(
        "The answer does not come from a maskgit server of this version; check the URL and both versions.",
        "not_understood",
    )


def parse(answer: httpx.Response, schema: type[Body]) -> Body:
    """Return the content of a JSON answer.

    Raises:
        RequestError: it is an error, or not an answer of this kind.
    """
    check(answer)
    return _validated(answer.content, schema)


def read_health(answer: httpx.Response) -> str:
    """Return a server's state, ready or not ready; the latter comes with status 503."""
    if answer.status_code == 503:
        try:
            return schemas.Health.model_validate_json(answer.content).status
        except ValidationError:
            # Some proxy's 503, not the server's.
            check(answer)
    return parse(answer, schemas.Health).status


def read_pictures(answer: httpx.Response) -> Pictures:
    """Return an answer's images, decoded; see `parse`."""
    return _pictures(parse(answer, schemas.Pictures))


def _pictures(body: schemas.Pictures) -> Pictures:
    made = []
    for shown in body.images:
        image, data = _decoded(shown.image)
        made.append(
            Picture(image, data, shown.media_type, shown.seed, shown.index, shown.tokens, shown.trace)
        )
    return Pictures(made, body.model, body.settings, body.class_guess, tuple(body.notes))


def _decoded(text: str) -> tuple[Image.Image, bytes]:
    """Return an image sent as base64, and its file."""
    try:
        data = base64.b64decode(text, validate=True)
        return imagefiles.read(data, _MAX_PIXELS, imagefiles.keep_alpha), data
    except (binascii.Error, ValueError) as error:
        raise _not_understood() from error
