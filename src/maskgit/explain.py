"""How an image came to be, as a picture and as an animation.

Shapes: B images, T steps, h × w the token grid, H × W pixels.
"""

import io
import math
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from maskgit import images
from maskgit.errors import ConfigError, ImageError, OutputError
from maskgit.foundation import files
from maskgit.foundation.checks import check_choice, check_count
from maskgit.images import provenance
from maskgit.images.provenance import Sign
from maskgit.model import Model
from maskgit.results import Output, Trace

# Lightness, chroma and hue (degrees) in OKLCh at equal distances. Lightness goes straight up or down, so that
# equal differences look equal, also in grey and to the colour-blind.
STEP_MAP = ((0.30, 0.13, 305), (0.45, 0.11, 270), (0.60, 0.11, 220), (0.75, 0.14, 165), (0.90, 0.17, 108))
CONFIDENCE_MAP = ((0.95, 0.06, 95), (0.79, 0.13, 65), (0.63, 0.17, 30), (0.46, 0.15, 0), (0.30, 0.10, 310))
# Where the logarithmic scale of probabilities begins: about one code in a thousand.
LEAST_CONFIDENCE = 0.001
KNOWN = (222, 222, 226)
PAPER, INK, FAINT = (255, 255, 255), (32, 33, 36), (112, 114, 120)

MARGIN, GAP = 28, 22
TITLE_SIZE, HEAD_SIZE, TEXT_SIZE = 20, 14, 12
# A panel is about so many pixels wide, an animated image at least so many.
PANEL_SIDE, FRAME_SIDE, SMALL_FRAME_SIDE = 320, 256, 128

# How tokens that are not fixed yet are shown: the weight of the mask's colour over what was sampled for them.
UNFIXED = {"faded": 0.78, "masked": 1.0, "sampled": 0.0}
MASK_COLOUR = (226, 227, 232)
# File endings of animations, and how Pillow writes them.
ANIMATIONS: dict[str, dict[str, Any]] = {
    ".gif": {"format": "GIF", "disposal": 1},
    ".webp": {"format": "WEBP", "lossless": True, "method": 4},
}


