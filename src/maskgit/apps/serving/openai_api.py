"""OpenAI's image API in front of the same service, for clients that know it already.

The prompt names a class, alone or after the model: "frog", "a photo of a frog", "cifar10/frog". What OpenAI's models take
and ours have no use for is accepted and ignored; the sampler's settings are further fields.
Source: OpenAI API reference, Images and Models.
"""

import asyncio
import base64
import json
import re
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI
from PIL import Image
from pydantic import AliasChoices, BaseModel, BeforeValidator, Field
from starlette.requests import Request
from starlette.responses import Response
from torch import Tensor

from maskgit import images
from maskgit.apps.serving import openapi_docs, outputs, schemas
from maskgit.apps.serving.answering import Emit, client_of, cost_of, stream, wait
from maskgit.apps.serving.errors import InvalidRequestError
from maskgit.apps.serving.handlers import class_text
from maskgit.apps.serving.inputs import read_body
from maskgit.apps.serving.middleware import error_answer
from maskgit.apps.serving.outputs import Answer
from maskgit.apps.serving.service import Service
from maskgit.editing.photos import open_picture
from maskgit.errors import ConfigError
from maskgit.images import provenance
from maskgit.images import reading as imagefiles
from maskgit.model import Model
from maskgit.pipeline import MaskGIT
from maskgit.results import Callback, Output

_AROUND_CLASS = re.compile(r"((a |an |the )?(photo|picture|image|drawing) of )?(a |an |the )?", re.IGNORECASE)
# In a form, a word such as 3 comes as a number.
_Text = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, int) else value)]
_Short = Annotated[_Text, Field(max_length=schemas.MAX_NAME)]


class _Images(schemas.Sampled):
    """Fields that generations and edits share, beside the sampler's settings."""

    prompt: _Short = Field(description="Class to draw, such as frog, a frog or MODEL/frog.")
    model: _Short | None = Field(None, description="Name of the model, as /v1/models lists it.")
    num_images: int = Field(1, ge=1, le=schemas.MAX_IMAGES, alias="n", description="Number of images.")
    size: _Short | None = Field(
        None, description="auto, or the size that the images have anyway, such as 256x256."
    )
    response_format: Literal["b64_json"] | None = Field(
        None, description="Images come as base64; URLs are not made."
    )
    format: schemas.Format = Field("png", alias="output_format", description="File format of the images.")
    partial_images: int = Field(0, ge=0, le=3, description="With stream, images sent while the result forms.")
    quality: _Short | None = Field(None, description="Ignored; use steps.")
    style: _Short | None = Field(None, description="Ignored.")
    background: _Short | None = Field(None, description="Ignored.")
    moderation: _Short | None = Field(None, description="Ignored.")
    user: _Short | None = Field(None, description="Ignored.")
    output_compression: int | None = Field(None, ge=0, le=100, description="Ignored.")


class Generation(_Images):
    """Images of a class."""


class Edit(_Images):
    """The transparent part of a mask, or else of the image, drawn anew."""

    image: schemas.File = Field(validation_alias=AliasChoices("image", "image[]"))
    mask: schemas.File | None = Field(None, description="PNG of the image's size, transparent where to edit.")
    input_fidelity: _Short | None = Field(None, description="Ignored.")


class _Image(BaseModel):
    b64_json: str


class ImagesAnswer(BaseModel):
    """The answer to a request for images, in OpenAI's form."""

    created: int
    data: list[_Image]
    output_format: str
    size: str


def add_routes(app: FastAPI) -> None:
    """Add OpenAI's paths to an application."""
    for name, schema, summary in (
        ("generations", Generation, "Generate images, as in OpenAI's API."),
        ("edits", Edit, "Inpaint an image, as in OpenAI's API."),
    ):
        openapi_docs.add_post(app, f"images/{name}", schema, summary, _route(schema), answer=ImagesAnswer)


