"""Words about scores: true, and about the right thing."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from spatialalign import DSR, Relation, Tracks, dsr_score
from spatialalign.explain import explain, objections, verdict

LR = DSR("cat", "box", Relation.LEFT, Relation.RIGHT)
T = 81


def clip(across: np.ndarray, **more: object) -> Tracks:
    """A cat at x = ``across`` from a box, NaN where it is absent; both are 20 x 20."""
    boxes = np.array([[[300 + x - 10, 50 + 0 * x, 300 + x + 10, 70 + 0 * x], [290, 50, 310, 70]] for x in across])
    return Tracks(boxes, np.full((T, 2), 0.9), ("cat", "box"), (200, 600), 16, **more)  # type: ignore[arg-type]


def words(tracks: Tracks, threshold: float = 0.7) -> list[str]:
    return explain(dsr_score(tracks, LR), LR, threshold)


WALK = np.linspace(-100, 100, T)


@pytest.mark.parametrize(
    ("score", "threshold", "expected"),
    [
        (0.8234, 0.7, "0.823 passes 0.7"),
        (0.7, 0.7, "0.700 passes 0.7"),
        (0.6999999, 0.7, "0.6999999 fails 0.7"),
        (0.69, 0.7, "0.690 fails 0.7"),
        (0.12349, 0.12345, "0.12349 passes 0.12345"),
    ],
)
def test_a_verdict_never_contradicts_its_figures(score: float, threshold: float, expected: str) -> None:
    assert verdict(score, threshold) == expected


def test_a_plain_passage_has_nothing_against_it() -> None:
    lines = words(clip(WALK))
    assert lines == [
        "DSR-Score 1.000 passes 0.7; normalised 1.000",
        "Robust score 1.000 passes 0.7",
        "81 of 81 frames are valid",
    ]


def test_an_end_on_the_wrong_side_is_named() -> None:
    still = words(clip(np.full(T, -100.0)))
    assert [line for line in still if "begin" in line] == []
    assert "- it hardly ceases to be on the left of the box (+0.00)" in still
    assert "- the cat does not end clearly to the right of the box (-1.00)" in still
    assert "- it hardly comes to be to the right of the box (+0.00)" in still


def test_each_check_of_the_robust_score_has_its_phrase() -> None:
    jump = np.where(np.arange(T) < 40, -100.0, 100.0)
    assert any("of the passage was not seen (jumps: 1," in line for line in words(clip(jump)))
    back = np.interp(np.arange(T), [0, 20, 40, 60, 80], [-100, 90, -90, 90, 100])
    # 1 forward, 0.95 back, 0.95 forward (in SSR, about): 1 of 2.8 and more.
    assert any(re.fullmatch(r"- only 3\d% of the cat's way leads from .* to the last", x) for x in words(clip(back)))
    assert "- only 0% of the cat's way leads from the first side to the last" in words(clip(-WALK))
    # The box goes from right of a cat that stands still to the left of it.
    swapped = clip(WALK).boxes[::-1, ::-1]
    moving = words(Tracks(swapped, np.full((T, 2), 0.9), ("cat", "box"), (200, 600), 16))
    assert "- the box moves too (100% of all motion)" in moving
    gone = np.where((np.arange(T) >= 20) & (np.arange(T) < 60), np.nan, WALK)
    assert any("is missing for long" in line for line in words(clip(gone)))
    assert not any("leaves the picture" in line for line in words(clip(gone)))
    # Last seen with its box at the left border.
    out = np.concatenate([np.linspace(-100, -290, 20), np.full(40, np.nan), np.linspace(-290, 100, 21)])
    assert any(line.startswith("- the cat leaves the picture") for line in words(clip(out)))


def test_hardly_seen_ends_are_named() -> None:
    lines = words(clip(np.where(np.arange(T) < 8, np.nan, WALK)))  # 4 of the 12 first frames are left
    assert "- only 33% of the first frames show both things" in lines
    assert not any("of the last frames" in line for line in lines)


def test_nothing_is_said_of_a_factor_of_one() -> None:
    parts = dsr_score(clip(WALK), LR).robust.parts  # type: ignore[union-attr]
    assert parts is not None and parts.factor == 1 and objections(parts, LR) == []
    for factor in ("continuity", "presence", "in_picture", "direction", "static_object"):
        assert len(objections(replace(parts, **{factor: 0.9}), LR)) == 1


def test_an_invalid_clip_says_why_and_that_it_does_not_pass() -> None:
    lines = words(clip(WALK, invalid="two cats in 30 frames"), threshold=0.0)
    assert lines[:3] == [
        "INVALID: tracker: two cats in 30 frames",
        "An INVALID clip has no score and does not pass.",
        "Robust score: INVALID, tracker: two cats in 30 frames",
    ]
    assert not any("passes" in line for line in lines)


def test_a_score_without_a_robust_one_is_told_alone() -> None:
    lines = explain(replace(dsr_score(clip(WALK), LR), robust=None), LR)
    assert len(lines) == 2 and "obust" not in "".join(lines)
