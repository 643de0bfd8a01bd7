"""Line charts as inline SVG, coloured by the page's own variables.

Lengths are in units of the drawing, WIDTH × HEIGHT, which the page stretches to its column.
"""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from maskgit.evaluation.metrics import Interval

WIDTH, HEIGHT = 320, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 10, 38
NUM_COLOURS = 6


class Mark(NamedTuple):
    """One measured point.

    Attributes:
        x: a place on the horizontal axis: a number, or a word where the axis has no scale.
        y: the value.
        interval: of the value, or None.
    """

    x: float | str
    y: float
    interval: Interval | None


def number(value: float) -> str:
    """Return a number as people read it, with four digits that matter."""
    if abs(value) >= 1e4:
        return f"{value:,.0f}"
    if value and abs(value) < 1e-3:
        return f"{value:.2e}".replace("-", "−")
    return f"{value:.4g}".replace("-", "−")


def line_chart(lines: Mapping[str, Sequence[Mark]], x_title: str, label: str) -> str:
    """Return a chart of lines by name as an SVG element.

    Args:
        lines: at least one, each with at least one mark; those of one chart share the kind of x.
        x_title: what the horizontal axis is.
        label: what the chart shows, for readers who do not see it.
    """
    marks = [mark for line in lines.values() for mark in line]
    ends = [end for mark in marks for end in (mark.y, *(mark.interval or ()))]
    ticks = _ticks(min(ends), max(ends))
    low, high = ticks[0], ticks[-1]
    places = _places([mark.x for mark in marks])

    def at(y: float) -> float:
        return TOP + (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for tick in ticks:
        y = at(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>')
    for x, place in places.items():
        text = x if isinstance(x, str) else f"{x:g}"
        parts.append(
            f'<text x="{place:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{escape(text)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x_title)}</text>')
    for index, line in enumerate(lines.values()):
        parts += _line(line, places, at, colour(index), index - (len(lines) - 1) / 2)
    return "".join(parts) + "</svg>"


def colour(index: int) -> str:
    """Return the page's variable for the colour of a line."""
    return f"var(--c{index % NUM_COLOURS + 1})"


def _line(
    line: Sequence[Mark],
    places: dict[float | str, float],
    at: Callable[[float], float],
    stroke: str,
    offset: float,
) -> list[str]:
    points = [(places[mark.x], at(mark.y)) for mark in line]
    parts = []
    for mark, (x, _) in zip(line, points, strict=True):
        if mark.interval is not None:
            # Beside each other, so that whiskers of several lines can be told apart.
            side = x + 2.5 * offset
            top, bottom = at(mark.interval.high), at(mark.interval.low)
            parts.append(
                f'<line class="whisker" stroke="{stroke}" x1="{side:.1f}" x2="{side:.1f}" y1="{top:.1f}" '
                f'y2="{bottom:.1f}"/>'
            )
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    parts.append(f'<polyline class="series" stroke="{stroke}" points="{path}"/>')
    parts += [f'<circle class="dot" fill="{stroke}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>' for x, y in points]
    return parts


def _places(values: Sequence[float | str]) -> dict[float | str, float]:
    """Return where each value lies on the horizontal axis: numbers to scale, words evenly."""
    left, right = LEFT + 14, WIDTH - RIGHT - 10
    words = any(isinstance(value, str) for value in values)
    order: list[float | str] = list(dict.fromkeys(values)) if words else sorted(set(values))
    if len(order) == 1:
        return {order[0]: (left + right) / 2}
    if words:
        return dict(zip(order, np.linspace(left, right, len(order)).tolist(), strict=True))
    first, last = float(order[0]), float(order[-1])
    return {x: left + (float(x) - first) / (last - first) * (right - left) for x in order}


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers that enclose a range, three to seven of them."""
    if not np.isfinite([low, high]).all():
        low, high = 0.0, 1.0
    if high - low < 1e-9 * max(abs(high), abs(low), 1e-9):
        low, high = low - max(abs(low) * 0.1, 1e-6), high + max(abs(high) * 0.1, 1e-6)
    raw = (high - low) / 4
    power = 10.0 ** np.floor(np.log10(raw))
    step = float(next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999) * power)
    first, last = int(np.floor(low / step + 1e-9)), int(np.ceil(high / step - 1e-9))
    return [i * step for i in range(first, last + 1)]