def colours(values: np.ndarray, anchors: Sequence[tuple[float, float, float]] = STEP_MAP) -> np.ndarray:
    """Return the colours of numbers.

    Args:
        values: floats in [0, 1] of any shape.
        anchors: (lightness, chroma, hue in degrees) in OKLCh at equal distances, hue without a jump.

    Returns:
        uint8 (…, 3), sRGB.

    Source: Ottosson, A perceptual color space for image processing (2020); IEC 61966-2-1 for sRGB.
    """
    places = np.linspace(0, 1, len(anchors))
    # The short way round the circle of hues.
    hues = np.unwrap([hue for _, _, hue in anchors], period=360)
    lightness = np.interp(values, places, [anchor[0] for anchor in anchors])
    chroma = np.interp(values, places, [anchor[1] for anchor in anchors])
    hue = np.deg2rad(np.interp(values, places, hues))
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=-1)
    to_cones = np.array(
        [
            [1, 0.3963377774, 0.2158037573],
            [1, -0.1055613458, -0.0638541728],
            [1, -0.0894841775, -1.2914855480],
        ]
    )
    to_rgb = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = ((lab @ to_cones.T) ** 3 @ to_rgb.T).clip(0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.rint(255 * encoded).astype(np.uint8)


def step_map(fixed_at: Tensor, steps: int, cell: int) -> Image.Image:
    """Show the step that fixed each token, dark for the first and light for the last; steps count from 1.

    Args:
        fixed_at: int64 (h, w), in [0, steps), or −1 for tokens known from the start (see `Trace.fixed_at`).
        steps: T.
        cell: pixels a side of a token; numbers are written where they have room.

    Returns:
        A PIL image of mode RGB, w · cell × h · cell.
    """
    steps_hw = fixed_at.numpy()
    values = colours(steps_hw.clip(0) / max(1, steps - 1))
    texts = np.where(steps_hw < 0, "", (steps_hw + 1).astype(str))
    return _cells(np.where(steps_hw[..., None] < 0, np.array(KNOWN, np.uint8), values), texts, cell)


def confidence_map(confidence: Tensor, known: Tensor, cell: int) -> Image.Image:
    """Show the probability of each token when it was fixed, in percent, dark for 1; the scale is logarithmic.

    Args:
        confidence: float (h, w) in [0, 1] (see `Trace.final_confidence`).
        known: bool (h, w), True = known from the start.
        cell: pixels a side of a token; numbers are written where they have room.

    Returns:
        A PIL image of mode RGB, w · cell × h · cell.
    """
    values, known_hw = confidence.double().clamp(LEAST_CONFIDENCE, 1).numpy(), known.numpy()
    texts = np.array([f"{100 * p:.{0 if p >= 0.0095 else 1}f}" for p in values.flat]).reshape(values.shape)
    shades = colours(1 - np.log(values) / math.log(LEAST_CONFIDENCE), CONFIDENCE_MAP)
    filled = np.where(known_hw[..., None], np.array(KNOWN, np.uint8), shades)
    return _cells(filled, np.where(known_hw, "", texts), cell)


def explain(
    made: Output, *, title: str = "How the image was decoded", captions: Sequence[str] | None = None
) -> Image.Image:
    """Show each image beside the step that fixed each of its tokens and how sure the model was of it.

    Args:
        made: what a pipeline returned with `return_steps=True`.
        title: one line above all.
        captions: a line under each image, or None.

    Returns:
        A PIL image of mode RGB; a row for each image, and what the colours mean below.

    Raises:
        ConfigError: there is no trace, or the captions are not as many as the images.
        ImageError: the picture would have more than 100 million pixels.
    """
    trace = _trace(made)
    count, steps, rows, columns = trace.tokens.shape
    if captions is not None and len(captions) != count:
        raise ConfigError(f"There are {len(captions)} captions for {count} images.")
    patch = made.images.shape[2] // rows
    cell = patch * max(1, round(PANEL_SIDE / (patch * max(rows, columns))))
    width, height = columns * cell, rows * cell
    line = TEXT_SIZE + 10 if captions is not None else 0
    head, legend = MARGIN + TITLE_SIZE + 18 + HEAD_SIZE + 12, 2 * TEXT_SIZE + 30
    size = (
        2 * MARGIN + 3 * width + 2 * GAP,
        head + count * (height + line) + (count - 1) * GAP + legend + MARGIN,
    )
    sheet, draw = _sheet(size)
    lefts = [MARGIN + i * (width + GAP) for i in range(3)]
    title = images.shorten(title, draw, _font(TITLE_SIZE), size[0] - 2 * MARGIN)
    draw.text((MARGIN, MARGIN), title, INK, _font(TITLE_SIZE), anchor="lt")
    headings = ("image", "step that fixed each token", "probability when fixed, in percent")
    for left, heading in zip(lefts, headings, strict=True):
        draw.text((left, head - 12), heading, INK, _font(HEAD_SIZE), anchor="ls")
    fixed_at, confidence = trace.fixed_at, trace.final_confidence
    for i, picture in enumerate(made.to_pil()):
        top = head + i * (height + line + GAP)
        panels = (
            picture.resize((width, height), Image.Resampling.NEAREST),
            step_map(fixed_at[i], steps, cell),
            confidence_map(confidence[i], fixed_at[i] < 0, cell),
        )
        for left, panel in zip(lefts, panels, strict=True):
            sheet.paste(panel, (left, top))
        if captions is not None:
            text = images.shorten(captions[i], draw, _font(TEXT_SIZE), width)
            draw.text((MARGIN + width / 2, top + height + 8), text, FAINT, _font(TEXT_SIZE), anchor="mt")
    top = size[1] - MARGIN - legend + 16
    if bool((fixed_at < 0).any()):
        draw.rectangle((MARGIN, top, MARGIN + 11, top + 11), KNOWN)
        draw.text((MARGIN + 19, top + 6), "known from the start", FAINT, _font(TEXT_SIZE), anchor="lm")
    bar = colours(np.arange(steps) / max(1, steps - 1))
    _legend(sheet, draw, (lefts[1], top, width), bar, [str(i + 1) for i in range(steps)])
    smooth = colours(np.linspace(0, 1, width), CONFIDENCE_MAP)
    _legend(sheet, draw, (lefts[2], top, width), smooth, ["0.1", "1", "10", "100"])
    provenance.say([sheet], made.source)
    return sheet


def animation(
    model: Model,
    made: Output,
    *,
    unfixed: str = "faded",
    scale: int | None = None,
    columns: int | None = None,
    batch_size: int = 16,
) -> list[Image.Image]:
    """Show images forming, a frame for each step.

    Args:
        model: what made them.
        made: what it returned with `return_steps=True`.
        unfixed: how tokens that are not fixed yet are shown, a name in `UNFIXED`: what was sampled for them
            faded, the mask's grey alone, or what was sampled alone.
        scale: how many times each pixel is repeated; None enlarges small images to 256 pixels, several to
            128.
        columns: images a row; None makes the sheet nearly square.
        batch_size: images decoded together.

    Returns:
        T + 1 PIL images of mode RGB: the start, with every token to be predicted grey, and what is fixed
        after each step; the last shows the images themselves.

    Raises:
        ConfigError: there is no trace, or a setting is not allowed.
        ImageError: the frames would have more than 100 million pixels.
    """
    trace = _trace(made)
    check_choice("unfixed", unfixed, UNFIXED)
    batch_size = check_count("batch_size", batch_size, 1, 65_536)
    count, steps = trace.tokens.shape[:2]
    side = FRAME_SIDE if count == 1 else SMALL_FRAME_SIDE
    scale = max(1, round(side / max(made.images.shape[2:]))) if scale is None else scale
    scale = check_count("scale", scale, 1, 1024)
    if (steps + 1) * made.images[:, 0].numel() * scale**2 > images.MAX_PIXELS:
        raise ImageError(
            f"{steps + 1} frames of {count} images at scale {scale} have more than {images.MAX_PIXELS:,} "
            "pixels; show fewer images or choose a smaller scale."
        )
    unknown = torch.cat([trace.unknown, torch.zeros_like(trace.unknown[:, :1])], dim=1)
    frames = []
    for step in range(steps + 1):
        weight = UNFIXED[unfixed] if step else 1.0
        if step == steps:
            pixels = made.images
        else:
            tokens = trace.tokens[:, max(0, step - 1)]
            parts = [_decoded(model, part) for part in tokens.split(batch_size)]
            pixels = _cover(torch.cat(parts), unknown[:, step], weight)
        sheet = images.contact_sheet(pixels, columns=columns, padding=6, scale=scale)
        sheet = sheet.crop((6, 6, sheet.width - 6, sheet.height - 6))
        fixed = 1 - float(unknown[:, step].sum() / unknown[:, 0].sum().clamp(min=1))
        frames.append(_frame(sheet, f"step {step} of {steps}", fixed))
    provenance.say(frames, made.source)
    return frames


def save_animation(
    path: str | os.PathLike[str],
    frames: Sequence[Image.Image],
    *,
    milliseconds: int = 250,
    hold: int = 2000,
    overwrite: bool = True,
    mark: bool = True,
    sign: Sign | None = None,
) -> None:
    """Write frames as an animation that repeats for ever, whole or not at all.

    Args:
        path: a name that ends in .gif or .webp (without loss); missing folders are made.
        frames: at least one, all of one size. A frame that equals the one before lengthens it.
        milliseconds: how long a frame is shown.
        hold: how long the last one is.
        overwrite: whether a file of that name may be replaced.
        mark, sign: as for `images.encode`.

    Raises:
        ConfigError, ImageError: a number is out of range, or there are no frames.
        OutputError: the name ends otherwise, or the file cannot be written or may not be replaced.
    """
    path = files.expand(path)
    if path.suffix.lower() not in ANIMATIONS:
        raise OutputError(f"{path} must end in {' or '.join(ANIMATIONS)}, the formats of animations.")
    if not overwrite and path.exists():
        raise OutputError(f"{path} exists already; choose another name or allow it to be overwritten.")
    data = encode_animation(
        frames, path.suffix.lower(), milliseconds=milliseconds, hold=hold, mark=mark, sign=sign
    )
    files.write_bytes(path, data, overwrite=overwrite)


def encode_animation(
    frames: Sequence[Image.Image],
    suffix: str,
    *,
    milliseconds: int = 250,
    hold: int = 2000,
    mark: bool = True,
    sign: Sign | None = None,
) -> bytes:
    """Return frames as the file of an animation.

    Args:
        suffix: a name in `ANIMATIONS`.
        frames, milliseconds, hold, mark, sign: as for `save_animation`.

    Raises:
        ConfigError, ImageError: a number is out of range, or there are no frames.
    """
    options = ANIMATIONS[suffix]
    if not frames or len({frame.size for frame in frames}) > 1:
        raise ImageError("An animation needs at least one frame, and all of the same size.")
    milliseconds = check_count("milliseconds", milliseconds, 20, 60_000)
    hold = check_count("hold", hold, milliseconds, 60_000)
    durations = [milliseconds] * (len(frames) - 1) + [hold]
    data = io.BytesIO()
    rest = list(frames[1:])
    form, source = options["format"].lower(), provenance.source_of(frames)
    xmp = provenance.packet(source) if mark and source is not None else None
    if xmp and form == "webp":
        options = options | {"xmp": xmp}
    frames[0].save(data, save_all=True, append_images=rest, duration=durations, loop=0, **options)
    written = data.getvalue()
    if xmp and form == "gif":
        written = provenance.into_gif(written, xmp)
    if sign is not None and source is not None:
        written = sign(written, f"image/{form}", source)
    return written


def _trace(made: Output) -> Trace:
    if made.trace is None:
        raise ConfigError("The images come without a trace; make them with return_steps=True.")
    return made.trace


def _decoded(model: Model, tokens: Tensor) -> Tensor:
    return model.tokenizer.decode(tokens.to(model.device)).float().clamp(0, 1).cpu()


def _cover(pixels: Tensor, mask: Tensor, weight: float) -> Tensor:
    """Lay the mask's colour over masked tokens: float (B, 3, H, W) and bool (B, h, w)."""
    patch = pixels.shape[2] // mask.shape[1]
    large = mask.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]
    colour = torch.tensor(MASK_COLOUR)[:, None, None] / 255
    return torch.where(large, weight * colour + (1 - weight) * pixels, pixels)


