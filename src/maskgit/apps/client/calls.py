"""What a client can ask of a server, without a connection: each function describes one request.

`maskgit.apps.client.client` has them as methods that send it and return its answer.
"""

import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypedDict, TypeVar, Unpack

import httpx
from PIL import Image

from maskgit.apps.client.answers import Pictures, parse, read_health, read_pictures
from maskgit.apps.serving import schemas
from maskgit.apps.serving.schemas import ClassName, Format, ModelCard
from maskgit.errors import ConfigError, ImageError
from maskgit.foundation.checks import plain
from maskgit.foundation.files import expand
from maskgit.images import reading as imagefiles

T = TypeVar("T")
Label = int | str | None
# A picture to send: a path, a file's bytes, or a PIL image.
Source = str | os.PathLike[str] | bytes | Image.Image

# Of a file that is sent; servers take less.
_MAX_BYTES = 2**28


class Making(TypedDict, total=False):
    """What every request that decodes tokens may say; the sampler's settings are those of docs/samplers.md.

    Attributes:
        num_images: ≥ 1.
        seed: in [0, 2⁶⁴); with the index, it decides an image.
        first_index: index of the first image.
        format: of the files that are sent.
        return_tokens: whether to send the images' tokens, too.
        priority: "low" lets all other requests go first.
    """

    num_images: int
    seed: int
    first_index: int
    format: Format
    return_tokens: bool
    priority: Literal["normal", "low"]
    steps: int
    policy: str
    policy_options: dict[str, Any]
    mask_schedule: str
    temperature: float
    temperature_schedule: str
    choice_temperature: float
    choice_schedule: str
    guidance_scale: float
    guidance_schedule: str
    force_guidance: bool
    tables: dict[str, list[float] | None]


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request.

    Attributes:
        path: of the URL.
        read: makes of an answer what is returned; raises `RequestError`.
        fields: JSON values, or None for a request without a body.
        files: pictures beside them.
        patient: whether it is sent again when the server has no place, or is not there.
    """

    path: str
    read: Callable[[httpx.Response], T]
    fields: dict[str, Any] | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    patient: bool = True

    def request(self, timeout: float, *, stream: bool = False) -> dict[str, Any]:
        """Return the arguments of `httpx.Client.request`.

        Args:
            timeout: seconds after which the server may drop it.
            stream: whether the answer is to be told in events.

        Raises:
            ConfigError: a field is no JSON value.
        """
        if self.fields is None:
            return {"method": "GET", "url": self.path}
        fields = self.fields | {"timeout": timeout}
        if stream:
            fields["stream"] = True
        texts = {name: _json(name, value) for name, value in fields.items()}
        if not self.files:
            body = ", ".join(f'"{name}": {text}' for name, text in texts.items())
            headers = {"content-type": "application/json"}
            return {"method": "POST", "url": self.path, "content": f"{{{body}}}".encode(), "headers": headers}
        files = {name: (name, data, "application/octet-stream") for name, data in self.files.items()}
        return {"method": "POST", "url": self.path, "data": texts, "files": files}


def generate(label: Label, **making: Unpack[Making]) -> Call[Pictures]:
    """Make new images of a class.

    Args:
        label: a class name or number, None for no class.
        **making: see `Making`.
    """
    return Call("/v1/generate", read_pictures, {"class": label, **making})


def edit(
    image: Source,
    boxes: Sequence[Sequence[int]],
    label: Label,
    *,
    rule: Literal["cover", "official"] = "cover",
    start_step: int | None = None,
    feather: float | None = None,
    **making: Unpack[Making],
) -> Call[Pictures]:
    """Replace what is in boxes of a photo by a class; see `MaskGIT.edit`.

    Args:
        image: a path, a file's bytes or a PIL image.
        boxes: (left, top, width, height) each, in pixels of the photo as it is seen.
        label: a class name or number, None for no class.
        rule: which tokens a box covers.
        start_step: the step to begin decoding at; None is the server's choice.
        feather: radius of the soft edge; None is the server's choice.
        **making: see `Making`.
    """
    fields = {"boxes": [list(box) for box in boxes], "class": label, "rule": rule, **making}
    fields |= _given(start_step=start_step, feather=feather)
    return Call("/v1/edit", read_pictures, fields, {"image": _file(image)})


def inpaint(
    image: Source,
    mask: Source | Literal["alpha"],
    label: Label = "guess",
    *,
    invert: bool = False,
    share: float = 0.0,
    dilate: int = 0,
    start_step: int = 0,
    feather: float | None = None,
    **making: Unpack[Making],
) -> Call[Pictures]:
    """Fill in a painted part of a photo; see `MaskGIT.inpaint`.

    Args:
        image: a path, a file's bytes or a PIL image.
        mask: the same, white where the photo is to be made new; "alpha" is where it is transparent.
        label: a class name or number, None for no class, "guess" for the likeliest.
        invert: whether all that the mask does not mark is to be made new.
        share: of a token's pixels that must be painted, in [0, 1].
        dilate: tokens by which the mask grows.
        start_step: the step to begin decoding at.
        feather: radius of the soft edge; None is the server's choice.
        **making: see `Making`.
    """
    fields = {"class": label, "share": share, "dilate": dilate, "start_step": start_step, **making}
    fields |= _given(feather=feather)
    # A server of before does not know the field.
    fields |= {"invert": True} if invert else {}
    files = {"image": _file(image)}
    if isinstance(mask, str) and mask == "alpha":
        fields["mask"] = mask
    else:
        files["mask"] = _file(mask)
    return Call("/v1/inpaint", read_pictures, fields, files)


def outpaint(
    image: Source,
    *,
    left: int = 0,
    right: int = 0,
    top: int = 0,
    bottom: int = 0,
    canvas: Sequence[int] | None = None,
    position: Sequence[int] | None = None,
    label: Label = None,
    feather: float | None = None,
    **making: Unpack[Making],
) -> Call[Pictures]:
    """Go on with a photo beyond its edges; see `MaskGIT.outpaint`.

    Args:
        image: a path, a file's bytes or a PIL image.
        left, right, top, bottom: pixels to add.
        canvas: in their place, (width, height) of the result.
        position: (x, y) of the photo in the canvas; None is the middle.
        label: a class name or number, None for no class.
        feather: pixels over which the photo fades into what is new; None is the server's choice.
        **making: see `Making`.
    """
    fields = {"left": left, "right": right, "top": top, "bottom": bottom, "class": label, **making}
    fields |= _given(
        canvas=None if canvas is None else list(canvas),
        position=None if position is None else list(position),
        feather=feather,
    )
    return Call("/v1/outpaint", read_pictures, fields, {"image": _file(image)})


def reconstruct(image: Source, *, format: Format = "png", return_tokens: bool = False) -> Call[Pictures]:
    """Show what the tokenizer keeps of a picture.

    Args:
        image: a path, a file's bytes or a PIL image.
        format: of the file that is sent back.
        return_tokens: whether to send its tokens, too.
    """
    fields = {"format": format, "return_tokens": return_tokens}
    return Call("/v1/reconstruct", read_pictures, fields, {"image": _file(image)})


def tokenize(image: Source) -> Call[list[list[int]]]:
    """Return a picture's tokens, rows of the token grid from the top.

    Args:
        image: a path, a file's bytes or a PIL image.
    """
    return Call(
        "/v1/tokenize", lambda answer: parse(answer, schemas.Tokens).tokens, {}, {"image": _file(image)}
    )


def detokenize(
    tokens: Sequence[Sequence[int]], *, format: Format = "png", return_tokens: bool = False
) -> Call[Pictures]:
    """Show the picture of tokens.

    Args:
        tokens: rows of the token grid, from the top.
        format: of the file that is sent back.
        return_tokens: whether to send the tokens back, too.
    """
    fields = {"tokens": [list(row) for row in tokens], "format": format, "return_tokens": return_tokens}
    return Call("/v1/detokenize", read_pictures, fields)


def models() -> Call[list[ModelCard]]:
    """Say what models are served."""
    return Call("/v1/models", lambda answer: parse(answer, schemas.Models).models)


def classes() -> Call[list[ClassName]]:
    """List the model's classes."""
    return Call("/v1/classes", lambda answer: parse(answer, schemas.Classes).classes)


def health() -> Call[str]:
    """Return "ready", or "not ready" if the server lives but takes no requests; asked once."""
    return Call("/readyz", read_health, patient=False)


def _json(name: str, value: Any) -> str:
    """Return a field as JSON, which it is in a form, too, so that "3" stays a name there."""
    try:
        return json.dumps(plain(value), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name} must be a JSON value, but is {value!r:.80} ({error}).") from error


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _file(source: Source) -> bytes:
    """Return a picture as a file's bytes; only a PIL image is encoded, as PNG."""
    if isinstance(source, bytes):
        return source
    if isinstance(source, Image.Image):
        data = io.BytesIO()
        # It may not have been read from its file yet.
        with imagefiles.decoding("The image"):
            imagefiles.keep_alpha(source).save(data, "PNG")
        return data.getvalue()
    if not isinstance(source, str | os.PathLike):
        raise ImageError(
            f"A picture must be a path, a file's bytes or a PIL image, but is a {type(source).__name__}."
        )
    try:
        with expand(source).open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ImageError(f"{source} cannot be read: {error}.") from error
    if len(content) > _MAX_BYTES:
        raise ImageError(f"{source} is larger than {_MAX_BYTES:,} bytes; make the picture smaller first.")
    return content
