"""Conversion between files, PIL pictures, arrays and float (B, 3, H, W) in [0, 1]; contact sheets.

Shapes: B batch, H × W pixels, C channels; rows from the top, columns from the left, colours red, green, blue.
Tensors are sRGB: a picture in other colours is converted (see `profiles`).
"""

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from maskgit.errors import ConfigError, ImageError, OutputError
from maskgit.foundation import files
from maskgit.foundation.checks import check_count
from maskgit.images.encoding import MAX_SETTINGS_CHARS, SETTINGS_KEY, encode
from maskgit.images.provenance import Sign, say, source_of
from maskgit.images.reading import MAX_PIXELS, Source, decoding, opened, to_rgb


def to_array(image: Tensor) -> np.ndarray:
    """Convert the tensor of one picture to an array that `to_tensor` accepts, channels last.

    Args:
        image: (H, W), (C, H, W) or (1, C, H, W), of a dtype and range that `to_tensor` accepts, or bfloat16.

    Returns:
        (H, W) or (H, W, C), floats as float32; other shapes are left for `to_tensor` to refuse.
    """
    image = image.detach().cpu()
    if image.ndim == 4:
        image = image.squeeze(0)
    if image.ndim == 3:
        image = image.movedim(0, -1)
    return (image.float() if image.is_floating_point() else image).numpy()


def to_tensor(image: Image.Image | np.ndarray) -> Tensor:
    """Convert one picture to a tensor.

    Args:
        image: a PIL image of any mode, whose orientation is not applied, or an array (H, W) or (H, W, C) with C = 1
            (grey), 3 (RGB) or 4 (RGB and alpha, composited over white): uint8 in [0, 255], uint16 in [0, 65535] or
            float in [0, 1].

    Returns:
        float32 (1, 3, H, W), RGB in [0, 1].

    Raises:
        ImageError: the dtype, shape or range is not supported.
    """
    if isinstance(image, Image.Image):
        # An image opened by the caller may not have been read from its file yet.
        with decoding("The image"):
            values = np.asarray(to_rgb(image)).astype(np.float32) / 255
    elif isinstance(image, np.ndarray):
        values = _from_array(image)
    else:
        raise ImageError(f"An image must be a PIL image or a numpy array, but is a {type(image).__name__}.")
    return torch.from_numpy(np.array(values.transpose(2, 0, 1), order="C"))[None]


def _from_array(array: np.ndarray) -> np.ndarray:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in array.shape:
        raise ImageError(f"An array must be of shape (H, W) or (H, W, 1, 3 or 4), but is {array.shape}.")
    if array.dtype.kind == "u" and array.dtype.itemsize <= 2:
        values = array.astype(np.float32) / np.iinfo(array.dtype).max
    elif np.issubdtype(array.dtype, np.floating):
        values = array.astype(np.float32)
        if not (values.min() >= 0 and values.max() <= 1):
            raise ImageError(
                f"A float array must be within [0, 1], but ranges from {values.min()} to {values.max()}; "
                "scale or clip it first."
            )
    else:
        raise ImageError(f"An array must be of type uint8, uint16 or float, but is {array.dtype}.")
    values = values.reshape(*array.shape[:2], channels)
    if channels == 4:
        alpha = values[..., 3:]
        values = values[..., :3] * alpha + (1 - alpha)
    return np.broadcast_to(values, (*array.shape[:2], 3))


