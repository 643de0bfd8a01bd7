"""Typed descriptions of the networks and of sampling, validated when made.

Every config is a frozen dataclass of plain values. `to_dict` and `from_dict` carry it to and from JSON;
an unknown or missing key, a wrong type or a value out of range is a `ConfigError` that names the field.
"""

import dataclasses
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Self

from maskgit.checks import check_choice, check_flag, check_number, check_range, check_whole, plain
from maskgit.errors import ConfigError, unknown_name

ACTIVATIONS = ("swish", "relu")
NORMS = ("GN", "LN", "BN")
QUANTIZERS = ("vq", "gumbel")

# Far above any real model, so that a hostile config cannot ask for absurd memory.
MAX_WIDTH = 65_536
MAX_LAYERS = 512
MAX_CODES = 65_536  # token caches hold uint16
MAX_GRID = 256


def _converted(name: str, value: Any, expected: Any) -> Any:
    """Return a field's value in its type.

    Raises:
        ConfigError: it is of another one.
    """
    origin = typing.get_origin(expected)
    if origin in (typing.Union, types.UnionType):
        allowed = typing.get_args(expected)
        if value is None and type(None) in allowed:
            return None
        return _converted(name, value, next(a for a in allowed if a is not type(None)))
    if origin is tuple:
        (item, _) = typing.get_args(expected)
        listed = plain(value)
        if not isinstance(listed, list | tuple):
            raise ConfigError(f"{name} must be a list, but is {value!r:.80}.")
        return tuple(_converted(f"{name}[{i}]", entry, item) for i, entry in enumerate(listed))
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise ConfigError(f"{name} must be an object of named values, but is {value!r:.80}.")
        return plain(value)
    if expected in _NUMBERS:
        return _NUMBERS[expected](name, value)
    if not isinstance(value, expected):
        kind = getattr(expected, "__name__", "number")
        raise ConfigError(f"{name} must be of type {kind}, but is {value!r:.80}.")
    return value


_NUMBERS: dict[Any, Callable[[str, Any], Any]] = {int: check_whole, float: check_number, bool: check_flag}


@dataclass(frozen=True)
class Config:
    """The base of all configs: types are checked when one is made, and JSON goes both ways."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, _converted(f.name, getattr(self, f.name), hints[f.name]))
        self.validate()

    def validate(self) -> None:
        """Raise a `ConfigError` if values are out of range or do not fit together."""

    def to_dict(self) -> dict[str, Any]:
        """Return the config as plain JSON values."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Make the config from plain JSON values.

        Raises:
            ConfigError: a key is unknown or missing, or a value is not allowed.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"{cls.__name__} must be a JSON object, but is {type(values).__name__}.")
        hints = typing.get_type_hints(cls)
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for key in values:
            if key not in fields:
                raise unknown_name(f"key in {cls.__name__}", key, fields)
        required = (dataclasses.MISSING, dataclasses.MISSING)
        for name, f in fields.items():
            if name not in values and (f.default, f.default_factory) == required:
                raise ConfigError(f"{cls.__name__} lacks the key {name!r}.")
        made = {}
        for key, value in values.items():
            kind = hints[key]
            if isinstance(kind, type) and issubclass(kind, Config):
                value = kind.from_dict(value)
            made[key] = value
        return cls(**made)


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, dict):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


