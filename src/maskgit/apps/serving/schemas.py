"""What requests and answers hold, as OpenAPI shows it; the model itself checks values against one another."""

import base64
import binascii
from typing import Annotated, Any, Literal
from urllib.parse import unquote, unquote_to_bytes

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from maskgit.apps.settings import SETTINGS

Format = Literal["png", "jpeg", "webp"]
# Upper bounds for any model; the server's own limits may be lower: a day; the images of the longest queue; steps,
# sides, classes and codes as in models' configs; pixels of the largest photo.
MAX_SECONDS, MAX_IMAGES, MAX_STEPS = 86_400, 4096, SETTINGS["steps"].high
MAX_GRID, MAX_CODES, MAX_PIXELS = 256, 65_536, 10**9
# For more than this, send a mask.
MAX_BOXES = 256
# Characters of a class's name, and of a setting's, such as power-cosine:2.5,0.1,1; options of a policy.
MAX_NAME, MAX_WORD, MAX_OPTIONS = 200, 100, 16
# JSON texts, keys included, and all values: the tokens of the largest grid, and room for the rest.
MAX_TEXTS, MAX_VALUES = 1000, MAX_GRID * MAX_GRID + 4 * MAX_STEPS


def _decoded(value: Any) -> Any:
    """Return a file sent as base64 text, in lines or in one, or as a data URL, as bytes."""
    if not isinstance(value, str):
        return value
    text = value.strip()
    try:
        if text[:5].lower() == "data:":
            head, _, text = text.partition(",")
            if not head.lower().rstrip().endswith(";base64"):
                return unquote_to_bytes(text)
            text = unquote(text)
        # MIME breaks lines after 76 letters.
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("must be an image file as base64 or as a data: URL") from error


def _mask(value: Any) -> Any:
    # In a form, the word comes as a field like any other; it is no base64.
    return value if value == "alpha" else _decoded(value)


def _setting(name: str, default: Any = None, **bounds: Any) -> Any:
    """Return a field described by `settings.SETTINGS`; `bounds` replace its range where a request's is narrower."""
    about = SETTINGS[name]
    ends = {"ge": about.low, "le": about.high} | bounds
    return Field(
        default, description=about.help, **{key: end for key, end in ends.items() if end is not None}
    )


File = Annotated[
    bytes,
    BeforeValidator(_decoded),
    WithJsonSchema({"type": "string", "contentEncoding": "base64", "description": "Image file, base64."}),
]
Mask = Annotated[
    bytes | Literal["alpha"],
    BeforeValidator(_mask),
    WithJsonSchema(
        {
            "type": "string",
            "description": 'Black and white image, base64, white where to inpaint; or "alpha" for the photo\'s '
            "transparent parts.",
        }
    ),
]
# Bounds of a number whose meaning only the policy knows.
Number = Annotated[int, Field(ge=-(2**63), lt=2**64)] | Annotated[float, Field(ge=-1e18, le=1e18)]
Word = Annotated[str, Field(max_length=MAX_WORD)]
_NameOrNumber = Annotated[int, Field(ge=0, lt=MAX_CODES)] | Annotated[str, Field(max_length=MAX_NAME)] | None
_ABOUT_CLASS = "Class name or number (name:NAME or number:NUMBER if ambiguous); null is no class"
Class = Annotated[_NameOrNumber, Field(alias="class", description=f"{_ABOUT_CLASS}.")]
GuessableClass = Annotated[
    _NameOrNumber,
    Field(alias="class", description=f'{_ABOUT_CLASS}, "guess" lets the model choose the likeliest.'),
]
Pixel = Annotated[int, Field(ge=-MAX_PIXELS, le=MAX_PIXELS)]
# A list ends at its first error: the errors of a long one would fill the memory.
Box = Annotated[
    list[Pixel], Field(min_length=4, max_length=4, fail_fast=True, description="left, top, width, height")
]
Pair = Annotated[list[Pixel], Field(min_length=2, max_length=2, fail_fast=True)]
Side = Annotated[int, Field(le=MAX_PIXELS)]
Table = Annotated[list[Annotated[float, Field(ge=0, le=1e6)]], Field(max_length=MAX_STEPS, fail_fast=True)]
Row = Annotated[list[Annotated[int, Field(ge=0, lt=MAX_CODES)]], Field(max_length=MAX_GRID, fail_fast=True)]


