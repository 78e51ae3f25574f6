"""How much a clip changes from frame to frame, and how evenly. Numpy only; no model."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .video import check_frames


def linear_smoothness(frames: NDArray[np.uint8]) -> float | None:
    """``1 - mean |frame_t - (frame_{t-1} + frame_{t+1}) / 2| / 255`` of frames (t, h, w, 3), in [0, 1].

    The idea of VBench's motion smoothness, how well a frame follows from its neighbours, with their plain mean in place
    of an interpolation network: no model is needed, and a fast motion counts as rough even when it is even. A still
    clip has 1, so read it beside :func:`frame_change`. None for fewer than three frames.
    """
    check_frames(frames)
    wrong = [_mean_size(2.0 * now - before - after) / 2 for before, now, after in _runs(frames, 3)]
    return 1 - float(np.mean(wrong)) / 255 if wrong else None


def frame_change(frames: NDArray[np.uint8]) -> float | None:
    """``mean |frame_t - frame_{t-1}| / 255`` of frames (t, h, w, 3), in [0, 1]; None for a single frame."""
    check_frames(frames)
    changes = [_mean_size(now - before) for before, now in _runs(frames, 2)]
    return float(np.mean(changes)) / 255 if changes else None


def _runs(frames: NDArray[np.uint8], length: int) -> Any:
    """Every ``length`` consecutive frames as float32, a few at a time: a clip as floats would fill the memory."""
    for start in range(len(frames) - length + 1):
        yield frames[start : start + length].astype(np.float32)


def _mean_size(values: NDArray[np.float32]) -> float:
    return float(np.abs(values).mean(dtype=np.float64))
