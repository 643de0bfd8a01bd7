"""The command line, `maskgit`: every command is a function whose parameters are its flags.

torch and the model code are imported inside the commands, so that `--help` answers at once.
"""

import sys
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from maskgit import __version__
from maskgit.apps.training_commands import pack, tokenize, train
from maskgit.errors import MaskGITError, OutputError

if TYPE_CHECKING:
    from PIL import Image

    from maskgit.pipeline import MaskGIT, Output

SHEET = "sheet.png"
EXIT_INPUT = 2
EXIT_INTERRUPTED = 130

app = tyro.extras.SubcommandApp()


def _own(metavar: str) -> Any:
    """Describe a flag that, when it is not given, leaves the choice to the model."""
    return arg(metavar=metavar, help_behavior_hint="(default: the model's own)")


@dataclass(frozen=True)
class Model:
    """Which model, and where it runs."""

    model: str = "cifar10"
    """A model's name (see `maskgit info`), its folder, or a Hugging Face id such as user/model."""
    device: str = "auto"
    """cuda, mps or cpu; auto takes the first that is there."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The type the networks compute in; float32 gives the same tokens everywhere."""

    def load(self) -> "MaskGIT":
        """Return the model on its device."""
        import torch

        from maskgit import hub
        from maskgit.devices import choose_device

        return hub.from_pretrained(
            self.model, device=choose_device(self.device), dtype=getattr(torch, self.dtype)
        )


