"""Smoothness and change of frames, by hand."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from spatialalign.errors import VideoError
from spatialalign.metrics_frames import frame_change, linear_smoothness


def grey(*levels: int) -> NDArray[np.uint8]:
    """Frames of one level each."""
    return np.broadcast_to(np.array(levels, dtype=np.uint8)[:, None, None, None], (len(levels), 4, 6, 3)).copy()


@pytest.mark.parametrize(
    ("levels", "smoothness", "change"),
    [
        ((7, 7, 7), 1.0, 0.0),
        ((10, 20, 30, 40), 1.0, 10 / 255),
        ((0, 10, 40), 1 - 10 / 255, 20 / 255),  # the middle is 10 off the mean of 0 and 40
        ((0, 255, 0, 255), 0.0, 1.0),
        ((0, 200), None, 200 / 255),
        ((5,), None, None),
    ],
)
def test_by_hand(levels: tuple[int, ...], smoothness: float | None, change: float | None) -> None:
    assert linear_smoothness(grey(*levels)) == (None if smoothness is None else pytest.approx(smoothness))
    assert frame_change(grey(*levels)) == (None if change is None else pytest.approx(change))


def test_it_is_a_mean_over_pixels_and_frames() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 3), dtype=np.uint8)
    real = frames.astype(np.float64)
    wrong = np.mean(np.abs(real[1:-1] - (real[:-2] + real[2:]) / 2))
    assert linear_smoothness(frames) == pytest.approx(1 - wrong / 255)
    assert frame_change(frames) == pytest.approx(np.mean(np.abs(np.diff(real, axis=0))) / 255)


def test_floats_are_refused() -> None:
    with pytest.raises(VideoError, match="uint8"):
        linear_smoothness(np.zeros((3, 2, 2, 3)))  # type: ignore[arg-type]