def _frame(sheet: Image.Image, text: str, share: float) -> Image.Image:
    """Put a sheet on paper, with a line of text and a bar of progress below."""
    margin = 16
    width = sheet.width + 2 * margin
    frame, draw = _sheet((width, sheet.height + 2 * margin + TEXT_SIZE + 18))
    frame.paste(sheet, (margin, margin))
    y = margin + sheet.height + 12
    right = width - margin - 1
    draw.rectangle((margin, y, right, y + 3), KNOWN)
    if share > 0:
        draw.rectangle((margin, y, margin + round((right - margin) * share), y + 3), INK)
    draw.text((margin, y + 11), text, FAINT, _font(TEXT_SIZE), anchor="lt")
    return frame


def _sheet(size: tuple[int, int]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    if size[0] * size[1] > images.MAX_PIXELS:
        raise ImageError(
            f"The picture would have {size[0]} × {size[1]} pixels, more than {images.MAX_PIXELS:,}; "
            "show fewer images."
        )
    sheet = Image.new("RGB", size, PAPER)
    return sheet, ImageDraw.Draw(sheet)


def _cells(filled: np.ndarray, texts: np.ndarray, cell: int) -> Image.Image:
    """Draw uint8 (h, w, 3) as squares, with a text each if there is room for the longest."""
    picture = Image.fromarray(filled.repeat(cell, 0).repeat(cell, 1))
    if cell < 8 + 7 * max(len(text) for text in texts.flat):
        return picture
    draw = ImageDraw.Draw(picture)
    font = _font(max(8, round(cell * 0.36)))
    for (row, column), text in np.ndenumerate(texts):
        place = ((column + 0.5) * cell, (row + 0.5) * cell)
        # Luma (Rec. 601); from about here on, black has more contrast than white.
        light = float(filled[row, column] @ np.array([0.299, 0.587, 0.114])) > 112
        draw.text(place, str(text), INK if light else (255, 255, 255), font, anchor="mm")
    return picture


def _legend(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int, int],
    bar: np.ndarray,
    labels: list[str],
) -> None:
    """Draw a bar of colours uint8 (n, 3) at (left, top, width), with as many of its labels as have room.

    Labels stand under their own colour if there is one for each, else from end to end.
    """
    left, top, width = place
    row = bar[np.arange(width) * len(bar) // width]
    sheet.paste(Image.fromarray(np.broadcast_to(row, (12, width, 3)).copy()), (left, top))
    font = _font(TEXT_SIZE)
    stride = math.ceil(len(labels) * max(draw.textlength(label, font) + 10 for label in labels) / width)
    shown = sorted({*range(0, len(labels) - stride, stride), len(labels) - 1})
    for i in shown:
        if len(labels) == len(bar):
            x, anchor = left + (i + 0.5) * width / len(bar), "mt"
        else:
            x = left + i * (width - 1) / (len(labels) - 1)
            anchor = "lt" if i == 0 else "rt" if i == len(labels) - 1 else "mt"
        draw.text((x, top + 18), labels[i], FAINT, font, anchor=anchor)


@lru_cache
def _font(size: int) -> Any:
    return ImageFont.load_default(size)
