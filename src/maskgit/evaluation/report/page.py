"""A report as one HTML page for people: its pictures and styles are in it, and nothing is fetched."""

import base64
import io
import itertools
import json
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from PIL import Image

from maskgit.evaluation.report.charts import Mark, colour, line_chart, number
from maskgit.evaluation.report.report import JSON_NAME, PAGE_NAME, Cost, Report, versions
from maskgit.evaluation.scores.classwise import ClassScore, best_and_worst
from maskgit.evaluation.scores.edits import STATES
from maskgit.evaluation.scores.memorisation import Memorisation, Row
from maskgit.evaluation.scores.names import BASELINES, Score, level
from maskgit.foundation.files import expand, write_bytes

# Images of at most this many pixels a side are enlarged with sharp pixels, and are kept exactly.
SMALL_SIDE = 96
# Nothing is loaded, and no script runs, whatever a class or a file is called.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def render(report: Report) -> str:
    """Return a report's page, HTML."""
    style = resources.files("maskgit").joinpath("assets/report.css").read_text("utf-8")
    sections = [
        _losses(report),
        _repeats(report),
        _sheet(report),
        _classes(report),
        _copies(report.memorisation, report.num_images),
        _edits(report),
        _curves(report),
        _settings(report),
    ]
    title = escape(report.title)
    kind = "pixels" if report.sheet and max(report.sheet[0].pixels.shape[:2]) <= SMALL_SIDE else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title} · evaluation</title>\n<style>\n{style}</style>\n</head>\n<body "
        f'class="{kind}">\n<main>\n'
        + _head(report)
        + "\n".join(section for section in sections if section)
        + f"\n<footer>Made by maskgit {escape(versions()['maskgit'])}. The numbers are in report.json "
        "beside this page.</footer>\n</main>\n</body>\n</html>\n"
    )


def _head(report: Report) -> str:
    what = (
        "Samples of a model" if report.kind == "samples" else "Reconstructions of real images by a tokenizer"
    )
    reference, evaluator = report.identities["reference"], report.identities["evaluator"]
    nets = [evaluator, *evaluator.get("also", {}).values()]
    networks = ", ".join(f"<b>{escape(net['identity'].split(',')[0])}</b>" for net in nets)
    facts = [
        f"<b>{report.num_images:,}</b> images",
        f"features of {networks}",
        f"{'against' if report.kind == 'samples' else 'of'} <b>{escape(str(reference['name']))}</b>",
    ]
    sampler = report.settings.get("sampler")
    if sampler:
        facts.append(
            f"<b>{sampler['steps']}</b> steps, <b>{escape(str(sampler['policy']))}</b>, guidance "
            f"<b>{sampler['guidance_scale']:g}</b>"
        )
    if "images" in report.settings:
        facts.append(
            f"labels <b>{escape(report.settings['images']['labels'])}</b>, seed "
            f"<b>{report.settings['images']['seed']}</b>"
        )
    if report.cost is not None:
        facts.append(f"an image: {_cost(report.cost)}")
    if "date" in report.run:
        facts.append(escape(str(report.run["date"])))
    command = f"<pre>{escape(report.run['command'])}</pre>\n" if "command" in report.run else ""
    k = evaluator.get("neighbours")
    cards = "\n".join(_card(score, k, first=place == 0) for place, score in enumerate(report.scores))
    return (
        f'<p class="kicker">{what}</p>\n<h1>{escape(report.title)}</h1>\n'
        f'<ul class="facts">{"".join(f"<li>{fact}</li>" for fact in facts)}</ul>\n{command}'
        f'<div class="scores">\n{cards}\n</div>\n{_cautions(report)}\n'
    )


def _cost(cost: Cost) -> str:
    """Return what an image costs in words."""
    passes = f"<b>{number(cost.forward_passes)}</b> forward passes"
    seconds = "" if cost.seconds is None else f", <b>{number(cost.seconds)}</b> s"
    return f"{passes}, <b>{number(cost.flops / 1e9)}</b> GFLOPs{seconds}"


