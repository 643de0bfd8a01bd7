"""The commands that edit pictures and make wide ones; each writes its results and a sheet of them."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, UseAppendAction, arg

from maskgit.apps.cli.flags import Model, Sampler, about
from maskgit.apps.cli.output import (
    MAX_COLUMNS,
    MAX_SHEET,
    Making,
    Progress,
    label_of,
    numbered,
    picture_paths,
    save_explained,
    save_sheet,
)
from maskgit.errors import ConfigError
from maskgit.networks.classes import class_query

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from maskgit.pipeline import MaskGIT
    from maskgit.results import Output

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
# What a command makes, given the model and what all of them share: seed, batch_size, callback and so on.
Make = Callable[["MaskGIT", dict[str, Any]], "Output"]


def edit(
    photo: Positional[Path],
    box: UseAppendAction[
        tuple[Annotated[tuple[int, int, int, int], arg(metavar="LEFT TOP WIDTH HEIGHT")], ...]
    ],
    class_: Annotated[str, arg(name="class", metavar="NAME|NUMBER")],
    model: Model,
    sampler: Sampler,
    making: Making,
    rule: Annotated[Literal["cover", "official"], about("rule")] = "cover",
    start_step: Annotated[
        int | None, about("start_step", metavar="INT", hint="(default: a sixth of the steps)")
    ] = None,
    explain: bool = False,
) -> None:
    """Replace boxes of a photo with a class. Writes the results and a before / mask / after sheet.

    Args:
        photo: An image of any size; of a large one, the model sees a square around the boxes.
        box: Area to replace, in pixels of the photo as displayed; repeat for several.
        class_: Class to draw there; "none" for no class, if the model supports it, and "name:none" for a class of that
            name.
        explain: Also show how the image was decoded: explain.png, and forming.gif as an animation.
    """
    if not box:
        raise ConfigError("Give at least one --box LEFT TOP WIDTH HEIGHT.")

    def make(pipe: "MaskGIT", shared: dict[str, Any]) -> "Output":
        label = label_of(pipe, class_)
        return pipe.edit(photo, list(box), label, rule=rule, start_step=start_step, **shared)

    chosen = {"class": class_, "box": [list(b) for b in box], "rule": rule, "start_step": start_step}
    _edited("edit", photo, make, chosen, model, sampler, making, explain)


def inpaint(
    photo: Positional[Path],
    mask: Annotated[str, arg(metavar="FILE|alpha")],
    model: Model,
    sampler: Sampler,
    making: Making,
    class_: Annotated[str, arg(name="class", metavar="NAME|NUMBER")] = "guess",
    invert: Annotated[bool, about("invert")] = False,
    share: Annotated[float, about("share")] = 0.0,
    dilate: Annotated[int, about("dilate")] = 0,
    start_step: Annotated[int, about("start_step")] = 0,
    explain: bool = False,
) -> None:
    """Inpaint the masked part of a photo. Writes the results and a before / mask / after sheet.

    Args:
        photo: An image of any size; of a large one, the model sees a square around the masked part.
        mask: Black and white image of the photo's size, white where to inpaint; "alpha" inpaints the photo's
            transparent parts.
        class_: Class of the photo; "guess" lets the model choose the likeliest, "none" is no class, and "name:guess" a
            class of that name.
        explain: Also show how the image was decoded: explain.png, and forming.gif as an animation.
    """

    def make(pipe: "MaskGIT", shared: dict[str, Any]) -> "Output":
        return pipe.inpaint(
            photo,
            mask,
            _label_or_guess(pipe, class_),
            invert=invert,
            share=share,
            dilate=dilate,
            start_step=start_step,
            **shared,
        )

    chosen = {
        "class": class_,
        "mask": Path(mask).name,
        "invert": invert,
        "share": share,
        "dilate": dilate,
        "start_step": start_step,
    }
    _edited("inpaint", photo, make, chosen, model, sampler, making, explain)


def outpaint(
    photo: Positional[Path],
    model: Model,
    sampler: Sampler,
    making: Making,
    class_: Annotated[str, arg(name="class", metavar="NAME|NUMBER")] = "none",
    left: Annotated[int, about("left")] = 0,
    right: Annotated[int, about("right")] = 0,
    top: Annotated[int, about("top")] = 0,
    bottom: Annotated[int, about("bottom")] = 0,
    canvas: Annotated[tuple[int, int] | None, about("canvas", metavar="WIDTH HEIGHT", hint="")] = None,
    position: Annotated[tuple[int, int] | None, about("position", metavar="X Y", hint="")] = None,
) -> None:
    """Extend a photo beyond its edges.

    Args:
        photo: An image; if its shorter side is longer than the model's image size, it is first scaled down to that, and
            pixels are counted at that scale.
        class_: Class of the new parts; "none" for no class, if the model supports it.
    """

    def make(pipe: "MaskGIT", shared: dict[str, Any]) -> "Output":
        return pipe.outpaint(
            photo, left=left, right=right, top=top, bottom=bottom, canvas=canvas, position=position,
            label=label_of(pipe, class_), **shared,
        )  # fmt: skip

    chosen = {"class": class_, "left": left, "right": right, "top": top, "bottom": bottom}
    chosen |= {"canvas": canvas and list(canvas), "position": position and list(position)}
    made = _made("outpaint", [f"{photo.stem}-outpainted"], make, chosen, model, sampler, making, photo=photo)
    from maskgit.editing.outpaint import EMPTY

    assert made.before is not None, "what it began with"
    _save_before_after(made, (made.before[0] == EMPTY).all(0), making)


def panorama(
    classes: Annotated[tuple[str, ...], arg(name="class", metavar="NAME|NUMBER")],
    width: int,
    model: Model,
    sampler: Sampler,
    making: Making,
    height: Annotated[
        int | None, arg(metavar="INT", help_behavior_hint="(default: the model's image size)")
    ] = None,
    loop: bool = False,
) -> None:
    """Generate panoramas of any width.

    Args:
        classes: Class names or numbers, from left to right; "none" for no class.
        width: Width in pixels.
        height: Height in pixels.
        loop: Make the right edge continue at the left one.
    """

    def make(pipe: "MaskGIT", shared: dict[str, Any]) -> "Output":
        labels = [label_of(pipe, name) for name in classes]
        return pipe.panorama(labels, width, height=height, loop=loop, **shared)

    chosen = {"class": list(classes), "width": width, "height": height, "loop": loop}
    _made("panorama", ["-".join(classes)], make, chosen, model, sampler, making)


def vary(
    photo: Positional[Path],
    strength: float,
    model: Model,
    sampler: Sampler,
    making: Making,
    class_: Annotated[str, arg(name="class", metavar="NAME|NUMBER")] = "guess",
    explain: bool = False,
) -> None:
    """Make variations of an image by replacing a random share of its tokens.

    Args:
        photo: An image; centre-cropped to a square and resized to the model's image size.
        strength: Share of tokens to replace: 0 is the reconstruction, 1 a new image.
        class_: Class of the image; "guess" lets the model choose the likeliest, "none" is no class, and "name:guess" a
            class of that name.
        explain: Also show how the image was decoded: explain.png, and forming.gif as an animation.
    """

    def make(pipe: "MaskGIT", shared: dict[str, Any]) -> "Output":
        return pipe.vary(photo, strength, _label_or_guess(pipe, class_), **shared)

    _edited("vary", photo, make, {"class": class_, "strength": strength}, model, sampler, making, explain)


def interpolate(
    first: Positional[str],
    second: Positional[str],
    model: Model,
    sampler: Sampler,
    making: Making,
    at: float = 0.5,
    refine: int = 1,
    class_: Annotated[str, arg(name="class", metavar="NAME|NUMBER")] = "none",
) -> None:
    """Interpolate between two classes, or between two images.

    Args:
        first: A class, or an image file.
        second: Another of the same kind.
        at: For classes, share of steps decoded as the first; for images, share of tokens taken from the second.
        refine: For images, number of tokens on each side of a seam to replace.
        class_: For images, class of the replaced tokens.
    """
    photos = [_is_picture(name) for name in (first, second)]
    if photos[0] != photos[1]:
        raise ConfigError(f"Give two classes or two images, not one of each: {first} and {second}.")

    def make(pipe: "MaskGIT", shared: dict[str, Any]) -> "Output":
        if photos[0]:
            label = label_of(pipe, class_) if refine else None
            return pipe.interpolate_images(first, second, label, share=at, refine=refine, **shared)
        return pipe.interpolate_classes(label_of(pipe, first), label_of(pipe, second), switch=at, **shared)

    chosen = {"first": Path(first).name, "second": Path(second).name, "at": at}
    chosen |= {"class": class_, "refine": refine} if photos[0] else {}
    stem = f"{Path(first).stem}-{Path(second).stem}"
    _made("interpolate", [stem], make, chosen, model, sampler, making)


def _made(
    command: str,
    stem: list[str],
    make: Make,
    chosen: dict[str, Any],
    model: Model,
    sampler: Sampler,
    making: Making,
    *,
    photo: Path | None = None,
    explain: bool = False,
) -> "Output":
    """Make and write pictures, their settings in them, and a sheet of what is no edit."""
    from maskgit import images
    from maskgit.foundation.download import sha256

    making.check()
    pipe = model.load()
    config = pipe.sampler_config(**sampler.given())
    paths = picture_paths(making.out, making.overwrite, numbered(making, stem * making.num_images), explain)
    shared: dict[str, Any] = {
        "num_images": making.num_images,
        "seed": making.seed,
        "first_index": making.first_index,
        "batch_size": making.batch_size,
    } | sampler.given()
    if explain:
        shared["return_steps"] = True
    with Progress() as progress:
        made = make(pipe, shared | {"callback": progress})
    settings = model.recorded(command) | config.to_dict() | chosen
    if photo is not None:
        settings |= {"photo": photo.name, "photo_sha256": sha256(photo)}
    if made.class_guess is not None:
        settings["class"] = _say_guess(pipe, made)
    writing = making.marking.writing(photo)
    for number, (path, picture) in enumerate(zip(paths, made.to_pil(), strict=True)):
        recorded = settings | making.recorded(number)
        images.save_png(path, picture, settings=recorded, overwrite=making.overwrite, **writing)
    if explain:
        save_explained(pipe, made, making)
    if made.before is None:
        pictures = made.to_pil()[:MAX_SHEET]
        wide = pictures[0].width > pictures[0].height
        save_sheet(pictures, len(paths), making.out, making.marking.writing(), columns=1 if wide else None)
    return made


def _edited(
    command: str,
    photo: Path,
    make: Make,
    chosen: dict[str, Any],
    model: Model,
    sampler: Sampler,
    making: Making,
    explain: bool,
) -> None:
    """Make and write edits, and their before / mask / after sheet: of a large photo, the part the model saw."""
    stem = f"{photo.stem}-{chosen['class']}"
    made = _made(command, [stem], make, chosen, model, sampler, making, photo=photo, explain=explain)
    assert made.token_mask is not None, "an edit returns its mask"
    _save_before_after(made, made.token_mask if made.token_mask.ndim == 2 else made.token_mask[0], making)


def _save_before_after(made: "Output", mask: "Tensor", making: Making) -> None:
    """Write the before / mask / after sheet; the mask is of tokens or of pixels."""
    from maskgit import images
    from maskgit.images import provenance

    assert made.before is not None, "an edit says what it began with"
    after: list[Image.Image] = images.to_pil(made.images)[: MAX_COLUMNS - 2]
    provenance.say(after, made.source)
    row = [*images.to_pil(made.before), images.overlay_mask(made.before, mask), *after]
    captions = ["before", "mask", *["after"] * len(after)]
    # Wide ones are read from the top down.
    columns = 1 if row[0].width > 2 * row[0].height else len(row)
    writing = making.marking.writing()
    save_sheet(row, len(row), making.out, writing, columns=columns, captions=captions)


def _is_picture(name: str) -> bool:
    """Return whether a name means a picture: a file, or what is called like one and may be missing."""
    ending = Path(name).suffix
    return ending.lower() in PICTURE_ENDINGS or (ending != "" and Path(name).is_file())


def _label_or_guess(pipe: "MaskGIT", name: str) -> int | str | None:
    return name if name == "guess" else label_of(pipe, name)


def _say_guess(pipe: "MaskGIT", made: "Output") -> str:
    """Print the likeliest classes and return the first one's name."""
    assert made.class_guess is not None, "there is a guess"
    scores = made.class_guess.log_likelihoods
    names = pipe.class_names or tuple(str(i) for i in range(len(scores)))
    best = scores.argsort(descending=True)[:3].tolist()
    shown = ", ".join(f"{names[i].split(',')[0]} {float(scores[i]):.1f}" for i in best)
    print(f"class guessed, by log-likelihood: {shown}")
    return class_query(names[best[0]].split(",")[0], best[0], names)
