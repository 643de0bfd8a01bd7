"""The tab that edits an uploaded photo."""

import html
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from maskgit.apps.settings import SETTINGS
from maskgit.apps.webui import edits, pictures
from maskgit.apps.webui.box_editor import Boxer
from maskgit.apps.webui.edits import OPERATIONS, SIDES
from maskgit.apps.webui.forms import SamplerForm, SubjectForm
from maskgit.apps.webui.session import (
    GUESS,
    NO_CLASS,
    PRIVATE,
    Clock,
    Studio,
    Values,
    buttons,
    connect,
    count_of,
    say,
    sentences,
)
from maskgit.apps.webui.streaming import Step, watch
from maskgit.errors import ConfigError, ImageError, MaskGITError
from maskgit.foundation.notes import listening
from maskgit.images import provenance
from maskgit.results import Output

# How far sliders reach: tokens, and times the model's image size.
MAX_DILATE, MAX_AMOUNT = 4, 4
PAINT = gr.Brush(default_size=48, colors=[edits.PAINT_COLOUR], color_mode="fixed")


class EditTab:
    """The tab's fields, and what happens when they are used."""

    def __init__(self, studio: Studio) -> None:
        """Build the tab in the present place of the page."""
        self.studio = studio
        self.photo = gr.State(None)
        with gr.Row(elem_classes="desk"):
            with gr.Column(scale=2, min_width=300, elem_classes="fields"):
                self.file = gr.File(label="Photo", file_types=["image"], height=132, elem_classes="upload")
                self.operation = gr.Radio(
                    [(operation.title, name) for name, operation in OPERATIONS.items()],
                    value="inpaint",
                    label="Operation",
                )
                self.groups = self._groups()
            with gr.Column(scale=5, min_width=300, elem_classes="results"):
                self.stage = self._stage()
        with gr.Row(elem_classes="desk"):
            with gr.Column(scale=2, min_width=300, elem_classes="fields"):
                self.subject = SubjectForm(studio, count=1, guess=True)
                with gr.Accordion("Sampler", open=False):
                    self.sampler = SamplerForm(studio)
                start, stop = buttons("Edit")
                self.remake = gr.UploadButton(
                    "Load settings from a PNG…", file_types=[".png"], size="sm", elem_classes="remake"
                )
            with gr.Column(scale=5, min_width=300, elem_classes="results"):
                self.status = gr.HTML(pictures.note("Upload a photo, choose an operation, then press Edit."))
                self.shown = gr.HTML(
                    pictures.empty("The result appears here, with a slider that shows the original.")
                )
        self._connect(start, stop)

    def _groups(self) -> dict[str, gr.Group]:
        """Make the fields of each operation; only one operation's are seen."""
        groups = {}
        image_size = self.studio.pipe.config.image_size
        patch = self.studio.pipe.tokenizer.patch_size
        for name in OPERATIONS:
            with gr.Group(visible=name == "inpaint") as groups[name]:
                if name == "inpaint":
                    self.dilate = gr.Slider(
                        0,
                        MAX_DILATE,
                        value=0,
                        step=1,
                        label="Grow the mask",
                        info=SETTINGS["dilate"].help,
                    )
                elif name == "edit":
                    self.boxer = Boxer()
                elif name == "outpaint":
                    self.sides = gr.CheckboxGroup(list(SIDES), value=["left", "right"], label="Sides")
                    self.amount = gr.Slider(
                        patch,
                        MAX_AMOUNT * image_size,
                        value=image_size // 2,
                        step=patch,
                        label="Pixels to add on each side",
                        info=f"Counted after scaling the photo so that its shorter side is at most {image_size}",
                    )
                else:
                    self.strength = gr.Slider(
                        0,
                        1,
                        value=0.5,
                        step=0.05,
                        label="Strength",
                        info="0 keeps the image, 1 makes a new one",
                    )
        return groups

    def _stage(self) -> dict[str, gr.Column]:
        """Make what the photo is shown in: to paint on, to draw a box on, or to look at."""
        stage = {}
        with gr.Column(visible=True, elem_classes="canvas painted") as stage["inpaint"]:
            self.editor = gr.ImageEditor(
                label="Paint over what to replace",
                type="pil",
                format="png",
                sources=(),
                transforms=(),
                layers=False,
                brush=PAINT,
                height=520,
                buttons=[],
                placeholder="Upload a photo, then paint over what to replace.",
            )
        with gr.Column(visible=False, elem_classes="canvas") as stage["edit"]:
            self.boxer.draw()
        with gr.Column(visible=False, elem_classes="canvas") as stage["look"]:
            self.view = gr.HTML(pictures.empty("Upload a photo first."))
        return stage

    def _connect(self, start: gr.Button, stop: gr.Button) -> None:
        pictured = [self.photo, self.editor, self.view, self.status, *self.boxer.outputs]
        fields = [self.operation, self.dilate, self.sides, self.amount, self.strength]
        fields += self.subject.fields + self.sampler.fields
        inputs = [self.photo, self.editor, *self.boxer.numbers, *fields]
        self.file.change(self._uploaded, {self.file}, pictured, **PRIVATE)
        shown = [*self.groups.values(), *self.stage.values(), self.subject.label]
        self.operation.change(
            self._chosen, {self.operation, self.subject.label}, shown, queue=False, **PRIVATE
        )
        self.boxer.connect()
        connect(start, stop, self._edit, inputs, self.status, [self.shown])
        self.remake.upload(
            sentences(self.status)(self._remake),
            {self.remake, self.photo},
            pictured + fields,
            **PRIVATE,
        )

    def _uploaded(self, values: Values) -> Values:
        """Show a photo that was uploaded, or that none is there any more."""
        cleared = {
            self.photo: None,
            self.editor: None,
            self.view: pictures.empty("Upload a photo first."),
        } | self.boxer.cleared()
        if values[self.file] is None:
            return cleared
        try:
            photo = edits.read_photo(values[self.file])
        except MaskGITError as error:
            return cleared | {self.status: say(error)}
        return {
            self.photo: photo,
            self.editor: {"background": photo.shown, "layers": [], "composite": None},
            self.view: f'<div class="view">{pictures.image(photo.shown, photo.path.name)}</div>',
            self.status: pictures.note(f"{photo.path.name}, {photo.size[0]} × {photo.size[1]} pixels"),
        } | self.boxer.show(photo)

    def _chosen(self, values: Values) -> Values:
        """Show the fields and the stage of an operation."""
        chosen = values[self.operation]
        staged = chosen if chosen in self.stage else "look"
        return (
            {group: gr.update(visible=name == chosen) for name, group in self.groups.items()}
            | {column: gr.update(visible=name == staged) for name, column in self.stage.items()}
            | {self.subject.label: self._classes(chosen, values[self.subject.label])}
        )

    def _classes(self, operation: str, label: Any) -> dict[str, Any]:
        """Return what the field for the class offers for an operation."""
        classes = self.studio.classes(guess=OPERATIONS[operation].guesses)
        allowed = [value for _, value in classes]
        # The first that the operation would take by itself; a box wants a class with a name.
        wanted = [label, GUESS, NO_CLASS] if operation == "outpaint" else [label, GUESS]
        named = next(value for value in allowed if value.isdigit())
        return gr.update(choices=classes, value=next((v for v in wanted if v in allowed), named))

    def _arguments(self, values: Values) -> dict[str, Any]:
        """Return what is recorded of the edit that the fields say.

        Raises:
            MaskGITError: a field holds something that is not allowed.
        """
        operation = values[self.operation]
        if operation == "inpaint":
            layers = (values[self.editor] or {}).get("layers") or []
            mask = edits.painted(layers)
            return {"mask_png": edits.pack_mask(mask), "dilate": int(values[self.dilate])}
        if operation == "edit":
            return {"box": [self.boxer.read(values)]}
        if operation == "outpaint":
            return {side: int(values[self.amount]) if side in values[self.sides] else 0 for side in SIDES}
        return {"strength": float(values[self.strength])}

    def _edit(self, values: Values) -> Iterator[Values]:
        clock, pipe, photo = Clock(), self.studio.pipe, values[self.photo]
        if photo is None:
            raise ImageError("There is no photo yet; upload one first.")
        command = values[self.operation]
        chosen = self._arguments(values)
        label, shared = self.subject.read(values)
        config = self.sampler.read(values)
        yield {self.status: pictures.note("Decoding…")}
        notes: list[str] = []

        def make(**options: Any) -> Output:
            with listening(notes.append):
                return OPERATIONS[command].make(pipe, photo, chosen, label, **options)

        for made in watch(partial(make, **shared, **vars(config))):
            if isinstance(made, Step):
                yield {
                    self.status: pictures.note(
                        f"Step {made.number % config.steps + 1} of {config.steps} · {clock}"
                    ),
                    self.shown: pictures.gallery(
                        self.studio.decode(made, provenance.EDITED),
                        ["the model's view"] * len(made.tokens),
                    ),
                }
                continue
            if made.class_guess is not None:
                label = made.class_guess.label
            name = self.studio.class_name(label)
            settings = self.studio.recorded(command) | config.to_dict() | chosen
            settings |= {"class": name, "photo": photo.path.name, "photo_sha256": photo.sha256}
            files = self.studio.save(made, settings, shared["seed"], shared["first_index"], photo.path)
            pairs = edits.pairs(photo, made)
            self.studio.shown([after for _, after in pairs])
            for text in notes:
                gr.Info(html.escape(text))
            guessed = f" · guessed class: {name.split(',')[0]}" if made.class_guess else ""
            alts = [f"{name.split(',')[0]} {number}" for number in range(len(files))]
            yield {
                self.status: pictures.note(f"{count_of(len(files))} in {clock}{guessed}"),
                self.shown: pictures.before_and_after(pairs, alts, files),
            }

    def _remake(self, values: Values) -> Iterator[Values]:
        """Fill the form from a picture that was made on this page."""
        path, photo = values[self.remake], values[self.photo]
        settings = self.studio.read_settings(path, *OPERATIONS)
        if photo is None or settings.get("photo_sha256") != photo.sha256:
            raise ConfigError(
                f"{Path(path).name} was made from {settings.get('photo')!s:.80}; upload that photo first."
            )
        command, chosen = settings["command"], edits.chosen_of(settings)
        filled: Values = {self.operation: command}
        if command == "inpaint":
            filled |= {
                self.editor: edits.repainted(photo, chosen),
                self.dilate: _reaching(chosen["dilate"], MAX_DILATE),
            }
        elif command == "edit":
            filled |= self.boxer.show(photo, chosen["box"][0])
        elif command == "outpaint":
            amounts = {chosen[side] for side in SIDES} - {0}
            if len(amounts) != 1:
                raise ConfigError(
                    "The sides of this image were extended by different amounts, but the form has one amount for all; use `maskgit outpaint`."
                )
            filled |= {
                self.sides: [side for side in SIDES if chosen[side]],
                self.amount: _reaching(amounts.pop(), MAX_AMOUNT * self.studio.pipe.config.image_size),
            }
        else:
            filled |= {self.strength: chosen["strength"]}
        subject = self.subject.fill(settings)
        label = subject.pop(self.subject.label)
        filled |= subject | self.sampler.fill(self.sampler.config(settings))
        filled[self.subject.label] = self._classes(command, label)
        filled[self.status] = pictures.note(
            f"Settings loaded from {Path(path).name}; press Edit to make the image again."
        )
        yield filled


def _reaching(value: int, high: int) -> dict[str, Any]:
    """Return what sets a slider, which a value from a picture's settings makes longer if it must."""
    return gr.update(value=value, maximum=max(value, high))


def edit_tab(studio: Studio) -> None:
    """Build the tab in the present place of the page."""
    EditTab(studio)
