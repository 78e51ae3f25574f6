"""DSR-Score: the paper's rule for one video, and the official record form beside it.

The rule is that of the official ``calc_dsr_score.py`` (arXiv 2602.22745); constants are parameters. What makes types
comparable (``normalised``) and what looks between the ends (``robust``) stand beside the score, never in its place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .dsr import DSR, Relation, relations_of
from .errors import DataError, TracksError
from .geometry import ssr
from .robust import RobustScore, RobustSettings, robust_score
from .tracks import Tracks

#: Version of the paper's rule as implemented here; written to score.json.
SCORE_VERSION = 1
#: What official lists hold for an invalid video. It exists in files only.
OFFICIAL_INVALID = -100.0
PAPER_FRAMES = 81


@dataclass(frozen=True)
class Limits:
    """When a video may be scored, and over how many frames. The defaults are the paper's, for 81 frames.

    Attributes:
        min_valid: fewest valid frames; at least 2, since a gap needs two ends.
        window: valid frames in the mean at either end.
        min_run: shortest run of valid detections that a tracker may be seeded from.
        max_redundant: most frames with surplus or wrong detections.
    """

    min_valid: int = 20
    window: int = 3
    min_run: int = 4
    max_redundant: int = 16

    def __post_init__(self) -> None:
        if self.min_valid < 2 or self.window < 1 or self.min_run < 1 or self.max_redundant < 0:
            raise TracksError(f"limits: expected min_valid >= 2, window >= 1, min_run >= 1, max_redundant >= 0: {self}")
        if self.window > self.min_valid:
            raise TracksError(f"limits: window {self.window} is longer than min_valid {self.min_valid}")

    @classmethod
    def for_frames(cls, frames: int) -> Limits:
        """The paper's limits scaled by ``frames / 81``: minima rounded up, the maximum down, the window to nearest.

        ``min_valid = max(2, ceil(20 T/81))``, ``window = max(1, round(3 T/81))``, ``min_run = max(1, ceil(4 T/81))``,
        ``max_redundant = floor(16 T/81)``; exactly 20, 3, 4, 16 at T = 81.
        """
        if frames < 1:
            raise TracksError(f"a video needs at least one frame, found {frames}")
        return cls(
            min_valid=max(2, -(-20 * frames // PAPER_FRAMES)),
            window=max(1, round(3 * frames / PAPER_FRAMES)),
            min_run=max(1, -(-4 * frames // PAPER_FRAMES)),
            max_redundant=16 * frames // PAPER_FRAMES,
        )


#: The paper's limits: 20 valid frames, windows of 3, runs of 4, at most 16 redundant frames.
PAPER_LIMITS = Limits()


@dataclass(frozen=True)
class Aggregate:
    """The four components in [-1, 1] and their score in [0, 1]: (sum of the components) / 8 + 1/2."""

    initial_mean: float
    initial_gap: float
    final_mean: float
    final_gap: float

    @property
    def score(self) -> float:
        """DSR-Score in [0, 1]."""
        return (self.initial_mean + self.initial_gap + self.final_mean + self.final_gap) / 8 + 0.5


def aggregate_dsr(initial: ArrayLike, final: ArrayLike, window: int = 3) -> Aggregate:
    """The paper's aggregation of two SSR curves (n,) in time order; frames where either is NaN are left out.

    ``initial_mean`` is the mean of the first ``window`` values of the initial relation, ``initial_gap`` half its fall
    from first to last value; ``final_mean`` is the mean of the last ``window`` values of the final relation and
    ``final_gap`` half its rise. Raises :class:`TracksError` for curves of different length, values outside
    [-1, 1], or fewer than ``window`` usable frames.
    """
    first, last = np.asarray(initial, dtype=np.float64), np.asarray(final, dtype=np.float64)
    if first.ndim != 1 or first.shape != last.shape:
        raise TracksError(f"curves: expected two of the same length (n,), found {first.shape} and {last.shape}")
    if window < 1:
        raise TracksError(f"window: expected at least 1, found {window}")
    usable = ~(np.isnan(first) | np.isnan(last))
    first, last = first[usable], last[usable]
    if len(first) < window:
        raise TracksError(f"curves: expected at least {window} frames without NaN, found {len(first)}")
    if max(np.abs(first).max(), np.abs(last).max()) > 1 + 1e-9:
        raise TracksError("curves: expected SSR values in [-1, 1]")
    return Aggregate(
        initial_mean=float(first[:window].mean()),
        initial_gap=float(first[0] - first[-1]) / 2,
        final_mean=float(last[-window:].mean()),
        final_gap=float(last[-1] - last[0]) / 2,
    )


def attainable(initial: Relation, final: Relation) -> tuple[float, float]:
    """Lowest and highest DSR-Score of a type, for a subject that rests while either window lasts.

    For opposite relations F = -I, so the score runs from 0 to 1. For perpendicular ones I^2 + F^2 <= 1 in every frame:
    an end that holds (I, F) contributes 3/2 I - 1/2 F to the sum (window mean plus half gap), at most
    sqrt(3/2^2 + 1/2^2) = sqrt(5/2); both ends give 1/2 + 2 sqrt(5/2) / 8 = 0.8953. The constraint allows every curve's
    negative, so the lowest is 1 minus that, 0.1047. A subject that jumps *within* a window can reach
    1/2 + (sqrt(34)/6 + 2/3) / 4 = 0.9096, since the gaps look at a single frame. Types with a depth relation are not
    bound: a small subject can be fully beside and, a pixel on, fully before the object.
    """
    axes = {Relation.LEFT: 0, Relation.RIGHT: 0, Relation.TOP: 1, Relation.UNDER: 1}
    if initial in axes and final in axes and axes[initial] != axes[final]:
        reach = 2 * math.sqrt(2.5) / 8
        return 0.5 - reach, 0.5 + reach
    return 0.0, 1.0


def normalise(score: float, initial: Relation, final: Relation) -> float:
    """A score made comparable between types: ``1/2 + (score - 1/2) / (2 highest - 1)``, clipped to [0, 1].

    Keeps 1/2 (no evidence either way) and maps the type's :func:`attainable` lowest and highest to 0 and 1.
    """
    highest = attainable(initial, final)[1]
    return min(1.0, max(0.0, 0.5 + (score - 0.5) / (2 * highest - 1)))


@dataclass(frozen=True)
class DsrScore:
    """The score of one video for one relationship, with everything it was made from.

    Attributes:
        score: DSR-Score in [0, 1], or None when the video is INVALID.
        reason: None, or why the video is INVALID, as ``code: words`` (codes: tracker, labels, frames).
        type_code: which relations were scored, e.g. ``LR``.
        frames: length of the video T (for official records: number of records).
        frames_used: (n,) int, the valid frames in time order.
        initial_ssr, final_ssr: (n,) float64 in [-1, 1], the curves over ``frames_used``.
        initial_mean, initial_gap, final_mean, final_gap: the components, None when INVALID.
        limits: the limits that were applied.
        robust: the robust score, beside this one.
    """

    score: float | None
    reason: str | None
    type_code: str
    frames: int
    frames_used: NDArray[np.int64]
    initial_ssr: NDArray[np.float64]
    final_ssr: NDArray[np.float64]
    initial_mean: float | None
    initial_gap: float | None
    final_mean: float | None
    final_gap: float | None
    limits: Limits
    robust: RobustScore | None = None

    def __post_init__(self) -> None:
        relations_of(self.type_code)
        if (self.score is None) == (self.reason is None):
            raise TracksError(f"expected either a score or a reason, found score {self.score}, reason {self.reason!r}")
        if self.score is not None and not 0 <= self.score <= 1:
            raise TracksError(f"score: expected a number in [0, 1], found {self.score}")
        if not len(self.frames_used) == len(self.initial_ssr) == len(self.final_ssr):
            raise TracksError("frames_used, initial_ssr and final_ssr must have the same length")

    @property
    def valid(self) -> bool:
        """False when the video is INVALID; ``reason`` says why."""
        return self.score is not None

    @property
    def normalised(self) -> float | None:
        """The score on a scale that all types share; see :func:`normalise`. None when INVALID."""
        return None if self.score is None else normalise(self.score, *relations_of(self.type_code))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for score.json."""
        return {
            "version": SCORE_VERSION,
            "type": self.type_code,
            "score": self.score,
            "valid": self.valid,
            "reason": self.reason,
            "normalised": self.normalised,
            "initial_mean": self.initial_mean,
            "initial_gap": self.initial_gap,
            "final_mean": self.final_mean,
            "final_gap": self.final_gap,
            "frames": self.frames,
            "frames_used": self.frames_used.tolist(),
            "initial_ssr": self.initial_ssr.tolist(),
            "final_ssr": self.final_ssr.tolist(),
            "limits": asdict(self.limits),
            "robust": None if self.robust is None else self.robust.to_dict(),
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> DsrScore:
        """Inverse of :meth:`to_dict`; :class:`DataError` for another version or missing keys."""
        if not isinstance(value, dict) or value.get("version") != SCORE_VERSION:
            found = value.get("version") if isinstance(value, dict) else type(value).__name__
            raise DataError(f"score: expected version {SCORE_VERSION}, found {found}; score the video again")
        try:
            robust = value["robust"]
            return cls(
                score=value["score"],
                reason=value["reason"],
                type_code=value["type"],
                frames=value["frames"],
                frames_used=np.asarray(value["frames_used"], dtype=np.int64),
                initial_ssr=np.asarray(value["initial_ssr"], dtype=np.float64),
                final_ssr=np.asarray(value["final_ssr"], dtype=np.float64),
                initial_mean=value["initial_mean"],
                initial_gap=value["initial_gap"],
                final_mean=value["final_mean"],
                final_gap=value["final_gap"],
                limits=Limits(**value["limits"]),
                robust=None if robust is None else RobustScore.from_dict(robust),
            )
        except (KeyError, TypeError) as error:
            raise DataError(f"score: a key is missing or of the wrong kind ({error!r}); score again") from error


def dsr_score(tracks: Tracks, dsr: DSR, limits: Limits | None = None, robust: RobustSettings | None = None) -> DsrScore:
    """Score tracks for a relationship, by the paper's rule and by the robust one beside it.

    ``limits`` default to :meth:`Limits.for_frames` of the tracks' length (the paper's at 81), ``robust`` to the current
    :class:`RobustSettings`. Swapped labels are put in order. INVALID (``score`` None, ``reason`` set) when the
    tracker said so, when the labels are other ones, or when fewer than ``limits.min_valid`` frames are valid.
    Raises :class:`TracksError` only for a depth relation without ``tracks.depth``.
    """
    limits = limits or Limits.for_frames(tracks.frames)
    other = robust_score(tracks, dsr, robust)
    if set(tracks.labels) != {dsr.subject, dsr.object}:
        labels = f"labels: the tracks show {tracks.labels}, the relationship is about {(dsr.subject, dsr.object)}"
        nothing = np.empty(0)
        return _scored(np.empty(0, dtype=np.int64), nothing, nothing, tracks.frames, dsr, limits, other, labels)
    initial, final = relation_curves(tracks.oriented(dsr.subject, dsr.object), dsr)
    used = np.flatnonzero(~(np.isnan(initial) | np.isnan(final)))
    reason = None if tracks.invalid is None else f"tracker: {tracks.invalid}"
    return _scored(used, initial[used], final[used], tracks.frames, dsr, limits, other, reason)


def relation_curves(tracks: Tracks, dsr: DSR) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """SSR (T,) of the initial and the final relation, NaN where a frame is not valid, for tracks with subject first."""
    depths = (None, None) if tracks.depth is None else (tracks.depth[:, 0], tracks.depth[:, 1])
    initial, final = (
        ssr(tracks.subject, tracks.object, relation, subject_depth=depths[0], object_depth=depths[1])
        for relation in (dsr.initial, dsr.final)
    )
    return initial, final


def score_records(records: Sequence[Sequence[Any]], dsr: DSR, limits: Limits = PAPER_LIMITS) -> DsrScore:
    """Score an official detection list, items ``[frame, labels, boxes, (masks)]``, just as the official program does.

    Items are sorted by frame (stably; a frame named twice counts twice), items whose labels are not the pair are
    skipped, swapped labels are put in order, and the rest follows the paper's rule. An empty list is INVALID. Only
    planar relations: the official records hold no depth. No robust score: the records do not say how long the
    video is.
    """
    frames: list[int] = []
    pairs: list[NDArray[np.float64]] = []
    for record in sorted(records, key=lambda item: item[0]):
        labels = [str(label) for label in record[1]]
        boxes = np.asarray(record[2], dtype=np.float64).reshape(-1, 4)
        if len(boxes) != 2 or sorted(labels) != sorted((dsr.subject, dsr.object)):
            continue
        frames.append(int(record[0]))
        pairs.append(boxes if labels[0] == dsr.subject else boxes[::-1])
    both = np.asarray(pairs, dtype=np.float64).reshape(-1, 2, 4)
    initial, final = (ssr(both[:, 0], both[:, 1], relation) for relation in (dsr.initial, dsr.final))
    valid = ~np.isnan(initial)
    used = np.asarray(frames, dtype=np.int64)[valid]
    return _scored(used, initial[valid], final[valid], len(records), dsr, limits, None, None)


def official_value(score: float | None) -> float:
    """What an official score list holds for a score: -100 for INVALID."""
    return OFFICIAL_INVALID if score is None else float(score)


def from_official_value(value: float) -> float | None:
    """A score from an official list; None for -100. :class:`DataError` for anything else outside [-1, 1]."""
    if value == OFFICIAL_INVALID:
        return None
    if not -1 <= value <= 1:
        raise DataError(f"expected an official score in [-1, 1] or {OFFICIAL_INVALID:g} for INVALID, found {value}")
    return float(value)


def _scored(
    used: NDArray[np.int64],
    initial: NDArray[np.float64],
    final: NDArray[np.float64],
    frames: int,
    dsr: DSR,
    limits: Limits,
    robust: RobustScore | None,
    reason: str | None,
) -> DsrScore:
    if reason is None and len(used) < limits.min_valid:
        reason = f"frames: {len(used)} of {frames} frames are valid, at least {limits.min_valid} are needed"
    parts = None if reason is not None else aggregate_dsr(initial, final, limits.window)
    return DsrScore(
        score=None if parts is None else min(1.0, max(0.0, parts.score)),
        reason=reason,
        type_code=dsr.type_code,
        frames=frames,
        frames_used=used,
        initial_ssr=initial,
        final_ssr=final,
        initial_mean=None if parts is None else parts.initial_mean,
        initial_gap=None if parts is None else parts.initial_gap,
        final_mean=None if parts is None else parts.final_mean,
        final_gap=None if parts is None else parts.final_gap,
        limits=limits,
        robust=robust,
    )
