"""What a client makes of a server's answers; nothing here needs a connection."""

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

# Pixels of a picture that comes.
_MAX_PIXELS = 100_000_000
# Characters of what somebody else than our server says.
_MAX_SAID = 300
# Statuses of what passes, with their kinds where a proxy gives them without any.
_KINDS = {429: "overloaded", 503: "unavailable"}


class RequestError(MaskGITError):
    """A request failed; the message is the server's, if it sent one.

    Attributes:
        kind: the error's type: the server's (docs/serving.md), or "unreachable", "timeout",
            "not_understood".
        status: of HTTP, or None if there was no answer.
        retry_after: seconds after which the server says to come again, or None.
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
        """Whether the same request may be answered later."""
        return self.kind == "unreachable" or self.status in _KINDS


@dataclass(frozen=True)
class Picture:
    """One picture of an answer.

    Attributes:
        image: mode RGB or RGBA.
        data: the file that came; a PNG holds its settings (`maskgit.images.read_settings`).
        media_type: of the file.
        seed, index: what it was drawn from, or None.
        tokens: rows of the token grid, if asked for.
    """

    image: Image.Image
    data: bytes = field(repr=False)
    media_type: str
    seed: int | None = None
    index: int | None = None
    tokens: list[list[int]] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Pictures:
    """The answer of what makes pictures.

    Attributes:
        pictures: as many as were asked for.
        model: its name.
        settings: what made them.
        class_guess: which class an edit found, where it was asked to guess, or None.
        notes: what the server has to say of how it understood the request.
    """

    pictures: list[Picture]
    model: str
    settings: dict[str, Any]
    class_guess: ClassName | None = None
    notes: tuple[str, ...] = ()

    @property
    def images(self) -> list[Image.Image]:
        """The pictures as PIL images."""
        return [picture.image for picture in self.pictures]


@dataclass(frozen=True)
class Preview:
    """An image as it is after a step.

    Attributes:
        step, index: the step's and the image's number.
        image: mode RGB, small.
    """

    step: int
    index: int
    image: Image.Image


def check(answer: httpx.Response) -> None:
    """Raise what an answer says is wrong.

    Args:
        answer: read whole, if its status is an error's.

    Raises:
        RequestError: with the server's message, or what else it said.
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
        """Take a line, and return the event that it ends, if any.

        Raises:
            RequestError: the event is an error, or not to be understood.
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
        """Say that there are no more lines.

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
        # A newer server may tell more.
        return None


class _PreviewData(BaseModel):
    step: int
    index: int
    image: str


def _seconds(header: str | None) -> float | None:
    """Return what the header Retry-After says, which may be seconds or a date, or None."""
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
    """Return what an answer in JSON holds.

    Raises:
        RequestError: it is an error, or another's answer.
    """
    check(answer)
    return _validated(answer.content, schema)


def read_health(answer: httpx.Response) -> str:
    """Return a server's own word for its state; 503 belongs to one of them."""
    if answer.status_code == 503:
        try:
            return schemas.Health.model_validate_json(answer.content).status
        except ValidationError:
            # It is another's 503, say a proxy's.
            check(answer)
    return parse(answer, schemas.Health).status


def read_pictures(answer: httpx.Response) -> Pictures:
    """Return an answer's pictures, decoded; see `parse`."""
    return _pictures(parse(answer, schemas.Pictures))


def _pictures(body: schemas.Pictures) -> Pictures:
    made = []
    for shown in body.images:
        image, data = _decoded(shown.image)
        made.append(Picture(image, data, shown.media_type, shown.seed, shown.index, shown.tokens))
    return Pictures(made, body.model, body.settings, body.class_guess, tuple(body.notes))


def _decoded(text: str) -> tuple[Image.Image, bytes]:
    """Return a picture that came as base64, and its file."""
    try:
        data = base64.b64decode(text, validate=True)
        return imagefiles.read(data, _MAX_PIXELS, imagefiles.keep_alpha), data
    except (binascii.Error, ValueError) as error:
        raise _not_understood() from error
