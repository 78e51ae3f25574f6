"""One detector and one segmenter joined into a tracker: frames in, :class:`~spatialalign.tracks.Tracks` out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, TracksError
from ..geometry import iou
from ..score import Limits
from ..tracks import Tracks
from ..video import check_frames
from .detect import Detections, Detector, clean_phrase
from .parts import Progress
from .segment import FrameSegmenter, Propagation, Propagator, boxes_from_masks
from .validity import Verdict, classify_frames, paper_verdict, robust_verdict

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Tracker:
    """Finds and follows a subject and an object.

    ``rule`` "paper" is the official pipeline: its validity rule, seed at the first run, boxes as inclusive integer
    mask extents. "robust" seeds at the best frame, keeps duplicates apart by continuity, and uses exclusive extents.
    ``segmenter`` is a :class:`Propagator` (SAM 2 video), a :class:`FrameSegmenter` (SAM per frame), or None, when the
    detector's own boxes are the tracks. ``agreement`` is the IoU from which a mask's box is trusted against the
    detector's; ``unconfirmed`` scales the confidence of propagated boxes that no detection confirms.
    ``limits`` default to the paper's, scaled to the clip's length.
    """

    detector: Detector
    segmenter: Propagator | FrameSegmenter | None = None
    rule: Literal["robust", "paper"] = "robust"
    limits: Limits | None = None
    keep_masks: bool = True
    agreement: float = 0.5
    unconfirmed: float = 0.25

    def __post_init__(self) -> None:
        if self.rule not in ("robust", "paper"):
            raise ConfigError(f"rule must be 'robust' or 'paper', found {self.rule!r}")
        if not isinstance(self.detector, Detector):
            raise ConfigError(f"detector {type(self.detector).__name__} has no method detect(frames, phrases)")
        if self.segmenter is not None and not isinstance(self.segmenter, Propagator | FrameSegmenter):
            raise ConfigError(f"segmenter {type(self.segmenter).__name__} has neither propagate(...) nor segment(...)")
        if not 0 <= self.agreement <= 1 or not 0 <= self.unconfirmed <= 1:
            raise ConfigError(f"agreement {self.agreement} and unconfirmed {self.unconfirmed} must lie in [0, 1]")

    def track(
        self, frames: NDArray[np.uint8], subject: str, object: str, fps: float, progress: Progress | None = None
    ) -> Tracks:
        """Tracks of ``subject`` and ``object`` in ``frames`` (T, H, W, 3) uint8.

        A clip that the rule refuses comes back with ``invalid`` set (and the detector's best boxes, so that one can
        see why); a clip of one frame likewise. ``progress`` hears of detection as the first half of the work and of
        segmentation as the second; what it raises ends the tracking, and no state stays behind. Raises
        :class:`~spatialalign.errors.VideoError` for frames that are no frames, and :class:`ConfigError` when both words
        are the same.
        """
        check_frames(frames)
        if clean_phrase(subject) == clean_phrase(object):
            raise ConfigError(f"subject and object are both {clean_phrase(subject)!r}; nothing can tell them apart")
        limits = self.limits or Limits.for_frames(len(frames))
        halves = 1 if self.segmenter is None else 2
        detections = self.detector.detect(frames, (subject, object), *_part(progress, 0, halves))
        if len(detections) != len(frames):
            raise TracksError(f"the detector answered for {len(detections)} of {len(frames)} frames")
        verdict = self._verdict(detections, limits)
        size = (int(frames.shape[1]), int(frames.shape[2]))
        boxes, scores = link(detections, verdict.seed or 0, size)
        masks = None
        if verdict.seed is not None and self.segmenter is not None:
            told = _part(progress, 1, halves)
            boxes, scores, masks = self._segmented(frames, verdict.seed, boxes, scores, detections, told)
        return Tracks(
            boxes=boxes,
            confidence=scores,
            labels=(subject, object),
            size=size,
            fps=fps,
            masks=masks if self.keep_masks else None,
            invalid=verdict.invalid,
            source=self.source,
        )

    @property
    def source(self) -> str:
        """What made the tracks: detector, segmenter and rule, for the record."""
        segmenter = "" if self.segmenter is None else f"+{type(self.segmenter).__name__}"
        return f"{type(self.detector).__name__}{segmenter} ({self.rule})"

    def _verdict(self, detections: Sequence[Detections], limits: Limits) -> Verdict:
        if len(detections) < 2:
            return Verdict(None, "the clip has 1 frame; a movement needs at least 2", 0, 0, 0)
        if self.rule == "paper":
            return paper_verdict(classify_frames(detections), limits)
        return robust_verdict(detections, limits)

    def _segmented(
        self,
        frames: NDArray[np.uint8],
        seed: int,
        boxes: Floats,
        scores: Floats,
        detections: Sequence[Detections],
        told: tuple[Progress, ...],
    ) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        inclusive = self.rule == "paper"
        if isinstance(self.segmenter, Propagator):
            result = self.segmenter.propagate(frames, seed, boxes[seed], *told)
            _check_masks(result, frames)
            found = boxes_from_masks(result.masks, inclusive)
            support = confirmation(boxes_from_masks(result.masks), detections, self.agreement, self.unconfirmed)
            return found, support * result.scores, result.masks
        assert isinstance(self.segmenter, FrameSegmenter)
        result = self.segmenter.segment(frames, boxes, *told)
        _check_masks(result, frames)
        found = boxes_from_masks(result.masks)
        with np.errstate(invalid="ignore"):
            agree = iou(np.nan_to_num(found), np.nan_to_num(boxes)) >= self.agreement
        agree &= ~np.isnan(found[..., 0])
        chosen = np.where(agree[..., None], boxes_from_masks(result.masks, inclusive), boxes)
        quality = np.where(agree, result.scores, self.unconfirmed * result.scores)
        # A mask that was not believed is not kept either.
        return chosen, scores * quality, result.masks & agree[..., None, None]


def link(
    detections: Sequence[Detections], seed: int, size: tuple[int, int], distance: float = 0.5
) -> tuple[Floats, Floats]:
    """One box per frame and phrase, (T, 2, 4) with NaN where there is none, and its score (T, 2).

    From ``seed`` outwards, the box with the highest score minus ``distance`` times the way from the last known box, in
    frame diagonals: the more certain one, and between rivals the nearer one. At the seed the best score wins. Nothing
    is refused for being far: whether a jump is believable is for the robust score to judge.
    """
    boxes, scores = np.full((len(detections), 2, 4), np.nan), np.zeros((len(detections), 2))
    diagonal = float(np.hypot(*size))
    for phrase in (0, 1):
        start: Floats | None = None
        for order in (range(seed, len(detections)), range(seed - 1, -1, -1)):
            last = start
            for i in order:
                mine = detections[i].of(phrase)
                if not len(mine):
                    continue
                value = mine.scores.copy()
                if last is not None:
                    value -= distance * np.linalg.norm(_centre(mine.boxes) - _centre(last), axis=1) / diagonal
                pick = int(value.argmax())
                last = boxes[i, phrase] = mine.boxes[pick]
                scores[i, phrase] = mine.scores[pick]
                start = last if start is None else start
    return boxes, scores


def confirmation(boxes: Floats, detections: Sequence[Detections], agreement: float, unconfirmed: float) -> Floats:
    """(T, 2) score of the detection that agrees best with each propagated box, at IoU ``agreement`` or more.

    Where the box is there but no detection confirms it, ``unconfirmed``; 0 where there is no box.
    """
    support = np.zeros(boxes.shape[:2])
    for i, phrase in np.argwhere(~np.isnan(boxes[..., 0])):
        mine = detections[i].of(int(phrase))
        good = mine.scores[iou(boxes[i, phrase][None], mine.boxes) >= agreement] if len(mine) else np.zeros(0)
        support[i, phrase] = good.max() if len(good) else unconfirmed
    return support


def tracks_from_masks(
    masks: NDArray[np.bool_],
    labels: tuple[str, str],
    fps: float,
    confidence: Floats | None = None,
    source: str = "masks",
) -> Tracks:
    """Tracks from masks made elsewhere, bool (T, 2, H, W), subject first; ``confidence`` (T, 2), 1 by default."""
    masks = np.asarray(masks)
    if masks.dtype != np.bool_ or masks.ndim != 4 or masks.shape[1] != 2:
        raise TracksError(f"masks must be bool of the shape (T, 2, H, W), found {masks.dtype} {masks.shape}")
    size = (int(masks.shape[2]), int(masks.shape[3]))
    given = np.ones(masks.shape[:2]) if confidence is None else confidence
    return Tracks(boxes_from_masks(masks), given, labels, size, fps, masks=masks, source=source)


def tracks_from_boxes(
    boxes: Floats,
    labels: tuple[str, str],
    size: tuple[int, int],
    fps: float,
    confidence: Floats | None = None,
    source: str = "boxes",
) -> Tracks:
    """Tracks from boxes made elsewhere, (T, 2, 4) xyxy exclusive, NaN = absent; ``confidence`` (T, 2), 1 by default."""
    boxes = np.asarray(boxes, dtype=np.float64)
    given = np.ones(boxes.shape[:2]) if confidence is None else confidence
    return Tracks(boxes, given, labels, size, fps, source=source)


def _part(progress: Progress | None, number: int, parts: int) -> tuple[Progress, ...]:
    """What to hand to part ``number`` of ``parts`` of the work, so that its own count becomes one of the whole."""
    if progress is None:
        return ()
    return (lambda done, total: progress(number * total + done, parts * total),)


def _centre(boxes: Floats) -> Floats:
    return np.asarray((boxes[..., :2] + boxes[..., 2:]) / 2)


def _check_masks(result: Propagation, frames: NDArray[np.uint8]) -> None:
    expected = (len(frames), 2, *frames.shape[1:3])
    if result.masks.shape != expected:
        raise TracksError(f"the segmenter gave masks of the shape {result.masks.shape}, expected {expected}")
