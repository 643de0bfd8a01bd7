"""What a run of either stage reads, opened and checked: caches, or images as they come from their source."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from maskgit import hub
from maskgit.checkpoints.weights import weights_fingerprint
from maskgit.data.batches import ImageBatches, TokenBatches
from maskgit.data.image_cache import ImageCache
from maskgit.data.streaming import StreamedImages, StreamedTokens
from maskgit.data.token_cache import TokenCache
from maskgit.errors import ConfigError
from maskgit.evaluation.scores.classwise import matched_classes
from maskgit.networks.tokenizer import Tokenizer
from maskgit.pipeline import MaskGIT
from maskgit.training.tokenizer_config import TokenizerTrainingConfig
from maskgit.training.transformer_config import TransformerTrainingConfig


class ImageInputs(NamedTuple):
    """What a run of the first stage reads.

    Attributes:
        train: the images to train on.
        test_cache: those to evaluate on.
        size: pixels a side to train at.
    """

    train: ImageBatches | StreamedImages
    test_cache: ImageCache | None
    size: int

    @property
    def fingerprints(self) -> dict[str, str]:
        """What the data are known by when a run goes on."""
        return _fingerprints(self.train, self.test_cache)

    @property
    def caches(self) -> tuple[ImageCache, ...]:
        """Those that are read; streamed data are none."""
        known = (self.train.cache if isinstance(self.train, ImageBatches) else None, self.test_cache)
        return tuple(cache for cache in known if cache is not None)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences about the data that a user should know."""
        return self.train.left_out if isinstance(self.train, StreamedImages) else ()


class TokenInputs(NamedTuple):
    """What a run of the second stage reads.

    Attributes:
        train: the tokens to train on.
        test_cache: those to evaluate on.
        tokenizer: what makes or made them.
        source: the model whose transformer training starts from.
        test_classes: int64 (classes,), which of the classes each of those of `test_cache` is.
        notes: sentences about the data that a user should know.
    """

    train: TokenBatches | StreamedTokens
    test_cache: TokenCache | None
    tokenizer: Tokenizer
    source: MaskGIT | None
    test_classes: Tensor
    notes: tuple[str, ...]

    @property
    def fingerprints(self) -> dict[str, str]:
        """What the data are known by when a run goes on."""
        return _fingerprints(self.train, self.test_cache)

    @property
    def caches(self) -> tuple[TokenCache, ...]:
        """Those that are read; streamed data are none."""
        known = (self.train.cache if isinstance(self.train, TokenBatches) else None, self.test_cache)
        return tuple(cache for cache in known if cache is not None)


def open_images(config: TokenizerTrainingConfig, rank: int = 0, world: int = 1) -> ImageInputs:
    """Open what a run of the first stage reads, and check that all of it fits together.

    Raises:
        ConfigError, DataError: something does not fit, or cannot be read.
    """
    _check_parts(config, world)
    train: ImageBatches | StreamedImages
    if config.data is not None:
        train = ImageBatches(
            ImageCache.open(config.data),
            seed=config.seed,
            global_batch=config.batch_size,
            rank=rank,
            world=world,
            size=config.image_size,
            augment=config.augment,
            num_workers=config.num_workers,
        )
    else:
        assert config.image_size is not None
        # The first stage has no use for labels.
        train = _open_stream(config, config.image_size, config.augment, rank, world, label_column=None)
    config.check_image_size(train.size)
    test_cache = ImageCache.open(config.test_data) if config.test_data else None
    if test_cache is not None and test_cache.size < train.size:
        raise ConfigError(
            f"test_data has images of {test_cache.size} pixels a side, but training is at {train.size}: pack "
            f"them at {train.size} or more."
        )
    return ImageInputs(train, test_cache, train.size)


def open_tokens(config: TransformerTrainingConfig, rank: int = 0, world: int = 1) -> TokenInputs:
    """Open what a run of the second stage reads, and check that all of it fits together.

    Raises:
        ConfigError, CheckpointError, DataError: something does not fit, or cannot be read.
    """
    _check_parts(config, world)
    source = hub.load_model(hub.locate(config.init_from)) if config.init_from else None
    if config.tokenizer is not None:
        tokenizer = hub.load_tokenizer(config.tokenizer)
    else:
        assert source is not None
        tokenizer = source.tokenizer
    tokenizer.requires_grad_(False)
    if source is not None:
        _check_codes(source.tokenizer, tokenizer)
    fingerprint = weights_fingerprint(tokenizer)
    train: TokenBatches | StreamedTokens
    if config.data is not None:
        train = TokenBatches(
            _open_token_cache(config, config.data, fingerprint),
            seed=config.seed,
            global_batch=config.batch_size,
            rank=rank,
            world=world,
            num_workers=config.num_workers,
        )
    else:
        train = _stream_tokens(config, tokenizer, fingerprint, rank, world)
    test_cache = _open_token_cache(config, config.test_data, fingerprint) if config.test_data else None
    notes = train.left_out if isinstance(train, StreamedTokens) else ()
    classes = torch.arange(config.model.num_classes)
    if test_cache is not None:
        names, theirs = train.class_names, test_cache.class_names
        found = matched_classes(theirs, len(theirs), names, len(names), "test_data")
        if found.numbers is None:
            notes += (f"{found.reason} They are taken by their numbers.",)
        else:
            classes = torch.from_numpy(found.numbers.astype(np.int64))
    return TokenInputs(train, test_cache, tokenizer, source, classes, notes)