def _route(schema: type[Generation] | type[Edit]) -> Callable[[Request], Any]:
    async def answer(http: Request) -> Response:
        service: Service = http.app.state.service
        body: Generation | Edit = await read_body(http, schema)
        if body.model not in (None, service.name):
            raise InvalidRequestError(f"There is no model {body.model!r}; this server has {service.name!r}.")
        if body.stream and body.num_images > 1:
            raise InvalidRequestError("A stream holds one image; leave out n.")
        label = find_class(service.model, service.name, body.prompt)
        cost = await asyncio.to_thread(cost_of, service, body)
        size = service.model.config.image_size
        if isinstance(body, Generation) and body.size not in (None, "auto", f"{size}x{size}"):
            raise InvalidRequestError(
                f"This model makes images of {size}x{size} pixels; leave size out, or set it to that or auto."
            )
        command = "generate" if isinstance(body, Generation) else "inpaint"

        def work(model: MaskGIT, told: Callback | None = None) -> Answer:
            made = _make(model, body, label, service.limits.max_pixels, told)
            recorded = service.recorded | {"command": command, "class": class_text(model, label)}
            settings = recorded | model.sampler_config(**body.settings()).to_dict()
            how = outputs.Recipe(settings, body.seed, body.first_index)
            writing = service.marking.writing(getattr(body, "image", None))
            files = [
                images.encode(picture, body.format, settings=how.of(number), **writing)
                for number, picture in enumerate(made.to_pil())
            ]
            data = [{"b64_json": base64.b64encode(file).decode("ascii")} for file in files]
            common = {"created": int(time.time()), "output_format": body.format, "size": _size(made)}
            return outputs.to_json(common | {"data": data})

        if not body.stream:
            return await wait(http, service.submit(work, client=client_of(http), **cost))
        kind = "image_generation" if isinstance(body, Generation) else "image_edit"
        steps = service.model.sampler_config(**body.settings()).steps
        source = provenance.GENERATED if isinstance(body, Generation) else provenance.EDITED
        return await stream(
            http,
            lambda model, emit: work(
                model, _partials(model, emit, kind, body, steps, source if service.marking.mark else None)
            ),
            cost,
            last=lambda made: _completed(kind, made),
            fail=lambda fault: outputs.event("error", error_answer(fault, openai=True).body),
        )

    return answer


def find_class(model: Model, name: str, prompt: str) -> int:
    """Return the number of the class that a prompt names.

    Args:
        model: whose classes.
        name: of the model, which may come first: "cifar10/frog".
        prompt: a class's name or number, perhaps with an article or "a photo of" before it.

    Raises:
        ConfigError: no class is called so; it suggests others.
    """
    words = prompt.strip().rstrip(".").removeprefix(f"{name}/").strip()
    try:
        return model.label(words)
    except ConfigError:
        return model.label(_AROUND_CLASS.sub("", words, count=1))


def _make(
    model: MaskGIT, body: Generation | Edit, label: int, max_pixels: int, told: Callback | None
) -> Output:
    shared = {
        "num_images": body.num_images,
        "seed": body.seed,
        "first_index": body.first_index,
        "callback": told,
    } | body.settings()
    if isinstance(body, Generation):
        return model.generate(label, **shared)
    photo = open_picture(body.image, "image")
    if body.mask is None:
        return model.inpaint(photo, "alpha", label, **shared)
    mask = imagefiles.read(body.mask, max_pixels, imagefiles.keep_alpha)
    if mask.mode != "RGBA":
        raise InvalidRequestError("The mask has no transparent part; make it transparent where to edit.")
    return model.inpaint(photo, np.asarray(mask.getchannel("A")) < 128, label, **shared)


def _size(made: Output) -> str:
    width, height = made.to_pil()[0].size
    return f"{width}x{height}"


def _partials(
    model: MaskGIT, emit: Emit, kind: str, body: Generation | Edit, steps: int, source: str | None
) -> Callback:
    """Return a callback that emits as many partial images as were asked for, at even distances."""
    wanted = {steps * (number + 1) // (body.partial_images + 1) for number in range(body.partial_images)}
    sent = 0

    def told(step: int, indices: Tensor, tokens: Tensor) -> None:
        nonlocal sent
        if step + 1 in wanted and step + 1 < steps and not emit.full:
            picture: Image.Image = images.to_pil(model.decode_tokens(tokens))[0]
            provenance.say([picture], source)
            data = {
                "type": f"{kind}.partial_image",
                "b64_json": base64.b64encode(images.encode(picture, body.format)).decode("ascii"),
                "partial_image_index": sent,
                "created_at": int(time.time()),
                "output_format": body.format,
                "size": f"{picture.width}x{picture.height}",
            }
            emit(outputs.event(f"{kind}.partial_image", data))
            sent += 1

    return told


def _completed(kind: str, made: Answer) -> bytes:
    answer = json.loads(made.body)
    data = {
        "type": f"{kind}.completed",
        "b64_json": answer["data"][0]["b64_json"],
        "created_at": answer["created"],
        "output_format": answer["output_format"],
        "size": answer["size"],
    }
    return outputs.event(f"{kind}.completed", data)
