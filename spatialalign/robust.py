"""The robust score: DSR-Score's question asked with time-indexed windows, and checks on what happens between them.

Ours, reported beside the paper's score and versioned. In words: the means of both SSR curves over the first and the
last share of the *video* (not of the valid frames) take the place of the paper's windows and single-frame gaps; an end
that was hardly seen counts less; and the evidence beyond 1/2 is discounted when the subject was not seen to go over
(it jumped, vanished, left the picture), went to and fro, or when the object moved in its stead::

    base  = 1/2 + (s_i I_a + s_i s_f (I_a - I_b)/2 + s_f F_b + s_i s_f (F_b - F_a)/2) / 8
    score = base - (1 - continuity presence in_picture direction static_object) max(0, base - 1/2)

I and F are the SSR of the initial and the final relation, a and b the first and last window, s the window's share of
known frames, scaled to 1 at ``full_coverage``. All positions are relative to the object, so a moving camera changes
nothing but the static-object check, which takes the camera's path when it is known and assumes a fixed camera
otherwise.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .dsr import DSR
from .errors import DataError, TracksError
from .geometry import centres, ssr
from .robust_settings import ROBUST_VERSION, RobustSettings
from .tracks import Tracks
from .trajectory import efficiency, fill_gaps, glitches, is_jump, sign_changes

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RobustParts:
    """Everything the robust score is made of.

    The five factors in [0, 1], 1 meaning nothing to object to: ``continuity`` (the passage was seen), ``presence``
    (neither thing vanished for long), ``in_picture`` (the subject did not leave the picture), ``direction`` (no going
    to and fro), ``static_object`` (the object did not move in the subject's stead).

    Attributes:
        base: score in [0, 1] before the factors.
        initial_mean, initial_gap, final_mean, final_gap: confidence-weighted components in [-1, 1], before shrinking.
        initial_coverage, final_coverage: share of known frames in either window.
        confidence: mean over the seen frames of the product of both confidences.
        seen, filled, dropped: frames seen, filled by interpolation, dropped as passing misdetections.
        jumps: steps too large to be motion, also across gaps.
        unseen_share: share of the passage in [0, 1] that happened in jumps and long gaps.
        absent_share, left_share: share of frames in long gaps (those just too long to fill count in part); of those,
            where the subject was out of the picture.
        efficiency: net progress over the whole way. crossings: sign changes of progress, 1 for a plain passage.
        object_share: the object's share of the motion in the picture.
        held_share: share of the video, up to its end, in which the final relation holds without a break.
    """

    base: float
    initial_mean: float
    initial_gap: float
    final_mean: float
    final_gap: float
    initial_coverage: float
    final_coverage: float
    confidence: float
    seen: int
    filled: int
    dropped: int
    jumps: int
    unseen_share: float
    absent_share: float
    left_share: float
    efficiency: float
    crossings: int
    object_share: float
    held_share: float
    continuity: float
    presence: float
    in_picture: float
    direction: float
    static_object: float

    @property
    def factor(self) -> float:
        """Product of the five checks."""
        return self.continuity * self.presence * self.in_picture * self.direction * self.static_object


@dataclass(frozen=True)
class RobustScore:
    """Score in [0, 1] or None with a ``reason`` (``code: words``; codes: tracker, labels, frames, initial, final)."""

    version: int
    score: float | None
    reason: str | None
    threshold: float
    parts: RobustParts | None

    def __post_init__(self) -> None:
        if (self.score is None) == (self.reason is None) or (self.score is None) != (self.parts is None):
            raise TracksError("a robust score has either a score and its parts, or a reason")

    @property
    def valid(self) -> bool:
        """False when INVALID."""
        return self.score is not None

    @property
    def passed(self) -> bool:
        """Valid and at least ``threshold``."""
        return self.score is not None and self.score >= self.threshold

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"valid": self.valid, "passed": self.passed}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> RobustScore:
        """Inverse of :meth:`to_dict`; :class:`DataError` for another version or missing keys."""
        if value.get("version") != ROBUST_VERSION:
            raise DataError(f"robust: expected version {ROBUST_VERSION}, found {value.get('version')}; score again")
        try:
            parts = value["parts"]
            return cls(
                version=value["version"],
                score=value["score"],
                reason=value["reason"],
                threshold=value["threshold"],
                parts=None if parts is None else RobustParts(**parts),
            )
        except (KeyError, TypeError) as error:
            raise DataError(f"robust: a key is missing or of the wrong kind ({error!r}); score again") from error


def robust_score(
    tracks: Tracks, dsr: DSR, settings: RobustSettings | None = None, camera: ArrayLike | None = None
) -> RobustScore:
    """Robust score of tracks for a relationship.

    ``camera`` is the (T, 2) path (x, y) of the background in pixels, where it is known; see the module's text.
    INVALID when the tracker said so, the labels are other ones, the video has fewer frames than two windows, or a
    window is hardly covered. Raises :class:`TracksError` for a depth relation without depth, or a camera path of the
    wrong shape.
    """
    settings = settings or RobustSettings()
    frames, window = tracks.frames, settings.window(tracks.frames)
    if tracks.invalid is not None:
        return _invalid(f"tracker: {tracks.invalid}", settings)
    if set(tracks.labels) != {dsr.subject, dsr.object}:
        return _invalid(f"labels: expected {(dsr.subject, dsr.object)}, found {tracks.labels}", settings)
    if frames < 2 * window:
        return _invalid(f"frames: {frames} are fewer than two windows of {window}", settings)
    path = np.zeros((frames, 2)) if camera is None else np.asarray(camera, dtype=np.float64)
    if path.shape != (frames, 2) or not np.isfinite(path).all():
        raise TracksError(f"camera: expected a finite path of shape {(frames, 2)}, found shape {path.shape}")
    course = _course(tracks.oriented(dsr.subject, dsr.object), dsr, settings)
    first, last = slice(0, window), slice(frames - window, frames)
    coverages = [float(course.known[part].mean()) for part in (first, last)]
    for name, coverage in zip(("initial", "final"), coverages, strict=True):
        if coverage < settings.min_coverage or coverage == 0:
            seen = round(coverage * window)
            return _invalid(f"{name}: both things are seen in {seen} of the {window} {name} frames", settings)
    parts = _parts(course, (first, last), coverages, path, tracks.size, settings)
    score = parts.base - (1 - parts.factor) * max(0.0, parts.base - 0.5)
    return RobustScore(ROBUST_VERSION, min(1.0, max(0.0, score)), None, settings.threshold, parts)


@dataclass(frozen=True)
class _Course:
    """Cleaned tracks: boxes (T, 2, 4) with glitches dropped and gaps filled, SSR curves (T,), weights (T,)."""

    boxes: Floats
    initial: Floats
    final: Floats
    weights: Floats
    observed: NDArray[np.int64]
    known: NDArray[np.bool_]
    subject_seen: NDArray[np.bool_]
    dropped: int
    longest_gap: int

    @property
    def progress(self) -> Floats:
        """(T,) in [-1, 1]: half the final minus the initial SSR; rises from the initial to the final relation."""
        return (self.final - self.initial) / 2


def _course(tracks: Tracks, dsr: DSR, settings: RobustSettings) -> _Course:
    longest = settings.longest_gap(tracks.frames)
    boxes = tracks.boxes.copy()
    extent = boxes[..., 2:] - boxes[..., :2]
    # A box without area (the mask was empty or a line) is no sighting.
    boxes[(extent == 0).any(-1)] = np.nan
    depth = np.zeros((tracks.frames, 2)) if tracks.depth is None else tracks.depth.copy()
    needs_depth = dsr.initial.is_depth or dsr.final.is_depth
    seen = ~np.isnan(boxes).any((1, 2))
    if needs_depth:
        seen &= ~np.isnan(depth).any(1)
    observed = np.flatnonzero(seen)
    body = np.maximum(extent[:, 0, 0], extent[:, 0, 1])
    relative = (centres(boxes[:, 0]) - centres(boxes[:, 1]))[observed]
    scale = float(np.median(body[observed])) if len(observed) else 1.0
    bad = observed[glitches(observed, relative / scale, settings.body_lengths, settings.glitch_frames, longest)]
    boxes[bad], depth[bad] = np.nan, np.nan
    values = np.concatenate([boxes, depth[..., None], tracks.confidence[..., None]], axis=-1)
    subject, subject_filled = fill_gaps(values[:, 0], longest)
    thing, thing_filled = fill_gaps(values[:, 1], longest)
    filled_depth = None if tracks.depth is None else (subject[:, 4], thing[:, 4])
    initial, final = (
        ssr(
            subject[:, :4],
            thing[:, :4],
            relation,
            subject_depth=None if filled_depth is None else filled_depth[0],
            object_depth=None if filled_depth is None else filled_depth[1],
        )
        for relation in (dsr.initial, dsr.final)
    )
    known = ~(np.isnan(initial) | np.isnan(final))
    # Interpolated frames are guesses: half the weight. The floor keeps zero confidences from dividing by zero.
    weights = np.maximum(subject[:, 5] * thing[:, 5], 1e-3) * np.where(subject_filled | thing_filled, 0.5, 1.0)
    return _Course(
        boxes=np.stack([subject[:, :4], thing[:, :4]], axis=1),
        initial=initial,
        final=final,
        weights=np.where(known, weights, 0.0),
        observed=np.setdiff1d(observed, bad),
        known=known,
        subject_seen=~np.isnan(boxes[:, 0, 0]),
        dropped=len(bad),
        longest_gap=longest,
    )


def _parts(
    course: _Course,
    windows: tuple[slice, slice],
    coverages: list[float],
    camera: Floats,
    size: tuple[int, int],
    settings: RobustSettings,
) -> RobustParts:
    initial_a, initial_b = (_mean(course.initial[w], course.weights[w]) for w in windows)
    final_a, final_b = (_mean(course.final[w], course.weights[w]) for w in windows)
    shrink_a, shrink_b = (min(1.0, coverage / settings.full_coverage) for coverage in coverages)
    initial_gap, final_gap = (initial_a - initial_b) / 2, (final_b - final_a) / 2
    total = shrink_a * initial_a + shrink_b * final_b + shrink_a * shrink_b * (initial_gap + final_gap)
    jumps, unseen = _unseen(course, settings)
    absent, left = _absence(course, size, settings)
    progress = course.progress[course.known]
    way = efficiency(progress, settings.reversal)
    share = _object_share(course, windows, camera)
    return RobustParts(
        base=total / 8 + 0.5,
        initial_mean=initial_a,
        initial_gap=initial_gap,
        final_mean=final_b,
        final_gap=final_gap,
        initial_coverage=coverages[0],
        final_coverage=coverages[1],
        confidence=float(course.weights[course.observed].mean()),
        seen=len(course.observed),
        filled=int(course.known.sum()) - len(course.observed),
        dropped=course.dropped,
        jumps=jumps,
        unseen_share=unseen,
        absent_share=absent,
        left_share=left,
        efficiency=way,
        crossings=sign_changes(progress, settings.reversal / 2),
        object_share=share,
        held_share=_held(course),
        continuity=_falling(unseen, settings.unseen_free, settings.unseen_free + 0.5),
        presence=_falling(absent, 0.0, settings.absent_limit),
        in_picture=_falling(left, 0.0, settings.left_limit),
        direction=min(1.0, way / settings.min_efficiency),
        static_object=_falling(share, settings.object_free, settings.object_limit),
    )


def _unseen(course: _Course, settings: RobustSettings) -> tuple[int, float]:
    """Number of jumps, and the share of the passage that happened in jumps and in gaps too long to fill."""
    times = course.observed
    if len(times) < 2:
        return 0, 1.0
    boxes = course.boxes[times]
    body = np.maximum(*np.moveaxis(boxes[:, 0, 2:] - boxes[:, 0, :2], -1, 0))
    relative = centres(boxes[:, 0]) - centres(boxes[:, 1])
    step = np.hypot(*np.diff(relative, axis=0).T) * 2 / (body[1:] + body[:-1])
    apart = np.diff(times)
    jump = is_jump(apart, step, settings.body_lengths, course.longest_gap)
    gap = _gravity(apart - 1, course.longest_gap)
    progress = course.progress[times]
    hidden = float((np.where(jump, 1.0, gap) * np.abs(np.diff(progress))).sum())
    net = float(progress[-1] - progress[0])
    return int(jump.sum()), 0.0 if hidden == 0 else min(1.0, hidden / net) if net > 0 else 1.0


def _absence(course: _Course, size: tuple[int, int], settings: RobustSettings) -> tuple[float, float]:
    """Share of frames in gaps between sightings too long to fill; of those, where the subject is out of the picture."""
    absent = left = 0.0
    for a, b in zip(course.observed[:-1], course.observed[1:], strict=True):
        missing = int((~course.known[a + 1 : b]).sum())
        missing_weight = missing * float(_gravity(np.asarray(missing), course.longest_gap))
        absent += missing_weight
        gone = missing > 0 and not course.subject_seen[a + 1 : b].any()
        if gone and any(_touches(course.boxes[t, 0], size, settings.border) for t in (a, b)):
            left += missing_weight
    return absent / len(course.known), left / len(course.known)


def _gravity(missing: NDArray[np.int64], longest_gap: int) -> Floats:
    """How much a gap counts, in [0, 1]: just too long to fill may be chance, twice that is an absence."""
    return np.clip((missing - longest_gap) / longest_gap, 0.0, 1.0)


def _touches(box: Floats, size: tuple[int, int], border: float) -> bool:
    height, width = size
    x, y = border * width, border * height
    return bool(box[0] <= x or box[1] <= y or box[2] >= width - x or box[3] >= height - y)


def _object_share(course: _Course, windows: tuple[slice, slice], camera: Floats) -> float:
    """The object's share of the way both went from window to window; 0 while it stays within a quarter of its size."""
    places = centres(course.boxes) - camera[:, None]
    first, last = (places[w][course.known[w]].mean(axis=0) for w in windows)
    subject, thing = np.hypot(*(last - first).T)
    known = course.boxes[course.known, 1]
    length = float(np.median(np.max(known[:, 2:] - known[:, :2], axis=1)))
    return float(thing / (subject + thing)) if thing > length / 4 else 0.0


def _held(course: _Course) -> float:
    holds = np.where(course.known, course.final > 0, True)
    broken = np.flatnonzero(~holds)
    return float(1 - (broken[-1] + 1) / len(holds)) if len(broken) else 1.0


def _mean(curve: Floats, weights: Floats) -> float:
    return float(np.nansum(curve * weights) / weights.sum())


def _falling(value: float, free: float, limit: float) -> float:
    """1 up to ``free``, then linearly down to 0 at ``limit``."""
    return float(np.clip((limit - value) / (limit - free), 0.0, 1.0))


def _invalid(reason: str, settings: RobustSettings) -> RobustScore:
    return RobustScore(ROBUST_VERSION, None, reason, settings.threshold, None)