@dataclass(frozen=True)
class TokenizerConfig(Config):
    """The shape of a VQGAN tokenizer; the defaults are the released ImageNet ones.

    Source: official configs/vqgan_config.py.
    """

    filters: int = 128
    num_res_blocks: int = 2
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    embedding_dim: int = 256
    codebook_size: int = 1024
    conv_downsample: bool = False
    activation: str = "swish"
    norm: str = "GN"
    quantizer: str = "vq"

    def validate(self) -> None:
        check_range("filters", self.filters, 1, 4096)
        check_range("num_res_blocks", self.num_res_blocks, 1, 16)
        check_range("len(channel_multipliers)", len(self.channel_multipliers), 1, 8)
        for multiplier in self.channel_multipliers:
            check_range("channel_multipliers", multiplier, 1, 64)
        check_range("embedding_dim", self.embedding_dim, 1, MAX_WIDTH)
        check_range("codebook_size", self.codebook_size, 2, MAX_CODES)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("norm", self.norm, NORMS)
        check_choice("quantizer", self.quantizer, QUANTIZERS)
        if self.norm == "GN" and self.filters % 32:
            raise ConfigError(f"filters must be a multiple of 32 for GroupNorm, but is {self.filters}.")

    @property
    def patch_size(self) -> int:
        """Pixels a token covers, in each direction."""
        return 2 ** (len(self.channel_multipliers) - 1)


