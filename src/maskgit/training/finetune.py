"""A trained model made one's own: from a folder of photos to an adapter, a model or a tokenizer, in one call.

    out/data/images/train, test     the photos, packed
    out/data/tokens/train, test     their tokens, by the model's own tokenizer
    out/adapter or out/model        what was trained, with the run's files beside it (see `run.folder`)
    out/tokenizer                   the run of the tokenizer, where its decoder is tuned
    out/sheet.png                   samples; where the decoder is tuned, photos, reconstructions before and after

The runs are those of `train_transformer` and `train_tokenizer`; here their settings are chosen.
"""

import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from maskgit import hub, images
from maskgit.checkpoints.adapters import adapted, load_adapter
from maskgit.checkpoints.weights import weights_fingerprint
from maskgit.data.image_cache import ImageCache
from maskgit.data.pack import pack_images
from maskgit.data.splitting import pack_split
from maskgit.data.token_cache import TokenCache, write_token_cache
from maskgit.errors import ConfigError
from maskgit.foundation.checks import Config, check_choice, check_range
from maskgit.foundation.devices import choose_device
from maskgit.foundation.files import check_writable, expand
from maskgit.model import Parts
from maskgit.networks.lora import LoraConfig
from maskgit.networks.vocabulary import Vocabulary
from maskgit.pipeline import MaskGIT
from maskgit.training.dry_run import dry_run_tokenizer, dry_run_transformer
from maskgit.training.evaluation import class_columns
from maskgit.training.numerics import autocast, choose_precision
from maskgit.training.objectives.losses import sequence_losses
from maskgit.training.run.folder import DATA, check_run_folder
from maskgit.training.run.progress import duration
from maskgit.training.tokenizer_config import TokenizerTrainingConfig
from maskgit.training.train_tokenizer import train_tokenizer
from maskgit.training.train_transformer import train_transformer
from maskgit.training.transformer_config import TransformerTrainingConfig
from maskgit.training.warm_start import first_transformer

METHODS = ("lora", "full", "decoder")
# Fewer are learned by heart before anything else is.
MIN_PHOTOS = 8
# From so many on, some are kept back to test on.
MIN_SPLIT, TEST_SHARE = 40, 0.1
# Of fewer, each is seen in ten crops instead of two.
FEW_PHOTOS = 1000
SHEET, SHEET_IMAGES = "sheet.png", 32


@dataclass(frozen=True)
class Finetuning(Config):
    """What is asked of a fine-tuning; None leaves a choice to the amount of data and the machine.

    Attributes:
        photos: a folder with a subfolder of images for each class, or anything else that `pack_images` reads.
        model: the model to begin from: a name, a folder or a Hugging Face id.
        out: the folder to write; the same call goes on where it stopped.
        method: "lora" trains an adapter, "full" the whole transformer, "decoder" the tokenizer's decoder alone, after
            which every image has the tokens that it had.
        steps: updates.
        minutes: no more steps than take about so long here, as the first ones tell.
        rank: of an adapter.
        batch_size: images a step.
        learning_rate: its peak.
        label_dropout: the share of samples whose class is masked, which teaches the model to be guided.
        device: "auto", "cpu", "cuda" or the like.
        seed: of the split, of first weights, order, masks and samples.
    """

    photos: str
    model: str
    out: str
    method: str = "lora"
    steps: int | None = None
    minutes: float | None = None
    rank: int = 8
    batch_size: int | None = None
    learning_rate: float | None = None
    label_dropout: float = 0.1
    device: str = "auto"
    seed: int = 0

    def validate(self) -> None:
        check_choice("method", self.method, METHODS)
        check_range("rank", self.rank, 1, 4096)
        for name, low, high in (("steps", 1, 2**40), ("minutes", 0.01, 1e6), ("batch_size", 1, 2**24)):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), low, high)


def finetune(asked: Finetuning, say: Callable[[str], None] = print) -> Path:
    """Fine-tune a model on photos; see the module's docstring for what is written.

    Args:
        asked: what.
        say: is told in lines what will be done, and what it takes.

    Returns:
        The folder of the adapter or of the model.

    Raises:
        ConfigError: there are too few photos, or a setting does not fit.
        CheckpointError, DownloadError: the model cannot be read.
        DataError: the photos cannot be read, or were packed for another model.
        OutputError: the folder cannot be written.
        SystemExit: with code 75, if it was stopped; the same call goes on.
    """
    out = expand(asked.out)
    check_run_folder(out)
    source = hub.load_model(hub.locate(asked.model))
    check_writable(out)
    train, test = _packed(asked, out / DATA / "images", source.config.image_size, say)
    if asked.method == "decoder":
        return _tune_decoder(asked, out, source, train, test, say)
    config = _transformer_config(asked, out, source, train, test)
    say(dry_run_transformer(config))
    config = _timed(asked, config, source, say)
    result = train_transformer(config)
    parts = Parts(source.config, source.tokenizer, source.transformer)
    tuned = (
        MaskGIT(*adapted(parts, load_adapter(result))) if asked.method == "lora" else hub.load_model(result)
    )
    _write_samples(tuned.to(choose_device(asked.device)), asked.seed, out / SHEET)
    return result


