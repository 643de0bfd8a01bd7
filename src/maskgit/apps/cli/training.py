"""The commands that train: `maskgit pack`, `tokenize` and `train`.

torch and the training code are imported inside the commands, so that `--help` answers at once.
"""

import dataclasses
import functools
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg, subcommand

from maskgit.errors import ConfigError

MAX_RECIPE_BYTES = 2**20
FOLLOW_SECONDS = 10


def pack(
    source: Positional[str],
    out: Positional[Path],
    size: int,
    split: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None,
    config: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None,
    image_column: str = "auto",
    label_column: str = "auto",
    class_names: Annotated[tuple[str, ...], arg(metavar="NAME", help_behavior_hint="")] = (),
    max_bad_share: float = 0.01,
    num_workers: int = 4,
    seed: int = 0,
) -> None:
    """Read a dataset once and store its images, cropped to squares, in a folder that training memory-maps.

    Args:
        source: A folder with one subfolder of images per class; Parquet files; WebDataset tars; a folder of IDX files
            (MNIST's format); or a dataset on the Hugging Face Hub.
        out: Folder to write.
        size: Side of the stored images in pixels. Use more than the training size if training draws random crops.
        split: Split to read, by the source's name for it; or shares such as 0.9/0.1, to pack training and test images,
            by class, into OUT/train and OUT/test, near-duplicates on one side.
        config: Configuration of a Hub dataset that has several.
        image_column: Column of images, if it cannot be found by its type.
        label_column: Column of labels; "none" puts all images in one class.
        class_names: Names for numeric labels, in order, in place of the source's.
        max_bad_share: Share of images that may be unreadable, 0 to 1.
        num_workers: Decoding threads.
        seed: Random seed of the split into shares.
    """
    from maskgit.data.pack import pack_images
    from maskgit.data.splitting import pack_split, test_share

    share = None if split is None else test_share(split)
    options: dict[str, Any] = {
        "size": size,
        "split": split if share is None else None,
        "config": config,
        "image_column": image_column,
        "label_column": None if label_column == "none" else label_column,
        "class_names": class_names or None,
        "max_bad_share": max_bad_share,
        "num_workers": num_workers,
        "progress": True,
    }
    if share is None:
        caches = [pack_images(source, out, **options)]
    else:
        train, test, shared = pack_split(source, out, share=share, seed=seed, **options)
        caches = [train, test]
    for note in (*caches[0].notes, *caches[0].skipped[:5], *caches[0].left_out):
        print(note)
    if share is not None and shared.num_near:
        print(
            f"Near-duplicates kept on one side: {shared.num_near:,} images (groups: {shared.num_groups:,})."
        )
    for cache in caches:
        print(
            f"{cache.path}: {len(cache)} images of {cache.size} × {cache.size} pixels in {cache.num_classes} classes"
        )


def tokenize(
    images: Positional[Path],
    out: Positional[Path],
    tokenizer: str,
    views: Literal["centre", "centre+flip", "ten_crop", "random"] = "centre+flip",
    num_views: Annotated[int | None, arg(metavar="INT", help_behavior_hint="")] = None,
    size: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: the images')")] = None,
    batch_size: int = 64,
    device: str = "auto",
    seed: int = 0,
) -> None:
    """Encode packed images to tokens, in several views, to train a transformer on; run again to resume.

    Args:
        images: Folder written by `maskgit pack`.
        out: Folder to write, or to complete.
        tokenizer: Folder of a tokenizer or of a whole model, or a model's name.
        views: Crops taken of each image.
        num_views: Number of random crops.
        size: Side of the crops in pixels.
        batch_size: Images encoded together.
        device: cuda, mps or cpu; auto picks the first available.
        seed: Random seed of the crops.
    """
    from maskgit import hub
    from maskgit.checkpoints.weights import weights_fingerprint
    from maskgit.data.image_cache import ImageCache
    from maskgit.data.token_cache import write_token_cache
    from maskgit.foundation.devices import own_device, rank_and_world

    network = hub.load_tokenizer(tokenizer)
    fingerprint = weights_fingerprint(network)
    chosen, (rank, world) = own_device(device), rank_and_world()
    cache = write_token_cache(
        ImageCache.open(images),
        network.to(chosen),
        out,
        tokenizer_fingerprint=fingerprint,
        num_codes=network.config.codebook_size,
        views=views,
        num_views=num_views,
        size=size,
        seed=seed,
        batch_size=batch_size,
        device=chosen,
        rank=rank,
        world=world,
        progress=True,
    )
    if cache is not None:
        print(
            f"{out}: {len(cache)} images, {cache.num_views} views of {cache.grid_size} × {cache.grid_size} tokens"
        )