@dataclass(frozen=True)
class TransformerConfig(Config):
    """The shape of a masked transformer; the defaults are the released ImageNet 256×256 ones.

    `grid_size` is the number of tokens a side: the sequence holds one class token and grid_size² tokens.

    Source: official configs/maskgit_class_cond_config.py.
    """

    num_codes: int = 1024
    num_classes: int = 1000
    grid_size: int = 16
    hidden_size: int = 768
    num_layers: int = 24
    num_heads: int = 16
    intermediate_size: int = 3072
    dropout: float = 0.1

    def validate(self) -> None:
        check_range("num_codes", self.num_codes, 2, MAX_CODES)
        check_range("num_classes", self.num_classes, 1, 1_000_000)
        check_range("grid_size", self.grid_size, 1, MAX_GRID)
        check_range("hidden_size", self.hidden_size, 1, MAX_WIDTH)
        check_range("num_layers", self.num_layers, 1, MAX_LAYERS)
        check_range("num_heads", self.num_heads, 1, self.hidden_size)
        check_range("intermediate_size", self.intermediate_size, 1, MAX_WIDTH)
        check_range("dropout", self.dropout, 0, 0.99)
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"hidden_size must be a multiple of num_heads, but {self.hidden_size} is not one of {self.num_heads}."
            )

    @property
    def num_tokens(self) -> int:
        """Image tokens in a sequence, the class token not counted."""
        return self.grid_size**2

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: codes, classes, and the mask token."""
        return self.num_codes + self.num_classes + 1


@dataclass(frozen=True)
class StepTables(Config):
    """Values for each step in place of curves; each is None or as long as there are steps.

    Attributes:
        mask_ratio: the share of tokens still masked after the step, never rising, in [0, 1].
        temperature, choice_temperature, guidance_scale: of the step.

    Source: AutoNAT (arXiv 2406.01994), which tunes them.
    """

    mask_ratio: tuple[float, ...] | None = None
    temperature: tuple[float, ...] | None = None
    choice_temperature: tuple[float, ...] | None = None
    guidance_scale: tuple[float, ...] | None = None

    def validate(self) -> None:
        highest = {"mask_ratio": 1.0, "temperature": 1e6, "choice_temperature": 1e6, "guidance_scale": 1e3}
        for name, high in highest.items():
            for value in getattr(self, name) or ():
                check_range(f"tables.{name}", value, 0, high)
        ratios = self.mask_ratio or ()
        if any(after > before for before, after in pairwise(ratios)):
            raise ConfigError(f"tables.mask_ratio must never rise, but is {list(ratios)}.")

    @property
    def num_steps(self) -> int:
        """The length of the longest table."""
        return max(len(getattr(self, f.name) or ()) for f in dataclasses.fields(self))

    def check_length(self, steps: int) -> None:
        """Raise a `ConfigError` unless every table has a value for each step."""
        for f in dataclasses.fields(self):
            table = getattr(self, f.name)
            if table is not None and len(table) != steps:
                raise ConfigError(f"tables.{f.name} has {len(table)} values, but there are {steps} steps.")


@dataclass(frozen=True)
class SamplerConfig(Config):
    """How tokens are decoded; the defaults are the official ones.

    A schedule is the name of a curve (see `schedules.curve`) that a setting is multiplied by.

    Attributes:
        steps: forward passes of the decoding loop; policies that adapt take no more than these.
        policy: which tokens stay after a step: a name in `policies.POLICIES`.
        policy_options: the policy's own parameters by name, where they are not its defaults.
        choice_temperature: scales the Gumbel noise on confidence.
        choice_schedule: its curve, falling: "linear" ends at 0.
        temperature: divides the logits before a token is sampled.
        temperature_schedule: its curve, falling.
        mask_schedule: name of the curve that gives the share of tokens still masked (see `schedules`).
        guidance_scale: classifier-free guidance s in u + s·(c − u), c the logits with the class and u without;
            1 is none.
        guidance_schedule: its curve w, rising: the scale of a step is 1 + (s − 1)·w.
        force_guidance: guide a model that was never trained without its class, too.
        tables: values for each step in place of the curves.

    Source: paper §3.2; official configs/maskgit_class_cond_config.py and libml/parallel_decode.py.
    """

    steps: int = 8
    policy: str = "confidence"
    policy_options: dict[str, Any] = field(default_factory=dict)
    choice_temperature: float = 4.5
    choice_schedule: str = "linear"
    temperature: float = 1.0
    temperature_schedule: str = "constant"
    mask_schedule: str = "cosine"
    guidance_scale: float = 1.0
    guidance_schedule: str = "constant"
    force_guidance: bool = False
    tables: StepTables = field(default_factory=StepTables)

    def validate(self) -> None:
        # Imported here because the tables of schedules and policies are the only lists of their names.
        from maskgit.policies import make_policy
        from maskgit.schedules import check_mask_schedule, curve

        check_range("steps", self.steps, 1, 10_000)
        check_range("choice_temperature", self.choice_temperature, 0, 1e6)
        check_range("temperature", self.temperature, 0, 1e6)
        check_range("guidance_scale", self.guidance_scale, 0, 1000)
        check_mask_schedule(self.mask_schedule)
        for spec in (self.choice_schedule, self.temperature_schedule, self.guidance_schedule):
            curve(spec, start=0, end=1)
        make_policy(self.policy, self.policy_options)
        self.tables.check_length(self.steps)

    def guides(self) -> bool:
        """Return whether any step needs a prediction without the class."""
        scales = self.tables.guidance_scale
        return self.guidance_scale != 1 if scales is None else any(scale != 1 for scale in scales)


@dataclass(frozen=True)
class ModelConfig(Config):
    """A whole model: its two networks, its image size, its classes and how it is best sampled.

    Attributes:
        tokenizer: the tokenizer's shape.
        transformer: the transformer's shape; its codes and grid must fit the tokenizer and the image size.
        image_size: pixels a side of the square images that the model was trained on.
        class_names: a name for each class (several separated by commas are synonyms), or none.
        label_dropout: share of training sequences whose class was masked; above 0 the model can be guided
            and can generate without a class.
        sampler: the settings used when the caller names none.
    """

    tokenizer: TokenizerConfig
    transformer: TransformerConfig
    image_size: int
    class_names: tuple[str, ...] | None = None
    label_dropout: float = 0.0
    sampler: SamplerConfig = field(default_factory=SamplerConfig)

    def validate(self) -> None:
        side = self.transformer.grid_size * self.tokenizer.patch_size
        if self.image_size != side:
            raise ConfigError(
                f"image_size is {self.image_size}, but {self.transformer.grid_size} tokens of "
                f"{self.tokenizer.patch_size} pixels make {side}."
            )
        if self.tokenizer.codebook_size != self.transformer.num_codes:
            raise ConfigError(
                f"The tokenizer has {self.tokenizer.codebook_size} codes, "
                f"but the transformer predicts {self.transformer.num_codes}: they do not belong together."
            )
        if self.class_names is not None and len(self.class_names) != self.transformer.num_classes:
            raise ConfigError(
                f"There are {len(self.class_names)} class names for {self.transformer.num_classes} classes."
            )
        check_range("label_dropout", self.label_dropout, 0, 1)
