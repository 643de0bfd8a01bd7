"""What functions that make and edit images ask of a model.

`maskgit.MaskGIT` is the one that users hold. A server's model, whose images are made in batches with those of others,
and the model behind `maskgit.diffusers` are others. Whatever is decoded goes through `fill_batches` of the model that
was asked.

Shapes: B images, S = N + 1 the sequence with its class token, K codes, h × w the token grid.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from maskgit import images
from maskgit.checkpoints.weights import plain_network, unwrapped
from maskgit.config import ModelConfig
from maskgit.errors import ConfigError
from maskgit.foundation.checks import Config, check_count, plain
from maskgit.foundation.devices import Device, Dtype, choose_device, choose_dtype, is_dtype, whole_float32
from maskgit.foundation.forks import check_process
from maskgit.networks.classes import find_class
from maskgit.networks.config import MAX_GRID
from maskgit.networks.tokenizer import Tokenizer
from maskgit.networks.transformer import Transformer
from maskgit.networks.vocabulary import Vocabulary
from maskgit.results import Draw, Output
from maskgit.sampler.config import SamplerConfig, StepTables
from maskgit.sampler.guidance import PredictLogits, WithGuide
from maskgit.sampler.loop import Forgetful, StepFunction, decode_step
from maskgit.sampler.policies import POLICIES

Label = int | str | None
Picture = str | Path | Image.Image | np.ndarray | Tensor

# Of the tokenizer's largest activation, in float32: a GPU needs a large batch to be busy, a CPU's cache is small.
SLICE_BYTES = {False: 2**31, True: 2**26}


class Parts(NamedTuple):
    """A config and the two networks that it describes, as checkpoints hold them."""

    config: ModelConfig
    tokenizer: Tokenizer
    transformer: Transformer


class Model:
    """A tokenizer and a transformer that belong together, and what is asked of them.

    Attributes:
        config: the `ModelConfig` of both.
        tokenizer, transformer: the networks.
        vocabulary: the transformer's `Vocabulary`.
        local_transformer: a form of the transformer for calls whose batch size varies.
        engine: how the model runs, if it was made by `optimize`; else None.
        decode_step: what makes a decoding step, `sampler.decode_step` or a faster form of it.
        masked_predictor: what predicts the logits of masked tokens alone, if the engine has such.
        guide: a weaker model whose prediction guides this one's, or None; see `guided_by`.
    """

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, transformer: Transformer) -> None:
        """Join two networks.

        Args:
            config: describes both.
            tokenizer, transformer: the networks, on one device.

        Raises:
            ConfigError: a network is not the one that the config describes.
        """
        self.tokenizer, self.transformer = tokenizer, transformer
        if self.tokenizer.config != config.tokenizer or self.transformer.config != config.transformer:
            raise ConfigError("The networks are not the ones that the config describes.")
        self.engine: Config | None = None
        self.decode_step: StepFunction = decode_step
        self.masked_predictor: PredictLogits | None = None
        self.guide: Model | None = None
        self.config = config
        self.local_transformer = self.transformer
        self.vocabulary = Vocabulary.of(config.transformer)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return a copy with weights of its own; those of an optimized model never change, and are shared."""
        if self.engine is not None:
            return copy.copy(self)
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        vars(made).update(copy.deepcopy(vars(self), memo))
        return made

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled.

        Raises:
            ConfigError: the model is optimized, in which form its weights cannot leave the process.
        """
        if self.engine is not None:
            raise ConfigError(
                "An optimized model cannot be pickled; pickle the one that it was made from, and optimize that where "
                "it arrives."
            )
        return vars(self)

    def __setattr__(self, name: str, value: Any) -> None:
        # Training wraps networks in DataParallel or DDP, which hide their methods; here they run on one device.
        if name in ("tokenizer", "transformer", "local_transformer") and isinstance(value, nn.Module):
            value = unwrapped(value)
        super().__setattr__(name, value)

    def to(self, *where: Device | Dtype, device: Device | None = None, dtype: Dtype | None = None) -> Self:
        """Move both networks to a device, a type, or both, and return the model.

        Args:
            where: devices and types in any order, such as "cuda", 0 or "bfloat16".
            device, dtype: the same by name; see `maskgit.foundation.devices.choose_device` and `choose_dtype`.

        Raises:
            ConfigError: the device is not available here, the type is none that networks compute in, or the model is
                optimized, for one device and type.
        """
        if self.engine is not None:
            raise ConfigError("An optimized model stays where it is; optimize the one that it was made from.")
        for one in where:
            if is_dtype(one):
                dtype = one
            elif one is not None:
                device = cast(Device, one)
        chosen, kind = None if device is None else choose_device(device), choose_dtype(dtype)
        self.tokenizer.to(device=chosen, dtype=kind)
        self.transformer.to(device=chosen, dtype=kind)
        if self.guide is not None:
            self.guide.to(device=chosen, dtype=kind)
        return self

    def resized(self, width: int, height: int) -> Self:
        """Return a model with the same weights that makes images of another size, such as 3:2.

        Positions count rows and columns from the same corner, so a model does best near the number of tokens that it
        was trained on.

        Args:
            width, height: pixels, multiples of the tokenizer's `patch_size`.

        Raises:
            ConfigError: the transformer's positions are learned, the size is no multiple, or the model is optimized.
        """
        if self.engine is not None:
            raise ConfigError("An optimized model keeps its size: resize the one that it was made from.")
        patch, was = self.tokenizer.patch_size, self.config.transformer
        for name, value in (("width", width), ("height", height)):
            if check_count(name, value, 1, MAX_GRID * patch) % patch:
                raise ConfigError(
                    f"{name} must be a multiple of the {patch} pixels of a token, but is {value}."
                )
        rows, columns = height // patch, width // patch
        if (rows, columns) == was.grid:
            return self
        if was.positions != "rotary" or was.output_bias == "positions":
            side = was.grid_size * patch
            raise ConfigError(
                f"This model makes images of {side} × {side} pixels alone: it has learned each position of its grid. "
                'Other sizes need a transformer with positions = "rotary".'
            )
        config = replace(was, grid_size=rows, grid_columns=0 if rows == columns else columns)
        # The same modules, but for the outermost, which alone asks how long a sequence is.
        transformer = copy.copy(self.transformer)
        transformer.config = config
        described = replace(self.config, transformer=config, image_size=height)
        made = type(self)(described, self.tokenizer, transformer)
        made.guide = None if self.guide is None else self.guide.resized(width, height)
        return made

    def guided_by(self, guide: "Model | None") -> Self:
        """Return the model, sharing its weights, with guidance away from the prediction of a weaker one.

        A guidance scale s then gives the logits w + s · (m − w), m this model's and w the guide's, both with the class.
        It needs no label dropout. An earlier checkpoint, or a smaller model of the same tokens, is a guide.

        Args:
            guide: a model of the same tokenizer, classes and grid, as it was loaded; None takes a guide away.

        Raises:
            ConfigError: the models' tokens or classes differ, or one of them is optimized already.

        Source: Karras et al., autoguidance (arXiv 2406.02507).
        """
        if self.engine is not None or (guide is not None and guide.engine is not None):
            raise ConfigError("Join a model and its guide first, and optimize the result.")
        if guide is not None:
            self._check_guide(guide)
        made = copy.copy(self)
        made.guide = guide
        return made

    def _check_guide(self, guide: "Model") -> None:
        ours, theirs = self.config.transformer, guide.config.transformer
        for name in ("num_codes", "groups", "grid", "num_classes", "num_logits"):
            if getattr(ours, name) != getattr(theirs, name):
                raise ConfigError(
                    f"The guide has {name} {getattr(theirs, name)}, but the model has {getattr(ours, name)}: it must "
                    "predict the same tokens of the same classes."
                )
        if None not in (self.class_names, guide.class_names) and self.class_names != guide.class_names:
            raise ConfigError(
                "The guide's classes have other names than the model's: it must be of the same classes."
            )
        quantizers = (self.tokenizer.quantizer.state_dict(), guide.tokenizer.quantizer.state_dict())
        if self.config.tokenizer != guide.config.tokenizer or not all(
            torch.equal(value.cpu(), quantizers[1][name].cpu()) for name, value in quantizers[0].items()
        ):
            raise ConfigError("The guide's codes are of another tokenizer, so they mean other things.")

    def free_memory(self) -> None:
        """Give back the memory that is kept for speed: captured decoding steps, and what torch holds for later."""
        if isinstance(self.decode_step, Forgetful):
            self.decode_step.forget()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.transformer.token_embedding.weight.device

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The classes' names, or None."""
        return self.config.class_names

    def label(self, query: Label) -> int:
        """Return the class number that a name or number means, −1 for None (no class).

        Raises:
            ConfigError: there is no such class, or the model cannot generate without one.
        """
        query = plain(query)
        if isinstance(query, bool):
            raise ConfigError(f"A class is a name or a number, but is {query}.")
        if query is None:
            if not self.config.label_dropout:
                raise ConfigError(
                    "This model was trained with classes only (no label dropout); name a class."
                )
            return -1
        return find_class(query, self.class_names, self.config.transformer.num_classes)

    def labels(self, queries: Label | Sequence[Label] | Tensor | np.ndarray) -> list[int]:
        """Return the class numbers that one or several names or numbers mean; see `label`."""
        queries = plain(queries)
        if isinstance(queries, Iterable) and not isinstance(queries, str):
            return [self.label(query) for query in queries]
        return [self.label(queries)]

    def sampler_config(self, **settings: Any) -> SamplerConfig:
        """Return the model's own sampler settings with those that are given (not None) in their place.

        Another policy than the model's own brings the settings that belong to it (`Policy.defaults`), where
        none are given.

        Raises:
            ConfigError: a setting is unknown, out of range, or beyond this model.
        """
        given = {key: value for key, value in settings.items() if value is not None}
        if isinstance(given.get("tables"), StepTables):
            given["tables"] = given["tables"].to_dict()
        own = self.config.sampler.to_dict()
        policy = given.get("policy", own["policy"])
        if policy != own["policy"] and isinstance(policy, str) and policy in POLICIES:
            own |= {"policy_options": {}} | dict(POLICIES[policy].defaults)
        config = SamplerConfig.from_dict(own | given)
        guidable = self.config.label_dropout or config.force_guidance or self.guide is not None
        if config.guides() and not guidable:
            raise ConfigError(
                "This model was trained without label dropout, so it never saw a masked class and has no "
                "prediction to guide by; use guidance_scale 1, a weaker model as its guide, or force_guidance to try all "
                "the same."
            )
        return config

    def prepare(self, image: Picture) -> Tensor:
        """Return a picture as float32 (1, 3, image_size, image_size) in [0, 1], cut and resized to fit.

        Raises:
            ImageError: it cannot be read or has another shape or range.
        """
        if isinstance(image, Tensor):
            image = images.to_array(image)
        if isinstance(image, str | Path):
            image = images.read_image(image)
        if isinstance(image, np.ndarray):
            image = images.to_pil(images.to_tensor(image))[0] if image.shape[:2] != self._sides else image
        if isinstance(image, Image.Image) and image.size != self._sides:
            image = images.fit(image, self.config.image_size)
        return images.to_tensor(image)

    @property
    def _sides(self) -> tuple[int, int]:
        return (self.config.image_size, self.config.image_size)

    @torch.no_grad()
    def predict_logits(self, sequence: Tensor) -> Tensor:
        """Return the logits of the image codes: int64 (B, S) → float (B, S, num_codes).

        Where the transformer scores the mask as well (`predict_mask`), its logit is one more, the last.
        """
        with whole_float32(sequence.device, self.transformer):
            return self.transformer(sequence, codes=self.config.transformer.num_logits)

    def predictor(self, *, known: bool = True) -> PredictLogits:
        """Return what predicts logits in decoding: `predict_logits`, or the engine's faster form of it.

        Args:
            known: whether the logits of known tokens are read, too; if not, they may be 0.
        """
        own = self.predict_logits if known or self.masked_predictor is None else self.masked_predictor
        return own if self.guide is None else WithGuide(own, self.guide.predictor(known=known))

    def decode_tokens(self, tokens: Tensor) -> Tensor:
        """Return the images of tokens: int64 (B, h, w) → float32 (B, 3, H, W) in [0, 1], on the CPU.

        A few images at a time, so that what the decoder keeps in memory stays small.
        """
        return self.decode_on_device(tokens.to(self.device)).cpu()

    def decode_on_device(self, tokens: Tensor) -> Tensor:
        """Return the images of tokens on the model's device: int64 (B, h, w) there → float32 (B, 3, H, W)."""
        check_process(self.device)
        parts = [self.tokenizer.decode(part).float().clamp(0, 1) for part in tokens.split(self._slice())]
        return torch.cat(parts)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Return the tokens of images: float (B, 3, H, W) in [0, 1] → int64 (B, h, w), on the CPU."""
        check_process(self.device)
        parts = pixels.to(self.device).split(self._slice())
        return torch.cat([self.tokenizer.encode(part).cpu() for part in parts])

    def _slice(self) -> int:
        """Return how many images go through the tokenizer at once."""
        config = self.config.tokenizer
        widest = 4 * self.config.image_size**2 * config.filters * config.channel_multipliers[0]
        return max(1, SLICE_BYTES[self.device.type == "cpu"] // widest)

    def fill_batches(
        self,
        sequences: Tensor,
        config: SamplerConfig,
        draw: Draw,
        *,
        start_step: int = 0,
        switch: tuple[int, Tensor] | None = None,
    ) -> Iterator[Output]:
        """Fill in masked sequences, batch by batch: the one method that decodes; see `maskgit.editing.fill`."""
        raise NotImplementedError


AnyModel = TypeVar("AnyModel", bound=Model)


def plain_model(model: AnyModel) -> AnyModel:
    """Return a model whose networks are not wrapped by `torch.compile` or the like: itself, or one that shares them."""
    networks = (
        plain_network(Tokenizer, model.config.tokenizer, model.tokenizer),
        plain_network(Transformer, model.config.transformer, model.transformer),
    )
    if networks == (model.tokenizer, model.transformer):
        return model
    made = type(model)(model.config, *networks)
    made.guide = model.guide
    return made
