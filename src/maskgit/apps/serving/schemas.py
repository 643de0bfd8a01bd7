"""What requests and answers hold, as OpenAPI shows it; the model itself checks what a value may be."""

import base64
import binascii
from typing import Annotated, Any, Literal
from urllib.parse import unquote, unquote_to_bytes

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

Format = Literal["png", "jpeg", "webp"]
MAX_SEED, MAX_INDEX = 2**64 - 1, 2**40 - 1
# What no request needs more of, whatever the model and the server's own limits, which may be lower: a day; the
# images of the longest queue; steps, sides, classes and codes as in configs of models; pixels as of the largest photo.
MAX_SECONDS, MAX_IMAGES, MAX_STEPS = 86_400, 4096, 10_000
MAX_GRID, MAX_CODES, MAX_PIXELS = 256, 65_536, 10**9
# More boxes are a mask.
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
        raise ValueError("must be a file's bytes as base64, or a data: URL") from error


def _mask(value: Any) -> Any:
    # In a form, the word comes as a field like any other; it is no base64.
    return value if value == "alpha" else _decoded(value)


File = Annotated[
    bytes,
    BeforeValidator(_decoded),
    WithJsonSchema({"type": "string", "contentEncoding": "base64", "description": "A picture, base64."}),
]
Mask = Annotated[
    bytes | Literal["alpha"],
    BeforeValidator(_mask),
    WithJsonSchema(
        {
            "type": "string",
            "description": 'A black and white picture, base64, white where it is to be made new; or "alpha".',
        }
    ),
]
# What a number may be where only the policy knows what it is for.
Number = Annotated[int, Field(ge=-(2**63), lt=2**64)] | Annotated[float, Field(ge=-1e18, le=1e18)]
Word = Annotated[str, Field(max_length=MAX_WORD)]
_NameOrNumber = Annotated[int, Field(ge=0, lt=MAX_CODES)] | Annotated[str, Field(max_length=MAX_NAME)] | None
_ABOUT_CLASS = "A class's name or number (name:… or number:… says which); null is no class"
Class = Annotated[_NameOrNumber, Field(alias="class", description=f"{_ABOUT_CLASS}.")]
GuessableClass = Annotated[
    _NameOrNumber,
    Field(alias="class", description=f'{_ABOUT_CLASS}, "guess" the one that the model finds likeliest.'),
]
Pixel = Annotated[int, Field(ge=-MAX_PIXELS, le=MAX_PIXELS)]
# A list ends at its first fault: those of a long one would fill the memory.
Box = Annotated[
    list[Pixel], Field(min_length=4, max_length=4, fail_fast=True, description="left, top, width, height")
]
Pair = Annotated[list[Pixel], Field(min_length=2, max_length=2, fail_fast=True)]
StartStep = Annotated[int, Field(ge=0, lt=MAX_STEPS, description="The step to begin decoding at.")]
Feather = Annotated[float | None, Field(ge=0, le=MAX_PIXELS, description="Radius of the soft edge.")]
Side = Annotated[int, Field(ge=0, le=MAX_PIXELS, description="Pixels to add.")]
Table = Annotated[list[Annotated[float, Field(ge=0, le=1e6)]], Field(max_length=MAX_STEPS, fail_fast=True)]
Row = Annotated[list[Annotated[int, Field(ge=0, lt=MAX_CODES)]], Field(max_length=MAX_GRID, fail_fast=True)]


class Request(BaseModel):
    """What every request may say."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, validate_by_name=False)

    timeout: float | None = Field(
        None,
        gt=0,
        le=MAX_SECONDS,
        description="Seconds after which nobody needs the answer; at most the server's.",
    )


class Shown(Request):
    """What a request that makes pictures may say."""

    format: Format = Field("png", description="Of pictures inside JSON.")
    return_tokens: bool = Field(False, description="Give the pictures' tokens, too.")


class Sampled(Shown):
    """What a request that decodes tokens may say; a setting that is not given is the model's own."""

    num_images: int = Field(1, ge=1, le=MAX_IMAGES)
    seed: int = Field(0, ge=0, le=MAX_SEED, description="With the index, decides an image.")
    first_index: int = Field(0, ge=0, le=MAX_INDEX, description="Index of the first image.")
    stream: bool = Field(False, description="Answer with server-sent events: previews, then the result.")
    steps: int | None = Field(None, ge=1, le=MAX_STEPS)
    policy: Word | None = Field(None, description="Which tokens stay after a step.")
    policy_options: dict[Word, bool | Number | Word] | None = Field(None, max_length=MAX_OPTIONS)
    mask_schedule: Word | None = None
    temperature: float | None = Field(None, ge=0, le=1e6)
    temperature_schedule: Word | None = None
    choice_temperature: float | None = Field(None, ge=0, le=1e6)
    choice_schedule: Word | None = None
    guidance_scale: float | None = Field(None, ge=0, le=1000)
    guidance_schedule: Word | None = None
    force_guidance: bool | None = None
    tables: dict[Word, Table | None] | None = Field(
        None, max_length=MAX_OPTIONS, description="Values for each step."
    )

    def settings(self) -> dict[str, Any]:
        """Return the sampler's settings that were given, by their names in `SamplerConfig`."""
        names = [name for name in Sampled.model_fields if name not in _NOT_SETTINGS]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


