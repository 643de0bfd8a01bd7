"""The tab that makes the same pictures with two settings, side by side."""

import html
from collections.abc import Iterator
from functools import partial

import gradio as gr

from maskgit.apps.webui import pictures
from maskgit.apps.webui.forms import SamplerForm, SubjectForm
from maskgit.apps.webui.session import Clock, Studio, Values, buttons, connect
from maskgit.apps.webui.streaming import Step, watch
from maskgit.sampler.config import SamplerConfig

SIDES = ("A", "B")


def compare_tab(studio: Studio) -> None:
    """Build the tab in the present place of the page."""
    with gr.Row(elem_classes="desk even"):
        with gr.Column(min_width=260, elem_classes="fields"):
            subject = SubjectForm(studio, count=4)
            start, stop = buttons("Compare")
        own = studio.pipe.config.sampler
        other = studio.pipe.sampler_config(policy="confidence" if own.policy == "halton" else "halton")
        forms = []
        for side, config in zip(SIDES, (own, other), strict=True):
            with gr.Column(min_width=260, elem_classes="fields"):
                forms.append(SamplerForm(studio, name=side, config=config))
    with gr.Column(elem_classes="results"):
        status = gr.HTML(
            pictures.note("Change the settings of A or B, then press Compare. Both use the same seed.")
        )
        shown = gr.HTML(pictures.empty("The images of both appear here side by side."))

    def compare(values: Values) -> Iterator[Values]:
        pipe = studio.pipe
        label, shared = subject.read(values)
        configs = [form.read(values) for form in forms]
        titles = _differences(configs)
        name = studio.class_name(label).split(",")[0]
        numbers = range(shared["first_index"], shared["first_index"] + shared["num_images"])
        alts = [f"{name} {number}" for number in numbers]
        columns = [pictures.empty("not started")] * len(SIDES)
        times = []
        yield {status: pictures.note("Decoding…")}
        for turn, config in enumerate(configs):
            clock = Clock()
            for made in watch(partial(pipe.generate, label, **shared, **vars(config))):
                if isinstance(made, Step):
                    columns[turn] = pictures.gallery(studio.decode(made), alts)
                    said = f"{SIDES[turn]}: step {made.number + 1} of {config.steps} · {clock}"
                    yield {status: pictures.note(said), shown: _side_by_side(titles, columns)}
                    continue
                settings = studio.recorded("generate") | config.to_dict()
                settings |= {"class": studio.class_name(label)}
                files = studio.save(made, settings, shared["seed"], shared["first_index"])
                columns[turn] = pictures.gallery(studio.shown(made.to_pil()), alts, files)
                times.append(f"{SIDES[turn]} took {clock}")
        yield {status: pictures.note(" · ".join(times)), shown: _side_by_side(titles, columns)}

    inputs = subject.fields + [field for form in forms for field in form.fields]
    connect(start, stop, compare, inputs, status, [shown])


def _differences(configs: list[SamplerConfig]) -> list[str]:
    """Return what each settings has that another has not."""
    listed = [config.to_dict() for config in configs]
    differing = [name for name, value in listed[0].items() if any(one[name] != value for one in listed)]
    return [", ".join(f"{name} {one[name]}" for name in differing) or "same settings" for one in listed]


def _side_by_side(titles: list[str], columns: list[str]) -> str:
    """Return both sides' pictures under what sets them apart."""
    shown = "".join(
        f"<section><h3>{side}<small>{html.escape(title)}</small></h3>{column}</section>"
        for side, title, column in zip(SIDES, titles, columns, strict=True)
    )
    return f'<div class="sides">{shown}</div>'