def _card(score: Score, k: int | None, *, first: bool) -> str:
    better = f"<span>{score.better} is better</span>" if score.better else ""
    interval = ""
    if score.interval is not None:
        interval = f"{score.level} interval: {number(score.interval.low)} – {number(score.interval.high)}"
    neighbours = score.name.startswith(("precision", "recall", "density", "coverage"))
    about = [f"N = {score.num_images:,}"] if score.num_images else []
    about += [score.features] if score.features else []
    about += [f"k = {k}"] if neighbours and k else []
    return (
        f'<article class="score{" first" if first else ""}" '
        f'id="{escape(score.name)}"><header>{escape(score.title)}{better}</header><div><div '
        f'class="value">{number(score.value)}</div><div class="range">{interval}</div>{_scale(score)}</div>'
        f"<p>{escape(score.about)}</p><small>{escape(' · '.join(about))}</small></article>"
    )


def _scale(score: Score) -> str:
    """Return where a score lies between those of real images and of reconstructions, if these are known."""
    if not score.baselines:
        return ""
    values = [score.value, *(baseline.value for baseline in score.baselines.values())]
    low, high = min(0.0, *values), max(values)
    # Shares have a scale of their own.
    high = 1.0 if 0.5 < high <= 1 and not low else high or 1.0
    ticks, texts = [], []
    for name, baseline in score.baselines.items():
        place = 100 * (baseline.value - low) / (high - low)
        ticks.append(f'<s class="{name}" style="left: {place:.1f}%"></s>')
        texts.append(f'<li><i class="tick {name}"></i>{BASELINES[name]} {number(baseline.value)}</li>')
    width = 100 * (score.value - low) / (high - low)
    return (
        f'<div class="bar"><i style="width: {width:.1f}%"></i>{"".join(ticks)}</div>'
        f'<ul class="key">{"".join(texts)}</ul>'
    )


