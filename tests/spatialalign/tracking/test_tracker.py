"""The tracker's own decisions, with detectors and segmenters whose answers are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from spatialalign import DSR, Relation, dsr_score
from spatialalign.errors import ConfigError, TracksError, VideoError
from spatialalign.tracking.detect import Detections
from spatialalign.tracking.segment import Propagation, boxes_from_masks
from spatialalign.tracking.tracker import Tracker, confirmation, link, tracks_from_boxes, tracks_from_masks
from spatialalign.tracks import Tracks

T, H, W = 12, 40, 60
LABELS = ("cat", "box")


def truth() -> np.ndarray:
    """A cat 6 x 6 that walks from left to right above a box 10 x 8, whole pixels."""
    boxes = np.zeros((T, 2, 4))
    for i in range(T):
        boxes[i] = [[4 * i, 10, 4 * i + 6, 16], [25, 20, 35, 28]]
    return boxes


def painted(boxes: np.ndarray) -> np.ndarray:
    masks = np.zeros((len(boxes), 2, H, W), dtype=bool)
    for i, thing in np.argwhere(~np.isnan(boxes[..., 0])):
        x0, y0, x1, y1 = boxes[i, thing].astype(int)
        masks[i, thing, y0:y1, x0:x1] = True
    return masks


@dataclass
class GivenDetector:
    """Says what it was told: per frame a list of (phrase, score, box)."""

    frames: list[list[tuple[int, float, Sequence[float]]]]
    asked: list[tuple[str, ...]] = field(default_factory=list)

    def detect(self, frames: np.ndarray, phrases: Sequence[str]) -> list[Detections]:
        self.asked.append(tuple(phrases))
        return [
            Detections(
                np.array([box for _, _, box in found], dtype=float).reshape(-1, 4),
                np.array([score for _, score, _ in found], dtype=float),
                np.array([phrase for phrase, _, _ in found], dtype=np.int64),
                tuple(str(phrase) for phrase, _, _ in found),
            )
            for found in self.frames
        ]


@dataclass
class GivenPropagator:
    masks: np.ndarray
    seeds: list[tuple[int, np.ndarray]] = field(default_factory=list)

    def propagate(self, frames: np.ndarray, seed_frame: int, boxes: np.ndarray) -> Propagation:
        self.seeds.append((seed_frame, boxes))
        return Propagation(self.masks, np.full((T, 2), 0.8))


@dataclass
class GivenSegmenter:
    masks: np.ndarray

    def segment(self, frames: np.ndarray, boxes: np.ndarray) -> Propagation:
        return Propagation(self.masks, np.where(np.isnan(boxes[..., 0]), 0.0, 0.8))


def told(boxes: np.ndarray, score: float = 0.9) -> GivenDetector:
    return GivenDetector(
        [[(p, score, boxes[i, p]) for p in (0, 1) if not np.isnan(boxes[i, p, 0])] for i in range(len(boxes))]
    )


@pytest.fixture
def frames() -> np.ndarray:
    return np.zeros((T, H, W, 3), dtype=np.uint8)


def test_detector_alone(frames: np.ndarray) -> None:
    boxes = truth()
    boxes[3, 0] = np.nan
    detector = told(boxes)
    tracks = Tracker(detector).track(frames, "cat", "box", 8)
    np.testing.assert_array_equal(tracks.boxes, boxes)
    assert detector.asked == [("cat", "box")]
    assert tracks.confidence[3].tolist() == [0.0, 0.9] and tracks.labels == LABELS and tracks.invalid is None
    dsr = DSR("cat", "box", Relation.LEFT, Relation.RIGHT)
    score = dsr_score(tracks, dsr).score
    assert score is not None and score > 0.9


def test_propagated_boxes_come_from_masks_and_know_what_confirms_them(frames: np.ndarray) -> None:
    boxes = truth()
    seen = boxes.copy()
    seen[7:, 0] = np.nan  # the detector loses the cat, the propagator does not
    masks = painted(boxes)
    masks[11] = False
    propagator = GivenPropagator(masks)
    tracks = Tracker(told(seen), propagator).track(frames, "cat", "box", 8)
    np.testing.assert_array_equal(tracks.boxes[:11], boxes[:11])
    assert np.isnan(tracks.boxes[11]).all()
    np.testing.assert_allclose(tracks.confidence[:7], 0.9 * 0.8)
    np.testing.assert_allclose(tracks.confidence[7:11], [[0.25 * 0.8, 0.9 * 0.8]] * 4)
    assert (tracks.confidence[11] == 0).all() and tracks.masks is not None
    seed, prompt = propagator.seeds[0]
    np.testing.assert_array_equal(prompt, boxes[seed])


def test_paper_rule_seeds_at_the_first_run_and_takes_inclusive_extents(frames: np.ndarray) -> None:
    boxes = truth()
    detector = told(boxes)
    # Frame 0 has two cats; with 12 frames runs of 1 are long enough, so frame 1 is the seed. Frame 9 scores best.
    detector.frames[0].append((0, 0.9, [40, 30, 46, 36]))
    detector.frames[9] = [(p, 0.99, boxes[9, p]) for p in (0, 1)]
    propagator = GivenPropagator(painted(boxes))
    tracks = Tracker(detector, propagator, rule="paper", keep_masks=False).track(frames, "cat", "box", 8)
    assert propagator.seeds[0][0] == 1 and tracks.masks is None
    np.testing.assert_array_equal(tracks.boxes, boxes - [0, 0, 1, 1])
    Tracker(detector, propagator).track(frames, "cat", "box", 8)
    assert propagator.seeds[1][0] == 9


def test_a_mask_is_used_where_it_agrees_with_its_box(frames: np.ndarray) -> None:
    boxes = truth()
    loose = boxes + [-1, -1, 1, 1]
    masks = painted(boxes)
    masks[4, 0] = False
    masks[4, 0, 30:40, 50:60] = True  # SAM took something else
    masks[5, 1] = False  # SAM found nothing
    tracks = Tracker(told(loose), GivenSegmenter(masks)).track(frames, "cat", "box", 8)
    expected = boxes.copy()
    expected[4, 0], expected[5, 1] = loose[4, 0], loose[5, 1]
    np.testing.assert_array_equal(tracks.boxes, expected)
    assert tracks.confidence[3, 0] == pytest.approx(0.9 * 0.8)
    assert tracks.confidence[4, 0] == pytest.approx(0.9 * 0.25 * 0.8)
    assert tracks.masks is not None and not tracks.masks[4, 0].any() and tracks.masks[4, 1].any()


def test_refused_clips_come_back_with_the_reason(frames: np.ndarray) -> None:
    boxes = truth()
    boxes[:, 1] = np.nan
    tracks = Tracker(told(boxes), GivenPropagator(painted(boxes))).track(frames, "cat", "box", 8)
    assert tracks.invalid is not None and "no frame shows both" in tracks.invalid
    np.testing.assert_array_equal(tracks.boxes[:, 0], boxes[:, 0])
    one = Tracker(told(truth()[:1])).track(frames[:1], "cat", "box", 8)
    assert one.frames == 1 and one.invalid is not None and "1 frame" in one.invalid
    result = dsr_score(one, DSR("cat", "box", Relation.LEFT, Relation.RIGHT))
    assert not result.valid and "1 frame" in str(result.reason)


def test_linking_prefers_the_nearer_of_equals_and_keeps_honest_jumps() -> None:
    boxes = truth()
    detector = told(boxes)
    for i in range(6):
        detector.frames[i].append((0, 0.92, [50, 30, 56, 36]))  # a second cat, far from where the first is seen
    found, scores = link(detector.detect(np.zeros(1), LABELS), 8, (H, W))
    np.testing.assert_array_equal(found, boxes)
    assert (scores == 0.9).all()
    jumped = boxes.copy()
    jumped[6:, 0] = [52, 2, 58, 8]
    np.testing.assert_array_equal(link(told(jumped).detect(np.zeros(1), LABELS), 0, (H, W))[0], jumped)


def test_confirmation_takes_the_detection_that_fits() -> None:
    boxes = truth()[:1]
    detections = GivenDetector([[(0, 0.9, [0, 10, 6, 16]), (0, 0.95, [30, 0, 36, 6]), (1, 0.6, [0, 0, 5, 5])]])
    support = confirmation(boxes, detections.detect(np.zeros(1), LABELS), 0.5, 0.25)
    assert support.tolist() == [[0.9, 0.25]]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (np.zeros((T, H, W, 3)), "uint8 in 0..255, found float64"),
        (np.full((T, H, W, 3), np.nan), "NaN or infinite"),
        (np.zeros((T, H, W), dtype=np.uint8), r"shape \(T, H, W, 3\)"),
        (np.zeros((0, H, W, 3), dtype=np.uint8), "at least one frame"),
        ([[1, 2]], "numpy array"),
    ],
)
def test_frames_that_are_none(bad: object, message: str) -> None:
    with pytest.raises(VideoError, match=message):
        Tracker(told(truth())).track(bad, "cat", "box", 8)  # type: ignore[arg-type]


def test_wrong_parts_are_named(frames: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="has no method detect"):
        Tracker(object())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="neither propagate"):
        Tracker(told(truth()), object())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'robust' or 'paper'"):
        Tracker(told(truth()), rule="strict")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="nothing can tell them apart"):
        Tracker(told(truth())).track(frames, "cat", "a Cat", 8)
    with pytest.raises(TracksError, match="answered for 3 of 12 frames"):
        Tracker(told(truth()[:3])).track(frames, "cat", "box", 8)
    with pytest.raises(TracksError, match="expected"):
        Tracker(told(truth()), GivenSegmenter(np.zeros((T, 2, 5, 5), bool))).track(frames, "cat", "box", 8)


def test_extents_of_masks() -> None:
    masks = np.zeros((3, H, W), dtype=bool)
    masks[0, 5, 7] = True
    masks[1, 0, 0] = masks[1, H - 1, W - 1] = True
    np.testing.assert_array_equal(boxes_from_masks(masks), [[7, 5, 8, 6], [0, 0, W, H], [np.nan] * 4])
    np.testing.assert_array_equal(
        boxes_from_masks(masks, inclusive=True), [[7, 5, 7, 5], [0, 0, W - 1, H - 1], [np.nan] * 4]
    )


def test_masks_and_boxes_from_elsewhere() -> None:
    boxes = truth()
    boxes[2, 1] = np.nan
    by_masks = tracks_from_masks(painted(boxes), LABELS, 8)
    by_boxes = tracks_from_boxes(boxes, LABELS, (H, W), 8)
    np.testing.assert_array_equal(by_masks.boxes, by_boxes.boxes)
    assert isinstance(by_masks, Tracks) and by_masks.size == (H, W) and by_boxes.confidence[2].tolist() == [1, 0]
    with pytest.raises(TracksError, match="masks must be bool"):
        tracks_from_masks(np.zeros((T, 2, H, W)), LABELS, 8)  # type: ignore[arg-type]


def test_progress_is_of_the_whole_work(frames: np.ndarray) -> None:
    class Telling(GivenDetector):
        def detect(self, frames: np.ndarray, phrases: Sequence[str], progress: Any = None) -> list[Detections]:
            for done in (6, 12):
                progress(done, 12)
            return super().detect(frames, phrases)

    class TellingPropagator(GivenPropagator):
        def propagate(
            self, frames: np.ndarray, seed_frame: int, boxes: np.ndarray, progress: Any = None
        ) -> Propagation:
            progress(3, 4)
            progress(4, 4)
            return super().propagate(frames, seed_frame, boxes)

    calls: list[tuple[int, int]] = []
    detector = Telling(told(truth()).frames)
    Tracker(detector).track(frames, "cat", "box", 8, lambda *call: calls.append(call))
    assert calls == [(6, 12), (12, 12)]
    calls.clear()
    tracker = Tracker(detector, TellingPropagator(painted(truth())))
    tracker.track(frames, "cat", "box", 8, lambda *call: calls.append(call))
    # Detection is the first half, propagation the second: 3 of 4 is 7 of 8.
    assert [done / total for done, total in calls] == [0.25, 0.5, 0.875, 1.0]
