"""The model as users hold it: generate, edit, reconstruct.

Shapes: B images, S = N + 1 the sequence with its class token, K codes, h × w the token grid.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maskgit import images, outpainting
from maskgit.classes import find_class
from maskgit.config import ModelConfig, SamplerConfig, StepTables, check_count
from maskgit.errors import ConfigError
from maskgit.noise import ImageNoise
from maskgit.policies import POLICIES
from maskgit.policies.base import log_probs_of
from maskgit.regions import box_to_token_mask, composite
from maskgit.results import Callback, Output, Trace
from maskgit.sampler import Decoded, decode_steps
from maskgit.tokenizer import Tokenizer
from maskgit.transformer import Transformer
from maskgit.vocabulary import Vocabulary

Label = int | str | None
Picture = str | Path | Image.Image | np.ndarray | Tensor
# So many images are decoded together when the caller does not say: enough to fill a GPU, little enough memory.
DEFAULT_BATCH_SIZE = 16


class MaskGIT:
    """A tokenizer and a transformer that belong together."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer, transformer: Transformer) -> None:
        """Join two networks; `MaskGIT.from_pretrained` is the usual way to one.

        Args:
            config: describes both.
            tokenizer, transformer: the networks, on one device.

        Raises:
            ConfigError: a network is not the one that the config describes.
        """
        if tokenizer.config != config.tokenizer or transformer.config != config.transformer:
            raise ConfigError("The networks are not the ones that the config describes.")
        self.config = config
        self.tokenizer = tokenizer
        self.transformer = transformer
        self.vocabulary = Vocabulary(
            config.transformer.num_codes, config.transformer.num_classes, config.transformer.grid_size
        )

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path | None = None, **options: Any) -> "MaskGIT":
        """Return a model by name or path; see `maskgit.hub.from_pretrained` (None is the bundled model)."""
        from maskgit import hub

        return hub.from_pretrained(hub.DEFAULT_MODEL if name_or_path is None else name_or_path, **options)

    def save_pretrained(self, path: str | Path, *, dtype: torch.dtype | None = None) -> Path:
        """Write the model as a folder; see `maskgit.hub.save_model`."""
        from maskgit import hub

        return hub.save_model(self, path, dtype=dtype)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model to the Hugging Face Hub; see `maskgit.hub.push_to_hub`."""
        from maskgit import hub

        return hub.push_to_hub(self, repo_id, **options)

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move both networks to a device, a type, or both, and return the model."""
        self.tokenizer.to(device=device, dtype=dtype)
        self.transformer.to(device=device, dtype=dtype)
        return self

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
        if query is None:
            if not self.config.label_dropout:
                raise ConfigError(
                    "This model was trained with classes only (no label dropout); name a class."
                )
            return -1
        return find_class(query, self.class_names, self.config.transformer.num_classes)

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
        if policy != own["policy"] and policy in POLICIES:
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
        num_images = check_count("num_images", num_images, 1, 1_000_000)
        if isinstance(labels, Tensor | np.ndarray | np.generic):
            labels = labels.tolist()
        listed = list(labels) if isinstance(labels, Iterable) and not isinstance(labels, str) else [labels]
        numbers = [self.label(label) for label in listed for _ in range(num_images)]
        sequences = self.vocabulary.sequence(torch.tensor(numbers, dtype=torch.int64))
        return self._decode(
            sequences,
            self.sampler_config(**settings),
            seed=seed,
            first_index=first_index,
            batch_size=batch_size,
            return_steps=return_steps,
            callback=callback,
        )

    def edit(
        self,
        image: Picture,
        box: Sequence[int],
        label: Label,
        *,
        num_images: int = 1,
        rule: str = "cover",
        start_step: int | None = None,
        seed: int = 0,
        first_index: int = 0,
        batch_size: int = DEFAULT_BATCH_SIZE,
        return_steps: bool = False,
        callback: Callback | None = None,
        **settings: Any,
    ) -> Output:
        """Replace what is in a box by a class, and blend it into the image.

        Args:
            image: a path, a picture, an array or a tensor (see `maskgit.images`); cut to a square and
                resized to the model's size if it has another.
            box: (left, top, width, height) in pixels of the image at the model's size.
            label: what is to appear in the box.
            num_images: variants to make.
            rule: which tokens the box masks, a name in `maskgit.regions.RULES`; `official` is the released
                notebook's.
            start_step: the step to begin decoding at; None is a sixth of the steps (official: 2 of 12).
            seed, first_index, batch_size, return_steps, callback, **settings: as for `generate`.

        Returns:
            `Output`; its images differ from the given one only in and softly around the masked tokens.

        Raises:
            ConfigError, ImageError, RegionError: an argument is not allowed.

        Source: official inference.py, `p_edit_samples` and `composite_outputs`.
        """
        num_images = check_count("num_images", num_images, 1, 1_000_000)
        config = self.sampler_config(**settings)
        pixels = self.prepare(image)
        mask = box_to_token_mask(box, self.config.image_size, self.tokenizer.patch_size, rule)
        tokens = self.tokenizer.encode(pixels.to(self.device)).cpu().expand(num_images, -1, -1)
        labels = torch.full((num_images,), self.label(label))
        made = self._decode(
            self.vocabulary.sequence(labels, tokens, mask),
            config,
            start_step=config.steps // 6 if start_step is None else start_step,
            seed=seed,
            first_index=first_index,
            batch_size=batch_size,
            return_steps=return_steps,
            callback=callback,
        )
        blended = composite(pixels.expand_as(made.images), made.images, mask, self.tokenizer.patch_size)
        return replace(made, images=blended, token_mask=mask)

    outpaint = outpainting.outpaint
    panorama = outpainting.panorama

    def reconstruct(self, image: Picture) -> Output:
        """Return what the tokenizer keeps of an image: encoded to tokens and decoded again.

        Args:
            image: as for `edit`.

        Returns:
            `Output` with one image of the model's size.

        Raises:
            ImageError: the image cannot be read.
        """
        tokens = self.tokenizer.encode(self.prepare(image).to(self.device))
        return Output(self._pixels(tokens), tokens.cpu())

    def prepare(self, image: Picture) -> Tensor:
        """Return a picture as float32 (1, 3, image_size, image_size) in [0, 1], cut and resized to fit.

        Raises:
            ImageError: it cannot be read or has another shape or range.
        """
        if isinstance(image, Tensor):
            image = image.detach().cpu().squeeze(0).movedim(0, -1).float().numpy()
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

    def _decode(
        self,
        sequences: Tensor,
        config: SamplerConfig,
        *,
        start_step: int = 0,
        seed: int,
        first_index: int,
        batch_size: int,
        return_steps: bool,
        callback: Callback | None,
    ) -> Output:
        """Fill in masked sequences (B, S), a batch at a time, and turn the result into images."""
        batch_size = check_count("batch_size", batch_size, 1, 65_536)
        first_index = check_count("first_index", first_index, 0, 2**62)
        pixels, tokens, traces = [], [], []
        for start in range(0, len(sequences), batch_size):
            batch = sequences[start : start + batch_size].to(self.device)
            indices = torch.arange(first_index + start, first_index + start + len(batch), device=self.device)
            steps = decode_steps(
                self.predict_logits,
                batch,
                config,
                mask_token=self.vocabulary.mask,
                start_step=start_step,
                noise=ImageNoise(seed, indices, batch.shape[1], self.vocabulary.num_codes),
            )
            history = []
            for made in steps:
                grid = self.vocabulary.grid(made.tokens)
                if return_steps:
                    history.append(self._record(made))
                if callback is not None:
                    callback(made.step, indices, grid)
            pixels.append(self._pixels(grid))
            tokens.append(grid.cpu())
            traces.append(history)
        return Output(torch.cat(pixels), torch.cat(tokens), _join(traces) if return_steps else None)

    def _record(self, made: Decoded) -> Trace:
        """Return what a trace keeps of one step."""
        parts = (made.tokens, made.unknown, log_probs_of(made.logits, made.tokens).exp())
        return Trace(*(self.vocabulary.grid(part).cpu() for part in parts))

    @torch.no_grad()
    def predict_logits(self, sequence: Tensor) -> Tensor:
        """Return the logits of the image codes: int64 (B, S) → float (B, S, num_codes)."""
        return self.transformer(sequence, codes=self.vocabulary.num_codes)

    def _pixels(self, tokens: Tensor) -> Tensor:
        return self.tokenizer.decode(tokens.to(self.device)).float().clamp(0, 1).cpu()


def _join(batches: list[list[Trace]]) -> Trace:
    """Join the steps of batches; one that was done early repeats its last step, in which nothing is unknown."""
    steps = max(len(history) for history in batches)
    joined: dict[str, list[Tensor]] = {"tokens": [], "unknown": [], "confidence": []}
    for history in batches:
        last = history[-1]
        rest = [Trace(last.tokens, torch.zeros_like(last.unknown), last.confidence)] * (steps - len(history))
        for name, parts in joined.items():
            parts.append(torch.stack([getattr(step, name) for step in history + rest], dim=1))
    return Trace(*(torch.cat(parts) for parts in joined.values()))