class Request(BaseModel):
    """Fields of every request."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_by_name=False)

    timeout: float | None = Field(
        None,
        gt=0,
        le=MAX_SECONDS,
        description="Seconds to wait for the answer, up to the server's own limit.",
    )


class Shown(Request):
    """Fields of every request that returns images."""

    format: Format = Field("png", description="File format of the images in a JSON answer.")
    return_tokens: bool = Field(False, description="Also return the images' tokens.")


class Sampled(Shown):
    """Fields of every request that decodes tokens; the sampler's settings default to the model's own."""

    num_images: int = _setting("num_images", 1, le=MAX_IMAGES)
    seed: int = _setting("seed", 0)
    first_index: int = _setting("first_index", 0)
    stream: bool = Field(False, description="Answer with server-sent events: previews, then the result.")
    return_trace: bool = Field(False, description="Also return how the image was decoded; of one image only.")
    priority: Literal["normal", "low"] = _setting("priority", "normal")
    steps: int | None = _setting("steps")
    policy: Word | None = _setting("policy")
    policy_options: dict[Word, bool | Number | Word] | None = _setting(
        "policy_options", max_length=MAX_OPTIONS
    )
    mask_schedule: Word | None = _setting("mask_schedule")
    temperature: float | None = _setting("temperature")
    temperature_schedule: Word | None = _setting("temperature_schedule")
    choice_temperature: float | None = _setting("choice_temperature")
    choice_schedule: Word | None = _setting("choice_schedule")
    guidance_scale: float | None = _setting("guidance_scale")
    guidance_schedule: Word | None = _setting("guidance_schedule")
    top_k: int | None = _setting("top_k")
    top_p: float | None = _setting("top_p")
    force_guidance: bool | None = _setting("force_guidance")
    tables: dict[Word, Table | None] | None = _setting("tables", max_length=MAX_OPTIONS)

    def settings(self) -> dict[str, Any]:
        """Return the sampler's settings that were given, by their names in `SamplerConfig`."""
        names = [name for name in Sampled.model_fields if name not in _NOT_SETTINGS]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


_NOT_SETTINGS = {
    *Shown.model_fields,
    "num_images",
    "seed",
    "first_index",
    "stream",
    "return_trace",
    "priority",
}


class Generate(Sampled):
    """New images of a class."""

    class_: Class


class Edit(Sampled):
    """Boxes of a photo, replaced by a class."""

    image: File
    boxes: list[Box] = Field(
        min_length=1,
        max_length=MAX_BOXES,
        fail_fast=True,
        description="Areas to replace, in pixels of the photo as displayed.",
    )
    class_: GuessableClass
    rule: Literal["cover", "official"] = _setting("rule", "cover")
    start_step: int | None = _setting("start_step")
    feather: float | None = _setting("feather", le=MAX_PIXELS)


class Inpaint(Sampled):
    """The masked part of a photo, inpainted."""

    image: File
    mask: Mask
    class_: GuessableClass = "guess"
    invert: bool = _setting("invert", False)
    share: float = _setting("share", 0.0)
    dilate: int = _setting("dilate", 0, le=MAX_GRID)
    start_step: int = _setting("start_step", 0)
    feather: float | None = _setting("feather", le=MAX_PIXELS)


class Outpaint(Sampled):
    """A photo, extended beyond its edges."""

    image: File
    left: Side = _setting("left", 0)
    right: Side = _setting("right", 0)
    top: Side = _setting("top", 0)
    bottom: Side = _setting("bottom", 0)
    canvas: Pair | None = _setting("canvas")
    position: Pair | None = _setting("position")
    class_: Class = None
    feather: float | None = _setting("inner_feather", le=MAX_PIXELS)


class Vary(Sampled):
    """Variations of an image."""

    image: File
    strength: float = _setting("strength", ...)
    class_: GuessableClass = "guess"


class Reconstruct(Shown):
    """An image, encoded to tokens and decoded again."""

    image: File


class Tokenize(Request):
    """An image to encode to tokens."""

    image: File


class Inspect(Request):
    """An image file to look at."""

    image: File


