"""MaskGIT for users of diffusers: the call, the generators and the callback that its pipelines have.

    pipe = MaskGITPipeline.from_pretrained("imagenet256").to("cuda")
    pipe(["lorikeet"], num_inference_steps=8, generator=torch.Generator().manual_seed(1)).images[0]

It has the interface of a `DiffusionPipeline` without being one: that class loads components by the class names
that a downloaded file gives, and its offloading and saving expect diffusers' own networks. diffusers itself is
imported only to return an `ImagePipelineOutput`.

Shapes: B images, S = N + 1 the sequence with its class token, h × w the token grid.
"""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from maskgit.editing.edit import inpaint
from maskgit.editing.fill import fill
from maskgit.errors import ConfigError, MaskGITError, install_extra
from maskgit.foundation.checks import check_choice, check_count, check_range, plain
from maskgit.foundation.devices import Device, Dtype
from maskgit.foundation.notes import bar
from maskgit.model import Label, Model, Picture
from maskgit.pipeline import MaskGIT
from maskgit.results import Draw, Output
from maskgit.sampler.config import SamplerConfig
from maskgit.sampler.loop import Decoded, decode_steps, free_tokens
from maskgit.sampler.noise import ImageNoise, seed_words
from maskgit.sampler.plans import num_steps
from maskgit.sampler.policies import make_policy

if TYPE_CHECKING:
    from diffusers import ImagePipelineOutput

Generators = torch.Generator | Sequence[torch.Generator] | None
# Called with the pipeline, the step from 0, how many steps are left int64 () and the tensors that were asked
# for; returns the last, changed or not.
StepEndCallback = Callable[["MaskGITPipeline", int, Tensor, dict[str, Tensor]], dict[str, Tensor]]

