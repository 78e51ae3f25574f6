"""A small canvas for charts, with Pillow alone: lines are smooth, text is sharp, and axes turn data into places."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.ImageFont import FreeTypeFont, ImageFont

Colour = tuple[int, int, int]
Point = tuple[float, float]

_FINE = 3
"""How much larger than the picture everything but text is drawn, to be averaged down."""


def font(points: int) -> FreeTypeFont | ImageFont:
    """Pillow's own font in a size; it needs no file on the machine."""
    from PIL import ImageFont

    return ImageFont.load_default(points)


def fitted(text: str, room: float, points: int) -> str:
    """``text`` in one line of at most ``room`` pixels, cut with three dots where it is longer."""
    set_in, text = font(points), " ".join(text.split())
    if set_in.getlength(text) <= room:
        return text
    while text and set_in.getlength(text + "...") > room:
        text = text[:-1]
    return text.rstrip() + "..."


class Canvas:
    """A picture of (width, height) pixels. All coordinates are pixels of the finished picture and may be fractions."""

    def __init__(self, size: tuple[int, int], paper: Colour) -> None:
        from PIL import Image, ImageDraw

        self._image = Image.new("RGB", (size[0] * _FINE, size[1] * _FINE), paper)
        self._draw = ImageDraw.Draw(self._image)
        self._texts: list[tuple[Point, str, Colour, int, str, bool]] = []

    def area(self, corners: Sequence[Point], fill: Colour) -> None:
        """A filled polygon; two corners are opposite ones of a rectangle."""
        fine = [(x * _FINE, y * _FINE) for x, y in corners]
        if len(fine) == 2:
            (x0, y0), (x1, y1) = fine
            # Pillow's rectangles include their last pixel.
            self._draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), fill=fill)
        else:
            self._draw.polygon(fine, fill=fill)

    def line(self, points: Sequence[Point], colour: Colour, width: float = 1.0) -> None:
        """A line through ``points``, with round joints and ends."""
        fine = [(x * _FINE, y * _FINE) for x, y in points]
        self._draw.line(fine, fill=colour, width=max(1, round(width * _FINE)), joint="curve")
        for place in (points[0], points[-1]) if width > 1 else ():
            self.dot(place, width / 2, colour)

    def dashes(self, start: Point, end: Point, colour: Colour, width: float = 1.0, dash: float = 5.0) -> None:
        """A straight dashed line."""
        (x0, y0), (x1, y1) = start, end
        length = float(np.hypot(x1 - x0, y1 - y0))
        for first in np.arange(0, length, 1.7 * dash):
            a, b = first / length, min(1.0, (first + dash) / length)
            piece = [(x0 + (x1 - x0) * part, y0 + (y1 - y0) * part) for part in (a, b)]
            self._draw.line([(x * _FINE, y * _FINE) for x, y in piece], fill=colour, width=max(1, round(width * _FINE)))

    def dot(self, centre: Point, radius: float, fill: Colour) -> None:
        """A filled circle."""
        x, y, r = centre[0] * _FINE, centre[1] * _FINE, radius * _FINE
        self._draw.ellipse((x - r, y - r, x + r, y + r), fill=fill)

    def text(
        self, place: Point, text: str, colour: Colour, points: int, anchor: str = "lm", upright: bool = False
    ) -> float:
        """Set ``text`` at ``place`` (Pillow's anchors; ``upright`` turns it by 90 degrees and centres it there).

        Text lies above all else. Returns its length in pixels.
        """
        self._texts.append((place, text, colour, points, anchor, upright))
        return float(font(points).getlength(text))

    def finish(self) -> NDArray[np.uint8]:
        """The picture, uint8 (height, width, 3)."""
        from PIL import Image, ImageDraw

        picture = self._image.reduce(_FINE)
        draw = ImageDraw.Draw(picture)
        for (x, y), text, colour, points, anchor, upright in self._texts:
            if not upright:
                draw.text((x, y), text, fill=colour, font=font(points), anchor=anchor)
                continue
            box = draw.textbbox((0, 0), text, font=font(points), anchor="lt")
            stencil = Image.new("L", (round(box[2]) + 2, round(box[3]) + 2))
            ImageDraw.Draw(stencil).text((1, 1), text, fill=255, font=font(points), anchor="lt")
            turned = stencil.rotate(90, expand=True)
            picture.paste(colour, (round(x - turned.width / 2), round(y - turned.height / 2)), turned)
        return np.asarray(picture)


@dataclass(frozen=True)
class Axes:
    """A rectangle (left, top, right, bottom) of a canvas, and the ranges of the data it shows."""

    canvas: Canvas
    box: tuple[float, float, float, float]
    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, x: float, y: float) -> Point:
        """Where a pair of data lies on the canvas."""
        left, top, right, bottom = self.box
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return left + across * (right - left), bottom - up * (bottom - top)

    def band(self, first: float, last: float, fill: Colour) -> None:
        """Shade the data from ``first`` to ``last`` of x over the whole height."""
        self.canvas.area((self.at(first, self.y[1]), self.at(last, self.y[0])), fill)

    def curve(self, x: Sequence[float], y: Sequence[float], colour: Colour, width: float, dot: float) -> None:
        """A line through the data with a dot of radius ``dot`` on each."""
        places = [self.at(a, b) for a, b in zip(x, y, strict=True)]
        if len(places) > 1:
            self.canvas.line(places, colour, width)
        for place in places:
            self.canvas.dot(place, dot, colour)

    def rows(self, ticks: Sequence[tuple[float, str]], grid: Colour, ink: Colour, points: int, right: bool) -> None:
        """Grid lines across and their labels, beside the left or the ``right`` edge."""
        for value, label in ticks:
            start, end = (_crisp(self.at(x, value)) for x in self.x)
            self.canvas.line((start, end), grid, 1)
            place = (end[0] + points * 0.5, end[1]) if right else (start[0] - points * 0.5, start[1])
            self.canvas.text(place, label, ink, points, "lm" if right else "rm")

    def columns(self, ticks: Sequence[tuple[float, str]], ink: Colour, points: int) -> None:
        """Small marks below the rectangle and their labels."""
        for value, label in ticks:
            x, y = _crisp(self.at(value, self.y[0]))
            self.canvas.line(((x, y), (x, y + points * 0.3)), ink, 1)
            self.canvas.text((x, y + points * 0.6), label, ink, points, "ma")


def _crisp(place: Point) -> Point:
    """The middle of its pixel, where a line of one pixel stays one."""
    return float(np.floor(place[0])) + 0.5, float(np.floor(place[1])) + 0.5


def whole_ticks(last: int, most: int = 9) -> list[int]:
    """0 and on in steps of 1, 2, 5, 10, 20, ... up to ``last``, not more than ``most`` + 1 of them."""
    step = next(s * 10**k for k in range(9) for s in (1, 2, 5) if last <= s * 10**k * most)
    return list(range(0, last + 1, step))
