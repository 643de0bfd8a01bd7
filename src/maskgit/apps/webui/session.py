"""What the page's tabs share: the model, its classes, and the words around a result."""

import functools
import html
import json
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from maskgit import images
from maskgit.apps.cli.flags import Marking, Model, Speed
from maskgit.apps.cli.output import slug
from maskgit.apps.webui import pictures
from maskgit.apps.webui.pictures import Saved, Shelf
from maskgit.apps.webui.streaming import Step
from maskgit.errors import ConfigError, ImageError, MaskGITError
from maskgit.foundation.checks import check_range
from maskgit.images import provenance
from maskgit.networks.classes import class_query
from maskgit.pipeline import MaskGIT
from maskgit.results import Output

# Decoded together, so that each step shows all.
MAX_IMAGES = 16
# Not a class: no class at all, and the one that the model finds.
NO_CLASS, GUESS = "none", "guess"
# Two people's work goes on at once; others wait in line.
WORK: dict[str, Any] = {"concurrency_limit": 2, "concurrency_id": "model"}
# No event is an API for others.
PRIVATE: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}

# Values of components by the component, as Gradio hands them over and takes them back.
Values = dict[Any, Any]
Label = int | str | None


@dataclass(frozen=True)
class Studio:
    """A model on its page.

    Attributes:
        pipe: the model.
        name: what it was loaded by.
        shelf: where finished pictures lie.
        marking: what their files say of where they come from.
    """

    pipe: MaskGIT
    name: str
    shelf: Shelf
    marking: Marking = field(default_factory=Marking)

    def recorded(self, command: str) -> dict[str, Any]:
        """Return what a picture's metadata says of the model and of what made it."""
        dtype: Any = str(next(self.pipe.transformer.parameters()).dtype).removeprefix("torch.")
        engine = self.pipe.engine
        quantized = engine is not None and bool(engine.quantize)
        fast = not quantized and (dtype != "float32" or (engine is not None and engine.graphs))
        speed = Speed(exact=not (fast or quantized), fast=fast, int8=quantized)
        return Model(model=self.name, dtype=dtype, speed=speed).recorded(command)

    def classes(self, *, guess: bool = False) -> list[tuple[str, str]]:
        """Return what there is to choose from, as (what is shown, what `label` takes)."""
        names = self.pipe.class_names or tuple(
            f"class {i}" for i in range(self.pipe.config.transformer.num_classes)
        )
        listed = [(name, str(i)) for i, name in enumerate(names)]
        if self.pipe.config.label_dropout:
            listed = [("no class", NO_CLASS), *listed]
        return [("guess from the image", GUESS), *listed] if guess else listed

    def label(self, choice: Any) -> Label:
        """Return the label that a choice of class means.

        Raises:
            ConfigError: there is none.
        """
        if choice is None or choice == "":
            raise ConfigError("Choose a class first.")
        return GUESS if choice == GUESS else None if choice == NO_CLASS else int(choice)

    def choice(self, recorded: Any) -> str:
        """Return the choice that a picture's recorded class means.

        Raises:
            ConfigError: this model has no such class.
        """
        if recorded in (NO_CLASS, GUESS):
            return str(recorded)
        return str(self.pipe.label(str(recorded)))

    def class_name(self, label: Label) -> str:
        """Return what a label is recorded as; it means the same to `MaskGIT.label`."""
        if label is None or isinstance(label, str):
            return label or NO_CLASS
        names = self.pipe.class_names
        return class_query(names[label], label, names) if names else str(label)

    def decode(self, step: Step, source: str = provenance.GENERATED) -> list[Image.Image]:
        """Return what a step's tokens look like; for `source` see `provenance.say`."""
        decoded = images.to_pil(self.pipe.decode_tokens(step.tokens))
        provenance.say(decoded, source if self.marking.mark else None)
        return decoded

    def shown(self, made: list[Image.Image]) -> list[Image.Image]:
        """Return pictures to be shown, which say what they are if the files are to."""
        if not self.marking.mark:
            for picture in made:
                picture.info.pop(provenance.KEY, None)
        return made

    def save(
        self, made: Output, settings: dict[str, Any], seed: int, first: int, photo: Path | None = None
    ) -> list[Saved]:
        """Write what was made, of a photo or of nothing, each picture with its settings."""
        files, writing = [], self.marking.writing(photo)
        for index, picture in enumerate(made.to_pil(), first):
            stem = f"{slug(str(settings['class']).split(',')[0])}-{seed}-{index:05}"
            files.append(self.shelf.save(picture, stem, settings | {"seed": seed, "index": index}, writing))
        return files

    def read_settings(self, path: str, *commands: str) -> dict[str, Any]:
        """Return the settings of a picture that one of some commands made with this model.

        Raises:
            ImageError: the picture holds none.
            ConfigError: another command or another model made it.
        """
        try:
            settings = images.read_settings(path)
        except ImageError as error:
            raise ImageError(str(error).replace(path, Path(path).name)) from error
        command, model = settings.get("command"), settings.get("model")
        if command not in commands:
            raise ConfigError(
                f"{Path(path).name} was made by {command!r:.80}; this form takes images made by "
                f"{', '.join(commands)}."
            )
        if model != self.name:
            raise ConfigError(
                f"{Path(path).name} was made by the model {model!r:.80}, but this page runs {self.name!r}."
            )
        return settings


def whole(name: str, text: Any, high: int) -> int:
    """Return the whole number that a field holds.

    Raises:
        ConfigError: it holds something else, or one that is out of range.
    """
    try:
        number = int(str(text).strip())
    except ValueError as error:
        raise ConfigError(f"{name} must be a whole number, but is {text!s:.40}.") from error
    check_range(name, number, 0, high)
    return number


def count_of(count: int) -> str:
    """Return a number of pictures in words."""
    return f"{count} image{'' if count == 1 else 's'}"


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.started = time.perf_counter()

    def __str__(self) -> str:
        return f"{time.perf_counter() - self.started:.1f} s"


def say(error: MaskGITError) -> str:
    """Show an error as a notice, and return it as the line above the pictures."""
    gr.Warning(html.escape(str(error)))
    return pictures.alert(str(error))


Handler = Callable[[Values], Iterator[Values]]


def sentences(status: gr.HTML) -> Callable[[Handler], Handler]:
    """Return a decorator for handlers of events: what a user can mend is said in a status line."""

    def decorate(handler: Handler) -> Handler:
        @functools.wraps(handler)
        def wrapped(values: Values) -> Generator[Values, None, None]:
            try:
                yield from handler(values)
            except MaskGITError as error:
                yield {status: say(error)}

        return wrapped

    return decorate


def buttons(text: str) -> tuple[gr.Button, gr.Button]:
    """Return the button that starts a tab's work and the one that stops it."""
    with gr.Row(elem_classes="actions"):
        start = gr.Button(text, variant="primary", scale=3, min_width=120)
        stop = gr.Button("Stop", scale=1, min_width=80)
    return start, stop


def connect(
    start: gr.Button,
    stop: gr.Button,
    handler: Handler,
    inputs: list[Any],
    status: gr.HTML,
    outputs: list[Any],
) -> None:
    """Let a button start a handler, and another stop it."""
    # Said by the browser itself, at once: others' work may come first.
    waiting = f"() => {json.dumps(pictures.note('Queued…'))}"
    start.click(None, None, status, js=waiting, **PRIVATE)
    running = start.click(sentences(status)(handler), set(inputs), [status, *outputs], **WORK, **PRIVATE)
    stop.click(lambda: pictures.note("Stopped."), None, status, cancels=[running], queue=False, **PRIVATE)
