"""The model as users hold it: generate, edit, reconstruct.

Shapes: B images, S = N + 1 the sequence with its class token, K codes, h × w the token grid.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor

from maskgit.checkpoints import folder
from maskgit.editing import edit as editing
from maskgit.editing import fill as filling
from maskgit.editing import likelihood, variations
from maskgit.editing import outpaint as outpainting
from maskgit.foundation.checks import check_count
from maskgit.foundation.devices import Dtype
from maskgit.images.provenance import EDITED
from maskgit.model import Label, Model, Picture
from maskgit.results import DEFAULT_BATCH_SIZE, Callback, Draw, Output, join_outputs

if TYPE_CHECKING:
    from maskgit.engine import Engine

GUIDE_OPTIONS = ("device", "dtype", "torch_dtype", "token", "cache_dir", "local_files_only")


class MaskGIT(Model):
    """A model as users hold it: what it makes and edits, where it comes from, and how it runs; see `Model`."""

    engine: "Engine | None"

    def __copy__(self) -> Self:
        """Return a model that shares the weights; optimized ones too, for it stays in this process."""
        made = type(self).__new__(type(self))
        vars(made).update(vars(self))
        return made

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path | None = None, *, guide: str | Path | None = None, **options: Any
    ) -> Self:
        """Return a model by name or path; see `maskgit.hub.from_pretrained` (None is the bundled model)."""
        made = cls(
            *folder.load_named(folder.DEFAULT_MODEL if name_or_path is None else name_or_path, **options)
        )
        if guide is None:
            return made
        # The revision and the adapter are the model's own.
        shared = {key: value for key, value in options.items() if key in GUIDE_OPTIONS}
        return made.guided_by(cls(*folder.load_named(guide, **shared)))

    def save_pretrained(self, path: str | Path, *, dtype: Dtype | None = None) -> Path:
        """Write the model as a folder; see `maskgit.hub.save_model`."""
        return folder.save_model(self, path, dtype=dtype)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload the model to the Hugging Face Hub; see `maskgit.hub.push_to_hub`."""
        return folder.push_to_hub(self, repo_id, **options)

    def optimize(self, mode: str = "fast", **choices: Any) -> "MaskGIT":
        """Return the model made ready to run fast; see `maskgit.engine.optimize`."""
        from maskgit.engine import optimize

        return optimize(self, mode, **choices)

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
        draw = Draw(seed, first_index, batch_size, return_steps, callback)
        return join_outputs(list(self._generate(labels, num_images, draw, settings)))

    def generate_batches(
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
    ) -> Iterator[Output]:
        """Give the `Output` of each batch as soon as it is there; arguments as those of `generate`."""
        draw = Draw(seed, first_index, batch_size, return_steps, callback)
        return self._generate(labels, num_images, draw, settings)

    def _generate(
        self,
        labels: Label | Sequence[Label] | Tensor | np.ndarray,
        num_images: int,
        draw: Draw,
        settings: dict[str, Any],
    ) -> Iterator[Output]:
        num_images = check_count("num_images", num_images, 1, 1_000_000)
        numbers = [number for number in self.labels(labels) for _ in range(num_images)]
        sequences = self.vocabulary.sequence(torch.tensor(numbers, dtype=torch.int64))
        return self.fill_batches(sequences, self.sampler_config(**settings), draw)

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
