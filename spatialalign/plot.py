"""Pictures of clips and tracks, as uint8 RGB arrays: overlays and contact sheets. Scores are in :mod:`.score_plot`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .chart import fitted, font
from .errors import TracksError, VideoError
from .files import atomic_path
from .tracks import Tracks
from .video import check_frames

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont, ImageFont

Image8 = NDArray[np.uint8]

COLOURS = ((255, 126, 32), (38, 150, 255))
"""RGB of the subject (orange) and the object (blue); told apart by colour-blind eyes too."""
_INK, _PAPER, _GREY = (24, 26, 30), (250, 250, 248), (120, 124, 130)


def draw_tracks(frames: Image8, tracks: Tracks, min_side: int = 320, masks: bool = True) -> Image8:
    """``frames`` (T, H, W, 3) with boxes, labels, confidences and (if there) masks, and a line of text below.

    Clips whose shorter side is below ``min_side`` are enlarged by a whole factor with hard pixel edges, so that text
    is readable and pixels stay pixels. Returns uint8 (T, H', W', 3) with even sides. Raises :class:`TracksError` when
    tracks and frames are not of one clip.
    """
    check_frames(frames)
    if len(frames) != tracks.frames:
        raise TracksError(f"the clip has {len(frames)} frames, the tracks have {tracks.frames}")
    height, width = frames.shape[1:3]
    # A clip with odd sides gains a row or column when it is encoded; tracks of the array fit the file all the same.
    if abs(height - tracks.size[0]) > 1 or abs(width - tracks.size[1]) > 1:
        raise TracksError(f"the clip is {height} x {width} pixels, the tracks are for {tracks.size}")
    scale = max(1, -(-min_side // min(height, width)))
    return np.stack([_overlay(frames[i], tracks, i, scale, masks) for i in range(len(frames))])


def _overlay(frame: Image8, tracks: Tracks, index: int, scale: int, masks: bool) -> Image8:
    from PIL import Image, ImageDraw

    shown = frame
    if masks and tracks.masks is not None:
        shown = frame.copy()
        for thing, colour in enumerate(COLOURS):
            mask = tracks.masks[index, thing][: frame.shape[0], : frame.shape[1]]
            part = shown[: mask.shape[0], : mask.shape[1]]
            part[mask] = (0.55 * part[mask] + 0.45 * np.array(colour)).astype(np.uint8)
    big = shown.repeat(scale, axis=0).repeat(scale, axis=1)
    height, width = big.shape[:2]
    points = max(12, min(width, height) // 26)
    letters = font(points)
    strip = points + 10
    canvas = Image.new("RGB", (width + width % 2, height + strip + (height + strip) % 2), _INK)
    canvas.paste(Image.fromarray(big), (0, 0))
    draw = ImageDraw.Draw(canvas)
    line = max(2, min(width, height) // 160)
    absent = []
    for thing in (1, 0):
        box = tracks.boxes[index, thing]
        if np.isnan(box[0]):
            absent.append(tracks.labels[thing])
            continue
        x0, y0, x1, y1 = (float(value) * scale for value in box)
        # The box is exclusive: its last pixel is the one before the right and bottom edge.
        corners = (x0, y0, max(x0, x1 - 1), max(y0, y1 - 1))
        # A dark rim keeps an orange box visible on an orange cat.
        rim = (corners[0] - 1, corners[1] - 1, corners[2] + 1, corners[3] + 1)
        draw.rectangle(rim, outline=_INK, width=line + 2)
        draw.rectangle(corners, outline=COLOURS[thing], width=line)
        text = f"{tracks.labels[thing]} {tracks.confidence[index, thing]:.2f}"
        _tag(draw, text, (x0, y0), (width, height), COLOURS[thing], letters)
    note = f"frame {index}/{tracks.frames - 1}   {index / tracks.fps:.2f} s"
    draw.text((6, height + 3), note, fill=_PAPER, font=letters)
    if absent:
        start = 6 + draw.textlength(note + "    ", font=letters)
        draw.text((start, height + 3), "absent: " + ", ".join(reversed(absent)), fill=(255, 196, 120), font=letters)
    return np.asarray(canvas)


def _tag(
    draw: ImageDraw,
    text: str,
    corner: tuple[float, float],
    limits: tuple[int, int],
    colour: tuple[int, int, int],
    letters: FreeTypeFont | ImageFont,
) -> None:
    """A filled label above the box's top left corner, or inside it where there is no room above."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=letters)
    wide, tall = right - left + 8, bottom - top + 6
    x = min(max(0.0, corner[0]), max(0.0, limits[0] - wide))
    y = corner[1] - tall if corner[1] >= tall else max(0.0, corner[1])
    draw.rectangle((x, y, x + wide, y + tall), fill=colour)
    draw.text((x + 4 - left, y + 3 - top), text, fill=_INK, font=letters)


def contact_sheet(clips: Sequence[tuple[str, Image8]], columns: int = 6, tile: int = 160) -> Image8:
    """One picture of several clips: a row for each (caption, frames (T, H, W, 3)), ``columns`` frames evenly spaced.

    First and last frame are always shown; ``tile`` is the width of one frame in pixels (tiny clips keep hard pixel
    edges). Returns uint8 (H', W', 3).
    """
    from PIL import Image, ImageDraw

    if not clips:
        raise VideoError("a contact sheet needs at least one clip")
    if columns < 1 or tile < 16:
        raise VideoError(f"columns must be at least 1 and tile at least 16, found {columns} and {tile}")
    for _, frames in clips:
        check_frames(frames)
    gap, line, points = 4, 20, 14
    heights = [max(1, round(tile * frames.shape[1] / frames.shape[2])) for _, frames in clips]
    width = gap + columns * (tile + gap)
    sheet = Image.new("RGB", (width, gap + sum(height + line + 2 * gap for height in heights)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    y = gap
    for (caption, frames), height in zip(clips, heights, strict=True):
        draw.text((gap, y), fitted(caption, width - 2 * gap, points), fill=_INK, font=font(points))
        y += line
        small = frames.shape[2] <= tile
        method = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
        shown = np.linspace(0, len(frames) - 1, columns).round().astype(int)
        for column, i in enumerate(shown):
            if column and i == shown[column - 1]:
                continue
            x = gap + column * (tile + gap)
            sheet.paste(Image.fromarray(frames[i]).resize((tile, height), method), (x, y))
            number = font(11)
            draw.rectangle((x, y, x + draw.textlength(str(i), font=number) + 5, y + 14), fill=_INK)
            draw.text((x + 3, y + 1), str(i), fill=_PAPER, font=number)
        y += height + 2 * gap
    return np.asarray(sheet)


def save_png(path: str | Path, image: Image8) -> None:
    """Write a uint8 picture (H, W, 3) as PNG, whole or not at all."""
    from PIL import Image

    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        raise VideoError(f"{path}: a picture must be uint8 of the shape (H, W, 3), found {image.dtype} {image.shape}")
    with atomic_path(path) as temporary:
        Image.fromarray(image).save(temporary, format="PNG")