def to_uint8(images: Tensor) -> np.ndarray:
    """Round images to 8 bits.

    Args:
        images: float (B, 3, H, W), RGB, nominally in [0, 1]; other values are clamped.

    Returns:
        uint8 (B, H, W, 3), the nearest of 256 levels.

    Raises:
        ImageError: the shape or dtype is wrong, or a value is NaN or infinite.
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ImageError(
            "Images must be floats of shape (B, 3, H, W), "
            f"but are {images.dtype} of shape {tuple(images.shape)}."
        )
    images = images.detach().float()
    if not images.isfinite().all():
        raise ImageError(
            "Images hold NaN or infinite values: the weights are broken, or their dtype is too narrow."
        )
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def to_pil(images: Tensor) -> list[Image.Image]:
    """Convert images to PIL images of mode RGB.

    Args:
        images: as in `to_uint8`.

    Returns:
        B images.

    Raises:
        ImageError: as in `to_uint8`.
    """
    return [Image.fromarray(array) for array in to_uint8(images)]


def fit(image: Image.Image, size: int) -> Image.Image:
    """Crop the largest central square of a picture and resize it.

    For square pictures this matches the official `read_image_from_url`, which stretches all others.

    Args:
        image: a PIL image of any mode.
        size: pixels per side.

    Returns:
        A PIL image of mode RGB, size × size, resized with Pillow's antialiased bicubic filter.

    Raises:
        ConfigError: the size is out of range.

    Source: official utils.py, `read_image_from_url`.
    """
    size = check_count("size", size, 1, 65_536)
    side = min(image.size)
    # Whole pixels, so that a picture that only needs cropping is not blurred.
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return to_rgb(image).resize((size, size), Image.Resampling.BICUBIC, box=box)


def save_png(
    path: str | os.PathLike[str],
    image: Image.Image,
    *,
    settings: dict[str, Any] | None = None,
    overwrite: bool = True,
    mark: bool = True,
    sign: Sign | None = None,
) -> None:
    """Write a PNG with the settings that made it; the file appears whole or not at all.

    Args:
        path: a name that ends in .png; missing folders are made.
        image: as for `encode`.
        settings: JSON values, kept in a text chunk under the key "maskgit"; `read_settings` returns them.
        overwrite: whether a file of that name may be replaced.
        mark, sign: as for `encode`.

    Raises:
        ConfigError: the settings are not JSON values, or are too long.
        OutputError: the file cannot be written, or exists and may not be replaced.
    """
    path = files.expand(path)
    if path.is_dir():
        raise OutputError(f"{path} is a folder; give the name of a file in it, such as {path / 'image.png'}.")
    if path.suffix.lower() != ".png":
        raise OutputError(f"{path} must end in .png, the only format that is written.")
    if not overwrite and path.exists():
        raise OutputError(f"{path} exists already; choose another name or allow it to be overwritten.")
    files.write_bytes(path, encode(image, settings=settings, mark=mark, sign=sign), overwrite=overwrite)


def read_settings(source: Source) -> dict[str, Any]:
    """Return the settings that `save_png` stored in a picture, without decoding its pixels.

    Args:
        source: as in `read_image`.

    Returns:
        JSON values from whoever wrote the file: check them before use.

    Raises:
        ImageError: the file has none, or cannot be read.
    """
    with opened(source, MAX_PIXELS) as (name, image):
        text = image.info.get(SETTINGS_KEY)
        if not isinstance(image, PngImageFile) or not isinstance(text, str):
            raise ImageError(f"{name} holds no settings; only PNG files written by maskgit do.")
        return files.parse_json(
            text, f"{name}: the text of its settings", ImageError, limit=MAX_SETTINGS_CHARS
        )


def overlay_mask(image: Tensor, token_mask: Tensor) -> Image.Image:
    """Tint an image red where its tokens are masked.

    Args:
        image: float (1, 3, H, W) in [0, 1].
        token_mask: bool (h, w), True = masked; h and w divide H and W.

    Returns:
        A PIL image of mode RGB, W × H.

    Raises:
        ImageError: a shape is wrong.
    """
    picture = to_uint8(image)[0]
    height, width = picture.shape[:2]
    if (
        image.shape[0] != 1
        or token_mask.ndim != 2
        or height % token_mask.shape[0]
        or width % token_mask.shape[1]
    ):
        raise ImageError(
            f"A mask of shape {tuple(token_mask.shape)} does not fit images of shape {tuple(image.shape)}; "
            "give one image, whose sides are multiples of the mask's."
        )
    rows, columns = token_mask.shape
    mask = token_mask.cpu().numpy().repeat(height // rows, 0).repeat(width // columns, 1)
    tinted = picture // 2 + np.array([127, 0, 0], np.uint8)
    return Image.fromarray(np.where(mask[..., None], tinted, picture))


CELL_SIDE = 128
CAPTION_SIZE = 13


def contact_sheet(
    images: Tensor | Sequence[Image.Image],
    *,
    columns: int | None = None,
    padding: int = 2,
    captions: Sequence[str] | None = None,
    scale: int | None = None,
) -> Image.Image:
    """Lay images out in a grid on white, row by row.

    Args:
        images: float (B, 3, H, W) in [0, 1], or PIL images, centred in their cells. The sheet takes their source type
            (`maskgit.images.provenance`).
        columns: images per row; None makes the sheet nearly square.
        padding: white pixels around each image.
        captions: a line under each image, truncated to its width; None for no captions.
        scale: how many times each pixel is repeated; None enlarges small images to at least 128 pixels per side.

    Returns:
        A PIL image of mode RGB.

    Raises:
        ConfigError: a setting is out of range, or the numbers of captions and images differ.
        ImageError: there are no images, or the sheet would have more than 100 million pixels.
    """
    source = None if isinstance(images, Tensor) else source_of(images)
    pictures = to_pil(images) if isinstance(images, Tensor) else [to_rgb(image) for image in images]
    if not pictures:
        raise ImageError("A contact sheet needs at least one image.")
    if captions is not None and len(captions) != len(pictures):
        raise ConfigError(f"There are {len(captions)} captions for {len(pictures)} images.")
    width, height = max(p.width for p in pictures), max(p.height for p in pictures)
    scale = max(1, math.ceil(CELL_SIDE / max(width, height))) if scale is None else scale
    columns = _columns(len(pictures)) if columns is None else columns
    scale = check_count("scale", scale, 1, 1024)
    padding = check_count("padding", padding, 0, 1024)
    columns = check_count("columns", columns, 1, 65_536)
    columns = min(columns, len(pictures))
    font = ImageFont.load_default(CAPTION_SIZE)
    line = CAPTION_SIZE + 4 if captions is not None else 0
    step_x, step_y = width * scale + padding, height * scale + padding + line
    size = (columns * step_x + padding, math.ceil(len(pictures) / columns) * step_y + padding)
    if size[0] * size[1] > MAX_PIXELS:
        raise ImageError(
            f"The sheet would have {size[0]} × {size[1]} pixels, more than {MAX_PIXELS:,}; use fewer images."
        )
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pictures):
        row, column = divmod(i, columns)
        left, top = padding + column * step_x, padding + row * step_y
        large = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
        sheet.paste(
            large, (left + (width * scale - large.width) // 2, top + (height * scale - large.height) // 2)
        )
        if captions is not None:
            text = shorten(captions[i], draw, font, width * scale)
            middle = (left + width * scale / 2, top + height * scale + line / 2)
            draw.text(middle, text, "black", font, anchor="mm")
    say([sheet], source)
    return sheet


def _columns(count: int) -> int:
    # A full grid if one is at most three times as wide as high, else the smallest square that fits.
    side = math.isqrt(count - 1) + 1
    full = [c for c in range(side, count + 1) if count % c == 0 and c * c <= 3 * count]
    return full[0] if full else side


def shorten(text: str, draw: ImageDraw.ImageDraw, font: Any, width: int) -> str:
    """Return text on one line, truncated with "…" to at most `width` pixels in a font."""
    text = " ".join(text.split())
    if draw.textlength(text, font) <= width:
        return text
    kept = len(text)
    while kept and draw.textlength(text[:kept].rstrip() + "…", font) > width:
        kept -= 1
    return text[:kept].rstrip() + "…" if kept else ""
