"""How other benchmarks judge a spatial relation, over the same tracks and videos: VBench, T2V-CompBench, VBench-2.0.

VBench and T2V-CompBench ask for one relation that holds all the time. For a relation that changes, the frames of the
first half are judged by the initial relation here and those of the second half by the final one; the boxes are those
of the tracks instead of the benchmark's own detector's. So these are the benchmarks' rules, not their numbers.
Methods: the programs ``spatial_relationship.py`` of VBench, ``eval_spatial_relationships`` of T2V-CompBench, and
``dynamic_spatial_relationship.py`` of VBench-2.0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .dsr import DSR, Relation
from .errors import ConfigError
from .geometry import centres, iou
from .tracks import Tracks
from .video import Video

if TYPE_CHECKING:
    from .rewards.vlm_judge import Answer

Floats = NDArray[np.float64]

SAMPLED = 16
"""Frames of a clip that VBench and T2V-CompBench look at."""
ASKED = 64
"""Frames of a clip that VBench-2.0 samples; the first question is about the first half of them."""
_CLOSE = 0.1
"""IoU from which VBench takes away from a frame."""


def sampled(frames: int, count: int = SAMPLED) -> NDArray[np.int64]:
    """The middle frames of ``count`` equal parts of a clip; every frame of a clip that has no more than that."""
    if frames < 1 or count < 1:
        raise ConfigError(f"expected at least one frame and one sample, found {frames} and {count}")
    count = min(frames, count)
    return np.asarray((2 * np.arange(count) + 1) * frames // (2 * count), dtype=np.int64)


def vbench_frames(subject: ArrayLike, thing: ArrayLike, relation: Relation) -> Floats:
    """VBench's score in [0, 1] of a relation in each frame, for boxes ``(n, 4)``, NaN where absent.

    1 where the centres lie further apart along the relation's axis than across it, ``0.1 / IoU`` there from an IoU of
    0.1 on, else 0, also where a box is absent. It has no sign: left scores as right does, top as under. NaN for
    relations in depth, for which there is no rule.
    """
    _, along, across, overlap = _apart(subject, thing, relation)
    if relation.is_depth:
        return np.full(overlap.shape, np.nan)
    close = np.divide(_CLOSE, overlap, out=np.ones_like(overlap), where=overlap >= _CLOSE)
    return np.where(np.abs(along) > np.abs(across), close, 0.0)


def compbench_frames(
    subject: ArrayLike,
    thing: ArrayLike,
    relation: Relation,
    subject_depth: ArrayLike | None = None,
    object_depth: ArrayLike | None = None,
) -> Floats:
    """T2V-CompBench's score in [0, 1] of a relation in each frame, for boxes ``(n, 4)``, NaN where absent.

    0 where both are absent, 0.2 where one is, 0.4 where the relation does not hold, and ``0.4 + 0.6 s`` where it does,
    with ``s = 1 - IoU``. It holds when the centres differ in its direction, by more than across it. In front of and
    behind hold where the boxes overlap and the disparities ``(n,)`` (larger is nearer) are in that order, with
    ``s = IoU``; NaN for them without disparities.
    """
    present, along, across, overlap = _apart(subject, thing, relation)
    if not relation.is_depth:
        sign = 1.0 if relation in (Relation.RIGHT, Relation.UNDER) else -1.0
        holds, strength = (sign * along > np.abs(across)), 1 - overlap
    elif subject_depth is None or object_depth is None:
        return np.full(overlap.shape, np.nan)
    else:
        nearer = np.asarray(subject_depth, dtype=np.float64) - np.asarray(object_depth, dtype=np.float64)
        holds, strength = (nearer if relation is Relation.FRONT else -nearer) > 0, overlap
    missing = np.where(present.any(axis=0), 0.2, 0.0)
    return np.where(present.all(axis=0), 0.4 + 0.6 * np.where(holds, strength, 0.0), missing)


def vbench_score(tracks: Tracks, dsr: DSR, count: int = SAMPLED) -> float | None:
    """VBench's spatial score in [0, 1] of a clip, initial relation first, final relation after; None in depth."""
    first, last = _halves(tracks, count)
    return _mean(
        *(
            vbench_frames(tracks.subject[part], tracks.object[part], relation)
            for part, relation in ((first, dsr.initial), (last, dsr.final))
        )
    )


def compbench_score(tracks: Tracks, dsr: DSR, count: int = SAMPLED) -> float | None:
    """T2V-CompBench's spatial score in [0, 1] of a clip, initial relation first, final relation after.

    None for a relation in depth when the tracks hold none.
    """
    parts = []
    for part, relation in zip(_halves(tracks, count), (dsr.initial, dsr.final), strict=True):
        depth = (None, None) if tracks.depth is None else (tracks.depth[part, 0], tracks.depth[part, 1])
        parts.append(compbench_frames(tracks.subject[part], tracks.object[part], relation, *depth))
    return _mean(*parts)


@dataclass(frozen=True)
class Answers:
    """What was answered about the initial and the final relation of a clip."""

    initial: Answer
    final: Answer

    @property
    def score(self) -> float | None:
        """1 when both are yes, 0 when one is no, None when it hangs on an unclear answer.

        VBench-2.0 itself takes whatever holds no "yes" for a no.
        """
        if "no" in (self.initial, self.final):
            return 0.0
        return 1.0 if self.initial == self.final == "yes" else None


def ask_both(video: Video, dsr: DSR, ask: Callable[[NDArray[np.uint8], str], Answer], count: int = ASKED) -> Answers:
    """VBench-2.0's protocol: one question on the first half of ``count`` frames, one on the very last frame.

    ``ask`` takes frames uint8 (t, h, w, 3) and a question. Frames of a shorter clip are shown once each; the words of
    the questions are those of :func:`~spatialalign.rewards.vlm_judge.question`.
    """
    from .rewards.vlm_judge import question

    if count < 2:
        raise ConfigError(f"expected at least two frames to ask about, found {count}")
    places = np.linspace(0, len(video.frames) - 1, count).astype(int)
    first, last = video.frames[np.unique(places[: count // 2])], video.frames[-1:]
    return Answers(ask(first, question(dsr, dsr.initial, len(first))), ask(last, question(dsr, dsr.final, len(last))))


def _apart(
    subject: ArrayLike, thing: ArrayLike, relation: Relation
) -> tuple[NDArray[np.bool_], Floats, Floats, Floats]:
    """Presence (2, n) of both; (n,) centre differences along and across the relation's axis, and IoU, 0 if absent."""
    one, two = np.asarray(subject, dtype=np.float64), np.asarray(thing, dtype=np.float64)
    present = ~np.isnan([one[..., 0], two[..., 0]])
    dx, dy = np.moveaxis(np.nan_to_num(centres(one) - centres(two)), -1, 0)
    along, across = (dx, dy) if relation in (Relation.LEFT, Relation.RIGHT) else (dy, dx)
    return present, along, across, np.nan_to_num(iou(one, two))


def _halves(tracks: Tracks, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    places = sampled(tracks.frames, count)
    return places[: len(places) // 2], places[len(places) // 2 :]


def _mean(first: Floats, last: Floats) -> float | None:
    """Mean over the frames of both halves; None when a relation has no rule."""
    both = np.concatenate([first, last])
    return None if np.isnan(both).any() else float(both.mean())