Changes = Annotated[UseAppendAction[tuple[tuple[str, ...], ...]], arg(name="set", metavar="KEY=VALUE")]


def train_tokenizer(
    recipe: Positional[Path],
    changes: Changes = (),
    change: bool = False,
    anneal: Annotated[int | None, arg(metavar="STEPS", help_behavior_hint="")] = None,
    dry_run: bool = False,
) -> None:
    """Train the first stage, which turns images into tokens and back.

    Args:
        recipe: TOML file; see `recipes/` for examples.
        changes: Override values of the recipe, in TOML, such as steps=1000 model.filters=64.
        change: Let the run go on from its newest checkpoint with other values than before, such as learning_rate.
        anneal: From the newest checkpoint on, let the learning rate fall to zero over so many steps, and end.
        dry_run: Only print parameter count, memory, steps and estimated time.
    """
    from maskgit.training.dry_run import dry_run_tokenizer
    from maskgit.training.inputs import completed_tokenizer
    from maskgit.training.tokenizer_config import TokenizerTrainingConfig
    from maskgit.training.train_tokenizer import train_tokenizer as run
    from maskgit.training.transformer_config import TransformerTrainingConfig

    values = _values(recipe, changes)
    _check_stage(recipe, values, "tokenizer", TokenizerTrainingConfig, TransformerTrainingConfig)
    config = TokenizerTrainingConfig.from_dict(completed_tokenizer(values))
    _trained(config, run, dry_run_tokenizer, change, anneal, dry_run)


def train_transformer(
    recipe: Positional[Path],
    changes: Changes = (),
    change: bool = False,
    anneal: Annotated[int | None, arg(metavar="STEPS", help_behavior_hint="")] = None,
    dry_run: bool = False,
) -> None:
    """Train the second stage, which predicts masked tokens.

    Args:
        recipe: TOML file; see `recipes/` for examples.
        changes: Override values of the recipe, in TOML, such as steps=1000 model.num_layers=8.
        change: Let the run go on from its newest checkpoint with other values than before, such as learning_rate.
        anneal: From the newest checkpoint on, let the learning rate fall to zero over so many steps, and end.
        dry_run: Only print parameter count, memory, steps and estimated time.
    """
    from maskgit.training.dry_run import dry_run_transformer
    from maskgit.training.inputs import completed
    from maskgit.training.tokenizer_config import TokenizerTrainingConfig
    from maskgit.training.train_transformer import train_transformer as run
    from maskgit.training.transformer_config import TransformerTrainingConfig

    values = _values(recipe, changes)
    _check_stage(recipe, values, "transformer", TransformerTrainingConfig, TokenizerTrainingConfig)
    config = TransformerTrainingConfig.from_dict(completed(values))
    _trained(config, run, dry_run_transformer, change, anneal, dry_run)


def _trained(
    config: Any,
    run: Callable[..., Path],
    describe: Callable[[Any, int], str],
    change: bool,
    anneal: int | None,
    dry_run: bool,
) -> None:
    """Train, or tell what that takes, and print what comes of it."""
    from maskgit.foundation.devices import rank_and_world
    from maskgit.training.run.folder import annealed

    if anneal is not None:
        config = annealed(config.out, config, anneal)
    print(
        describe(config, rank_and_world()[1]) if dry_run else run(config, change=change or anneal is not None)
    )