def _losses(report: Report) -> str:
    """Return the table that says what of the quality the tokenizer loses, and what the transformer."""
    rows = []
    for score in report.scores:
        values = [score.baselines[name].value for name in BASELINES if name in score.baselines]
        if len(values) < len(BASELINES) or not score.better:
            continue
        values.append(score.value)
        sign = 1 if score.better == "lower" else -1
        # Less than nothing is lost where a score rises on the way, as precision does of blurred pictures.
        lost = [sign * (after - before) + 0.0 for before, after in itertools.pairwise(values)]
        cells = "".join(f"<td>{number(value)}</td>" for value in (*values, *lost))
        rows.append(f"<tr><th>{escape(score.title)}</th>{cells}</tr>")
    if not rows:
        return ""
    return (
        '<section id="losses"><h2>Where quality is lost</h2><p class="lede">From real images to their reconstructions, '
        "and on to samples: what is lost first is the tokenizer’s, the rest the transformer’s. A negative loss is a "
        'score that rises on the way.</p><div class="wide"><table><thead><tr><th></th><th>real images</th>'
        "<th>reconstructions</th><th>samples</th><th>lost by the tokenizer</th><th>lost by the transformer</th>"
        f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _repeats(report: Report) -> str:
    """Return the table of the scores with other seeds."""
    if report.repeats is None:
        return ""
    titles = {score.name: score.title for score in report.scores}
    titles |= {
        f"{e.mask} {score.name}": f"{score.title}, {e.mask}" for e in report.edits for score in e.scores
    }
    rows = []
    for name, values in report.repeats.values.items():
        cells = "".join(f"<td>{number(value)}</td>" for value in (*report.repeats.spread(name), *values))
        rows.append(f"<tr><th>{escape(titles[name])}</th>{cells}</tr>")
    heads = "".join(f"<th>seed {seed}</th>" for seed in report.repeats.seeds)
    return (
        '<section id="repeats"><h2>Other seeds</h2><p class="lede">The same evaluation with other seeds, of the same '
        "model: differences smaller than this spread say nothing.</p>"
        '<div class="wide"><table><thead><tr><th></th><th>mean</th><th>standard deviation</th>'
        f"{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _cautions(report: Report) -> str:
    listed = list(report.cautions)
    if report.skipped:
        first = "; ".join(report.skipped[:3]) + ("; …" if len(report.skipped) > 3 else "")
        listed.append(f"{len(report.skipped):,} images could not be read: {first}")
    if not listed:
        return ""
    items = "".join(f"<li>{escape(caution)}</li>" for caution in listed)
    return f'<div class="cautions" role="note"><b>Read with care</b><ul>{items}</ul></div>'


def data_uri(pixels: NDArray) -> str:
    """Return a picture, uint8 (H, W, 3), as an address that holds it."""
    data = io.BytesIO()
    if max(pixels.shape[:2]) <= SMALL_SIDE:
        Image.fromarray(pixels).save(data, "PNG")
        kind = "png"
    else:
        Image.fromarray(pixels).save(data, "WEBP", quality=90)
        kind = "webp"
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"


def _figure(pixels: NDArray, caption: str, alt: str | None = None) -> str:
    height, width = pixels.shape[:2]
    text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return (
        f'<figure><img src="{data_uri(pixels)}" width="{width}" height="{height}" '
        f'alt="{escape(caption if alt is None else alt)}" loading="lazy">{text}</figure>'
    )


def _sheet(report: Report) -> str:
    if not report.sheet:
        return ""
    if report.pairs:
        pairs = zip(report.sheet[::2], report.sheet[1::2], strict=True)
        figures = "\n".join(f'<div class="pair">{_figure(*a)}{_figure(*b)}</div>' for a, b in pairs)
        half = len(report.sheet) // 2
        note = f"{half} images spread at random, each before its reconstruction. Nothing was chosen."
        return (
            f'<section id="images"><h2>Before and after</h2><p class="lede">{note}</p>'
            f'<div class="sheet pairs" style="--columns: 4">\n{figures}\n</div></section>'
        )
    small = max(report.sheet[0].pixels.shape[:2]) <= SMALL_SIDE
    beside = _beside(report, 4 if small else 2)
    columns = (16 if small else 8) // (2 if beside else 1)
    count = f"{len(report.sheet)} of {report.num_images:,}"
    note = f"{count}, drawn by index before any was made. Nothing was chosen."
    own = _block("Random samples", note, [_figure(*picture) for picture in report.sheet], columns)
    if beside:
        own = f'<div class="sides"><div>{own}</div><div>{beside}</div></div>'
    return f'<section id="images">{own}</section>'


def _beside(report: Report, columns: int) -> str:
    """Return real images with their reconstructions, which say what the tokenizer alone does to an image."""
    pairs = zip(report.rebuilt[::2], report.rebuilt[1::2], strict=True)
    figures = [f'<div class="pair">{_figure(*a)}{_figure(*b)}</div>' for a, b in pairs]
    note = f"{len(figures)} real images of the reference, each before its reconstruction by the tokenizer."
    return _block("Reconstructions", note, figures, columns) if figures else ""


def _block(title: str, note: str, figures: list[str], columns: int) -> str:
    sheet = "\n".join(figures)
    return f'<h2>{title}</h2><p class="lede">{note}</p><div class="sheet" style="--columns: {columns}">\n{sheet}\n</div>'


def _classes(report: Report) -> str:
    if not report.classes:
        return ""
    chosen = best_and_worst(report.classes)
    rows = [_class_row(entry, report) for entry in chosen]
    if len(chosen) < len(report.classes):
        half = len(rows) // 2
        rows = ["<h3>Best</h3>", *rows[:half], "<h3>Worst</h3>", *rows[half:]]
    key = (
        '<ul class="key"><li><i></i>samples that show their class</li>'
        '<li><i class="line"></i>interval</li><li><i class="tick"></i>the same of real images that are held out</li></ul>'
    )
    count = f"{len(chosen)} of {len(report.classes):,}" if len(chosen) < len(report.classes) else "All"
    return (
        f'<section id="classes"><h2>Classes</h2><p class="lede">{count} classes, best first. A linear '
        "probe of real images says what a sample shows; pictures are the first of their class by index.</p>"
        f"{key}\n{''.join(rows)}</section>"
    )


def _class_row(entry: ClassScore, report: Report) -> str:
    pictures = report.examples.get(entry.label, [])
    strip = (
        f'<div class="strip">{"".join(_figure(p.pixels, "", p.caption) for p in pictures)}</div>'
        if pictures
        else ""
    )
    ceiling = "" if entry.real is None else f'<s style="left: {100 * entry.real:.1f}%"></s>'
    low, high = entry.interval
    return (
        f'<div class="class{" pictured" if pictures else ""}"><div '
        f'class="name">{escape(report.class_name(entry.label))}'
        f"<small>{entry.num_images:,} images</small></div>"
        f'<div class="bar"><i style="width: {100 * entry.agreement:.1f}%"></i>'
        f'<u style="left: {100 * low:.1f}%; width: {100 * (high - low):.1f}%"></u>{ceiling}</div>'
        f'<div class="share">{100 * entry.agreement:.0f} %</div>{strip}</div>\n'
    )


def _copies(found: Memorisation | None, num_images: int) -> str:
    if found is None:
        return ""
    text = (
        f"The nearest of {found.num_training:,} training images, by distance of features. The median sample "
        f"is <b>{number(found.sample_distance)}</b> from its nearest training image"
    )
    if found.real_distance is not None and found.real_authenticity is not None:
        text += (
            f"; real images of the reference are <b>{number(found.real_distance)}</b> from theirs, and their "
            f"authenticity is <b>{number(found.real_authenticity)}</b>"
        )
    blocks = [
        ("Random samples, outlined, and their nearest training images", found.random),
        (f"The {len(found.nearest)} of all {num_images:,} samples that look most like copies", found.nearest),
    ]
    shown = "".join(
        f'<h3>{title}</h3><div class="copies">{"".join(map(_copy, rows))}</div>' for title, rows in blocks
    )
    return f'<section id="copies"><h2>Is anything copied?</h2><p class="lede">{text}.</p>{shown}</section>'


def _copy(row: Row) -> str:
    figures = [_figure(row.image, f"{row.sample}", f"sample {row.sample}"), "<span>→</span>"]
    if not row.neighbours:
        pairs = zip(row.numbers, row.distances, strict=True)
        named = ", ".join(f"{place} ({number(distance)})" for place, distance in pairs)
        return f'<div class="copy named">{"".join(figures)}<p>training images {named}</p></div>'
    for place, distance, pixels in zip(row.numbers, row.distances, row.neighbours, strict=True):
        figures.append(_figure(pixels, number(distance), f"training image {place}"))
    return f'<div class="copy">{"".join(figures)}</div>'


def _edits(report: Report) -> str:
    """Return the table of how well parts of real images are filled in."""
    if not report.edits:
        return ""
    rows = []
    for edited in report.edits:
        for place, score in enumerate(edited.scores):
            mask = f'<th rowspan="{len(edited.scores)}">{escape(edited.mask)}</th>' if not place else ""
            values = "".join(f"<td>{number(score.values[state])}</td>" for state in STATES)
            ends = "" if score.interval is None else " – ".join(map(number, score.interval))
            ends += f" ({level(score.name)})" if ends else ""
            better = f" ({score.better} is better)" if score.better else ""
            rows.append(f"<tr>{mask}<td>{escape(score.title)}{better}</td>{values}<td>{ends}</td></tr>")
    heads = "".join(f"<th>{escape(title)}</th>" for title in ("score", *STATES.values(), "interval of edits"))
    pictures = report.edit_pictures
    triples = "\n".join(
        f'<div class="triple">{"".join(_figure(*picture) for picture in pictures[place : place + 3])}</div>'
        for place in range(0, len(pictures), 3)
    )
    sheet = f'<div class="sheet pairs" style="--columns: 3">\n{triples}\n</div>' if pictures else ""
    return (
        f'<section id="edits"><h2>Edits</h2><p class="lede">{report.edits[0].num_images:,} real images, parts of which '
        "are masked and filled in with their own class. Beside each score stands the same score where the part is left "
        "untouched, and where the tokenizer’s reconstruction is put there. The Fréchet distance is from the same parts "
        "of other real images; the feature distance is 1 less the cosine from what was there; the seam ratio is the "
        f"gradient across the mask’s border over that within.</p>{sheet}"
        f'<div class="wide"><table><thead><tr><th>mask</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        "</section>"
    )


def _curves(report: Report) -> str:
    if not report.curves:
        return ""
    axes = list(report.curves[0].settings)
    numeric = [axis for axis in axes if all(not isinstance(p.settings[axis], str) for p in report.curves)]
    x_axis = (numeric or axes)[0]
    names = [score.name for score in report.curves[0].scores]
    lines: dict[str, list[Any]] = {}
    for point in report.curves:
        others = ", ".join(
            str(value) if isinstance(value, str) else f"{name} {value}"
            for name, value in point.settings.items()
            if name != x_axis
        )
        lines.setdefault(others, []).append(point)
    charts = []
    for place, name in enumerate(names):
        title = report.curves[0].scores[place].title
        marks = {
            line: sorted(
                (Mark(p.settings[x_axis], p.scores[place].value, p.scores[place].interval) for p in points),
                key=lambda mark: (isinstance(mark.x, str), mark.x),
            )
            for line, points in lines.items()
        }
        chart = line_chart(marks, x_axis.replace("_", " "), f"{title} by {x_axis}")
        charts.append(
            '<figure class="chart" '
            f'id="curve-{escape(name)}"><figcaption>{escape(title)}</figcaption>{chart}</figure>'
        )
    key = ""
    if len(lines) > 1:
        items = "".join(
            f'<li><i style="background: {colour(i)}"></i>{escape(line)}</li>' for i, line in enumerate(lines)
        )
        key = f'<ul class="key">{items}</ul>'
    return (
        '<section id="curves"><h2>Other settings</h2><p class="lede">Each point is a run of '
        f"{report.curve_images:,} "
        "images with the same labels and seed. Fréchet distances of fewer images are larger: compare "
        "points with each "
        f'other, not with the score above.</p>{key}<div class="charts">{"".join(charts)}</div>{_costs(report)}</section>'
    )


def _costs(report: Report) -> str:
    """Return the table of what the runs of a curve cost and score."""
    if any(point.cost is None for point in report.curves):
        return ""
    head = [name.replace("_", " ") for name in report.curves[0].settings]
    head += ["forward passes", "GFLOPs", "seconds", *(score.title for score in report.curves[0].scores)]
    rows = []
    for point in report.curves:
        assert point.cost is not None
        passes, flops, seconds = point.cost
        numbers = [passes, flops / 1e9, seconds, *(score.value for score in point.scores)]
        cells = [str(value) for value in point.settings.values()]
        cells += ["—" if value is None else number(value) for value in numbers]
        rows.append("".join(f"<td>{escape(cell)}</td>" for cell in cells))
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table></div>'


def _settings(report: Report) -> str:
    tables = [(name.capitalize(), values) for name, values in report.identities.items()]
    tables += [("Settings", report.settings), ("Versions", versions()), ("Run", report.run)]
    blocks = "".join(f"<div><h3>{escape(name)}</h3>{_table(_flat(values))}</div>" for name, values in tables)
    return (
        '<section id="settings"><h2>How it was measured</h2><p class="note">An interval says how '
        "much other samples of the same model would move the number, not how far another network or "
        "reference would."
        f'</p><div class="tables">{blocks}</div></section>'
    )


def _flat(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name} · ")
        else:
            yield prefix + name, value


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    cells = []
    for name, value in rows:
        text = (
            ", ".join(map(str, value))
            if isinstance(value, Sequence) and not isinstance(value, str)
            else value
        )
        text = "—" if text is None or text == "" else str(text)
        text = text if len(text) <= 300 else text[:299] + "…"
        is_hash = len(text) == 64 and all(c in "0123456789abcdef" for c in text)
        kind = ' class="hash"' if is_hash else ""
        cells.append(f"<dt>{escape(name)}</dt><dd{kind}>{escape(text)}</dd>")
    return f"<dl>{''.join(cells)}</dl>"


def write_report(report: Report, folder: str | Path) -> tuple[Path, Path]:
    """Write a report as JSON and HTML, each whole or not at all, and return the two paths.

    Raises:
        OutputError: one cannot be written.
    """
    values, page = expand(folder) / JSON_NAME, expand(folder) / PAGE_NAME
    text = json.dumps(report.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
    write_bytes(page, render(report).encode(errors="backslashreplace"))
    # A file name that is no text, in surrogates, becomes the escapes that JSON has for them.
    write_bytes(values, text.encode(errors="backslashreplace") + b"\n")
    return values, page