_NOT_SETTINGS = {*Shown.model_fields, "num_images", "seed", "first_index", "stream"}


class Generate(Sampled):
    """New images of a class."""

    class_: Class


class Edit(Sampled):
    """What is in boxes of a photo, replaced by a class."""

    image: File
    boxes: list[Box] = Field(
        min_length=1,
        max_length=MAX_BOXES,
        fail_fast=True,
        description="In pixels of the photo as it is seen.",
    )
    class_: Class
    rule: Literal["cover", "official"] = "cover"
    start_step: StartStep | None = None
    feather: Feather = None


class Inpaint(Sampled):
    """A painted part of a photo, filled in."""

    image: File
    mask: Mask
    class_: GuessableClass = "guess"
    invert: bool = Field(False, description="Make new what the mask does not mark.")
    share: float = Field(0.0, ge=0, le=1)
    dilate: int = Field(0, ge=0, le=MAX_GRID)
    start_step: StartStep = 0
    feather: Feather = None


class Outpaint(Sampled):
    """A photo, gone on with beyond its edges."""

    image: File
    left: Side = 0
    right: Side = 0
    top: Side = 0
    bottom: Side = 0
    canvas: Pair | None = Field(None, description="In place of amounts, width and height of the result.")
    position: Pair | None = Field(None, description="Where the photo is in the canvas.")
    class_: Class = None
    feather: Annotated[
        float | None,
        Field(
            ge=0, le=MAX_PIXELS, description="Pixels inside the photo over which it fades into what is new."
        ),
    ] = None


class Reconstruct(Shown):
    """What the tokenizer keeps of a picture."""

    image: File


class Tokenize(Request):
    """A picture's tokens."""

    image: File


class Detokenize(Shown):
    """The picture of tokens."""

    tokens: list[Row] = Field(
        max_length=MAX_GRID, fail_fast=True, description="Rows of the token grid, from the top."
    )


class Picture(BaseModel):
    """One picture of an answer."""

    image: str = Field(description="The file, base64.")
    media_type: str
    seed: int | None = None
    index: int | None = None
    tokens: list[list[int]] | None = None


class ClassName(BaseModel):
    """A class of the model."""

    number: int
    name: str | None


class Pictures(BaseModel):
    """The answer of what makes pictures."""

    model: str
    settings: dict[str, Any] = Field(description="What made them, as in the PNG files' metadata.")
    class_guess: ClassName | None = None
    images: list[Picture]
    notes: list[str] = Field([], description="What is worth saying of how the request was understood.")


class Tokens(BaseModel):
    """The answer of `tokenize`."""

    model: str
    tokens: list[list[int]]


class ModelCard(BaseModel):
    """What a model is."""

    name: str
    image_size: int
    grid_size: int
    num_codes: int
    num_classes: int
    without_class: bool = Field(description="Whether it can generate without a class, and be guided.")
    sampler: dict[str, Any] = Field(description="The settings used where a request gives none.")


class Models(BaseModel):
    """The answer of `models`."""

    models: list[ModelCard]


class Classes(BaseModel):
    """The answer of `classes`."""

    classes: list[ClassName]


class Health(BaseModel):
    """The answer of `healthz` and `readyz`."""

    status: str


class Fault(BaseModel):
    """Why there is no answer."""

    type: str = Field(description="A word that programs can go by.")
    message: str = Field(description="A sentence for people.")


class ErrorAnswer(BaseModel):
    """The body of every answer that is an error."""

    error: Fault
