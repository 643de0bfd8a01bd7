"""What each request that makes pictures asks of the model. No HTTP here: a request, a model, an `Output`.

These functions run in a request's own thread, or wherever else somebody has a model.
"""

import base64
import hashlib
import io
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from PIL import Image

from maskgit import images
from maskgit.apps.serving import schemas
from maskgit.apps.serving.errors import InvalidRequestError, TooLargeError
from maskgit.apps.serving.inputs import picture_size
from maskgit.apps.serving.options import Limits
from maskgit.apps.serving.outputs import Recipe
from maskgit.editing.masks import read_painted
from maskgit.editing.outpaint import count_windows
from maskgit.editing.photos import open_picture
from maskgit.errors import ImageError, RegionError
from maskgit.foundation.checks import check_count
from maskgit.images import reading as imagefiles
from maskgit.networks.classes import class_query
from maskgit.pipeline import MaskGIT
from maskgit.results import Callback, Output

# While a canvas is decoded and blended, a pixel takes so many times as much memory as one of a photo.
_CANVAS_COST = 8
# Characters of a mask in metadata, and pixels a side of a preview.
_MAX_MASK_CHARS, _PREVIEW_SIDE = 2**19, 1280


class Maker(NamedTuple):
    """One kind of request.

    Attributes:
        schema: what it holds.
        make: makes its pictures; the callback is told of every step.
        summary: for the documentation.
    """

    schema: type[schemas.Shown]
    make: Callable[[MaskGIT, Any, Callback | None], Output]
    summary: str


def generate(model: MaskGIT, body: schemas.Generate, told: Callback | None) -> Output:
    """Make new images."""
    return model.generate(body.class_, **_shared(body, told))


def edit(model: MaskGIT, body: schemas.Edit, told: Callback | None) -> Output:
    """Replace what is in boxes."""
    boxes = [(left, top, width, height) for left, top, width, height in body.boxes]
    return model.edit(
        open_picture(body.image, "photo"),
        boxes,
        body.class_,
        rule=body.rule,
        start_step=body.start_step,
        feather=body.feather,
        **_shared(body, told),
    )


def inpaint(model: MaskGIT, body: schemas.Inpaint, told: Callback | None) -> Output:
    """Fill in what is painted."""
    return model.inpaint(
        open_picture(body.image, "photo"),
        body.mask,
        body.class_,
        invert=body.invert,
        share=body.share,
        dilate=body.dilate,
        start_step=body.start_step,
        feather=body.feather,
        **_shared(body, told),
    )


def outpaint(model: MaskGIT, body: schemas.Outpaint, told: Callback | None) -> Output:
    """Go on beyond the edges."""
    return model.outpaint(
        open_picture(body.image, "photo"),
        left=body.left,
        right=body.right,
        top=body.top,
        bottom=body.bottom,
        canvas=body.canvas,
        position=body.position,
        label=body.class_,
        feather=body.feather,
        **_shared(body, told),
    )


def vary(model: MaskGIT, body: schemas.Vary, told: Callback | None) -> Output:
    """Replace a share of an image's tokens."""
    return model.vary(images.read_image(body.image), body.strength, body.class_, **_shared(body, told))


def reconstruct(model: MaskGIT, body: schemas.Reconstruct, told: Callback | None) -> Output:
    """Encode and decode."""
    return model.reconstruct(images.read_image(body.image))


def detokenize(model: MaskGIT, body: schemas.Detokenize, told: Callback | None) -> Output:
    """Decode tokens."""
    side = model.vocabulary.grid_size
    if len(body.tokens) != side or any(len(row) != side for row in body.tokens):
        raise RegionError(f"tokens must be {side} rows of {side} numbers for this model.")
    for row in body.tokens:
        for token in row:
            check_count("tokens", token, 0, model.vocabulary.image_codes - 1)
    tokens = torch.tensor([body.tokens])
    return Output(model.decode_tokens(tokens), tokens)


MAKERS = {
    "generate": Maker(schemas.Generate, generate, "Generate images of a class."),
    "edit": Maker(schemas.Edit, edit, "Replace boxes of a photo with a class."),
    "inpaint": Maker(schemas.Inpaint, inpaint, "Inpaint the masked part of a photo."),
    "outpaint": Maker(schemas.Outpaint, outpaint, "Extend a photo beyond its edges."),
    "vary": Maker(schemas.Vary, vary, "Make variations of an image."),
    "reconstruct": Maker(schemas.Reconstruct, reconstruct, "Encode an image to tokens and decode it again."),
    "detokenize": Maker(schemas.Detokenize, detokenize, "Decode tokens to an image."),
}


def tokenize(model: MaskGIT, body: schemas.Tokenize) -> list[list[int]]:
    """Return a picture's tokens, row by row."""
    return model.encode_pixels(model.prepare(images.read_image(body.image)))[0].tolist()


