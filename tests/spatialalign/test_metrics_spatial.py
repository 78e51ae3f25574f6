"""The spatial rules of other benchmarks, by hand, and VBench-2.0's questions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from spatialalign.dsr import DSR, Relation
from spatialalign.errors import ConfigError
from spatialalign.metrics_spatial import (
    Answers,
    ask_both,
    compbench_frames,
    compbench_score,
    sampled,
    vbench_frames,
    vbench_score,
)
from spatialalign.rewards.vlm_judge import Answer, question
from spatialalign.tracks import Tracks
from spatialalign.video import Video

L, R, T, U, F, B = (Relation(code) for code in "LRTUFB")
ABSENT = [np.nan] * 4
HERE = [0.0, 0.0, 10.0, 10.0]
FAR = [20.0, 4.0, 30.0, 14.0]
"""dx = -20, dy = -4 from ``HERE``, no overlap."""
NEAR = [5.0, 0.0, 15.0, 10.0]
"""Overlaps ``HERE``: 50 of 150, an IoU of 1/3."""
DIAGONAL = [20.0, 20.0, 30.0, 30.0]

LEFT_TO_RIGHT = DSR("cat", "box", L, R)


def tracks(subjects: list[list[float]], objects: list[list[float]], depth: Any = None) -> Tracks:
    """Tracks of these boxes."""
    boxes = np.stack([np.array(subjects), np.array(objects)], axis=1)
    return Tracks(boxes, np.ones((len(boxes), 2)), ("cat", "box"), (64, 64), 8.0, depth=depth)


@pytest.mark.parametrize(
    ("subject", "thing", "relation", "vbench", "compbench"),
    [
        (HERE, FAR, L, 1.0, 1.0),
        (HERE, FAR, R, 1.0, 0.4),  # VBench has no sign
        (HERE, FAR, T, 0.0, 0.4),  # above, but further to the side
        (FAR, HERE, R, 1.0, 1.0),
        (HERE, NEAR, L, 0.1 * 3, 0.4 + 0.6 * 2 / 3),
        (HERE, DIAGONAL, L, 0.0, 0.4),  # neither axis is the larger one
        (HERE, DIAGONAL, T, 0.0, 0.4),
        ([0.0, 20.0, 10.0, 30.0], HERE, U, 1.0, 1.0),
        (HERE, HERE, L, 0.0, 0.4),
        (ABSENT, HERE, L, 0.0, 0.2),
        (HERE, ABSENT, R, 0.0, 0.2),
        (ABSENT, ABSENT, L, 0.0, 0.0),
    ],
)
def test_frames_by_hand(
    subject: list[float], thing: list[float], relation: Relation, vbench: float, compbench: float
) -> None:
    assert vbench_frames([subject], [thing], relation) == pytest.approx([vbench])
    assert compbench_frames([subject], [thing], relation) == pytest.approx([compbench])


def test_in_front_and_behind_need_overlap_and_the_order_of_disparities() -> None:
    subjects, things = [HERE, HERE, HERE, ABSENT], [NEAR, NEAR, FAR, NEAR]
    near, far = [0.8, 0.2, 0.8, np.nan], [0.2, 0.8, 0.2, 0.5]
    front = compbench_frames(subjects, things, F, near, far)
    assert front == pytest.approx([0.4 + 0.6 / 3, 0.4, 0.4, 0.2])
    assert compbench_frames(subjects, things, B, near, far) == pytest.approx([0.4, 0.4 + 0.6 / 3, 0.4, 0.2])
    assert np.isnan(compbench_frames(subjects, things, F)).all()
    assert np.isnan(vbench_frames(subjects, things, F)).all()


boxes = st.tuples(*[st.integers(0, 40)] * 2, *[st.integers(1, 20)] * 2).map(
    lambda v: [float(v[0]), float(v[1]), float(v[0] + v[2]), float(v[1] + v[3])]
)


@given(boxes, boxes)
def test_a_mirror_tells_compbench_from_vbench(one: list[float], two: list[float]) -> None:
    mirrored = [[60 - box[2], box[1], 60 - box[0], box[3]] for box in (one, two)]
    assert compbench_frames([mirrored[0]], [mirrored[1]], R) == pytest.approx(compbench_frames([one], [two], L))
    assert vbench_frames([mirrored[0]], [mirrored[1]], L) == pytest.approx(vbench_frames([one], [two], L))
    assert vbench_frames([two], [one], L) == pytest.approx(vbench_frames([one], [two], L))


def test_frames_are_the_middles_of_equal_parts() -> None:
    assert sampled(32).tolist() == list(range(1, 32, 2))
    assert sampled(5).tolist() == [0, 1, 2, 3, 4]
    assert sampled(9, 3).tolist() == [1, 4, 7]
    with pytest.raises(ConfigError, match="at least one"):
        sampled(0)


def test_the_first_half_is_judged_by_the_initial_relation_and_the_second_by_the_final_one() -> None:
    obeys = tracks([HERE, HERE, FAR, FAR], [FAR, FAR, HERE, HERE])
    assert vbench_score(obeys, LEFT_TO_RIGHT) == compbench_score(obeys, LEFT_TO_RIGHT) == pytest.approx(1.0)
    backwards = obeys.reversed()
    assert vbench_score(backwards, LEFT_TO_RIGHT) == 1.0
    assert compbench_score(backwards, LEFT_TO_RIGHT) == pytest.approx(0.4)
    stays = tracks([HERE] * 4, [FAR] * 4)
    assert compbench_score(stays, LEFT_TO_RIGHT) == pytest.approx(0.7)
    lost = tracks([HERE, HERE, ABSENT, ABSENT], [FAR, FAR, HERE, ABSENT])
    assert vbench_score(lost, LEFT_TO_RIGHT) == 0.5
    assert compbench_score(lost, LEFT_TO_RIGHT) == pytest.approx((1 + 1 + 0.2 + 0) / 4)


def test_a_relation_in_depth_needs_disparities() -> None:
    dsr = DSR("cat", "box", L, F)
    flat = tracks([HERE, HERE], [FAR, NEAR])
    assert vbench_score(flat, dsr) is None
    assert compbench_score(flat, dsr) is None
    deep = tracks([HERE, HERE], [FAR, NEAR], depth=np.array([[0.5, 0.5], [0.9, 0.1]]))
    assert compbench_score(deep, dsr) == pytest.approx((1.0 + 0.6) / 2)


@pytest.mark.parametrize(
    ("initial", "final", "score"),
    [
        ("yes", "yes", 1.0),
        ("yes", "no", 0.0),
        ("no", "yes", 0.0),
        ("unclear", "no", 0.0),
        ("yes", "unclear", None),
        ("unclear", "unclear", None),
    ],
)
def test_both_answers_must_be_yes(initial: Answer, final: Answer, score: float | None) -> None:
    assert Answers(initial, final).score == score


def test_the_questions_are_about_the_first_half_and_the_last_frame() -> None:
    asked: list[tuple[list[int], str]] = []

    def ask(frames: NDArray[np.uint8], words: str) -> Answer:
        asked.append((frames[:, 0, 0, 0].tolist(), words))
        return "yes" if len(asked) == 1 else "no"

    def clip(frames: int) -> Video:
        numbers = np.arange(frames, dtype=np.uint8)[:, None, None, None]
        return Video(np.broadcast_to(numbers, (frames, 2, 2, 3)).copy(), 8.0)

    assert ask_both(clip(128), LEFT_TO_RIGHT, ask) == Answers("yes", "no")
    places = [int(place * 127 / 63) for place in range(32)]
    assert asked == [(places, question(LEFT_TO_RIGHT, L, 32)), ([127], question(LEFT_TO_RIGHT, R, 1))]
    asked.clear()
    # 64 samples of nine frames show each of the first half once.
    ask_both(clip(9), LEFT_TO_RIGHT, ask)
    assert [frames for frames, _ in asked] == [[0, 1, 2, 3], [8]]
    with pytest.raises(ConfigError, match="at least two frames"):
        ask_both(clip(9), LEFT_TO_RIGHT, ask, 1)
