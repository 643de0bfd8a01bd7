"""What runs logged, as pictures of curves; drawn with Pillow, so that nothing else need be installed."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from maskgit.images import save_png, shorten

# Okabe and Ito's colours, which colour-blind readers tell apart, without yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
WIDTH, HEIGHT = 560, 340
LEFT, RIGHT, TOP, BOTTOM = 64, 24, 58, 40
# Drawn larger and made smaller again, which smooths lines.
SCALE = 2
# Above this share of a chart's values its top lies: a loss begins far above where it is worth looking at.
SHOWN_SHARE = 0.98
LOSSES = "losses.png"


class Curve(NamedTuple):
    """A line of a chart.

    Attributes:
        name: what it is.
        x, y: float (n,), in rising order of x.
        dots: whether each point is marked; for what is measured seldom.
        colour: a number in `COLOURS`; those of one run share it.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    dots: bool = False
    colour: int = 0


class Chart(NamedTuple):
    """Curves over one axis."""

    title: str
    x_title: str
    curves: tuple[Curve, ...]


class Logged:
    """What a run wrote into its scalars.jsonl."""

    def __init__(self, lines: Sequence[Mapping[str, Any]], batch_size: int = 0) -> None:
        """Take what was logged.

        Args:
            lines: by step.
            batch_size: images of a step, by which hours are told of runs that did not log them.
        """
        self.lines = lines
        timed = [line for line in lines if "images_per_second" in line]
        self._steps = np.array([0.0, *(line["step"] for line in timed)])
        if all("hours" in line for line in timed):
            self._hours = np.array([0.0, *(line["hours"] for line in timed)])
        else:
            seconds = [batch_size / max(line["images_per_second"], 1e-9) for line in timed]
            self._hours = np.concatenate([[0.0], np.cumsum(np.diff(self._steps) * seconds) / 3600])

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps at which a scalar was logged, and its finite values, float (n,) each."""
        found = [(line["step"], line[name]) for line in self.lines if name in line]
        points = np.array(found, float).reshape(-1, 2)
        points = points[np.isfinite(points).all(1)]
        return points[:, 0], points[:, 1]

    def hours(self, steps: np.ndarray) -> np.ndarray:
        """Return the hours that a run took up to some steps, float (n,)."""
        return np.interp(steps, self._steps, self._hours)

    @property
    def loss(self) -> str:
        """The name of the training loss: older runs logged that of single steps alone."""
        return "mean_loss" if any("mean_loss" in line for line in self.lines) else "loss"


def run_charts(logged: Logged) -> list[Chart]:
    """Return the charts of one run: the losses, other scores of the test data, the learning rate."""
    losses = [
        Curve("training", *logged.series(logged.loss)),
        Curve("test", *logged.series("test_loss"), True, 1),
    ]
    charts = [Chart("loss", "steps", tuple(losses))]
    for name, title in (("test_psnr", "PSNR of test images, dB"), ("learning_rate", "learning rate")):
        charts.append(Chart(title, "steps", (Curve("", *logged.series(name), name.startswith("test")),)))
    return charts


def comparison_charts(runs: Mapping[str, Logged]) -> list[Chart]:
    """Return the charts of several runs: training loss and test scores, over steps and over hours."""
    charts = []
    for title, scalar in (
        ("training loss", None),
        ("test loss", "test_loss"),
        ("PSNR of test images, dB", "test_psnr"),
    ):
        for x_title in ("steps", "hours"):
            curves = []
            for i, (name, logged) in enumerate(runs.items()):
                steps, values = logged.series(scalar or logged.loss)
                x = steps if x_title == "steps" else logged.hours(steps)
                curves.append(Curve(name, x, values, scalar is not None, i))
            charts.append(Chart(title, x_title, tuple(curves)))
    return charts


def draw_charts(charts: Sequence[Chart], path: Path) -> None:
    """Write charts that have anything to show as one PNG, two beside each other.

    Raises:
        OutputError: it cannot be written.
    """
    charts = [
        chart._replace(curves=curves)
        for chart in charts
        if (curves := tuple(curve for curve in chart.curves if len(curve.x)))
    ]
    if not charts:
        return
    columns = min(2, len(charts))
    rows = math.ceil(len(charts) / columns)
    sheet = Image.new("RGB", (columns * WIDTH * SCALE, rows * HEIGHT * SCALE), "white")
    for i, chart in enumerate(charts):
        drawing = Image.new("RGB", (WIDTH * SCALE, HEIGHT * SCALE), "white")
        _draw(chart, ImageDraw.Draw(drawing))
        sheet.paste(drawing, (i % columns * WIDTH * SCALE, i // columns * HEIGHT * SCALE))
    save_png(path, sheet.resize((columns * WIDTH, rows * HEIGHT), Image.Resampling.BOX), mark=False)


def _draw(chart: Chart, draw: ImageDraw.ImageDraw) -> None:
    small, large = (ImageFont.load_default(size * SCALE) for size in (11, 14))
    left, right = LEFT * SCALE, (WIDTH - RIGHT) * SCALE
    top, bottom = TOP * SCALE, (HEIGHT - BOTTOM) * SCALE
    values = np.concatenate([curve.y for curve in chart.curves])
    y_ticks = ticks(float(values.min()), float(np.quantile(values, SHOWN_SHARE)))
    x_ticks = ticks(0.0, max(float(curve.x[-1]) for curve in chart.curves))

    def across(x: np.ndarray) -> np.ndarray:
        return left + x / x_ticks[-1] * (right - left)

    def down(y: np.ndarray) -> np.ndarray:
        share = (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return bottom - np.clip(share, 0, 1) * (bottom - top)

    draw.text((left, 14 * SCALE), chart.title, "black", large, anchor="lm")
    for tick, y in zip(y_ticks, down(np.array(y_ticks)), strict=True):
        draw.line([(left, y), (right, y)], "#E0E0E0", SCALE)
        draw.text((left - 6 * SCALE, y), _number(tick), "#404040", small, anchor="rm")
    for tick, x in zip(x_ticks, across(np.array(x_ticks)), strict=True):
        draw.line([(x, bottom), (x, bottom + 4 * SCALE)], "#808080", SCALE)
        draw.text((x, bottom + 13 * SCALE), _number(tick), "#404040", small, anchor="mm")
    draw.text(((left + right) / 2, bottom + 29 * SCALE), chart.x_title, "#404040", small, anchor="mm")
    legend = left
    for curve in chart.curves:
        colour = COLOURS[curve.colour % len(COLOURS)]
        points = list(zip(across(curve.x).tolist(), down(curve.y).tolist(), strict=True))
        if len(points) > 1:
            draw.line(points, colour, 2 * SCALE, joint="curve")
        if curve.dots or len(points) == 1:
            for x, y in points:
                draw.ellipse([x - 3 * SCALE, y - 3 * SCALE, x + 3 * SCALE, y + 3 * SCALE], colour)
        if curve.name and legend < right:
            draw.rectangle([legend, 32 * SCALE, legend + 10 * SCALE, 42 * SCALE], colour)
            name = shorten(curve.name, draw, small, right - legend - 14 * SCALE)
            draw.text((legend + 14 * SCALE, 37 * SCALE), name, "black", small, anchor="lm")
            legend += int(draw.textlength(name, small)) + 28 * SCALE


def ticks(low: float, high: float) -> list[float]:
    """Return round numbers that enclose a range, three to seven of them."""
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
        low, high = low - max(abs(low) * 0.1, 1e-6), high + max(abs(high) * 0.1, 1e-6)
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    return [i * step for i in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