def check_limits(body: schemas.Request, limits: Limits, image_size: int) -> int:
    """Check what a request asks for, and return the pixels of the pictures that it holds; nothing is decoded.

    Args:
        body: the request.
        limits: what is allowed.
        image_size: pixels a side of the model's image.

    Raises:
        InvalidRequestError, TooLargeError: it asks for too much.
        ImageError: a picture is none.
    """
    if isinstance(body, schemas.Sampled):
        if body.num_images > limits.max_images:
            raise InvalidRequestError(
                f"num_images may be at most {limits.max_images} on this server, but is {body.num_images}."
            )
        if (body.steps or 0) > limits.max_steps:
            raise InvalidRequestError(
                f"steps may be at most {limits.max_steps} on this server, but is {body.steps}."
            )
        if body.return_trace and body.num_images > 1:
            raise InvalidRequestError(f"return_trace takes one image, but num_images is {body.num_images}.")
    pixels = 0
    for picture in (getattr(body, "image", None), getattr(body, "mask", None)):
        if isinstance(picture, bytes):
            width, height = picture_size(picture, limits.max_pixels)
            pixels += width * height
    if not isinstance(body, schemas.Sampled) or not hasattr(body, "image"):
        return pixels
    if isinstance(body, schemas.Vary):
        return pixels
    if not isinstance(body, schemas.Outpaint):
        width, height = picture_size(body.image, limits.max_pixels)
        return pixels + _check_results(body, width * height, limits.max_pixels)
    width, height = picture_size(body.image, limits.max_pixels)
    scale = min(1.0, image_size / min(width, height))
    wide, high = (
        round(width * scale) + body.left + body.right,
        round(height * scale) + body.top + body.bottom,
    )
    if body.canvas is not None:
        wide, high = (max(0, side) for side in body.canvas)
    largest = limits.max_pixels // _CANVAS_COST
    return pixels + _CANVAS_COST * _check_results(body, wide * high, largest)


def count_steps(model: MaskGIT, body: schemas.Request) -> int:
    """Return the decoding steps of all images of a request together; 1 if it decodes none.

    Args:
        model: is asked about its config alone.
        body: the request; see `check_limits` for its size.

    Raises:
        ConfigError, RegionError: a setting or class is not allowed.
    """
    if not isinstance(body, schemas.Sampled):
        return 1
    config = model.sampler_config(**body.settings())
    label, start, windows = getattr(body, "class_", "guess"), 0, 1
    if isinstance(body, schemas.Generate | schemas.Outpaint) or label != "guess":
        model.label(label)
    if isinstance(body, schemas.Edit):
        start = config.steps // 6 if body.start_step is None else body.start_step
    elif isinstance(body, schemas.Inpaint):
        start = body.start_step
    elif isinstance(body, schemas.Outpaint):
        with imagefiles.opened(body.image, 2**64) as (_, image):
            width, height = image.size
        sides = {
            name: getattr(body, name) for name in ("left", "right", "top", "bottom", "canvas", "position")
        }
        # What is wrong with the sides is told once the image is decoded and its orientation known.
        with suppress(RegionError):
            windows = count_windows(model, width, height, **sides)
    return body.num_images * max(1, min(config.steps, model.vocabulary.num_tokens) - start) * windows


def _check_results(body: schemas.Sampled, pixels: int, largest: int) -> int:
    """Return the pixels of all results of a request."""
    pixels *= body.num_images
    if pixels > largest:
        raise TooLargeError(
            f"The results would have {pixels:,} pixels, but the limit is {largest:,}; ask for fewer or smaller images."
        )
    return pixels


def recipe(model: MaskGIT, recorded: dict[str, Any], body: schemas.Shown, made: Output) -> Recipe:
    """Return what decided the pictures of a request.

    Args:
        model: made them.
        recorded: what metadata says of the model and of the kind of request.
        body: the request.
        made: its result.
    """
    settings = dict(recorded)
    if not isinstance(body, schemas.Sampled):
        return Recipe(settings)
    settings |= model.sampler_config(**body.settings()).to_dict()
    label = getattr(body, "class_", None)
    if made.class_guess is not None:
        label = made.class_guess.label
    settings["class"] = None if label is None else class_text(model, label)
    shown = set(schemas.Sampled.model_fields) | {"image", "mask", "class_"}
    settings |= {key: value for key, value in body.model_dump().items() if key not in shown}
    photo, mask = getattr(body, "image", None), getattr(body, "mask", None)
    if photo is not None:
        settings["photo_sha256"] = hashlib.sha256(photo).hexdigest()
    if mask is not None:
        settings |= {"mask": mask} if isinstance(mask, str) else _recorded_mask(mask)
    return Recipe(settings, body.seed, body.first_index)


def _recorded_mask(mask: bytes) -> dict[str, str]:
    """Return a mask for metadata, so that the edit can be repeated; one that is too large is left out."""
    data = io.BytesIO()
    Image.fromarray(read_painted(mask)).save(data, "PNG")
    text = base64.b64encode(data.getvalue()).decode()
    return {"mask_png": text} if len(text) <= _MAX_MASK_CHARS else {}


def inspect_file(data: bytes) -> schemas.Inspected:
    """Look at an image file.

    Raises:
        ImageError: it is none.
    """
    picture = open_picture(data, "image")
    try:
        settings = images.read_settings(data)
    except ImageError:
        settings = None
    width, height = picture.size
    small, preview = picture.copy(), io.BytesIO()
    small.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE))
    small.save(preview, "WEBP", quality=90)
    return schemas.Inspected(
        width=width,
        height=height,
        sha256=hashlib.sha256(data).hexdigest(),
        settings=settings,
        preview=base64.b64encode(preview.getvalue()).decode(),
    )


def class_text(model: MaskGIT, label: int | str) -> int | str:
    """Return the first of a class's names as a command takes it, or its number if it has none."""
    number = model.label(label)
    names = model.class_names
    return number if names is None else class_query(names[number].split(",")[0], number, names)


def _shared(body: schemas.Sampled, told: Callback | None) -> dict[str, Any]:
    return {
        "num_images": body.num_images,
        "seed": body.seed,
        "first_index": body.first_index,
        "callback": told,
        **({"return_steps": True} if body.return_trace else {}),
    } | body.settings()
