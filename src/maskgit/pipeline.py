"""The model as users hold it: generate, edit, reconstruct.

Shapes: B images, S = N + 1 the sequence with its class token, K codes, h × w the token grid.
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from maskgit import images
from maskgit.checkpoints.weights import plain_network, unwrapped
from maskgit.config import ModelConfig
from maskgit.editing import edit as editing
from maskgit.editing import fill as filling
from maskgit.editing import likelihood, variations
from maskgit.editing import outpaint as outpainting
from maskgit.errors import ConfigError
from maskgit.foundation.checks import check_count, plain
from maskgit.foundation.devices import Device, Dtype, choose_device, choose_dtype, is_dtype
from maskgit.foundation.forks import check_process
from maskgit.foundation.precision import whole_float32
from maskgit.images.provenance import EDITED
from maskgit.model import Label, Picture
from maskgit.networks.classes import find_class
from maskgit.networks.tokenizer import Tokenizer
from maskgit.networks.transformer import Transformer
from maskgit.networks.vocabulary import Vocabulary
from maskgit.results import DEFAULT_BATCH_SIZE, Callback, Output, join_outputs
from maskgit.sampler.config import SamplerConfig, StepTables
from maskgit.sampler.guidance import PredictLogits
from maskgit.sampler.loop import Forgetful, StepFunction, decode_step
from maskgit.sampler.policies import POLICIES

# Of the tokenizer's largest activation, in float32: a GPU needs a large batch to be busy, a CPU's cache is small.
SLICE_BYTES = {False: 2**31, True: 2**26}

if TYPE_CHECKING:
    from maskgit.engine import Engine


def plain_model(model: "MaskGIT") -> "MaskGIT":
    """Return a model whose networks are not wrapped by `torch.compile` or the like: itself, or one that shares them."""
    networks = (
        plain_network(Tokenizer, model.config.tokenizer, model.tokenizer),
        plain_network(Transformer, model.config.transformer, model.transformer),
    )
    return model if networks == (model.tokenizer, model.transformer) else MaskGIT(model.config, *networks)


class MaskGIT:
    """A tokenizer and a transformer that belong together.

    Attributes:
        config: the `ModelConfig` of both.
        tokenizer, transformer: the networks.
        vocabulary: the transformer's `Vocabulary`.
        local_transformer: a form of the transformer whose calls may be of ever other sizes.
        engine: how the model runs, if it was made by `optimize`; else None.
        decode_step: what makes a decoding step, `sampler.decode_step` or a faster form of it.
        masked_predictor: what predicts the logits of masked tokens alone, if the engine has such.
    """

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, transformer: Transformer) -> None:
        """Join two networks; `MaskGIT.from_pretrained` is the usual way to one.

        Args:
            config: describes both.
            tokenizer, transformer: the networks, on one device.

        Raises:
            ConfigError: a network is not the one that the config describes.
        """
        self.tokenizer, self.transformer = tokenizer, transformer
        if self.tokenizer.config != config.tokenizer or self.transformer.config != config.transformer:
            raise ConfigError("The networks are not the ones that the config describes.")
        self.engine: Engine | None = None
        self.decode_step: StepFunction = decode_step
        self.masked_predictor: PredictLogits | None = None
        self.config = config
        self.local_transformer = self.transformer
        self.vocabulary = Vocabulary(
            config.transformer.num_codes, config.transformer.num_classes, config.transformer.grid_size
        )

    def __copy__(self) -> Self:
        """Return a model that shares the weights; optimized ones too, for it stays in this process."""
        made = type(self).__new__(type(self))
        vars(made).update(vars(self))
        return made

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

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path | None = None, **options: Any) -> "MaskGIT":
        """Return a model by name or path; see `maskgit.hub.from_pretrained` (None is the bundled model)."""
        from maskgit import hub

        return hub.from_pretrained(hub.DEFAULT_MODEL if name_or_path is None else name_or_path, **options)

    def save_pretrained(self, path: str | Path, *, dtype: Dtype | None = None) -> Path:
        """Write the model as a folder; see `maskgit.hub.save_model`."""
        from maskgit import hub

        return hub.save_model(self, path, dtype=dtype)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model to the Hugging Face Hub; see `maskgit.hub.push_to_hub`."""
        from maskgit import hub

        return hub.push_to_hub(self, repo_id, **options)

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
        return self

    def free_memory(self) -> None:
        """Give back the memory that is kept for speed: captured decoding steps, and what torch holds for later."""
        if isinstance(self.decode_step, Forgetful):
            self.decode_step.forget()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def optimize(self, mode: str = "fast", **choices: Any) -> "MaskGIT":
        """Return the model made ready to run fast; see `maskgit.engine.optimize`."""
        from maskgit import engine

        return engine.optimize(self, mode, **choices)

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
        if config.guides() and not self.config.label_dropout and not config.force_guidance:
            raise ConfigError(
                "This model was trained without label dropout, so it never saw a masked class and has no "
                "prediction to guide by; use guidance_scale 1, or force_guidance to try all the same."
            )
        return config

    def generate(
        self,
        labels: Label | Sequence[Label] | Tensor | np.ndarray,
        *,
        num_images: int = 1,
        seed: int = 0,
        first_index: int = 0,
        batch_size: int = DEFAULT_BATCH_SIZE,
        return_steps: bool = False,
        callback: Callback | None = None,
        **settings: Any,
    ) -> Output:
        """Make new images of classes.

        An image is a function of (weights, label, settings, seed, index): it is the same whatever else is
        made with it.

        Args:
            labels: a class number or name, None for no class, or a sequence of these, one for each image.
            num_images: images for each label; those of the first label come first.
            seed: in [0, 2⁶⁴).
            first_index: the index of the first image; the others count on from it.
            batch_size: images decoded together.
            return_steps: whether to return the `Trace` of every step.
            callback: see `maskgit.results.Callback`.
            **settings: fields of `SamplerConfig` in place of the model's own, such as steps, policy,
                temperature or guidance_scale.

        Returns:
            `Output` with len(labels) · num_images images.

        Raises:
            ConfigError: a label or setting is not allowed.

        Source: paper §3.2; official inference.py, `generate_samples`.
        """
        made = self.generate_batches(
            labels,
            num_images=num_images,
            seed=seed,
            first_index=first_index,
            batch_size=batch_size,
            return_steps=return_steps,
            callback=callback,
            **settings,
        )
        return join_outputs(list(made))

    def generate_batches(
        self,
        labels: Label | Sequence[Label] | Tensor | np.ndarray,
        *,
        num_images: int = 1,
        **options: Any,
    ) -> Iterator[Output]:
        """Give the `Output` of each batch as soon as it is there; arguments as those of `generate`."""
        num_images = check_count("num_images", num_images, 1, 1_000_000)
        numbers = [number for number in self.labels(labels) for _ in range(num_images)]
        sequences = self.vocabulary.sequence(torch.tensor(numbers, dtype=torch.int64))
        named = ("seed", "first_index", "batch_size", "return_steps", "callback")
        given = {name: options.pop(name) for name in named if name in options}
        return self.fill_batches(sequences, self.sampler_config(**options), **given)

    fill = filling.fill
    fill_batches = filling.fill_batches
    edit = editing.edit
    inpaint = editing.inpaint
    vary = variations.vary
    interpolate_classes = variations.interpolate_classes
    interpolate_images = variations.interpolate_images
    outpaint = outpainting.outpaint
    panorama = outpainting.panorama
    log_likelihood = likelihood.log_likelihood
    guess_class = likelihood.guess_class
    generate_best = likelihood.generate_best

    def reconstruct(self, image: Picture) -> Output:
        """Return what the tokenizer keeps of an image: encoded to tokens and decoded again.

        Args:
            image: a path, a picture, an array or a tensor (see `maskgit.images`); cut to a square and
                resized to the model's size if it has another.

        Returns:
            `Output` with one image of the model's size.

        Raises:
            ImageError: the image cannot be read.
        """
        tokens = self.encode_pixels(self.prepare(image))
        return Output(self.decode_tokens(tokens), tokens, source=EDITED)

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
        """Return the logits of the image codes: int64 (B, S) → float (B, S, num_codes)."""
        with whole_float32(sequence.device, self.transformer):
            return self.transformer(sequence, codes=self.vocabulary.num_codes)

    def new_predictor(self, *, known: bool = True) -> PredictLogits:
        """Return what predicts logits through one decoding: `predict_logits`, or another form of it.

        With an engine that reuses context it remembers evaluations, so every decoding has its own.

        Args:
            known: whether the logits of known tokens are read, too; if not, they may be 0.
        """
        if not known and self.masked_predictor is not None:
            return self.masked_predictor
        if self.engine is None or self.engine.reuse == 1:
            return self.predict_logits
        from maskgit.engine.reuse import ContextReuse

        return ContextReuse(
            self.transformer,
            self.local_transformer,
            codes=self.vocabulary.num_codes,
            mask_token=self.vocabulary.mask,
            reuse=self.engine.reuse,
        )

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
