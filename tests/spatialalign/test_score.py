"""DSR-Score against an independent scalar reading of the official rule, on any input; bounds, files and symmetries."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from spatialalign.dsr import DSR, Relation, relations_of
from spatialalign.errors import DataError, TracksError
from spatialalign.prompts import PAPER_TYPES
from spatialalign.score import (
    PAPER_LIMITS,
    DsrScore,
    Limits,
    aggregate_dsr,
    attainable,
    dsr_score,
    from_official_value,
    normalise,
    official_value,
    score_records,
)
from spatialalign.tracks import Tracks

Record = list[Any]
SIZE = (100, 100)


def dsr_of(kind: str) -> DSR:
    return DSR("cat", "box", *relations_of(kind))


# --- an independent, slow reading of the official rule: plain numbers, one frame at a time -------------------------


def scalar_relation(a: Sequence[float], o: Sequence[float], letter: str) -> float:
    dx = (a[0] + a[2]) / 2 - (o[0] + o[2]) / 2
    dy = (a[1] + a[3]) / 2 - (o[1] + o[3]) / 2
    norm = math.sqrt(dx * dx + dy * dy)
    cos_x, cos_y = (dx / norm, dy / norm) if norm > 0 else (0.0, 0.0)
    far_x = min(1.0, abs(dx) / (((a[2] - a[0]) + (o[2] - o[0])) / 2))
    far_y = min(1.0, abs(dy) / (((a[3] - a[1]) + (o[3] - o[1])) / 2))
    return {"L": -cos_x * far_x, "R": cos_x * far_x, "T": -cos_y * far_y}[letter]


def scalar_official(records: list[Record], kind: str, least: int = 20, window: int = 3) -> float:
    first: list[float] = []
    last: list[float] = []
    for _, labels, boxes, *_ in sorted(records, key=lambda record: record[0]):
        if len(boxes) != 2 or sorted(labels) != ["box", "cat"]:
            continue
        a, o = (boxes[0], boxes[1]) if labels[0] == "cat" else (boxes[1], boxes[0])
        widths, heights = (a[2] - a[0], o[2] - o[0]), (a[3] - a[1], o[3] - o[1])
        if sum(widths) / 2 == 0 or sum(heights) / 2 == 0 or widths[0] == 0 or widths[1] == 0:
            continue
        first.append(scalar_relation(a, o, kind[0]))
        last.append(scalar_relation(a, o, kind[1]))
    if len(first) < least:
        return -100.0
    r_init = sum(first[:window]) / window
    g_init = (first[0] - first[-1]) / 2
    r_final = sum(last[-window:]) / window
    g_final = (last[-1] - last[0]) / 2
    return (r_init + g_init + r_final + g_final) / 8 + 0.5


# Few whole numbers, so that centres coincide and extents vanish often.
side = st.integers(0, 4)
small_box = st.tuples(side, side, side, side).map(lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]])
real_box = st.tuples(*[st.floats(0, 50), st.floats(0, 50), st.floats(0, 30), st.floats(0, 30)]).map(
    lambda b: [b[0], b[1], b[0] + b[2], b[1] + b[3]]
)
labels = st.sampled_from(
    [["cat", "box"]] * 6 + [["box", "cat"]] * 3 + [["cat", "cat"], ["cat", "dog"], ["box"], ["cat", "box", "box"]]
)


@st.composite
def record_lists(draw: st.DrawFn) -> list[Record]:
    """Official lists: frames missing, doubled and in any order, labels swapped, wrong, too few or too many."""
    size = draw(st.integers(0, 45))
    frames = draw(st.lists(st.integers(0, 80), min_size=size, max_size=size))
    kind = draw(st.sampled_from([small_box, real_box]))
    records: list[Record] = []
    for frame in frames:
        names = draw(labels)
        records.append([frame, names, [draw(kind) for _ in names]])
    return records


@given(record_lists(), st.sampled_from(PAPER_TYPES), st.sampled_from([(20, 3), (20, 3), (5, 1), (8, 8)]))
@settings(max_examples=300)
def test_records_score_as_the_official_rule_does(records: list[Record], kind: str, limits: tuple[int, int]) -> None:
    result = score_records(records, dsr_of(kind), Limits(min_valid=limits[0], window=limits[1]))
    assert official_value(result.score) == pytest.approx(scalar_official(records, kind, *limits), abs=1e-12)
    assert result.valid == (result.reason is None)


@given(record_lists(), st.sampled_from(PAPER_TYPES))
@settings(max_examples=150)
def test_tracks_score_as_the_official_rule_does(records: list[Record], kind: str) -> None:
    once = list({record[0]: record for record in records}.values())
    tracks = Tracks.from_official(once, "cat", "box", SIZE, 16, frames=81)
    assert official_value(dsr_score(tracks, dsr_of(kind)).score) == pytest.approx(
        scalar_official(once, kind), abs=1e-12
    )


def test_the_generated_lists_are_not_all_invalid() -> None:
    # Guards the two tests above: a full, clean list must reach a score, and 19 frames must not.
    records = [[i, ["cat", "box"], [[i, 0, i + 9, 9], [36, 0, 44, 9]]] for i in range(81)]
    assert scalar_official(records, "LR") > 0.9
    assert scalar_official(records[:20], "LR") != -100
    assert scalar_official(records[:19], "LR") == -100
    assert score_records(records[:19], dsr_of("LR")).reason == (
        "frames: 19 of 19 frames are valid, at least 20 are needed"
    )


def test_order_of_equal_frames_is_kept() -> None:
    left, right = [[0, 0, 9, 9], [40, 0, 49, 9]], [[80, 0, 89, 9], [40, 0, 49, 9]]
    records = [[0, ["cat", "box"], left], [0, ["cat", "box"], right]] * 10
    for rotated in (records, records[1:] + records[:1]):
        assert score_records(rotated, dsr_of("LR")).score == pytest.approx(scalar_official(rotated, "LR"), abs=1e-12)


# --- aggregation ---------------------------------------------------------------------------------------------------


def test_aggregate_by_hand() -> None:
    initial, final = [1.0, 0.8, 0.6, 0.0, -0.2], [-1.0, -0.5, 0.0, 0.3, 0.9]
    parts = aggregate_dsr(initial, final)
    assert parts.initial_mean == pytest.approx((1.0 + 0.8 + 0.6) / 3)
    assert parts.initial_gap == pytest.approx((1.0 + 0.2) / 2)
    assert parts.final_mean == pytest.approx((0.0 + 0.3 + 0.9) / 3)
    assert parts.final_gap == pytest.approx((0.9 + 1.0) / 2)
    assert parts.score == pytest.approx((0.8 + 0.6 + 0.4 + 0.95) / 8 + 0.5)
    with_gap = aggregate_dsr([1.0, np.nan, 0.8, 0.6, 0.1, 0.0, -0.2], [-1, 0.5, -0.5, 0.0, np.nan, 0.3, 0.9])
    assert with_gap == parts


def test_aggregate_refuses_what_is_no_curve() -> None:
    with pytest.raises(TracksError, match="same length"):
        aggregate_dsr([1, 2], [1, 2, 3])
    with pytest.raises(TracksError, match="at least 3 frames"):
        aggregate_dsr([1, np.nan, 0, 0], [0, 0, 0, np.nan])
    with pytest.raises(TracksError, match=r"\[-1, 1\]"):
        aggregate_dsr([5, 0, 0], [0, 0, 0])
    with pytest.raises(TracksError, match="window"):
        aggregate_dsr([1, 0, 0], [0, 0, 0], window=0)


@given(st.floats(-1, 1), st.integers(3, 30))
def test_a_still_video_scores_half_and_a_quarter_of_its_ssr(value: float, n: int) -> None:
    assert aggregate_dsr([value] * n, [value] * n).score == pytest.approx(0.5 + value / 4)
    assert aggregate_dsr([value] * n, [-value] * n).score == pytest.approx(0.5)


# --- limits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        (81, (20, 3, 4, 16)),  # the paper's
        (17, (5, 1, 1, 3)),  # 4.2 up, 0.63 to nearest, 0.84 up, 3.4 down
        (33, (9, 1, 2, 6)),
        (162, (40, 6, 8, 32)),
        (1, (2, 1, 1, 0)),  # one frame has no motion: a score needs two
    ],
)
def test_limits_scale(frames: int, expected: tuple[int, int, int, int]) -> None:
    assert Limits.for_frames(frames) == Limits(*expected)


@given(st.integers(1, 2000))
def test_limits_are_always_usable(frames: int) -> None:
    limits = Limits.for_frames(frames)
    assert limits.window <= limits.min_valid <= max(2, frames)


def test_limits_are_checked() -> None:
    assert Limits() == PAPER_LIMITS == Limits.for_frames(81)
    for bad in ({"min_valid": 1}, {"window": 0}, {"min_run": 0}, {"max_redundant": -1}, {"window": 21}):
        with pytest.raises(TracksError, match="limits"):
            Limits(**bad)
    with pytest.raises(TracksError, match="at least one frame"):
        Limits.for_frames(0)


# --- normalised ----------------------------------------------------------------------------------------------------

angles = st.floats(-math.pi, math.pi)


@given(st.lists(angles, min_size=0, max_size=10), angles, angles, st.sampled_from(["LT", "RT", "TL", "TR"]))
def test_no_perpendicular_video_that_rests_at_its_ends_leaves_the_attainable_range(
    middle: list[float], start: float, end: float, kind: str
) -> None:
    # On the circle SSR(L)^2 + SSR(T)^2 = 1, the outermost that a frame allows.
    course = np.array([start] * 3 + middle + [end] * 3)
    low, high = attainable(*relations_of(kind))
    assert low - 1e-12 <= aggregate_dsr(np.cos(course), np.sin(course)).score <= high + 1e-12


def test_the_attainable_bounds_are_attained() -> None:
    low, high = attainable(Relation.LEFT, Relation.TOP)
    assert high == pytest.approx(0.8953, abs=5e-5)
    assert low == pytest.approx(1 - high)
    # The best resting place at the start is (I, F) in the direction (3/2, -1/2); at the end mirrored.
    start, end = math.atan2(-1, 3), math.atan2(3, -1)
    course = np.array([start] * 3 + [end] * 3)
    assert aggregate_dsr(np.cos(course), np.sin(course)).score == pytest.approx(high)
    assert aggregate_dsr(-np.cos(course), -np.sin(course)).score == pytest.approx(low)
    for kind in ("LR", "RL", "TU", "FB", "LF"):
        assert attainable(*relations_of(kind)) == (0, 1)


def test_a_jump_inside_a_window_can_exceed_the_resting_bound() -> None:
    jump = math.atan2(-3, 5)
    course = np.array([jump, 0, 0, math.pi / 2, math.pi / 2, math.pi / 2 - jump])
    expected = 0.5 + (math.sqrt(34) / 6 + 2 / 3) / 4
    assert aggregate_dsr(np.cos(course), np.sin(course)).score == pytest.approx(expected)
    assert expected == pytest.approx(0.9096, abs=5e-5)
    assert normalise(expected, Relation.LEFT, Relation.TOP) == 1.0


@given(st.floats(0, 1), st.floats(0, 1), st.sampled_from(PAPER_TYPES))
def test_normalise_is_monotone_and_keeps_one_half(a: float, b: float, kind: str) -> None:
    pair = relations_of(kind)
    assert normalise(0.5, *pair) == 0.5
    assert (normalise(a, *pair) <= normalise(b, *pair)) or a > b
    low, high = attainable(*pair)
    assert (normalise(low, *pair), normalise(high, *pair)) == pytest.approx((0, 1))
    if kind in ("LR", "RL"):
        assert normalise(a, *pair) == pytest.approx(a)


# --- whole tracks --------------------------------------------------------------------------------------------------


@st.composite
def random_tracks(draw: st.DrawFn) -> Tracks:
    frames = draw(st.integers(5, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    low = rng.uniform(0, 60, (frames, 2, 2))
    boxes = np.concatenate([low, low + rng.uniform(1, 40, low.shape)], axis=-1)
    boxes[rng.random((frames, 2)) < draw(st.sampled_from([0.0, 0.3]))] = np.nan
    return Tracks(boxes, np.ones((frames, 2)), ("cat", "box"), SIZE, 16)


all_types = st.sampled_from([a + b for a in "LRTU" for b in "LRTU" if a != b])


@given(random_tracks(), all_types)
def test_mirror_swaps_left_and_right(tracks: Tracks, kind: str) -> None:
    dsr = dsr_of(kind)
    assert_same(dsr_score(tracks.mirrored(), dsr.mirrored()), dsr_score(tracks, dsr))


@given(random_tracks(), all_types)
def test_time_reversal_swaps_initial_and_final(tracks: Tracks, kind: str) -> None:
    dsr = dsr_of(kind)
    backward = dsr_score(tracks.reversed(), dsr.reversed())
    assert_same(backward, dsr_score(tracks, dsr))
    assert_allclose(backward.initial_ssr, dsr_score(tracks, dsr).final_ssr[::-1])


@given(random_tracks(), all_types, st.floats(0.2, 5), st.floats(-50, 50), st.floats(-50, 50))
def test_scale_and_translation_leave_the_score(tracks: Tracks, kind: str, scale: float, x: float, y: float) -> None:
    moved = Tracks(tracks.boxes * scale + np.array([x, y, x, y]), tracks.confidence, tracks.labels, SIZE, tracks.fps)
    assert_same(dsr_score(moved, dsr_of(kind)), dsr_score(tracks, dsr_of(kind)))


@given(random_tracks(), all_types)
def test_the_opposite_question_has_the_opposite_score(tracks: Tracks, kind: str) -> None:
    dsr = dsr_of(kind)
    other = DSR("cat", "box", dsr.initial.opposite, dsr.final.opposite)
    score, opposite = dsr_score(tracks, dsr).score, dsr_score(tracks, other).score
    assert (score is None) == (opposite is None)
    if score is not None and opposite is not None:
        assert score + opposite == pytest.approx(1)


@given(random_tracks(), all_types)
def test_swapped_labels_are_put_in_order(tracks: Tracks, kind: str) -> None:
    swapped = tracks.oriented("box", "cat")
    assert_same(dsr_score(swapped, dsr_of(kind)), dsr_score(tracks, dsr_of(kind)))


@given(random_tracks(), all_types)
def test_score_files_keep_everything(tracks: Tracks, kind: str) -> None:
    score = dsr_score(tracks, dsr_of(kind))
    value = json.loads(json.dumps(score.to_dict(), allow_nan=False))
    back = DsrScore.from_dict(value)
    assert back.to_dict() == score.to_dict() == value
    assert back.robust == score.robust


def test_invalid_is_a_status_with_a_reason() -> None:
    boxes = np.tile([[[0.0, 0, 9, 9], [40, 0, 49, 9]]], (81, 1, 1))
    tracks = Tracks(boxes, np.ones((81, 2)), ("cat", "box"), SIZE, 16)
    dsr = dsr_of("LR")
    assert dsr_score(tracks, dsr).score == pytest.approx(0.5)
    foreign = dsr_score(tracks, DSR("dog", "box", Relation.LEFT, Relation.RIGHT))
    assert (foreign.score, foreign.valid) == (None, False)
    assert foreign.reason is not None
    assert foreign.reason.startswith("labels: ")
    said = dsr_score(Tracks(boxes, np.ones((81, 2)), ("cat", "box"), SIZE, 16, invalid="too many cats"), dsr)
    assert said.reason == "tracker: too many cats"
    assert len(said.frames_used) == 81  # the curves are still there to be looked at
    assert said.normalised is None
    single = dsr_score(Tracks(boxes[:1], np.ones((1, 2)), ("cat", "box"), SIZE, 16), dsr)
    assert single.reason == "frames: 1 of 1 frames are valid, at least 2 are needed"
    boxes[19:] = np.nan
    few = dsr_score(Tracks(boxes, np.ones((81, 2)), ("cat", "box"), SIZE, 16), dsr)
    assert few.reason == "frames: 19 of 81 frames are valid, at least 20 are needed"
    assert few.initial_mean is None


def test_official_values() -> None:
    assert official_value(None) == -100.0
    assert from_official_value(-100) is None
    assert from_official_value(0.7) == 0.7
    for bad in (2.0, -1.5, math.nan):
        with pytest.raises(DataError, match="expected an official score"):
            from_official_value(bad)


def test_damaged_score_files() -> None:
    value = score_records([], dsr_of("LR")).to_dict()
    assert DsrScore.from_dict(value).reason is not None
    with pytest.raises(DataError, match="expected version 1, found 7"):
        DsrScore.from_dict(value | {"version": 7})
    del value["limits"]
    with pytest.raises(DataError, match="limits"):
        DsrScore.from_dict(value)
    with pytest.raises(DataError, match="found list"):
        DsrScore.from_dict([])  # type: ignore[arg-type]


def test_depth_relations_end_to_end() -> None:
    # The subject walks from behind the object to in front of it: the order of disparities turns.
    frames = 81
    boxes = np.tile([[[40.0, 40, 60, 60], [30, 30, 70, 70]]], (frames, 1, 1))
    depth = np.stack([np.linspace(0.5, 1.5, frames), np.ones(frames)], axis=-1)
    tracks = Tracks(boxes, np.ones((frames, 2)), ("cat", "box"), SIZE, 16, depth=depth)
    walked = dsr_score(tracks, dsr_of("BF"))
    assert walked.score == pytest.approx(1.0)
    assert dsr_score(tracks, dsr_of("FB")).score == pytest.approx(0.0)
    assert walked.robust is not None
    assert walked.robust.passed
    # Reversal and mirror hold for depth as well.
    assert dsr_score(tracks.reversed(), dsr_of("FB")).score == pytest.approx(1.0)
    assert dsr_score(tracks.mirrored(), dsr_of("BF")).score == pytest.approx(1.0)
    with pytest.raises(TracksError, match="BEHIND needs the mean disparity"):
        dsr_score(Tracks(boxes, np.ones((frames, 2)), ("cat", "box"), SIZE, 16), dsr_of("BF"))


def test_from_left_to_under() -> None:
    t = np.linspace(0, 1, 81)[:, None]
    start, end = np.array([0.0, 40, 20, 60]), np.array([45.0, 75, 65, 95])
    boxes = np.stack([start + t * (end - start), np.tile([40.0, 35, 70, 65], (81, 1))], axis=1)
    tracks = Tracks(boxes, np.ones((81, 2)), ("cat", "box"), SIZE, 16)
    under, top = dsr_score(tracks, dsr_of("LU")).score, dsr_score(tracks, dsr_of("LT")).score
    assert under is not None
    assert top is not None
    # Both start well; the wrong half of LT is as wrong as that of LU is right.
    assert under > 0.8
    assert top == pytest.approx(0.5, abs=0.01)


def assert_same(a: DsrScore, b: DsrScore) -> None:
    assert len(a.frames_used) == len(b.frames_used)
    assert a.valid == b.valid
    if a.score is not None and b.score is not None:
        assert a.score == pytest.approx(b.score, abs=1e-9)