# What a callback may ask for: what the next step begins with, and all tokens as sampled so far.
CALLBACK_TENSORS = ("latents", "tokens")
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class MaskGITPipeline:
    """A `MaskGIT` model that is called as diffusers' pipelines are.

    A callback may set, as it may there: `_interrupt = True`, to end with the tokens sampled so far, and
    `_guidance_scale`, for the steps that are left.
    """

    def __init__(self, model: MaskGIT) -> None:
        """Wrap a model, also one that `MaskGIT.optimize` made fast; it stays at hand as `model`."""
        self.model = model
        self._guidance_scale = model.config.sampler.guidance_scale
        self._num_timesteps = 0
        self._interrupt = False
        self._progress_bar_config: dict[str, Any] = {}

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None = None,
        *,
        dtype: Dtype | None = None,
        torch_dtype: Dtype | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Self:
        """Return the pipeline of a model by name or path.

        Args:
            pretrained_model_name_or_path: as for `MaskGIT.from_pretrained`; None is the bundled model.
            dtype: as for `MaskGIT.from_pretrained`.
            torch_dtype: the older name of dtype.
            revision, token, cache_dir, local_files_only: see `maskgit.hub.locate`.

        Raises:
            CheckpointError, ConfigError, DownloadError: there is no such model, or it is broken.
        """
        model = MaskGIT.from_pretrained(
            pretrained_model_name_or_path,
            dtype=torch_dtype if dtype is None else dtype,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        return cls(model)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the model as a folder; see `maskgit.hub.save_model`."""
        self.model.save_pretrained(save_directory)

    def to(self, *where: Device | Dtype, device: Device | None = None, dtype: Dtype | None = None) -> Self:
        """Move the model to a device, a type, or both, and return the pipeline; see `MaskGIT.to`."""
        self.model.to(*where, device=device, dtype=dtype)
        return self

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        """The type that the transformer computes in."""
        return self.model.transformer.token_embedding.weight.dtype

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the next step."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """The steps that the last call planned."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the last call was told to end early."""
        return self._interrupt

    def set_progress_bar_config(self, **options: Any) -> None:
        """Set options of the `tqdm` bar, such as disable=True."""
        self._progress_bar_config = options

    def progress_bar(self, iterable: Iterable[Any] | None = None, total: int | None = None) -> "tqdm[Any]":
        """Return a progress bar with the options that were set."""
        # As there, it also goes to a log file and stays.
        options: dict[str, Any] = {"leave": True, "disable": sys.stderr is None}
        return bar(iterable, total=total, **options | self._progress_bar_config)

    def get_label_ids(self, label: Label | Sequence[Label]) -> list[int]:
        """Return the class numbers of names; see `MaskGIT.labels`."""
        return self.model.labels(label)

    def __call__(
        self,
        class_labels: Label | Sequence[Label],
        *,
        image: Picture | None = None,
        mask_image: Any = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: Generators = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepEndCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **settings: Any,
    ) -> "ImagePipelineOutput | tuple[Any]":
        """Make images of classes, or fill in a painted part of a photo.

        Args:
            class_labels: a class number or name, None for no class, or a sequence of these. With an image, one
                alone, or "guess" for the class that the model finds likeliest.
            image, mask_image: a photo and where it is to be made new (white), as `MaskGIT.inpaint` takes them.
            num_images_per_prompt: images for each label; those of the first label come first. All are decoded
                together.
            num_inference_steps: decoding steps; None is the model's own number.
            guidance_scale: classifier-free guidance; 1 or less is none, as in diffusers; None is the model's
                own.
            generator: where seeds come from, as `draw_seeds` draws them: a list has one for each image.
            output_type: "pil" for pictures; "np" for float32 (B, H, W, 3) and "pt" for float32 (B, 3, H, W)
                on the CPU, RGB in [0, 1], with a fourth channel where the photo has transparency; "latent"
                for tokens int64 (B, h, w).
            return_dict: whether an `ImagePipelineOutput` is returned, or a tuple.
            callback_on_step_end: see `StepEndCallback`. It may change "latents" where tokens were to be
                predicted: codes, or the mask token where the next step is to predict.
            callback_on_step_end_tensor_inputs: which tensors it gets, int64 (B, h, w), names in
                `CALLBACK_TENSORS`; a callback's own `tensor_inputs` go first.
            **settings: fields of `SamplerConfig`, such as policy or temperature.

        Returns:
            The images, as `ImagePipelineOutput.images` or in a tuple of one. An image is the one that
            `MaskGIT.generate` or `MaskGIT.inpaint` makes alone of the same label, settings and seed.

        Raises:
            ConfigError, ImageError, RegionError: an argument is not allowed.
            MaskGITError: diffusers is not installed and return_dict is true.
        """
        check_choice("output_type", output_type, OUTPUT_TYPES)
        count = check_count("num_images_per_prompt", num_images_per_prompt, 1, 65_536)
        if "steps" in settings:
            raise ConfigError("The number of steps is called num_inference_steps here.")
        if (image is None) != (mask_image is None):
            raise ConfigError(
                "image and mask_image belong together; for variations of a whole image use pipe.model.vary."
            )
        settings["steps"] = num_inference_steps
        settings["guidance_scale"] = _at_least_1(guidance_scale)
        config = self.model.sampler_config(**settings)
        self._guidance_scale, self._interrupt = config.guidance_scale, False
        tensors = getattr(callback_on_step_end, "tensor_inputs", callback_on_step_end_tensor_inputs)
        for name in tensors:
            check_choice("callback_on_step_end_tensor_inputs", name, CALLBACK_TENSORS)

        watched = _Watched(self, callback_on_step_end, tensors)
        output_class = _output_class() if return_dict else None
        if image is None:
            labels = [number for number in self.model.labels(class_labels) for _ in range(count)]
            watched.seeds = draw_seeds(generator, len(labels))
            sequences = self.model.vocabulary.sequence(torch.tensor(labels))
            made = fill(cast(Model, watched), sequences, config)
        else:
            watched.seeds = draw_seeds(generator, count)
            label = _single(class_labels)
            made = inpaint(cast(Model, watched), image, mask_image, label, num_images=count, **settings)

        found = made.tokens if output_type == "latent" else _as_type(made, output_type)
        return (found,) if output_class is None else output_class(images=found)


class _Watched:
    """A `Model` for one call: its images have seeds of their own, and its caller has a say after each step."""

    def __init__(
        self, pipe: MaskGITPipeline, callback: StepEndCallback | None, tensors: Sequence[str]
    ) -> None:
        vocabulary = pipe.model.vocabulary
        if callback is not None and (vocabulary.groups > 1 or vocabulary.predict_mask):
            raise ConfigError(
                "callback_on_step_end shows whole codes, but this model draws parts of them or the mask itself; leave it out."
            )
        self.pipe = pipe
        self.callback = callback
        self.tensors = tensors
        self.seeds: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe.model, name)

    def fill_batches(
        self,
        sequences: Tensor,
        config: SamplerConfig,
        draw: Draw,
        *,
        start_step: int = 0,
        switch: tuple[int, Tensor] | None = None,
    ) -> Iterator[Output]:
        """Do as `MaskGIT.fill_batches`, with the call's own seeds, all images together, and no trace."""
        pipe, model = self.pipe, self.pipe.model
        sequences = sequences.to(model.device)
        indices = torch.zeros(len(sequences), dtype=torch.int64, device=model.device)
        free = free_tokens(sequences, model.vocabulary.mask)
        words = seed_words(self.seeds, model.device)
        noise = ImageNoise.of_words(words, indices, sequences.shape[1], model.vocabulary.num_logits)
        policy = make_policy(config.policy, config.policy_options)
        num_tokens = model.vocabulary.num_tokens
        pipe._num_timesteps = num_steps(config, num_tokens, remasks=policy.remasks, start_step=start_step)
        table, state = config.tables.guidance_scale, None
        if table is not None:
            pipe._guidance_scale = table[-pipe._num_timesteps]
        scale = pipe._guidance_scale
        predict_logits = model.predictor(known=policy.reads_known)
        with pipe.progress_bar(total=pipe._num_timesteps) as bar:
            for number in range(pipe._num_timesteps):
                if pipe._guidance_scale != scale:
                    # The callback's scale is for all steps that are left, a table's, too.
                    scale = _at_least_1(pipe._guidance_scale)
                    table = None if table is None else (scale,) * len(table)
                    tables = config.tables.to_dict() | {"guidance_scale": table}
                    changed = {"guidance_scale": scale, "tables": tables}
                    config = model.sampler_config(**config.to_dict() | changed)
                # One step at a time, so that what a callback changes is read.
                made = next(
                    decode_steps(
                        predict_logits,
                        sequences,
                        config,
                        mask_token=model.vocabulary.mask,
                        noise=noise,
                        start_step=start_step,
                        state=state,
                        step_function=model.decode_step,
                        groups=model.vocabulary.groups,
                    )
                )
                bar.update()
                if table is not None and made.state is not None:
                    pipe._guidance_scale = table[made.state.step]
                scale = pipe._guidance_scale
                made = self._told(number, made, free)
                state = made.state
                if state is None or pipe._interrupt:
                    break
        tokens = model.vocabulary.grid(made.tokens)
        yield Output(model.decode_tokens(tokens), tokens.cpu())

    def _told(self, number: int, made: Decoded, free: Tensor) -> Decoded:
        """Tell the callback of a step; return the step as the callback leaves it."""
        if self.callback is None:
            return made
        vocabulary = self.pipe.model.vocabulary
        sequence = made.tokens if made.state is None else made.state.sequence
        given = {"latents": vocabulary.grid(sequence).clone(), "tokens": vocabulary.grid(made.tokens).clone()}
        left = torch.tensor(self.pipe._num_timesteps - 1 - number)
        returned = self.callback(self.pipe, number, left, {name: given[name] for name in self.tensors})
        if not isinstance(returned, dict):
            raise ConfigError(
                f"callback_on_step_end must return its dict of tensors, but returned {returned!r:.80}."
            )
        latents = returned.get("latents", given["latents"])
        self._check_latents(latents, like=given["latents"], masked=made.state is not None)
        changed = torch.cat([sequence[:, :1], latents.to(sequence.device).flatten(1)], dim=1)
        sequence = torch.where(free, changed, sequence)
        tokens = torch.where(sequence == vocabulary.mask, made.tokens, sequence)
        state = None if made.state is None else made.state._replace(sequence=sequence)
        return made._replace(tokens=tokens, state=state)

    def _check_latents(self, latents: Any, *, like: Tensor, masked: bool) -> None:
        vocabulary = self.pipe.model.vocabulary
        if not isinstance(latents, Tensor) or latents.dtype != like.dtype or latents.shape != like.shape:
            shape = " × ".join(map(str, like.shape))
            raise ConfigError(f"The callback's latents must stay an int64 tensor of {shape} tokens.")
        allowed = (latents >= 0) & (latents < vocabulary.num_codes)
        if masked:
            allowed |= latents == vocabulary.mask
        if not bool(allowed.all()):
            also = f", or {vocabulary.mask} for the mask" if masked else " after the last step"
            raise ConfigError(f"The callback's latents must be codes below {vocabulary.num_codes}{also}.")


