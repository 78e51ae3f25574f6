"""Heat maps of block scores over the frames of a clip."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .blocks import BlockGrid, frame_slices
from .chart import font
from .errors import VideoError
from .plot import Image8
from .video import check_frames

BAD, UNKNOWN = (214, 0, 106), (128, 128, 128)
"""RGB of the worst score (told from green and blue by colour-blind eyes too), and of one that is not known."""
_INK, _PAPER = (24, 26, 30), (250, 250, 248)
_STRONGEST = 0.7


def draw_patches(
    frames: Image8,
    values: NDArray[np.floating],
    latent_frames: int,
    scale: tuple[float, float] | None = None,
    min_side: int = 320,
) -> Image8:
    """``frames`` (T, H, W, 3) under a veil that is the stronger the worse a block is, with its score in it.

    Small clips are enlarged by a whole factor with hard pixel edges.

    Args:
        frames: uint8.
        values: score of each block ``(F, R, C)``, larger being better; NaN for unknown, which is grey.
        latent_frames: of the clip; they say which frames a block holds.
        scale: score with the strongest veil, and score without any; None for the least and the largest here.
        min_side: least size of the shorter side.

    Returns:
        uint8 ``(T, H', W', 3)`` with even sides.

    Raises:
        VideoError: no scores of blocks, or a scale that ends below its start.
        ConfigError: the frames cannot be cut into these blocks.
    """
    check_frames(frames)
    if values.ndim != 3 or scale is not None and not scale[0] < scale[1]:
        raise VideoError(
            f"a heat map needs scores by time, row and column and a rising scale, found {values.shape}, {scale}"
        )
    grid = BlockGrid(*values.shape)
    _, height, width = grid.block_size((grid.frames, *frames.shape[1:3]), "frames")
    low, high = scale or _range(values)
    veil = np.clip((high - values) / (high - low), 0, 1) if high > low else np.zeros(values.shape)
    enlarged = max(1, -(-min_side // min(frames.shape[1:3])))
    shown = []
    for block, time in enumerate(frame_slices(grid, len(frames), latent_frames)):
        strength = np.where(np.isnan(veil[block]), 0.5, veil[block]) * _STRONGEST
        colour = np.where(np.isnan(veil[block])[..., None], UNKNOWN, BAD)
        alpha, paint = (part.repeat(height, 0).repeat(width, 1) for part in (strength[..., None], colour))
        for index in range(time.start, time.stop):
            mixed = ((1 - alpha) * frames[index] + alpha * paint).round().astype(np.uint8)
            note = f"frame {index}/{len(frames) - 1}   veil from {high:.2f} down to {low:.2f}"
            shown.append(_labelled(mixed.repeat(enlarged, 0).repeat(enlarged, 1), values[block], note))
    return np.stack(shown)


def _range(values: NDArray[np.floating]) -> tuple[float, float]:
    known = values[~np.isnan(values)]
    return (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)


def _labelled(picture: Image8, values: NDArray[np.floating], note: str) -> Image8:
    """The picture with lines between the blocks, the score of each where there is room, and a line of text below."""
    from PIL import Image, ImageDraw

    height, width = picture.shape[:2]
    points = max(12, min(width, height) // 26)
    strip, letters = points + 10, font(points)
    canvas = Image.new("RGB", (width + width % 2, height + strip + (height + strip) % 2), _INK)
    canvas.paste(Image.fromarray(picture), (0, 0))
    draw = ImageDraw.Draw(canvas)
    rows, columns = values.shape
    tall, wide = height // rows, width // columns
    for y in range(1, rows):
        draw.line((0, y * tall, width - 1, y * tall), fill=_INK)
    for x in range(1, columns):
        draw.line((x * wide, 0, x * wide, height - 1), fill=_INK)
    for (row, column), value in np.ndenumerate(values):
        text = "?" if np.isnan(value) else f"{value:.2f}"
        if draw.textlength(text, font=letters) + 6 <= wide and points + 6 <= tall:
            corner = (column * wide + 4, row * tall + 3)
            draw.text(corner, text, fill=_PAPER, font=letters, stroke_width=2, stroke_fill=_INK)
    draw.text((6, height + 3), note, fill=_PAPER, font=letters)
    return np.asarray(canvas)
