"""The paper's counting rule at its limits, and the robust anchor."""

from __future__ import annotations

import numpy as np
import pytest

from spatialalign.score import Limits
from spatialalign.tracking.detect import Detections
from spatialalign.tracking.validity import (
    FrameClass,
    anchor_values,
    best_scores,
    classify_frames,
    first_run,
    paper_verdict,
    robust_verdict,
)

M, R, V = FrameClass.MISS, FrameClass.REDUNDANT, FrameClass.VALID
PAPER = Limits()


def frame(*found: tuple[int, float]) -> Detections:
    """Detections given as (phrase, score), boxes side by side."""
    boxes = np.array([[20.0 * i, 0, 20 * i + 10, 10] for i in range(len(found))]).reshape(-1, 4)
    return Detections(
        boxes,
        np.array([score for _, score in found], dtype=float),
        np.array([phrase for phrase, _ in found], dtype=np.int64),
        tuple(str(phrase) for phrase, _ in found),
    )


@pytest.mark.parametrize(
    ("found", "code"),
    [
        ((), M),
        (((0, 0.9),), M),
        (((0, 0.9), (1, 0.8)), V),
        (((1, 0.9), (0, 0.8)), V),
        (((0, 0.9), (0, 0.8)), R),  # two cats, no box
        (((0, 0.9), (-1, 0.8)), R),  # "cat" and "cat box"
        (((0, 0.9), (1, 0.8), (0, 0.5)), R),
    ],
)
def test_frame_classes(found: tuple[tuple[int, float], ...], code: FrameClass) -> None:
    assert classify_frames([frame(*found)]).tolist() == [code]


def codes(*runs: tuple[int, int]) -> np.ndarray:
    return np.concatenate([np.full(count, code, dtype=np.int8) for code, count in runs])


def test_the_first_run_is_the_first_in_time() -> None:
    assert first_run(codes((V, 3), (M, 1), (V, 4), (R, 1), (V, 30)), 4) == 4
    assert first_run(codes((V, 4)), 4) == 0
    assert first_run(codes((V, 3), (M, 1), (V, 3)), 4) is None


@pytest.mark.parametrize(
    ("sequence", "seed", "why"),
    [
        (codes((M, 5), (V, 76)), 5, None),
        (codes((R, 16), (V, 65)), 16, None),
        (codes((R, 17), (V, 64)), None, "17 of 81 frames show surplus or wrongly named boxes, 16 allowed"),
        (codes((M, 61), (V, 20)), 61, None),
        (codes((M, 62), (V, 19)), None, "19 of 81 frames show exactly the subject and the object, 20 are needed"),
        (np.tile(codes((V, 3), (M, 1)), 20), None, "no run of 4 frames"),
    ],
)
def test_paper_limits_are_met_exactly(sequence: np.ndarray, seed: int | None, why: str | None) -> None:
    verdict = paper_verdict(sequence, PAPER)
    assert verdict.seed == seed
    assert verdict.invalid is None if why is None else why in str(verdict.invalid)
    assert verdict.miss + verdict.redundant + verdict.valid == len(sequence)


def test_limits_scale_with_the_clip() -> None:
    # 17 frames: ceil(20 * 17 / 81) = 5 valid, runs of 1, floor(16 * 17 / 81) = 3 redundant.
    limits = Limits.for_frames(17)
    assert paper_verdict(codes((R, 3), (M, 9), (V, 5)), limits).seed == 12
    assert paper_verdict(codes((R, 4), (M, 8), (V, 5)), limits).invalid is not None
    assert paper_verdict(codes((M, 13), (V, 4)), limits).invalid is not None


def test_anchor_is_the_best_frame_less_its_duplicates() -> None:
    clip = [
        frame((0, 0.5), (1, 0.9)),  # 0.45
        frame((0, 0.9), (1, 0.9), (0, 0.8)),  # 0.81 - 0.5 * 0.8 = 0.41
        frame((0, 0.8), (1, 0.9)),  # 0.72
        frame((0, 1.0)),  # no object
    ]
    best, second = best_scores(clip)
    np.testing.assert_allclose(anchor_values(best, second), [0.45, 0.41, 0.72, 0.0])
    verdict = robust_verdict(clip, Limits(min_valid=2, window=1, min_run=1, max_redundant=1))
    assert (verdict.seed, verdict.invalid) == (2, None)
    assert (verdict.miss, verdict.redundant, verdict.valid) == (1, 1, 2)


def test_an_anchor_needs_both_even_when_duplicates_make_every_value_negative() -> None:
    clip = [frame((0, 0.9)), frame((0, 0.3), (1, 0.3), (0, 0.29), (1, 0.29))]
    assert robust_verdict(clip, PAPER).seed == 1


def test_robust_rule_refuses_what_cannot_be_followed() -> None:
    nothing = robust_verdict([frame((0, 0.9)), frame()], PAPER)
    assert nothing.seed is None and "found: the subject" in str(nothing.invalid)
    twins = [frame((0, 0.9), (0, 0.85), (1, 0.9))] * 17 + [frame((0, 0.9), (1, 0.9))] * 64
    assert "17 of 81 frames show two subjects" in str(robust_verdict(twins, PAPER).invalid)
    # A faint second reading is no rival.
    faint = [frame((0, 0.9), (0, 0.35), (1, 0.9))] * 81
    assert robust_verdict(faint, PAPER).invalid is None
