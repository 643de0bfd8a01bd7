"""The command line, `maskgit`: every command is a function whose parameters are its flags.

torch and the model code are imported inside the commands, so that `--help` answers at once.
"""

import atexit
import gc
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional, arg

from maskgit.apps.cli.editing import edit, inpaint, interpolate, outpaint, panorama, vary
from maskgit.apps.cli.evaluation import compare, evaluate, stats
from maskgit.apps.cli.flags import Marking, Model, Sampler
from maskgit.apps.cli.models import convert, export, info
from maskgit.apps.cli.output import (
    MAX_COLUMNS,
    MAX_SHEET,
    Making,
    Progress,
    Writer,
    label_of,
    numbered,
    picture_paths,
    save_explained,
    save_sheet,
    slug,
)
from maskgit.apps.cli.scoring import COMMAND
from maskgit.apps.cli.serving import page, serve
from maskgit.apps.cli.streams import open_closed, outlets
from maskgit.apps.cli.training import finetune, pack, tokenize, train
from maskgit.apps.cli.tuning import tune
from maskgit.errors import ConfigError, MaskGITError
from maskgit.foundation import __version__
from maskgit.foundation.files import expand_argument
from maskgit.foundation.notes import listening

if TYPE_CHECKING:
    from PIL import Image

    from maskgit.pipeline import MaskGIT

EXIT_INPUT = 2
EXIT_INTERRUPTED = 130

app = tyro.extras.SubcommandApp()


@app.command
def generate(
    classes: Annotated[tuple[str, ...], arg(name="class", metavar="NAME|NUMBER")],
    model: Model,
    sampler: Sampler,
    making: Making,
    candidates: Annotated[int, arg(metavar="INT", help_behavior_hint="(default: keep all)")] = 0,
    explain: bool = False,
    size: Annotated[tuple[int, int] | None, arg(metavar="WIDTH HEIGHT", help_behavior_hint="")] = None,
) -> None:
    """Generate images of one or more classes: PNG files and a contact sheet.

    Args:
        classes: Class names or numbers; "none" for no class, if the model supports it. If a name is ambiguous, write
            name:NAME, such as name:none, and for a number number:3.
        candidates: Images generated per class, of which the likeliest --num-images are kept.
        explain: Also show how the first images were decoded: explain.png, and forming.gif as an animation.
        size: Pixels of the images, if the model's positions are rotary; its own size otherwise.
    """

    making.check()
    if candidates and explain:
        raise ConfigError("--explain does not work with --candidates; leave one of them out.")
    pipe = model.load(size)
    config = pipe.sampler_config(**sampler.given())
    names = [name for name in classes for _ in range(making.num_images)]
    found = {name: label_of(pipe, name) for name in classes}
    labels = [found[name] for name in names]
    paths = picture_paths(making.out, making.overwrite, numbered(making, names), explain)
    if candidates:
        _generate_best(pipe, classes, names, paths, model, sampler, making, candidates, size)
        return
    settings = model.recorded("generate") | config.to_dict() | ({"size": list(size)} if size else {})
    sheet: list[Image.Image] = []
    with Progress() as progress, Writer(making.overwrite, making.marking.writing()) as writer:
        # Each batch is written as soon as it is made, so that an interrupt loses little.
        batches = pipe.generate_batches(
            labels,
            seed=making.seed,
            first_index=making.first_index,
            batch_size=making.batch_size,
            return_steps=explain,
            callback=progress,
            **sampler.given(),
        )
        number = 0
        for made in batches:
            pictures = made.to_pil()
            for picture in pictures:
                recorded = settings | {"class": names[number], **making.recorded(number)}
                writer.save(paths[number], picture, recorded)
                number += 1
            sheet += pictures[: MAX_SHEET - len(sheet)]
            if made.trace is not None and number == len(pictures):
                save_explained(pipe, made, making)
    columns = making.num_images if len(classes) > 1 and 1 < making.num_images <= MAX_COLUMNS else None
    save_sheet(sheet, len(paths), making.out, making.marking.writing(), columns=columns)


def _generate_best(
    pipe: "MaskGIT",
    classes: tuple[str, ...],
    names: list[str],
    paths: list[Path],
    model: Model,
    sampler: Sampler,
    making: Making,
    candidates: int,
    size: tuple[int, int] | None,
) -> None:
    """Write the likeliest of many candidates."""
    from maskgit import images

    config = pipe.sampler_config(**sampler.given())
    with Progress() as progress:
        made = pipe.generate_best(
            [label_of(pipe, name) for name in classes],
            candidates=candidates,
            num_images=making.num_images,
            seed=making.seed,
            first_index=making.first_index,
            batch_size=making.batch_size,
            callback=progress,
            **sampler.given(),
        )
    assert made.indices is not None, "the best say which they are"
    settings = model.recorded("generate") | config.to_dict() | {"candidates": candidates, "seed": making.seed}
    settings |= {"size": list(size)} if size else {}
    writing = making.marking.writing()
    for path, picture, name, index in zip(paths, made.to_pil(), names, made.indices.tolist(), strict=True):
        recorded = settings | {"class": name, "index": index}
        images.save_png(path, picture, settings=recorded, overwrite=making.overwrite, **writing)
    save_sheet(made.to_pil()[:MAX_SHEET], len(paths), making.out, writing)