def show_runs(
    runs: Positional[Annotated[tuple[Path, ...], arg(metavar="RUN")]],
    out: Path = Path("runs.png"),
    follow: bool = False,
) -> None:
    """Compare runs, finished or still training: a table of results, the settings that differ, and a plot.

    Args:
        runs: Folders of runs, of one stage or of both.
        out: PNG file for the plot.
        follow: Refresh every ten seconds until Ctrl-C.
    """
    from maskgit.training.run import comparison

    if not runs:
        raise ConfigError("Name at least one run, such as runs/photos-tokenizer.")
    while True:
        read = comparison.read_runs(runs)
        comparison.draw_comparison(read, out)
        # Where somebody watches, the new table takes the old one's place.
        print("\x1b[H\x1b[J" if follow and sys.stdout.isatty() else "", end="")
        print(comparison.table_of_runs(read), comparison.table_of_settings(read), sep="\n\n")
        print(f"The curves are in {out}.", flush=True)
        if not follow:
            return
        time.sleep(FOLLOW_SECONDS)


def save_model(
    run: Positional[Path],
    dest: Positional[Path],
    step: Annotated[int | None, arg(metavar="STEP", help_behavior_hint="(default: the newest)")] = None,
    best: bool = False,
    ema: Annotated[
        str | None, arg(metavar="DECAY|raw", help_behavior_hint="(default: the best on test data)")
    ] = None,
    reference: Annotated[str | None, arg(metavar="IMAGES", help_behavior_hint="")] = None,
    num_images: int = 1000,
) -> None:
    """Write a model from a checkpoint of a run of your own, also of one that was stopped.

    Args:
        run: Folder of the run.
        dest: Model folder to write.
        step: Step of the checkpoint.
        best: Take the checkpoint with the best test score.
        ema: Which weights: an average's decay, such as 0.999, or raw for the trained weights themselves.
        reference: Real images, such as data/photos/test: of several averages, save the one whose samples (or, of a
            tokenizer, reconstructions) are nearest to them by EffNet-FD.
        num_images: Samples for each average, with --reference.
    """
    from maskgit.training import saving

    saved = saving.save_model(
        run, dest, step=step, best=best, ema=ema, reference=reference, num_images=num_images
    )
    for name, score in saved.scores.items():
        print(f"EMA {name}: {saved.measure} {score:.4f}")
    print(
        f"{saved.path}: step {saved.step}, "
        + ("weights as trained" if saved.ema == "raw" else f"EMA {saved.ema}")
    )


