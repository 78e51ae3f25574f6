"""Which frames count, whether a clip may be tracked at all, and from which frame. Pure functions.

Two rules: the paper's (official ``detection.py``, bit for bit) and the robust one, which looks at scores instead of
counting frames. Constants come from :class:`~spatialalign.score.Limits`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from ..score import Limits
from .detect import Detections

SUBJECT, OBJECT = 0, 1


class FrameClass(IntEnum):
    """What the paper calls a frame: too few boxes, surplus or wrongly named ones, or exactly the two."""

    MISS = 0
    REDUNDANT = 1
    VALID = 2


@dataclass(frozen=True)
class Verdict:
    """``seed`` is the frame to track from, None exactly when ``invalid`` gives the reason; counts for reports."""

    seed: int | None
    invalid: str | None
    miss: int
    redundant: int
    valid: int


def classify_frames(detections: Sequence[Detections]) -> NDArray[np.int8]:
    """(T,) :class:`FrameClass` codes: fewer than two boxes MISS, more than two REDUNDANT; exactly two are VALID when
    one is the subject (phrase 0) and the other the object (phrase 1), else REDUNDANT."""
    codes = np.empty(len(detections), dtype=np.int8)
    for i, found in enumerate(detections):
        if len(found) < 2:
            codes[i] = FrameClass.MISS
        else:
            exact = len(found) == 2 and sorted(found.phrases.tolist()) == [SUBJECT, OBJECT]
            codes[i] = FrameClass.VALID if exact else FrameClass.REDUNDANT
    return codes


def first_run(codes: NDArray[np.int8], length: int) -> int | None:
    """First frame of the first (not the longest) run of at least ``length`` VALID frames, or None."""
    run = 0
    for i, code in enumerate(codes):
        run = run + 1 if code == FrameClass.VALID else 0
        if run == length:
            return i - length + 1
    return None


def paper_verdict(codes: NDArray[np.int8], limits: Limits) -> Verdict:
    """The paper's rule: INVALID if redundant > ``max_redundant``, valid < ``min_valid``, or no run of ``min_run``.

    Misses alone never invalidate. The seed is the first frame of the first run.
    """
    miss, redundant, valid = (int((codes == code).sum()) for code in FrameClass)
    seed = first_run(codes, limits.min_run)
    reason = None
    if redundant > limits.max_redundant:
        reason = (
            f"{redundant} of {len(codes)} frames show surplus or wrongly named boxes, {limits.max_redundant} allowed"
        )
    elif valid < limits.min_valid:
        reason = (
            f"{valid} of {len(codes)} frames show exactly the subject and the object, {limits.min_valid} are needed "
            f"({miss} frames miss one of them)"
        )
    elif seed is None:
        reason = f"no run of {limits.min_run} frames that show exactly the subject and the object"
    return Verdict(None if reason else seed, reason, miss, redundant, valid)


def best_scores(detections: Sequence[Detections]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Best and second-best score per frame and phrase, both (T, 2), 0 where there is none."""
    scores = np.zeros((2, len(detections), 2))
    for i, found in enumerate(detections):
        for phrase in (SUBJECT, OBJECT):
            mine = np.sort(found.scores[found.phrases == phrase])[::-1][:2]
            scores[: len(mine), i, phrase] = mine
    return scores[0], scores[1]


def anchor_values(
    best: NDArray[np.float64], second: NDArray[np.float64], duplicate_penalty: float = 0.5
) -> NDArray[np.float64]:
    """(T,) how well each frame would serve as an anchor: product of the two best scores minus the duplicate penalty.

    A frame without one of the two is 0 at most; a rival of the same phrase costs ``duplicate_penalty`` times its score.
    """
    both = (best > 0).all(axis=1)
    return np.where(both, best.prod(axis=1) - duplicate_penalty * second.sum(axis=1), 0.0)


def robust_verdict(
    detections: Sequence[Detections], limits: Limits, duplicate_penalty: float = 0.5, rival: float = 0.75
) -> Verdict:
    """Seed at the frame with the best :func:`anchor_values` (the first of equals).

    INVALID when no frame shows both things, or when more than ``max_redundant`` frames show a rival (a second box of
    the same phrase scoring at least ``rival`` times the best): with two cats, nobody knows which one to follow.
    Frames with a miss are left to the score, which knows *when* something was missing.
    """
    best, second = best_scores(detections)
    both = np.asarray((best > 0).all(axis=1))
    rivals = ((second >= rival * best) & (second > 0)).any(axis=1)
    counts = {"miss": int((~both).sum()), "redundant": int(rivals.sum()), "valid": int((both & ~rivals).sum())}
    if not both.any():
        seen = [
            "the subject" if (best[:, SUBJECT] > 0).any() else "",
            "the object" if (best[:, OBJECT] > 0).any() else "",
        ]
        found = " and ".join(name for name in seen if name) or "neither"
        return Verdict(None, f"no frame shows both the subject and the object (found: {found})", **counts)
    if rivals.sum() > limits.max_redundant:
        reason = (
            f"{rivals.sum()} of {len(both)} frames show two subjects or two objects, {limits.max_redundant} allowed"
        )
        return Verdict(None, reason, **counts)
    values = np.where(both, anchor_values(best, second, duplicate_penalty), -np.inf)
    return Verdict(int(values.argmax()), None, **counts)
