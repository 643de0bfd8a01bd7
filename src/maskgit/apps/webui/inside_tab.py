"""The tab that shows how a picture came to be."""

import html
from collections.abc import Iterator
from functools import partial

import gradio as gr

from maskgit import explain, images
from maskgit.apps.webui import pictures
from maskgit.apps.webui.forms import SamplerForm, SubjectForm
from maskgit.apps.webui.session import Clock, Studio, Values, buttons, connect
from maskgit.apps.webui.streaming import Step, watch
from maskgit.results import Output, Trace

# A panel of tokens is about so many pixels wide.
PANEL_SIDE = 480
# Tokens a side up to which their numbers have room.
MAX_NUMBERED = 16


def inside_tab(studio: Studio) -> None:
    """Build the tab in the present place of the page."""
    with gr.Row(elem_classes="desk"):
        with gr.Column(scale=2, min_width=300, elem_classes="fields"):
            subject = SubjectForm(studio, count=0)
            sampler = SamplerForm(studio)
            start, stop = buttons("Look inside")
        with gr.Column(scale=5, min_width=300, elem_classes="results"):
            status = gr.HTML(pictures.note("Choose a class, then press Look inside."))
            shown = gr.HTML(
                pictures.empty(
                    "The step that fixed each token, and the model's confidence in it, appear here."
                )
            )

    def look(values: Values) -> Iterator[Values]:
        clock, pipe = Clock(), studio.pipe
        label, shared = subject.read(values)
        config = sampler.read(values)
        name = studio.class_name(label).split(",")[0]
        yield {status: pictures.note("Decoding…")}
        for made in watch(partial(pipe.generate, label, return_steps=True, **shared, **vars(config))):
            if isinstance(made, Step):
                yield {
                    status: pictures.note(f"Step {made.number + 1} of {config.steps} · {clock}"),
                    shown: pictures.gallery(studio.decode(made), [name]),
                }
                continue
            settings = studio.recorded("generate") | config.to_dict() | {"class": studio.class_name(label)}
            saved = studio.save(made, settings, shared["seed"], shared["first_index"])[0]
            yield {status: pictures.note(f"Decoded in {clock}"), shown: explained(studio, made, name, saved)}

    connect(start, stop, look, subject.fields + sampler.fields, status, [shown])


def explained(studio: Studio, made: Output, name: str, saved: pictures.Saved) -> str:
    """Return how one image was decoded, as HTML.

    Args:
        studio: whose model decoded it.
        made: one image with its trace.
        name: what it is of.
        saved: its file.
    """
    trace = made.trace
    assert trace is not None, "asked for"
    steps, rows, columns = trace.tokens.shape[1:]
    cell = max(1, PANEL_SIDE // max(rows, columns))
    fixed_at, confidence = trace.fixed_at[0], trace.final_confidence[0]
    drawn = explain.step_map(fixed_at, steps, cell)
    sure = explain.confidence_map(confidence, fixed_at < 0, cell)
    frames = explain.animation(studio.pipe, made)
    files = [saved, *_files(studio, made, frames, saved.name.removesuffix(".png"))]
    links = (pictures.link(*pair) for pair in zip(files, ("Image", "Explanation", "Animation"), strict=True))
    panels = (
        (
            "The image as it forms",
            pictures.film(studio.shown(frames), name),
            "Move the slider to see each step.",
        ),
        (
            "The step that fixed each token",
            pictures.image(
                drawn, f"A map of {rows} × {columns} tokens: the step that fixed each", sharp=False
            ),
            f"From dark (step 1) to light (step {steps}).",
        ),
        (
            "Confidence, in percent",
            pictures.image(
                sure, f"A map of {rows} × {columns} tokens: the probability of each when fixed", sharp=False
            ),
            "The probability of each token when it was fixed; darker is higher.",
        ),
        ("The tokens", _grid(trace), "The code of each token; hover over one for its step and confidence."),
    )
    shown = "".join(
        f"<figure><h3>{title}</h3>{panel}<figcaption><span>{about}</span></figcaption></figure>"
        for title, panel, about in panels
    )
    return f'<p class="links">{"".join(links)}</p><div class="panels">{shown}</div>'


def _files(studio: Studio, made: Output, frames: list, stem: str) -> list[pictures.Saved]:
    """Write the explanation and the animation."""
    picture, film = (studio.shelf.place(f"{stem}-{name}") for name in ("explained.png", "forming.gif"))
    writing = studio.marking.writing()
    images.save_png(picture, explain.explain(made), **writing)
    explain.save_animation(film, frames, **writing)
    return [studio.shelf.saved(picture), studio.shelf.saved(film)]


def _grid(trace: Trace) -> str:
    """Return the tokens as a grid, in the colours of the step that fixed each."""
    codes, steps = trace.tokens[0, -1], trace.tokens.shape[1]
    fixed_at, confidence = trace.fixed_at[0], trace.final_confidence[0]
    rows, columns = codes.shape
    colours = explain.colours(fixed_at.numpy().clip(0) / max(1, steps - 1))
    cells = []
    for row in range(rows):
        for column in range(columns):
            code, step = int(codes[row, column]), int(fixed_at[row, column]) + 1
            about = (
                f"row {row + 1}, column {column + 1}: code {code}, fixed at step {step} of {steps} "
                f"with {100 * float(confidence[row, column]):.1f} %"
            )
            red, green, blue = (int(part) for part in colours[row, column])
            ink = "#202124" if 0.299 * red + 0.587 * green + 0.114 * blue > 112 else "#fff"
            number = code if max(rows, columns) <= MAX_NUMBERED else ""
            cells.append(
                f'<span style="background:rgb({red},{green},{blue});color:{ink}" '
                f'title="{html.escape(about)}">{number}</span>'
            )
    return (
        f'<div class="tokens" style="--columns:{columns}" role="img" '
        f'aria-label="{rows} × {columns} tokens with their codes">{"".join(cells)}</div>'
    )
