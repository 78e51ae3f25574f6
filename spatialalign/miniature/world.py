"""The miniature world: clips of one animal that moves about one object, with a caption and the truth.

It is animated on fours, as cheap cartoons are: four poses, each held as long as one group of frames of the autoencoder.

An animal beside the object stands a little nearer to the viewer, so its centre is lower than the object's: the SSR of
"left" and "right" is then about 0.73 rather than 1, and under the paper's rule a clip that shows half of the right
relationship (left → top where left → right was asked) stays below 0.7 instead of reaching 0.74.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dsr import DSR, Relation
from ..prompts import Prompt
from ..tracking.segment import boxes_from_masks
from ..tracks import Tracks
from . import FPS, FRAMES, HEIGHT, HOLD
from .sprites import ANIMALS, CELL, OBJECTS, SCENES, SUBPIXELS, background, sprite

Array = NDArray[Any]

VERBS: dict[str, tuple[str, ...]] = {
    "cat": ("walks", "leaps"),
    "bird": ("hops", "flutters"),
    "rabbit": ("hops", "bounds"),
    "dog": ("trots", "jumps"),
}
TYPES = ("LR", "LT", "RL", "RT", "TL", "TR")

_SIDE = 17.0
"""Horizontal distance of an animal beside the object, centre to centre, in pixels."""
_GROUND_OBJECT, _GROUND_ANIMAL = 44.0, 58.0
"""Foot lines of the object and of an animal on the ground, in pixels from the top."""
_OBJECT_HEIGHT = 18.0


@dataclass(frozen=True)
class Clip:
    """Frames ``(t, 64, 64, 3)`` uint8, the caption's relationship, what is shown, and the true tracks with masks."""

    frames: NDArray[np.uint8]
    dsr: DSR
    shown: str
    tracks: Tracks


def path(shown: str, rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Foot positions ``(POSES, 2)`` of the animal, ``(2,)`` of the object, and the direction the animal faces (±1)."""
    thing = np.array([32 + rng.uniform(-4, 4), _GROUND_OBJECT + rng.uniform(-1, 1)])
    offsets = {
        "L": np.array([-_SIDE, _GROUND_ANIMAL - _GROUND_OBJECT]),
        "R": np.array([+_SIDE, _GROUND_ANIMAL - _GROUND_OBJECT]),
        "T": np.array([0.0, -_OBJECT_HEIGHT + 1]),
    }
    start, end = (
        thing + offsets[code] + rng.uniform(-1.5, 1.5, 2) * (1, 0.3 if code == "T" else 0.7) for code in shown
    )
    u = np.array([0.0, rng.uniform(0.25, 0.42), rng.uniform(0.58, 0.75), 1.0])
    feet = start + (end - start) * u[:, None]
    if "T" in shown:
        # An animal jumps from the ground: first up, then over, so that it does not cut through the object.
        climb = u**0.6 if shown[1] == "T" else 1 - (1 - u) ** 0.6
        feet[:, 1] = start[1] + (end[1] - start[1]) * climb - rng.uniform(5, 8) * 2 * u * (1 - u)
    facing = float(np.sign(end[0] - start[0])) if shown[0] != shown[1] else rng.choice([-1.0, 1.0])
    return feet, thing, facing


def held(poses: Array) -> Array:
    """Frames from poses: the first once, every other one :data:`~spatialalign.miniature.HOLD` times."""
    return np.repeat(poses, [1] + [HOLD] * (len(poses) - 1), axis=0)


def stamp(
    name: str, foot: NDArray[np.float64], flip: bool, size: int
) -> tuple[tuple[slice, slice], NDArray[np.float32]]:
    """Where on the ``size``-pixel canvas the sprite falls, and the part of it that is inside."""
    steps = np.round(foot * SUBPIXELS).astype(int)
    whole, part = steps // SUBPIXELS, steps % SUBPIXELS
    x, y = whole[0] - CELL // 2, whole[1] - (CELL - 2)
    picture = sprite(name, int(part[0]), int(part[1]), flip)
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + CELL, size), min(y + CELL, size)
    inside = (slice(y0, max(y1, y0)), slice(x0, max(x1, x0)))
    return inside, picture[y0 - y : max(y1, y0) - y, x0 - x : max(x1, x0) - x]


def draw(
    scene: str, things: list[tuple[str, NDArray[np.float64], bool]], size: int = HEIGHT
) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """One frame: ``things`` are (name, foot position, flipped), drawn in that order, later ones in front.

    Returns the picture ``(size, size, 3)`` uint8 and the visible part of every thing ``(n, size, size)``.
    """
    image = background(scene, size).copy()
    masks = np.zeros((len(things), size, size), bool)
    for index, (name, foot, flip) in enumerate(things):
        inside, picture = stamp(name, foot, flip, size)
        alpha = picture[..., 3:]
        image[inside] = image[inside] * (1 - alpha) + picture[..., :3]
        cover = np.zeros((size, size), bool)
        cover[inside] = alpha[..., 0] > 0.5
        masks[:index] &= ~cover
        masks[index] = cover
    return (image * 255 + 0.5).astype(np.uint8), masks


def render(dsr: DSR, seed: int | Sequence[int], shown: str | None = None) -> Clip:
    """Draw the clip of ``dsr`` with everything left open (places, timing) drawn from ``seed``.

    ``shown`` overrides what is seen: another type, or twice the same letter ("LL") for an animal that stays.
    """
    rng = np.random.default_rng(seed)
    shown = shown or dsr.type_code
    feet, thing, facing = path(shown, rng)
    pictures, masks = zip(
        *(draw(dsr.scene, [(dsr.object, thing, False), (dsr.subject, foot, facing < 0)]) for foot in feet), strict=True
    )
    stacked = held(np.stack(masks)[:, ::-1])
    tracks = Tracks(
        boxes=boxes_from_masks(stacked),
        confidence=np.ones((FRAMES, 2)),
        labels=(dsr.subject, dsr.object),
        size=(HEIGHT, HEIGHT),
        fps=FPS,
        masks=stacked,
        source="miniature world, ground truth",
    )
    return Clip(held(np.stack(pictures)), dsr, shown, tracks)


def triples(split: str) -> list[tuple[str, str, str]]:
    """(subject, object, scene) of ``"train"`` (48 of 64) or ``"eval"`` (16): a Latin square, so that each word and each
    pair of subject and object or of object and scene is equally common on both sides."""
    if split not in ("train", "eval"):
        raise ValueError(f'split is "train" or "eval", not {split!r}')
    grid = itertools.product(enumerate(ANIMALS), enumerate(OBJECTS), enumerate(SCENES))
    return [(a, o, s) for (i, a), (j, o), (k, s) in grid if ((i + j + k) % 4 == 3) == (split == "eval")]


def prompts(split: str) -> list[Prompt]:
    """Every prompt of a split, six types a triple: 288 for training, 96 held out; ids say triple and type."""
    out = []
    for number, (subject, thing, scene) in enumerate(triples(split)):
        for index, code in enumerate(TYPES):
            verb = VERBS[subject][(number + index) % 2]
            dsr = DSR(subject, thing, Relation(code[0]), Relation(code[1]), scene=scene, motion=verb)
            out.append(Prompt(f"{split}{number:02d}_{code}", dsr, dsr.prompt()))
    return out