def _packed(
    asked: Finetuning, folder: Path, size: int, say: Callable[[str], None]
) -> tuple[ImageCache, ImageCache | None]:
    """Return the photos to train and to test on, packed now or by an earlier call."""
    train, test = folder / "train", folder / "test"
    if train.is_dir():
        say(f"The photos in {folder} were packed before; remove that folder to read {asked.photos} again.")
    else:
        # With a margin for crops at the corners.
        options: dict[str, Any] = {"size": size * 9 // 8, "progress": True}
        parts: tuple[ImageCache, ...] = ()
        # Too few to split, all are trained on.
        with suppress(ConfigError):
            parts = pack_split(asked.photos, folder, share=TEST_SHARE, seed=asked.seed, **options)[:2]
        if sum(map(len, parts)) < MIN_SPLIT:
            shutil.rmtree(folder, ignore_errors=True)
            pack_images(asked.photos, train, **options)
    cache = ImageCache.open(train)
    for note in (*cache.notes, *cache.left_out):
        say(note)
    if len(cache) < MIN_PHOTOS:
        raise ConfigError(
            f"{asked.photos} has {len(cache)} images to train on, which would be learned by heart: give at least "
            f"{MIN_PHOTOS}, better 100, and remove {folder}."
        )
    if not test.is_dir():
        say(
            f"{len(cache)} images are too few to keep some back: nothing tells when they are learned by heart."
        )
        return cache, None
    return cache, ImageCache.open(test)


def _transformer_config(
    asked: Finetuning, out: Path, source: MaskGIT, train: ImageCache, test: ImageCache | None
) -> TransformerTrainingConfig:
    """Return the run's settings, once the photos are tokens."""
    size, device = source.config.image_size, choose_device(asked.device)
    tokenizer = source.tokenizer.to(device)
    fingerprint = weights_fingerprint(hub.load_tokenizer(asked.model))
    views = "ten_crop" if len(train) < FEW_PHOTOS else "centre+flip"
    tokens: list[TokenCache] = []
    for cache, name, chosen in ((train, "train", views), (test, "test", "centre")):
        if cache is not None:
            written = write_token_cache(
                cache,
                tokenizer,
                out / DATA / "tokens" / name,
                tokenizer_fingerprint=fingerprint,
                num_codes=source.config.tokenizer.codebook_size,
                views=chosen,
                size=size,
                device=device,
                progress=True,
            )
            assert written is not None, "one process writes all"
            tokens.append(written)
    source.tokenizer.to("cpu")
    batch = asked.batch_size or _batch_size(len(train), device)
    steps = asked.steps or _steps(len(train), batch)
    every = max(1, steps // 10)
    lora = asked.method == "lora"
    shape = source.config.transformer.to_dict() | {"num_classes": train.num_classes}
    return TransformerTrainingConfig.from_dict(
        {
            "out": str(out),
            "data": str(tokens[0].path),
            "test_data": str(tokens[1].path) if test is not None else None,
            "init_from": asked.model,
            "model": shape,
            "lora": LoraConfig(rank=asked.rank, alpha=2.0 * asked.rank).to_dict() if lora else {},
            "steps": steps,
            "batch_size": batch,
            "seed": asked.seed,
            "learning_rate": asked.learning_rate or (1e-3 if lora else 1e-4),
            "lr_schedule": "cosine",
            "warmup_steps": min(100, steps // 10),
            "weight_decay": 0.0 if lora else 4.5e-2,
            "label_smoothing": 0.0,
            "label_dropout": asked.label_dropout,
            "ema_decay": 0.99,
            "device": asked.device,
            "log_every": max(1, steps // 50),
            "evaluate_every": every,
            "sample_every": max(1, steps // 4),
            "checkpoint_every": every,
            "keep_last": 1,
            "keep_best": 1 if test is not None else 0,
            "patience": 3 if test is not None else None,
            "num_workers": 1,
            "sampler": source.config.sampler.to_dict(),
        }
    )


def _batch_size(num_images: int, device: torch.device) -> int:
    most = 32 if device.type == "cpu" else 64
    return min(most, 1 << (num_images.bit_length() - 1))


def _steps(num_images: int, batch_size: int) -> int:
    """Return how many steps go through few images often, and through many a few times."""
    passes = 60 if num_images < FEW_PHOTOS else 20
    return min(20_000, max(200, num_images * passes // batch_size))


def _timed(
    asked: Finetuning, config: TransformerTrainingConfig, source: MaskGIT, say: Callable[[str], None]
) -> TransformerTrainingConfig:
    """Return the run's settings with no more steps than there is time for; say how long they will take."""
    device = choose_device(config.device)
    names = TokenCache.open(str(config.data)).class_names
    transformer = first_transformer(
        config.model,
        config.seed,
        source=source,
        class_names=names,
        init_classes=config.init_classes,
        lora=config.lora,
    ).to(device)
    vocabulary = Vocabulary.of(config.model)
    tokens = torch.zeros(config.batch_size, vocabulary.grid_size, vocabulary.grid_size, dtype=torch.int64)
    tokens = tokens.to(device)
    labels = torch.zeros(config.batch_size, dtype=torch.int64, device=device)
    sequence = vocabulary.sequence(labels, tokens, torch.ones_like(tokens, dtype=torch.bool))
    split = vocabulary.split(tokens).flatten(1)

    def step() -> Tensor:
        with autocast(device, choose_precision(config.precision, device)):
            logits = transformer(sequence, codes=vocabulary.num_codes)
        loss = sequence_losses(logits[:, 1:], split, torch.ones_like(split, dtype=torch.bool), 0.0).mean()
        loss.backward()
        return loss.detach()

    seconds = _seconds(step)
    steps = config.steps
    if asked.minutes is not None:
        steps = min(steps, max(10, int(60 * asked.minutes / seconds)))
    say(
        f"time           about {duration(steps * seconds)} for {steps:,} steps of {seconds:.2g} s, as two of them went"
    )
    if steps == config.steps:
        return config
    every = max(1, steps // 10)
    return TransformerTrainingConfig.from_dict(
        config.to_dict()
        | {"steps": steps, "warmup_steps": min(100, steps // 10)}
        | {"evaluate_every": every, "checkpoint_every": every, "sample_every": max(1, steps // 4)}
    )


def _seconds(step: Callable[[], Tensor]) -> float:
    """Return how long a step takes once it has been made before."""
    float(step())
    start = time.perf_counter()
    float(step())
    return time.perf_counter() - start


@torch.no_grad()
def _write_samples(model: MaskGIT, seed: int, path: Path) -> None:
    """Write images of the model's classes, a class a column."""
    columns = class_columns(np.arange(model.vocabulary.num_classes), seed, SHEET_IMAGES)
    labels = np.resize(columns, SHEET_IMAGES)
    names = model.class_names or tuple(map(str, range(model.vocabulary.num_classes)))
    made = model.generate(labels, seed=seed)
    captions = [names[label] for label in labels]
    images.save_png(path, images.contact_sheet(made.to_pil(), columns=len(columns), captions=captions))


def _tune_decoder(
    asked: Finetuning,
    out: Path,
    source: MaskGIT,
    train: ImageCache,
    test: ImageCache | None,
    say: Callable[[str], None],
) -> Path:
    """Train the decoder on the photos; write the model with it, and a sheet of what it changed."""
    batch = asked.batch_size or _batch_size(len(train), choose_device(asked.device))
    steps = asked.steps or _steps(len(train), batch)
    every = max(1, steps // 10)
    config = TokenizerTrainingConfig.from_dict(
        {
            "out": str(out / "tokenizer"),
            "data": str(train.path),
            "test_data": None if test is None else str(test.path),
            "init_from": asked.model,
            "model": source.config.tokenizer.to_dict(),
            "freeze": "encoder",
            "image_size": source.config.image_size,
            "augment": "crop+flip",
            "steps": steps,
            "batch_size": batch,
            "seed": asked.seed,
            "learning_rate": asked.learning_rate or 2e-4,
            "lr_schedule": "cosine",
            "warmup_steps": min(100, steps // 10),
            "ema_decay": 0.99,
            "perceptual": "effnet-lite0" if find_spec("efficientnet_lite_pytorch") else "none",
            "adversarial_weight": 0.0,
            "device": asked.device,
            "log_every": max(1, steps // 50),
            "evaluate_every": every,
            "checkpoint_every": every,
            "keep_last": 1,
            "keep_best": 1 if test is not None else 0,
            "num_workers": 1,
        }
    )
    say(dry_run_tokenizer(config))
    tuned = hub.load_tokenizer(train_tokenizer(config))
    result = hub.save_model(MaskGIT(source.config, tuned, source.transformer), out / "model")
    shown = train if test is None else test
    size = source.config.image_size
    photos = [images.fit(images.to_pil(images.to_tensor(picture))[0], size) for picture in shown.images[:8]]
    pixels = torch.cat([source.prepare(photo) for photo in photos])
    tokens = source.encode_pixels(pixels)
    after = hub.load_model(result).decode_tokens(tokens)
    rows = torch.stack([pixels, source.decode_tokens(tokens), after], dim=1).flatten(0, 1)
    captions = ["photo", "before", "after"] * len(photos)
    images.save_png(out / SHEET, images.contact_sheet(rows, columns=3, captions=captions))
    return result