def draw_seeds(generator: Generators, count: int) -> list[int]:
    """Return the seeds of images, each one draw of 63 bits from its generator.

    An image made with a generator of its own is thus the same whatever else is made with it. A generator moves
    on with each draw, so that a second call makes other images.

    Args:
        generator: one for all images, which draws in their order; a list of one for each image (a list of one
            is for all); or None for torch's own, which `torch.manual_seed` seeds.
        count: images.

    Returns:
        `count` seeds, in [0, 2⁶³ − 1).

    Raises:
        ConfigError: there are more or fewer generators than images, or one is none.
    """
    generators = list(generator) if isinstance(generator, Sequence) else [generator]
    if len(generators) == 1:
        generators *= count
    if len(generators) != count:
        raise ConfigError(
            f"There are {len(generators)} generators for {count} images; give one, or one for each image."
        )
    for one in generators:
        if not isinstance(one, torch.Generator | None):
            raise ConfigError(f"A generator must be a torch.Generator, but is {one!r:.80}.")
    return [
        int(torch.randint(2**63 - 1, (), generator=one, device="cpu" if one is None else one.device))
        for one in generators
    ]


def _at_least_1(guidance_scale: Any) -> Any:
    """Return the scale that means the same to `SamplerConfig`."""
    return (
        None
        if guidance_scale is None
        else max(1.0, check_range("guidance_scale", guidance_scale, -1000, 1000))
    )


def _single(class_labels: Any) -> Label:
    """Return the only label."""
    class_labels = plain(class_labels)
    if isinstance(class_labels, str) or not isinstance(class_labels, Sequence):
        return class_labels
    if len(class_labels) != 1:
        raise ConfigError(
            f"An image takes one class label, but was given {len(class_labels)}; call once for each."
        )
    return class_labels[0]


def _as_type(made: Output, output_type: str) -> Any:
    """Return images as `MaskGITPipeline.__call__` describes an output type."""
    if output_type == "pil":
        return made.to_pil()
    pixels = made.images
    if made.photos is not None:
        channels_last = torch.from_numpy(np.stack([np.asarray(photo) for photo in made.photos]))
        pixels = channels_last.permute(0, 3, 1, 2).float() / 255
    return pixels if output_type == "pt" else pixels.permute(0, 2, 3, 1).numpy()


def _output_class() -> "type[ImagePipelineOutput]":
    try:
        from diffusers import ImagePipelineOutput
    except ImportError as error:
        raise MaskGITError(
            "An ImagePipelineOutput needs the package diffusers; say return_dict=False for a tuple, or, "
            f"{install_extra('diffusers')}."
        ) from error
    return ImagePipelineOutput
