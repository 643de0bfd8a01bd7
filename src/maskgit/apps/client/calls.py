"""The requests of a client, without a connection: each function describes one.

The clients in `maskgit.apps.client.client` have them as methods that send the request and return its answer.
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
# An image to send: a path, a file's bytes, or a PIL image.
Source = str | os.PathLike[str] | bytes | Image.Image

# Largest file that is sent; servers accept less.
_MAX_BYTES = 2**28


class Making(TypedDict, total=False):
    """Optional arguments of every request that decodes tokens; docs/samplers.md describes the sampler's settings.

    Attributes:
        num_images: number of images, at least 1.
        seed: in [0, 2⁶⁴); seed and index together determine an image.
        first_index: index of the first image.
        format: file format of the images in the answer.
        return_tokens: whether to return the images' tokens, too.
        return_trace: whether to return how the image was decoded, too; of one image only.
        priority: "low" lets all other requests go first.
    """

    num_images: int
    seed: int
    first_index: int
    format: Format
    return_tokens: bool
    return_trace: bool
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
    top_k: int
    top_p: float
    force_guidance: bool
    tables: dict[str, list[float] | None]


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request.

    Attributes:
        path: of the URL.
        read: turns the HTTP answer into the result; raises `RequestError`.
        fields: JSON values, or None for a request without a body.
        files: image files by field name.
        patient: whether it is retried while the server is full, not ready or unreachable.
    """

    path: str
    read: Callable[[httpx.Response], T]
    fields: dict[str, Any] | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    patient: bool = True

    def request(self, timeout: float, *, stream: bool = False) -> dict[str, Any]:
        """Return the arguments of `httpx.Client.request`.

        Args:
            timeout: seconds after which the server may drop the request.
            stream: whether to ask for server-sent events.

        Raises:
            ConfigError: a field cannot be written as JSON.
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
    """Generate images of a class.

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
    """Replace boxes of a photo with a class; see `MaskGIT.edit`.

    Args:
        image: a path, a file's bytes or a PIL image.
        boxes: (left, top, width, height) each, in pixels of the photo as displayed.
        label: a class name or number, None for no class, "guess" lets the model choose the likeliest.
        rule: "cover" replaces every token that a box touches, "official" follows the official notebook.
        start_step: step to start decoding at; None is the server's default.
        feather: radius in pixels of the soft edge; None is the server's default.
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
    """Fill in the masked part of a photo; see `MaskGIT.inpaint`.

    Args:
        image: a path, a file's bytes or a PIL image.
        mask: a black and white image, also as a path, bytes or PIL image, white where to inpaint; "alpha" inpaints
            the photo's transparent parts.
        label: a class name or number, None for no class, "guess" lets the model choose the likeliest.
        invert: whether to replace what the mask leaves out and keep what it marks.
        share: share of a token's pixels, in [0, 1], that the mask must mark before the token is replaced.
        dilate: number of tokens to grow the mask by.
        start_step: step to start decoding at.
        feather: radius in pixels of the soft edge; None is the server's default.
        **making: see `Making`.
    """
    fields = {"class": label, "share": share, "dilate": dilate, "start_step": start_step, **making}
    fields |= _given(feather=feather)
    # Older servers do not know the field.
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
    """Extend a photo beyond its edges; see `MaskGIT.outpaint`.

    Args:
        image: a path, a file's bytes or a PIL image.
        left, right, top, bottom: pixels to add.
        canvas: (width, height) of the result, in place of the pixels to add.
        position: (x, y) of the photo's top left corner on the canvas; None is the middle.
        label: a class name or number, None for no class.
        feather: pixels inside the photo over which it blends into the new content; None is the server's default.
        **making: see `Making`.
    """
    fields = {"left": left, "right": right, "top": top, "bottom": bottom, "class": label, **making}
    fields |= _given(
        canvas=None if canvas is None else list(canvas),
        position=None if position is None else list(position),
        feather=feather,
    )
    return Call("/v1/outpaint", read_pictures, fields, {"image": _file(image)})


def vary(image: Source, strength: float, label: Label = "guess", **making: Unpack[Making]) -> Call[Pictures]:
    """Make variations of an image; see `MaskGIT.vary`.

    Args:
        image: a path, a file's bytes or a PIL image.
        strength: share of tokens to replace: 0 is the reconstruction, 1 a new image.
        label: a class name or number, None for no class, "guess" lets the model choose the likeliest.
        **making: see `Making`.
    """
    fields = {"strength": strength, "class": label, **making}
    return Call("/v1/vary", read_pictures, fields, {"image": _file(image)})


def reconstruct(image: Source, *, format: Format = "png", return_tokens: bool = False) -> Call[Pictures]:
    """Encode an image to tokens and decode it again.

    Args:
        image: a path, a file's bytes or a PIL image.
        format: file format of the image in the answer.
        return_tokens: whether to return its tokens, too.
    """
    fields = {"format": format, "return_tokens": return_tokens}
    return Call("/v1/reconstruct", read_pictures, fields, {"image": _file(image)})


def tokenize(image: Source) -> Call[list[list[int]]]:
    """Return an image's tokens: rows of the token grid, top row first.

    Args:
        image: a path, a file's bytes or a PIL image.
    """
    return Call(
        "/v1/tokenize", lambda answer: parse(answer, schemas.Tokens).tokens, {}, {"image": _file(image)}
    )


def detokenize(
    tokens: Sequence[Sequence[int]], *, format: Format = "png", return_tokens: bool = False
) -> Call[Pictures]:
    """Decode tokens to an image.

    Args:
        tokens: rows of the token grid, top row first.
        format: file format of the image in the answer.
        return_tokens: whether to return the tokens, too.
    """
    fields = {"tokens": [list(row) for row in tokens], "format": format, "return_tokens": return_tokens}
    return Call("/v1/detokenize", read_pictures, fields)


def models() -> Call[list[ModelCard]]:
    """List the models that the server offers."""
    return Call("/v1/models", lambda answer: parse(answer, schemas.Models).models)


def classes() -> Call[list[ClassName]]:
    """List the model's classes."""
    return Call("/v1/classes", lambda answer: parse(answer, schemas.Classes).classes)


def health() -> Call[str]:
    """Return "ready", or "not ready" if the server runs but accepts no requests; never retried."""
    return Call("/readyz", read_health, patient=False)


def _json(name: str, value: Any) -> str:
    """Return a field as JSON; forms carry JSON, too, so that the string "3" stays a class name."""
    try:
        return json.dumps(plain(value), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name} must be a JSON value, but is {value!r:.80} ({error}).") from error


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _file(source: Source) -> bytes:
    """Return an image as a file's bytes; a PIL image is encoded as PNG."""
    if isinstance(source, bytes):
        return source
    if isinstance(source, Image.Image):
        data = io.BytesIO()
        # Pillow may not have read its file yet.
        with imagefiles.decoding("The image"):
            imagefiles.keep_alpha(source).save(data, "PNG")
        return data.getvalue()
    if not isinstance(source, str | os.PathLike):
        raise ImageError(
            f"An image must be a path, a file's bytes or a PIL image, but is a {type(source).__name__}."
        )
    try:
        with expand(source).open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ImageError(f"{source} cannot be read: {error}.") from error
    if len(content) > _MAX_BYTES:
        raise ImageError(f"{source} is larger than {_MAX_BYTES:,} bytes; make the image smaller first.")
    return content
