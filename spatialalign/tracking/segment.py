"""Masks of the two things over time, and the boxes around masks. No model here, numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..errors import TracksError
from .parts import Progress


@dataclass(frozen=True, eq=False)
class Propagation:
    """``masks`` bool (T, 2, H, W), subject first; ``scores`` (T, 2) in [0, 1], 0 where nothing was segmented."""

    masks: NDArray[np.bool_]
    scores: NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.masks.dtype != np.bool_ or self.masks.ndim != 4 or self.masks.shape[1] != 2:
            raise TracksError(
                f"masks must be bool of the shape (T, 2, H, W), found {self.masks.dtype} {self.masks.shape}"
            )
        if self.scores.shape != self.masks.shape[:2] or not ((self.scores >= 0) & (self.scores <= 1)).all():
            raise TracksError(f"mask scores must be in [0, 1] of the shape {self.masks.shape[:2]}")


@runtime_checkable
class Propagator(Protocol):
    """Follows two things through a clip from one frame in which they are known (SAM 2 video)."""

    def propagate(
        self,
        frames: NDArray[np.uint8],
        seed_frame: int,
        boxes: NDArray[np.float64],
        progress: Progress | None = None,
    ) -> Propagation:
        """Masks in all of ``frames`` (T, H, W, 3) from ``boxes`` (2, 4) in ``seed_frame``, both ways in time."""
        ...


@runtime_checkable
class FrameSegmenter(Protocol):
    """Segments what boxes enclose, frame by frame (SAM on images)."""

    def segment(
        self, frames: NDArray[np.uint8], boxes: NDArray[np.float64], progress: Progress | None = None
    ) -> Propagation:
        """Masks in ``frames`` (T, H, W, 3) for ``boxes`` (T, 2, 4); four NaN mean no box and give an empty mask."""
        ...


def boxes_from_masks(masks: NDArray[np.bool_], inclusive: bool = False) -> NDArray[np.float64]:
    """Extent of each mask, bool (..., H, W) -> (..., 4) xyxy; four NaN for an empty mask.

    Right and bottom are exclusive (one pixel has width 1). ``inclusive`` gives the official program's extents
    instead, where one pixel has width 0; its ``[0, 0, 0, 0]`` of an empty mask is NaN here too, since both mean that
    the frame cannot be scored.
    """
    columns, rows = np.asarray(masks.any(axis=-2)), np.asarray(masks.any(axis=-1))
    width, height = masks.shape[-1], masks.shape[-2]
    extra = 0 if inclusive else 1
    box = np.stack(
        [
            columns.argmax(-1),
            rows.argmax(-1),
            width - 1 - columns[..., ::-1].argmax(-1) + extra,
            height - 1 - rows[..., ::-1].argmax(-1) + extra,
        ],
        axis=-1,
    ).astype(np.float64)
    box[~columns.any(-1)] = np.nan
    return box
