"""The drawn things of the miniature world: four animals, four objects, four scenes.

Everything is drawn with plain shapes at eight times the size and reduced, so edges are smooth and a position may fall
between pixels. Sprites are premultiplied RGBA float32 arrays in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Array = NDArray[np.float32]
SCALE = 8
CELL = 24
"""Side of a sprite's canvas in pixels: every sprite fits, with a margin for sub-pixel shifts."""
SUBPIXELS = 4

Colour = tuple[int, int, int]
INK: Colour = (25, 22, 30)


class _Pen:
    """Draws in pixel units (floats) on the enlarged canvas; the origin is the middle of the sprite's foot line."""

    def __init__(self, dx: float, dy: float, flip: bool) -> None:
        self.image = Image.new("RGBA", (CELL * SCALE, CELL * SCALE), (0, 0, 0, 0))
        self.draw = ImageDraw.Draw(self.image)
        self.dx, self.dy, self.sign = CELL / 2 + dx, CELL - 2 + dy, -1 if flip else 1

    def points(self, *xy: float) -> list[tuple[float, float]]:
        pairs = zip(xy[::2], xy[1::2], strict=True)
        return [((self.sign * x + self.dx) * SCALE, (y + self.dy) * SCALE) for x, y in pairs]

    def ellipse(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        (a, b), (c, d) = self.points(x0, y0, x1, y1)
        self.draw.ellipse((min(a, c), b, max(a, c), d), fill=colour)

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: Colour) -> None:
        (a, b), (c, d) = self.points(x0, y0, x1, y1)
        self.draw.rectangle((min(a, c), b, max(a, c), d), fill=colour)

    def polygon(self, *xy: float, colour: Colour) -> None:
        self.draw.polygon(self.points(*xy), fill=colour)

    def line(self, *xy: float, colour: Colour, width: float) -> None:
        self.draw.line(self.points(*xy), fill=colour, width=round(width * SCALE), joint="curve")


def _cat(p: _Pen) -> None:
    coat, light = (240, 140, 35), (255, 205, 130)
    p.line(-5, -6, -8, -9, -7, -13, colour=coat, width=1.8)
    p.ellipse(-7, -9, 4, -1, coat)
    p.box(-6, -4, -4, 0, coat)
    p.box(1, -4, 3, 0, coat)
    p.ellipse(0, -13, 8, -5, coat)
    p.polygon(0.5, -10, 1, -15, 4, -12, colour=coat)
    p.polygon(4, -12, 7, -15, 7.5, -10, colour=coat)
    p.ellipse(4, -9, 7.5, -6, light)
    p.ellipse(4, -11, 5.5, -9.5, INK)


def _bird(p: _Pen) -> None:
    coat, wing = (45, 95, 225), (130, 175, 255)
    p.polygon(-3, -7, -8, -11, -8, -5, colour=coat)
    p.ellipse(-6, -11, 5, -2, coat)
    p.ellipse(-4, -9, 2, -4, wing)
    p.ellipse(0, -15, 7, -7.5, coat)
    p.polygon(6, -12.5, 9, -11, 6, -9.5, colour=(250, 190, 40))
    p.ellipse(3.5, -13, 5, -11.5, (255, 255, 255))
    p.line(-1, -3, -1, 0, colour=(250, 190, 40), width=1.3)
    p.line(2, -3, 2, 0, colour=(250, 190, 40), width=1.3)


def _rabbit(p: _Pen) -> None:
    coat, light = (225, 120, 190), (255, 205, 235)
    p.ellipse(-8, -7, -4.5, -3.5, light)
    p.ellipse(-7, -9, 4, 0, coat)
    p.ellipse(0, -11, 7.5, -4, coat)
    p.ellipse(0.5, -16, 3, -8, coat)
    p.ellipse(3.5, -16, 6, -8, coat)
    p.ellipse(1.2, -14.5, 2.4, -10, light)
    p.ellipse(4.2, -14.5, 5.4, -10, light)
    p.ellipse(4.5, -9, 6, -7.5, INK)


def _dog(p: _Pen) -> None:
    coat, ear = (62, 48, 48), (25, 20, 24)
    p.line(-6, -7, -8.5, -12, colour=coat, width=1.8)
    p.box(-7, -10, 3, -3.5, coat)
    p.box(-7, -4, -4.5, 0, coat)
    p.box(0.5, -4, 3, 0, coat)
    p.box(0, -14, 6, -7, coat)
    p.box(5, -11, 9, -7.5, coat)
    p.polygon(0, -14, 2.5, -14, 1, -7.5, -1, -8, colour=ear)
    p.ellipse(3.6, -12.6, 5.2, -11, (255, 255, 255))
    p.box(8, -11, 9, -9.8, (230, 80, 80))