def completed_tokenizer(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a first stage's recipe, with the shape of `init_from` where it leaves the shape out.

    Raises:
        CheckpointError, ConfigError, DownloadError: `init_from` cannot be read.
    """
    if not isinstance(values.get("init_from"), str):
        return dict(values)
    shape = hub.load_tokenizer(values["init_from"]).config.to_dict()
    return {**values, "model": shape | dict(values.get("model", {}))}


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a second stage's recipe, with what it leaves out and others decide.

    The shape and the sampler are those of `init_from`; codes, classes and grid are those of `data`.

    Args:
        values: as a recipe gives them.

    Raises:
        CheckpointError, DataError: `init_from` or `data` cannot be read.
    """
    model: dict[str, Any] = {}
    result = dict(values)
    if isinstance(values.get("init_from"), str):
        source = hub.load_model(hub.locate(values["init_from"])).config
        model |= source.transformer.to_dict()
        result["sampler"] = source.sampler.to_dict() | dict(values.get("sampler", {}))
    if isinstance(values.get("data"), str):
        cache = TokenCache.open(values["data"])
        model |= {name: getattr(cache, name) for name in ("num_codes", "num_classes", "grid_size")}
    if model:
        result["model"] = model | dict(values.get("model", {}))
    return result


def _check_parts(config: TokenizerTrainingConfig | TransformerTrainingConfig, world: int) -> None:
    if config.batch_size % (world * config.accumulate):
        raise ConfigError(
            f"batch_size must be a multiple of the {world} processes times accumulate ({config.accumulate}), "
            f"but is {config.batch_size}."
        )


def _check_codes(theirs: Tokenizer, tokenizer: Tokenizer) -> None:
    """Raise a `ConfigError` unless codes mean the same to both; decoders may differ."""
    parts = ("encoder", "quantizer")
    if any(
        weights_fingerprint(getattr(theirs, part)) != weights_fingerprint(getattr(tokenizer, part))
        for part in parts
    ):
        raise ConfigError(
            "init_from is a model whose codes are of another tokenizer, so its transformer knows nothing of these. "
            "Make the tokens with that model's tokenizer and leave `tokenizer` out, or leave init_from out."
        )


def _open_token_cache(config: TransformerTrainingConfig, path: str, tokenizer_fingerprint: str) -> TokenCache:
    cache = TokenCache.open(path)
    cache.check_tokenizer(tokenizer_fingerprint)
    found = {"num_codes": cache.num_codes, "num_classes": cache.num_classes}
    if config.windows:
        longest = max(config.model.grid_size, *(max(shape) for shape in config.windows))
        if longest > cache.grid_size:
            raise ConfigError(
                f"windows and model.grid_size need up to {longest} tokens a side, but the tokens in {cache.path} have "
                f"{cache.grid_size}: tokenize larger images, or choose smaller windows."
            )
    else:
        found["grid_size"] = cache.grid_size
    for name, value in found.items():
        if getattr(config.model, name) != value:
            raise ConfigError(
                f"model.{name} is {getattr(config.model, name)}, but the tokens in {cache.path} have {value}."
            )
    return cache


def _stream_tokens(
    config: TransformerTrainingConfig, tokenizer: Tokenizer, tokenizer_fingerprint: str, rank: int, world: int
) -> StreamedTokens:
    stream = config.stream
    images = _open_stream(
        config,
        config.model.grid_size * tokenizer.patch_size,
        stream.augment,
        rank,
        world,
        label_column=None if stream.label_column == "none" else stream.label_column,
        class_names=stream.class_names,
    )
    found = {"num_codes": tokenizer.config.codebook_size, "num_classes": len(images.class_names)}
    for name, value in found.items():
        if getattr(config.model, name) != value:
            whose = "the tokenizer has" if name == "num_codes" else f"{images.name} has"
            raise ConfigError(f"model.{name} is {getattr(config.model, name)}, but {whose} {value}.")
    return StreamedTokens(images, tokenizer, tokenizer_fingerprint)


def _open_stream(
    config: TokenizerTrainingConfig | TransformerTrainingConfig,
    size: int,
    augment: str,
    rank: int,
    world: int,
    *,
    label_column: str | None,
    class_names: tuple[str, ...] | None = None,
) -> StreamedImages:
    stream = config.stream
    return StreamedImages(
        stream.source,
        seed=config.seed,
        global_batch=config.batch_size,
        size=size,
        rank=rank,
        world=world,
        lanes=stream.lanes,
        split=stream.split,
        config=stream.config,
        revision=stream.revision,
        image_column=stream.image_column,
        label_column=label_column,
        class_names=class_names,
        decoded_size=stream.decoded_size,
        augment=augment,
        shuffle_buffer=stream.shuffle_buffer,
        max_bad_share=stream.max_bad_share,
        num_workers=config.num_workers,
    )


def _fingerprints(
    train: ImageBatches | StreamedImages | TokenBatches | StreamedTokens,
    test_cache: ImageCache | TokenCache | None,
) -> dict[str, str]:
    known = {"train": train.fingerprint}
    return known | ({"test": test_cache.fingerprint} if test_cache else {})
