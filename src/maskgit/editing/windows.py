"""Token canvases larger than the model's grid: the windows that fill them, and the tokenizer in tiles.

Shapes: B images, R × C the canvas's tokens, side × side the model's grid, H × W = R · patch × C · patch pixels.
A box is (left, top, width, height) in tokens.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from maskgit.networks.tokenizer import Tokenizer

# The most pixels that the tokenizer decodes in one call (or one image of the model's size, if larger): the official
# one needs 1 to 2 GB for them.
TILE_PIXELS = 512 * 512


class Window(NamedTuple):
    """Where the model looks at a canvas.

    Attributes:
        rows, columns: int64 (side,), of the canvas; columns of a loop may pass its end.
        unknown: bool (side, side), True = to be predicted by this window; the rest is known by then.
    """

    rows: Tensor
    columns: Tensor
    unknown: Tensor

    def read(self, canvas: Tensor) -> Tensor:
        """Return what the window shows, (B, R, C) → (B, side, side)."""
        return canvas[:, self.rows[:, None], self.columns]

    def write(self, canvas: Tensor, tokens: Tensor) -> None:
        """Put (B, side, side) into the canvas (B, R, C)."""
        canvas[:, self.rows[:, None], self.columns] = tokens


def plan_windows(
    rows: int, columns: int, known: Sequence[int], side: int, *, loop: bool = False
) -> list[Window]:
    """Return the windows that fill a canvas around a known box, each going by what is known already.

    The band of rows that holds the box grows by half a window at a time, first to the right, then to the
    left; then the whole width grows down, then up. A window knows at least half of its tokens, but for the
    first ones around a box that is smaller than a window.

    Args:
        rows, columns: the canvas, at least `side` each.
        known: the box, inside the canvas; of width or height 0 if nothing is known.
        side: tokens a side of a window.
        loop: whether the last column meets the first; then nothing may be known, and a half more columns than
            a window has are needed.

    Returns:
        Windows in their order; together they predict each unknown token once.
    """
    left, top, width, height = known
    band, stretch = _widen(top, top + height, rows, side), _widen(left, left + width, columns, side)
    if loop:
        assert not width * height
        assert columns >= side + side // 2
        first = every = _around(columns, side)
    else:
        first = _cover(*stretch, side) + _reach(*stretch, columns, side)
        every = _cover(0, columns, side)
    starts = [(row, column) for column in first for row in _cover(*band, side)]
    starts += [(row, column) for row in _reach(*band, rows, side) for column in every]
    unknown = torch.ones(rows, columns, dtype=torch.bool)
    unknown[top : top + height, left : left + width] = False
    windows = []
    for row, column in starts:
        row_side, column_side = row + torch.arange(side), (column + torch.arange(side)) % columns
        view = (row_side[:, None], column_side)
        if unknown[view].any():
            windows.append(Window(row_side, column_side, unknown[view].clone()))
            unknown[view] = False
    assert not unknown.any()
    return windows


def _kept(side: int) -> int:
    """Return how many rows or columns of a window stay known: half, rounded up, but never all."""
    return min(side - 1, side - side // 2)


def _widen(low: int, high: int, total: int, side: int) -> tuple[int, int]:
    """Return a stretch of at least `side` around [low, high), inside [0, total)."""
    missing = max(0, side - (high - low))
    low = min(max(0, low - missing // 2), total - max(side, high - low))
    return low, max(high, low + side)


def _cover(low: int, high: int, side: int) -> list[int]:
    """Return the starts of windows that cover [low, high), half over each other."""
    return [*range(low, high - side, side - _kept(side)), high - side]


def _reach(low: int, high: int, total: int, side: int) -> list[int]:
    """Return the starts of windows that take [low, high) to the end of [0, total), then to its beginning."""
    starts = []
    while high < total:
        starts.append(min(high - _kept(side), total - side))
        high = starts[-1] + side
    while low > 0:
        starts.append(max(low + _kept(side) - side, 0))
        low = starts[-1]
    return starts


def _around(total: int, side: int) -> list[int]:
    """Return the starts of windows that go round a loop; the last stands between two known parts."""
    rest = total - side
    count = math.ceil(rest / (side - _kept(side)))
    ends = [side + rest * i // count for i in range(count + 1)]
    gap = total - ends[-2]
    return [end - side for end in ends[:-1]] + [ends[-2] - (side - gap) // 2]


def encode_canvas(tokenizer: Tokenizer, images: Tensor, side: int) -> Tensor:
    """Return the tokens of images of any size, in memory that does not grow with them.

    Args:
        tokenizer: on any device.
        images: float (B, 3, H, W) in [0, 1]; H and W multiples of its patch.
        side: tokens a side of the model's image.

    Returns:
        int64 (B, R, C), on the CPU.
    """
    patch = tokenizer.patch_size
    rows, columns = images.shape[2] // patch, images.shape[3] // patch
    tile_rows, tile_columns = _tile(rows, columns, side, patch)
    tokens = torch.zeros(len(images), rows, columns, dtype=torch.int64)
    device = next(tokenizer.parameters()).device
    for top in _cover(0, rows, tile_rows):
        for left in _cover(0, columns, tile_columns):
            part = images[
                :, :, top * patch : (top + tile_rows) * patch, left * patch : (left + tile_columns) * patch
            ]
            made = torch.cat([tokenizer.encode(one[None].to(device)).cpu() for one in part])
            # Tiles overlap by half or more; a quarter at the inner edges has too little around it to be kept.
            skip_rows, skip_columns = (tile_rows // 4 if top else 0), (tile_columns // 4 if left else 0)
            tokens[:, top + skip_rows : top + tile_rows, left + skip_columns : left + tile_columns] = made[
                :, skip_rows:, skip_columns:
            ]
    return tokens


def decode_canvas(tokenizer: Tokenizer, tokens: Tensor, side: int, *, loop: bool = False) -> Tensor:
    """Return the images of token canvases; one too large to be decoded at once is blended from tiles.

    Tiles lie half over each other and fade into each other, so that neither their edges nor the group norms,
    whose statistics are a tile's own, show as seams.

    Args:
        tokenizer: on any device.
        tokens: int64 (B, R, C).
        side: tokens a side of the model's image.
        loop: whether the last column meets the first.

    Returns:
        float32 (B, 3, H, W) in [0, 1], on the CPU.
    """
    patch = tokenizer.patch_size
    tile_rows, tile_columns = _tile(tokens.shape[1], tokens.shape[2], side, patch)
    at_once = max(1, TILE_PIXELS // (tile_rows * tile_columns * patch**2))
    batches = tokens.split(at_once)
    return torch.cat([_blend(tokenizer, batch, tile_rows, tile_columns, loop) for batch in batches])


def _tile(rows: int, columns: int, side: int, patch: int) -> tuple[int, int]:
    """Return the rows and columns of tokens that go through the tokenizer at once."""
    side = max(side, math.isqrt(TILE_PIXELS) // patch)
    return (rows, columns) if rows * columns <= side**2 else (min(rows, side), min(columns, side))


def _blend(tokenizer: Tokenizer, tokens: Tensor, tile_rows: int, tile_columns: int, loop: bool) -> Tensor:
    """Return float32 (B, 3, H, W) of tokens (B, R, C)."""
    patch = tokenizer.patch_size
    rows, columns = tokens.shape[1:]
    device = next(tokenizer.parameters()).device
    if (tile_rows, tile_columns) == (rows, columns) and not loop:
        return tokenizer.decode(tokens.to(device)).float().clamp(0, 1).cpu()
    total = torch.zeros(len(tokens), 3, rows * patch, columns * patch)
    weights = torch.zeros(rows * patch, columns * patch)
    hat = _hat(tile_rows * patch)[:, None] * _hat(tile_columns * patch)
    # Round a loop, a tile that passes the end goes on at the beginning.
    step = tile_columns - _kept(tile_columns)
    lefts = range(0, columns, step) if loop else _cover(0, columns, tile_columns)
    for top in _cover(0, rows, tile_rows):
        for left in lefts:
            across = (left + torch.arange(tile_columns)) % columns
            part = tokens[:, top : top + tile_rows, across].to(device)
            y = slice(top * patch, (top + tile_rows) * patch)
            x = (left * patch + torch.arange(tile_columns * patch)) % (columns * patch)
            total[:, :, y, x] += tokenizer.decode(part).float().clamp(0, 1).cpu() * hat
            weights[y, x] += hat
    return total.div_(weights)


def _hat(length: int) -> Tensor:
    """Return float32 (length,) that rises to the middle and falls again, nowhere 0."""
    place = torch.arange(length) + 0.5
    return torch.minimum(place, length - place) * (2 / length)