for editing in (edit, inpaint, outpaint, panorama, vary, interpolate):
    app.command(editing)


@app.command
def reconstruct(
    photos: Positional[tuple[Path, ...]],
    model: Model,
    marking: Marking,
    out: Path = Path("out"),
    overwrite: bool = False,
) -> None:
    """Encode images to tokens and decode them again. Writes the results and a sheet that compares them.

    Args:
        photos: Images; centre-cropped to squares and resized to the model's image size.
        out: Folder for the images; created if needed.
        overwrite: Replace existing images.
    """
    from maskgit import images

    if not photos:
        raise ConfigError("Give at least one image.")
    marking.writing()
    pipe = model.load()
    before = [pipe.prepare(photo) for photo in photos]
    paths = picture_paths(out, overwrite, [f"{slug(photo.stem)}-reconstructed" for photo in photos])
    sheet: list[Image.Image] = []
    for photo, pixels, path in zip(photos, before, paths, strict=True):
        made = pipe.reconstruct(pixels).to_pil()
        settings = model.recorded("reconstruct")
        settings["photo"] = photo.name
        images.save_png(path, made[0], settings=settings, overwrite=overwrite, **marking.writing(photo))
        sheet += [*images.to_pil(pixels), *made][: MAX_SHEET - len(sheet)]
    save_sheet(
        sheet,
        2 * len(photos),
        out,
        marking.writing(),
        columns=2,
        captions=(["original", "reconstruction"] * len(photos))[: len(sheet)],
    )


def policies() -> None:
    """List the decoding policies, their parameters and sources."""
    import inspect
    from dataclasses import fields

    from maskgit.sampler.policies import POLICIES

    for name, policy in POLICIES.items():
        about = inspect.getdoc(policy) or ""
        print(f"{name}\n    {about.splitlines()[0]}\n    Source: {policy.source}")
        described = about.partition("Attributes:")[2].split("\n    ")
        for f in fields(policy):
            text = next((line.strip() for line in described if line.strip().startswith(f"{f.name}")), f.name)
            print(
                f"    --policy-options {f.name}={str(f.default).lower() if f.type is bool else f.default}: "
                f"{text.partition(': ')[2]}"
            )
        for setting, value in policy.defaults.items():
            print(f"    default with this policy: --{setting.replace('_', '-')} {value}")
        print()


for command in (
    convert,
    policies,
    info,
    pack,
    tokenize,
    train,
    finetune,
    evaluate,
    stats,
    compare,
    tune,
    export,
    serve,
):
    app.command(command)
app.command(name="app")(page)


def _spare_the_collector() -> None:
    """Keep Python's garbage collector from going through all that importing torch makes: 0.2 s a command."""
    gc.set_threshold(20_000, 10, 10)
    atexit.register(gc.freeze)


@contextmanager
def _polite() -> Iterator[None]:
    """End on SIGTERM so that what is half-written is removed; training has its own answer to it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        # A program that calls this one keeps its own; None is one that Python did not set.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def _say(text: str) -> None:
    print(f"maskgit: {text}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code (2: a wrong input, told in one sentence)."""
    arguments = [expand_argument(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    if argv is None:
        _spare_the_collector()
        open_closed()
    # A URL's query may hold a token.
    typed = [argument.partition("?")[0] if "://" in argument else argument for argument in arguments]
    COMMAND.set(shlex.join(["maskgit", *typed]))
    with outlets() as out:
        code = _run(arguments)
        out.flush()
        if out.error is None or out.unread:
            return code
        print(f"maskgit: standard output cannot be written: {out.error.strerror}.", file=sys.stderr)
        return code or EXIT_INPUT


def _run(arguments: list[str]) -> int:
    """Run a command and return its exit code."""
    if arguments in (["--version"], ["-V"]):
        print(__version__)
        return 0
    try:
        with _polite(), listening(_say):
            app.cli(
                prog="maskgit",
                description="Masked generative image transformers: generate and edit images, and train your own. Try `maskgit generate --class frog`.",
                args=arguments,
                sort_subcommands=False,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as leaving:
        # After help, wrong flags, or a training that was stopped.
        return int(leaving.code or 0)
    except MaskGITError as error:
        print(f"maskgit: {error}", file=sys.stderr)
        return EXIT_INPUT
    except OSError as error:
        # Whatever the file system has against a path that was given: too long, forbidden, gone.
        print(f"maskgit: {error.filename or 'a file'}: {error.strerror or error}.", file=sys.stderr)
        return EXIT_INPUT
    except KeyboardInterrupt:
        print("maskgit: interrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0
