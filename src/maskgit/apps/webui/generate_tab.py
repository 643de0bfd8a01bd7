"""The tab that makes new pictures of a class."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import gradio as gr

from maskgit.apps.webui import pictures
from maskgit.apps.webui.forms import SamplerForm, SubjectForm
from maskgit.apps.webui.session import PRIVATE, Clock, Studio, Values, buttons, connect, count_of, sentences
from maskgit.apps.webui.streaming import Step, watch


def generate_tab(studio: Studio) -> None:
    """Build the tab in the present place of the page."""
    with gr.Row(elem_classes="desk"):
        with gr.Column(scale=2, min_width=300, elem_classes="fields"):
            subject = SubjectForm(studio, count=4)
            sampler = SamplerForm(studio)
            start, stop = buttons("Generate")
            remake = gr.UploadButton(
                "Load settings from a PNG…", file_types=[".png"], size="sm", elem_classes="remake"
            )
        with gr.Column(scale=5, min_width=300, elem_classes="results"):
            status = gr.HTML(pictures.note("Choose a class, then press Generate."))
            shown = gr.HTML(pictures.empty("The images appear here as they form."))

    def generate(values: Values) -> Iterator[Values]:
        clock, pipe = Clock(), studio.pipe
        label, shared = subject.read(values)
        config = sampler.read(values)
        name = studio.class_name(label).split(",")[0]
        numbers = range(shared["first_index"], shared["first_index"] + shared["num_images"])
        alts = [f"{name} {number}" for number in numbers]
        yield {status: pictures.note("Decoding…")}
        for made in watch(partial(pipe.generate, label, **shared, **vars(config))):
            if isinstance(made, Step):
                yield {
                    status: pictures.note(f"Step {made.number + 1} of {config.steps} · {clock}"),
                    shown: pictures.gallery(studio.decode(made), alts),
                }
                continue
            settings = studio.recorded("generate") | config.to_dict() | {"class": studio.class_name(label)}
            files = studio.save(made, settings, shared["seed"], shared["first_index"])
            yield {
                status: pictures.note(f"{count_of(len(files))} in {clock}"),
                shown: pictures.gallery(studio.shown(made.to_pil()), alts, files),
            }

    def fill(values: Values) -> Iterator[Values]:
        path = values[remake]
        settings = studio.read_settings(path, "generate")
        yield (
            subject.fill(settings)
            | sampler.fill(sampler.config(settings))
            | {
                status: pictures.note(
                    f"Settings loaded from {Path(path).name}; press Generate to make the image again."
                )
            }
        )

    connect(start, stop, generate, subject.fields + sampler.fields, status, [shown])
    remake.upload(sentences(status)(fill), {remake}, [status, *subject.fields, *sampler.fields], **PRIVATE)
