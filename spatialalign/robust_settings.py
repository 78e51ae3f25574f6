"""The constants of the robust score (:mod:`spatialalign.robust`)."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from .errors import TracksError

#: Version of the rule; raised whenever a default or a formula changes.
ROBUST_VERSION = 1


@dataclass(frozen=True)
class RobustSettings:
    """Constants of the robust score, version 1. Shares are of the video's length unless said otherwise.

    Attributes:
        window_share: length of the first and the last window (at least 2 frames).
        min_coverage: below this share of known frames in a window the video is INVALID.
        full_coverage: from this share on a window counts in full.
        gap_share: longest gap that is filled by interpolation (at least 2 frames).
        body_lengths: largest step from frame to frame, in lengths of the subject's longer side.
        glitch_frames: longest misdetection, passing or at an end, that is dropped instead of being counted as a jump.
        unseen_free: share of the passage that may go unseen without discount; at 1/2 + this, nothing counts.
        absent_limit: share of frames without both things, in gaps too long to fill, that discounts everything.
        left_limit: the same for a subject that left through the border of the picture.
        border: how near to the border a box touches it, as a share of the picture's side.
        reversal: smallest change of progress (range [-1, 1]) that counts as turning round.
        min_efficiency: net progress over the whole way, from which on there is no discount.
        object_free, object_limit: the object's share of the motion where the discount begins and is complete.
        threshold: scores from here on pass.
    """

    window_share: float = 0.15
    min_coverage: float = 0.2
    full_coverage: float = 0.5
    gap_share: float = 0.08
    body_lengths: float = 1.0
    glitch_frames: int = 2
    unseen_free: float = 0.1
    absent_limit: float = 0.6
    left_limit: float = 0.2
    border: float = 0.02
    reversal: float = 0.25
    min_efficiency: float = 0.6
    object_free: float = 0.6
    object_limit: float = 0.9
    threshold: float = 0.7

    def __post_init__(self) -> None:
        shares = {k: v for k, v in asdict(self).items() if k not in ("body_lengths", "glitch_frames")}
        for name, value in shares.items():
            if not 0 <= value <= 1:
                raise TracksError(f"robust settings: {name} must be in [0, 1], found {value}")
        if not 0 < self.window_share <= 0.5 or min(self.full_coverage, self.absent_limit, self.left_limit) <= 0:
            raise TracksError("robust settings: window_share must be in (0, 0.5], the coverage and limits above 0")
        if self.body_lengths <= 0 or self.glitch_frames < 0 or self.reversal <= 0 or self.min_efficiency <= 0:
            raise TracksError("robust settings: body_lengths, reversal, min_efficiency must be above 0")
        if self.object_free >= self.object_limit:
            raise TracksError("robust settings: object_free must be below object_limit")

    def window(self, frames: int) -> int:
        """Frames in either window."""
        return max(2, round(self.window_share * frames))

    def longest_gap(self, frames: int) -> int:
        """Longest gap that is filled: 6 frames of 81, 2 of 17."""
        return max(2, int(self.gap_share * frames))
