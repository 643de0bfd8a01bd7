"""A box on a photo: drawn with the pointer, or given as numbers."""

from importlib import resources
from typing import Any

import gradio as gr

from maskgit.apps.webui import pictures
from maskgit.apps.webui.edits import Photo
from maskgit.apps.webui.session import PRIVATE, Values
from maskgit.errors import RegionError

NAMES = ("Left", "Top", "Width", "Height")
NO_BOX = [0, 0, 0, 0]


class Boxer:
    """Four numbers, and the photo that they are drawn on."""

    def __init__(self) -> None:
        """Make the numbers in the present place of the page; `draw` makes the photo."""
        with gr.Row(elem_classes="box-numbers"):
            self.numbers: list[Any] = [
                gr.Number(0, label=name, precision=0, minimum=0, min_width=60) for name in NAMES
            ]

    def draw(self) -> None:
        """Make the photo in the present place of the page."""
        data = resources.files("maskgit").joinpath("assets/webui")
        self.canvas = gr.HTML(
            NO_BOX,
            html_template=data.joinpath("boxer.html").read_text("utf-8"),
            js_on_load=data.joinpath("boxer.js").read_text("utf-8"),
            photo="",
            size=[1, 1],
            sharp="",
        )
        self.outputs = [self.canvas, *self.numbers]

    def connect(self) -> None:
        """Let the numbers follow the pointer, and the drawn box the numbers.

        The browser does so by itself: a box is there as soon as it is drawn, however far away the server is.
        """
        self.canvas.submit(None, self.canvas, self.numbers, js="box => box", **PRIVATE)
        for field in self.numbers:
            field.input(None, self.numbers, self.canvas, js="(...box) => [box.map(Number)]", **PRIVATE)

    def read(self, values: Values) -> list[int]:
        """Return the box (left, top, width, height).

        Raises:
            RegionError: there is none.
        """
        box = [int(values[field] or 0) for field in self.numbers]
        if not (box[2] and box[3]):
            raise RegionError("There is no box yet: draw one on the photo or enter its coordinates.")
        return box

    def show(self, photo: Photo, box: list[int] | None = None) -> Values:
        """Return what shows a photo with a box, or without one."""
        box = box or NO_BOX
        sharp = "pixels" if max(photo.size) <= pictures.SMALL_SIDE else ""
        uri = pictures.data_uri(photo.shown)
        shown = gr.update(value=box, photo=uri, size=list(photo.size), sharp=sharp)
        return {self.canvas: shown} | dict(zip(self.numbers, box, strict=True))

    def cleared(self) -> Values:
        """Return what shows that there is no photo."""
        return {self.canvas: gr.update(value=NO_BOX, photo="")} | dict.fromkeys(self.numbers, 0)