@dataclass(frozen=True)
class Sampler:
    """How tokens are decoded; what is not given is the model's own choice."""

    steps: Annotated[int | None, _own("INT")] = None
    """Forward passes; more is slower and usually better."""
    choice_temperature: Annotated[float | None, _own("FLOAT")] = None
    """Noise on the confidence that decides which tokens stay; more is more varied."""
    temperature: Annotated[float | None, _own("FLOAT")] = None
    """Divides the logits; below 1 plays safe, 0 takes the likeliest token."""
    mask_schedule: Annotated[str | None, _own("NAME")] = None
    """cosine, uniform, square, cubic, sqrt, log, exp, or powX such as pow2.5."""
    guidance_scale: Annotated[float | None, _own("FLOAT")] = None
    """Classifier-free guidance; 1 is none."""

    def given(self) -> dict[str, Any]:
        """Return the settings that were given."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}


@dataclass(frozen=True)
class Making:
    """What is made and where it goes."""

    num_images: Annotated[int, arg(aliases=["-n"])] = 1
    """Images for each class."""
    seed: int = 0
    """With the index, decides an image; the same seed makes the same images."""
    first_index: int = 0
    """Index of the first image; go on from a former run to get new ones."""
    batch_size: int = 16
    """Images decoded together; does not change them."""
    out: Path = Path("out")
    """The folder for the pictures; made if needed."""
    overwrite: bool = False
    """Replace pictures that are there."""


@app.command
def generate(
    classes: Annotated[tuple[str, ...], arg(name="class", metavar="NAME|NUMBER")],
    model: Model,
    sampler: Sampler,
    making: Making,
) -> None:
    """Make new images of one or more classes: single PNGs and a sheet of all.

    Args:
        classes: Names or numbers; "none" for no class, where the model can.
    """
    pipe = model.load()
    labels = [pipe.label(None if name == "none" else name) for name in classes]
    config = pipe.sampler_config(**sampler.given())
    paths = _paths(
        making, _numbered(making, [_slug(name) for name in classes for _ in range(making.num_images)])
    )
    with _Progress(config.steps, len(paths), making) as progress:
        made = pipe.generate(
            [None if label < 0 else label for label in labels],
            num_images=making.num_images,
            seed=making.seed,
            first_index=making.first_index,
            batch_size=making.batch_size,
            callback=progress,
            **sampler.given(),
        )
    settings = {"command": "generate", "model": model.model, **config.to_dict(), "dtype": model.dtype}
    named = [name for name in classes for _ in range(making.num_images)]
    _save(made, paths, making, [{**settings, "class": name} for name in named])
    columns = making.num_images if len(classes) > 1 and making.num_images > 1 else None
    _save_sheet(made.to_pil(), making, columns=columns)


@app.command
def edit(
    photo: Positional[Path],
    box: Annotated[tuple[int, int, int, int], arg(metavar="LEFT TOP WIDTH HEIGHT")],
    class_: Annotated[str, arg(name="class", metavar="NAME|NUMBER")],
    model: Model,
    sampler: Sampler,
    making: Making,
    rule: Literal["cover", "official"] = "cover",
    start_step: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint="(default: a sixth of the steps)")
    ] = None,
) -> None:
    """Replace what is in a box of a photograph by a class; writes the results and a before / mask / after sheet.

    Args:
        photo: A picture; cut to a square and resized to the model's size if it has another.
        box: In pixels of the picture at the model's size.
        class_: What is to appear there.
        rule: Which tokens the box masks: all that it touches, or as in the official notebook.
        start_step: The step to begin decoding at.
    """
    from maskgit import images

    pipe = model.load()
    config = pipe.sampler_config(**sampler.given())
    paths = _paths(making, _numbered(making, [f"{_slug(photo.stem)}-{_slug(class_)}"] * making.num_images))
    with _Progress(config.steps, len(paths), making) as progress:
        made = pipe.edit(
            photo,
            box,
            class_,
            num_images=making.num_images,
            rule=rule,
            start_step=start_step,
            seed=making.seed,
            first_index=making.first_index,
            batch_size=making.batch_size,
            callback=progress,
            **sampler.given(),
        )
    settings = {"command": "edit", "model": model.model, **config.to_dict(), "dtype": model.dtype}
    settings |= {
        "class": class_,
        "box": list(box),
        "rule": rule,
        "start_step": start_step,
        "photo": photo.name,
    }
    _save(made, paths, making, [settings] * len(paths))
    assert made.token_mask is not None, "an edit returns its mask"
    before = pipe.prepare(photo)
    row = [*images.to_pil(before), images.overlay_mask(before, made.token_mask), *made.to_pil()]
    _save_sheet(row, making, columns=len(row), captions=["before", "mask", *["after"] * len(paths)])


@app.command
def reconstruct(
    photos: Positional[tuple[Path, ...]],
    model: Model,
    out: Path = Path("out"),
    overwrite: bool = False,
) -> None:
    """Encode pictures to tokens and decode them again: what the tokenizer keeps; a sheet shows both.

    Args:
        photos: Pictures; cut to squares and resized to the model's size.
        out: The folder for the pictures; made if needed.
        overwrite: Replace pictures that are there.
    """
    from maskgit import images

    making = Making(out=out, overwrite=overwrite)
    pipe = model.load()
    paths = _paths(making, [f"{_slug(photo.stem)}-reconstructed" for photo in photos])
    sheet: list[Image.Image] = []
    for photo, path in zip(photos, paths, strict=True):
        made = pipe.reconstruct(photo)
        _save(made, [path], making, [{"command": "reconstruct", "model": model.model, "photo": photo.name}])
        sheet += [*images.to_pil(pipe.prepare(photo)), *made.to_pil()]
    _save_sheet(sheet, making, columns=2, captions=["original", "reconstruction"] * len(photos))


@app.command
def convert(
    source: Positional[Path],
    dest: Positional[Path],
    transformer: Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="")] = None,
    to_flax: bool = False,
    activation: Literal["swish", "relu"] = "swish",
    quantizer: Literal["vq", "gumbel"] = "vq",
) -> None:
    """Turn official checkpoints into a model folder, or back.

    Args:
        source: The tokenizer's checkpoint, a folder that holds `tokenizer_*` and `maskgit_*` checkpoints, or,
            with --to-flax, a model folder.
        dest: The folder to write.
        transformer: The transformer's checkpoint, if source is the tokenizer's.
        to_flax: Write official checkpoints for the JAX code instead.
        activation: The tokenizer's; not recorded in a checkpoint.
        quantizer: The tokenizer's; not recorded in a checkpoint.
    """
    from maskgit import convert as conversion
    from maskgit import hub

    if to_flax:
        for path in conversion.save_official(hub.from_pretrained(source), dest):
            print(path)
        return
    first, second = (source, transformer) if transformer else conversion.find_official(source)
    model = conversion.load_official(first, second, activation=activation, quantizer=quantizer)
    print(hub.save_model(model, dest))


@app.command
def info(model: Positional[str] = "", classes: bool = False) -> None:
    """Describe a model, or list the models that have names.

    Args:
        model: A name, folder or Hugging Face id; nothing lists the names.
        classes: List the model's classes too.
    """
    from maskgit import hub

    if not model:
        for name, entry in hub.REGISTRY.items():
            print(f"{name:14}{'bundled with the package' if isinstance(entry, Path) else entry.transformer}")
        return
    pipe = hub.from_pretrained(model)
    config = pipe.config
    for stage, module in (("tokenizer", pipe.tokenizer), ("transformer", pipe.transformer)):
        count = sum(p.numel() for p in module.parameters())
        print(f"{stage}: {count / 1e6:.1f} M parameters")
        for key, value in getattr(config, stage).to_dict().items():
            print(f"    {key}: {value}")
    print(f"image_size: {config.image_size}")
    print(f"label_dropout: {config.label_dropout}")
    print("sampler: " + ", ".join(f"{key} {value}" for key, value in config.sampler.to_dict().items()))
    if classes:
        for number in range(config.transformer.num_classes):
            print(f"{number:5} {config.class_names[number] if config.class_names else ''}")


for command in (pack, tokenize, train):
    app.command(command)


class _Progress:
    """A progress bar over decoding steps, on the terminal alone; used as a callback."""

    def __init__(self, steps: int, count: int, making: Making) -> None:
        self.total = steps * -(-count // making.batch_size)

    def __enter__(self) -> "_Progress":
        from tqdm import tqdm

        self.bar = tqdm(total=self.total, unit="step", leave=False, disable=None)
        return self

    def __call__(self, *_: object) -> None:
        self.bar.update()

    def __exit__(self, *_: object) -> None:
        self.bar.close()


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.casefold()).split())[:60] or "image"


def _numbered(making: Making, stems: list[str]) -> list[str]:
    return [f"{stem}-{making.seed}-{making.first_index + i:05}" for i, stem in enumerate(stems)]


def _paths(making: Making, stems: list[str]) -> list[Path]:
    """Return a path for each picture, before any work is done for one that could not be written."""
    seen = Counter[str]()
    paths = []
    for stem in stems:
        seen[stem] += 1
        paths.append(making.out / (f"{stem}.png" if seen[stem] == 1 else f"{stem}-{seen[stem]}.png"))
    for path in [*paths, making.out / SHEET]:
        if path.exists() and not making.overwrite:
            raise OutputError(f"{path} is there already; choose another --out, or say --overwrite.")
    return paths


def _save(made: "Output", paths: list[Path], making: Making, settings: list[dict[str, Any]]) -> None:
    from maskgit import images

    for i, (path, picture) in enumerate(zip(paths, made.to_pil(), strict=True)):
        recorded = {
            "maskgit": __version__,
            **settings[i],
            "seed": making.seed,
            "index": making.first_index + i,
        }
        images.save_png(path, picture, settings=recorded, overwrite=making.overwrite)


def _save_sheet(pictures: "list[Image.Image]", making: Making, **layout: Any) -> None:
    from maskgit import images

    path = making.out / SHEET
    images.save_png(path, images.contact_sheet(pictures, **layout), overwrite=making.overwrite)
    print(path)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return its exit code (2: a wrong input, told in one sentence)."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments in (["--version"], ["-V"]):
        print(__version__)
        return 0
    try:
        app.cli(
            prog="maskgit",
            description="Masked generative image transformers: generate and edit images, and train your own. Try `maskgit generate --class frog`.",
            args=arguments,
            sort_subcommands=False,
            config=(tyro.conf.OmitArgPrefixes,),
        )
    except MaskGITError as error:
        print(f"maskgit: {error}", file=sys.stderr)
        return EXIT_INPUT
    except KeyboardInterrupt:
        print("maskgit: interrupted.", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0