class Detokenize(Shown):
    """Tokens to decode to an image."""

    tokens: list[Row] = Field(
        max_length=MAX_GRID, fail_fast=True, description="Rows of the token grid, top row first."
    )


class Trace(BaseModel):
    """How an image was decoded; lists of lists are rows of the token grid."""

    steps: int
    fixed_at: list[list[int]] = Field(
        description="The step that fixed each token, from 0; -1 where it was known from the start."
    )
    confidence: list[list[float]] = Field(description="The probability of each token when it was fixed.")
    tokens: list[list[int]]
    frames: list[str] = Field(
        description="The image that decoding would give after each step; PNG files, base64."
    )
    explanation: str = Field(description="The image and both maps on one sheet; a PNG file, base64.")
    animation: str = Field(description="The image as it forms; a GIF file, base64.")


class Picture(BaseModel):
    """One image of an answer."""

    image: str = Field(description="Image file, base64.")
    media_type: str
    seed: int | None = None
    index: int | None = None
    tokens: list[list[int]] | None = None
    trace: Trace | None = None


class ClassName(BaseModel):
    """A class of the model."""

    number: int
    name: str | None


class Pictures(BaseModel):
    """The answer to a request for images."""

    model: str
    settings: dict[str, Any] = Field(
        description="Settings that the images were made with, as in the PNG files' metadata."
    )
    class_guess: ClassName | None = None
    images: list[Picture]
    notes: list[str] = Field([], description="Remarks on how the request was understood.")


class Tokens(BaseModel):
    """The answer to `tokenize`."""

    model: str
    tokens: list[list[int]]


class Inspected(BaseModel):
    """The answer to `inspect`."""

    width: int = Field(description="Pixels of the image as displayed.")
    height: int
    sha256: str = Field(description="Of the file; images made from it record it.")
    settings: dict[str, Any] | None = Field(description="Settings that the file records, if any.")
    preview: str = Field(description="The image as displayed, scaled down to 1280 pixels; WebP, base64.")


class PolicyCard(BaseModel):
    """A decoding policy."""

    name: str
    about: str
    parameters: dict[str, Any] = Field(description="Defaults of its policy_options.")
    sampler: dict[str, Any] = Field(description="Sampler settings that the model uses with it by default.")


class SettingCard(BaseModel):
    """A setting of requests."""

    help: str
    low: int | float | None = Field(description="Range of a number, both ends included.")
    high: int | float | None


class Policies(BaseModel):
    """The answer to `policies`."""

    policies: list[PolicyCard]
    mask_schedules: list[str]
    settings: dict[str, SettingCard]


class Sample(BaseModel):
    """An image that can be generated again with the model's default settings."""

    number: int | None = Field(description="Of its class.")
    seed: int
    index: int


class Samples(BaseModel):
    """The answer to `samples`: what the sheets classes.webp and forming.webp beside it show, in square tiles."""

    columns: int | None = Field(
        default=None, description="Classes in a row of classes.webp, by number; null: no sheets."
    )
    frames: int = Field(
        default=0, description="Columns of forming.webp, from the first step to the finished image."
    )
    forming: list[Sample] = Field(default=[], description="Rows of forming.webp.")


class ModelCard(BaseModel):
    """A model that is served."""

    name: str
    image_size: int
    grid_size: int
    num_codes: int
    num_classes: int
    without_class: bool = Field(
        description="Whether the model can generate without a class, and so be guided."
    )
    sampler: dict[str, Any] = Field(description="Default sampler settings.")


class OpenAIModel(BaseModel):
    """A model in OpenAI's form."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "maskgit"


class Models(BaseModel):
    """The answer to `models`; object and data are in OpenAI's form."""

    models: list[ModelCard]
    object: Literal["list"] = "list"
    data: list[OpenAIModel] = []


class Classes(BaseModel):
    """The answer to `classes`."""

    classes: list[ClassName]


class Health(BaseModel):
    """The answer to `healthz` and `readyz`."""

    status: str


class Fault(BaseModel):
    """What went wrong."""

    type: str = Field(description="Error type, for programs.")
    message: str = Field(description="What went wrong and what to do, for people.")


class ErrorAnswer(BaseModel):
    """The body of every error."""

    error: Fault