def finetune(
    photos: Positional[str],
    source: Annotated[str, arg(name="from", metavar="MODEL")],
    out: Annotated[Path, arg(metavar="RUN")],
    method: Literal["lora", "full", "decoder"] = "lora",
    steps: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint="(default: by the number of images)")
    ] = None,
    minutes: Annotated[float | None, arg(metavar="FLOAT", help_behavior_hint="")] = None,
    rank: int = 8,
    batch_size: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint="(default: by the machine)")
    ] = None,
    learning_rate: Annotated[
        float | None, arg(metavar="FLOAT", help_behavior_hint="(default: by the method)")
    ] = None,
    label_dropout: float = 0.1,
    device: str = "auto",
    seed: int = 0,
) -> None:
    """Train a model further on images of your own; run again to resume.

    Packs and tokenizes the images, says how much memory and time training takes, trains, and writes samples as RUN/sheet.png.

    Args:
        photos: A folder with one subfolder of images per class, or any other source that `maskgit pack` reads.
        source: The model to begin from: name, folder or Hugging Face id.
        out: Folder for the run and the result: RUN/adapter, or RUN/model.
        method: lora trains a small adapter, used with --model MODEL --adapter RUN; full trains the whole transformer;
            decoder trains the tokenizer's decoder alone, so that images keep their tokens.
        steps: Updates.
        minutes: Make no more steps than take about this long.
        rank: Rank of the adapter; higher learns more and is larger.
        batch_size: Images per step.
        learning_rate: Its peak.
        label_dropout: Share of images shown without their class, 0 to 1; above 0 the model learns to be guided.
        device: cuda, mps or cpu; auto picks the first available.
        seed: Random seed.
    """
    from maskgit.training.finetune import Finetuning
    from maskgit.training.finetune import finetune as run

    asked = Finetuning(
        photos=photos,
        model=source,
        out=str(out),
        method=method,
        steps=steps,
        minutes=minutes,
        rank=rank,
        batch_size=batch_size,
        learning_rate=learning_rate,
        label_dropout=label_dropout,
        device=device,
        seed=seed,
    )
    result = run(asked, lambda line: print(line, flush=True))
    print(f"{out / 'sheet.png'}\n{result}")
    use = f"--model {source} --adapter {out}" if method == "lora" else f"--model {result}"
    print(f"Use it with: maskgit generate {use} --class NAME")


def _command(name: str, function: Callable[..., None]) -> Any:
    """Return a command below `train`, which is called once all flags are read."""

    @functools.wraps(function)
    def later(*arguments: Any, **flags: Any) -> Callable[[], None]:
        return functools.partial(function, *arguments, **flags)

    return Annotated[Callable[[], None], subcommand(name, constructor=later)]


COMMANDS: Any = (
    _command("tokenizer", train_tokenizer)
    | _command("transformer", train_transformer)
    | _command("save-model", save_model)
    | _command("show", show_runs)
)


def train(command: COMMANDS) -> None:
    """Train a tokenizer or a transformer from a recipe; run again to resume.

    On SIGTERM or Ctrl-C, training writes a checkpoint and exits with code 75. On several GPUs:
    `torchrun --nproc-per-node 8 -m maskgit train …`. `maskgit train show RUN…` compares runs.
    """
    command()


def _check_stage(recipe: Path, values: dict[str, Any], stage: str, own: type, other: type) -> None:
    """Raise a `ConfigError` if a recipe is one for the other stage."""
    keys, others = ({field.name for field in dataclasses.fields(config)} for config in (own, other))
    foreign = sorted(key for key in values if key not in keys and key in others)
    if foreign and not any(key not in keys | others for key in values):
        needed = "transformer" if stage == "tokenizer" else "tokenizer"
        raise ConfigError(
            f"{recipe} is a recipe for the {needed} ({', '.join(foreign[:3])}), not for the {stage}: "
            f"run `maskgit train {needed} {recipe}`."
        )


def _values(recipe: Path, changes: tuple[tuple[str, ...], ...]) -> dict[str, Any]:
    return read_recipe(recipe, tuple(change for given in changes for change in given))


def read_recipe(path: Path, changes: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the values of a recipe, changed as the user asks.

    Args:
        path: a TOML file.
        changes: "key=value" with a TOML value (a bare word is text) and dots for tables.

    Raises:
        ConfigError: the file cannot be read, or a change is not of that form.
    """
    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise ConfigError(f"{path} is larger than any recipe.")
        values = tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {error}.") from error
    for change in changes:
        key, equals, text = change.partition("=")
        *tables, name = key.split(".")
        if not equals or not all((*tables, name)):
            raise ConfigError(f"--set takes KEY=VALUE, such as steps=1000, but was given {change!r}.")
        table = values
        for part in tables:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise ConfigError(f"--set {change}: {part!r} is a value in {path}, not a table.")
        table[name] = _toml_value(text)
    return values


def _toml_value(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except ValueError:
        return text
    return parsed["value"] if parsed.keys() == {"value"} else text