def _crate(p: _Pen) -> None:
    wood, dark = (205, 160, 70), (140, 100, 35)
    p.box(-8, -18, 8, 0, dark)
    p.box(-6.5, -16.5, 6.5, -1.5, wood)
    p.line(-6.5, -16.5, 6.5, -1.5, colour=dark, width=1.8)
    p.line(6.5, -16.5, -6.5, -1.5, colour=dark, width=1.8)


def _barrel(p: _Pen) -> None:
    wood, band = (150, 40, 45), (235, 200, 120)
    p.ellipse(-8, -18, 8, -12, wood)
    p.ellipse(-8.5, -17, 8.5, -1, wood)
    p.box(-7, -16, 7, -1.5, wood)
    p.ellipse(-7, -5, 7, 0, wood)
    p.box(-8, -14, 8, -12, band)
    p.box(-8, -6, 8, -4, band)


def _rock(p: _Pen) -> None:
    stone, light = (125, 128, 138), (185, 190, 200)
    p.polygon(-9, 0, -8, -9, -4, -17, 3, -18, 7, -11, 9, 0, colour=stone)
    p.polygon(-6, -9, -3, -16, 2, -17, -1, -9, colour=light)


def _bench(p: _Pen) -> None:
    paint, dark = (20, 140, 120), (10, 85, 75)
    p.box(-8.5, -18, 8.5, -14.5, paint)
    p.box(-8.5, -13, 8.5, -9.5, paint)
    p.box(-8.5, -8, 8.5, -5, dark)
    p.box(-8, -18, -6, 0, dark)
    p.box(6, -18, 8, 0, dark)


ANIMALS: dict[str, Callable[[_Pen], None]] = {"cat": _cat, "bird": _bird, "rabbit": _rabbit, "dog": _dog}
OBJECTS: dict[str, Callable[[_Pen], None]] = {"crate": _crate, "barrel": _barrel, "rock": _rock, "bench": _bench}

SCENES: dict[str, tuple[Colour, Colour, Colour]] = {
    "On a sunny meadow": ((150, 205, 245), (120, 190, 90), (255, 225, 90)),
    "In a snowy garden": ((190, 200, 220), (238, 242, 248), (120, 150, 130)),
    "On a sandy beach": ((120, 210, 220), (240, 220, 165), (60, 150, 190)),
    "In a cozy room": ((245, 215, 200), (185, 135, 110), (160, 90, 120)),
}
"""Scene phrase → colours of the back, the ground and one far decoration."""


@cache
def sprite(name: str, step_x: int, step_y: int, flip: bool) -> Array:
    """RGBA ``(CELL, CELL, 4)``, premultiplied; ``step_*`` in 0..SUBPIXELS-1 shifts by that part of a pixel."""
    pen = _Pen(step_x / SUBPIXELS, step_y / SUBPIXELS, flip)
    {**ANIMALS, **OBJECTS}[name](pen)
    large = np.asarray(pen.image, np.float32) / 255
    large = np.concatenate([large[..., :3] * large[..., 3:], large[..., 3:]], axis=-1)
    return large.reshape(CELL, SCALE, CELL, SCALE, 4).mean((1, 3)).astype(np.float32)


@cache
def background(scene: str, size: int) -> Array:
    """RGB ``(size, size, 3)`` in [0, 1]: back, ground with a soft edge at 55 % of the height, one far decoration."""
    back, ground, decoration = SCENES[scene]
    image = Image.new("RGB", (size * SCALE, size * SCALE), back)
    draw = ImageDraw.Draw(image)
    unit = size * SCALE / 64
    draw.rectangle((0, 36 * unit, size * SCALE, size * SCALE), fill=ground)
    if scene == "On a sunny meadow":
        draw.ellipse((50 * unit, 4 * unit, 60 * unit, 14 * unit), fill=decoration)
    elif scene == "In a snowy garden":
        draw.polygon([(4 * unit, 36 * unit), (9 * unit, 20 * unit), (14 * unit, 36 * unit)], fill=decoration)
    elif scene == "On a sandy beach":
        draw.rectangle((0, 28 * unit, size * SCALE, 36 * unit), fill=decoration)
    else:
        draw.rectangle((46 * unit, 6 * unit, 60 * unit, 20 * unit), fill=decoration)
    small = np.asarray(image, np.float32).reshape(size, SCALE, size, SCALE, 3).mean((1, 3)) / 255
    return small.astype(np.float32)
