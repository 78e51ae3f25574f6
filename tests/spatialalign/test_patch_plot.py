"""Heat maps: which pixels are veiled, in which frames, and how strongly."""

from __future__ import annotations

import numpy as np
import pytest

from spatialalign.errors import ConfigError, VideoError
from spatialalign.patch_plot import BAD, UNKNOWN, draw_patches

FRAMES = np.full((5, 64, 64, 3), 100, np.uint8)


def middle(picture: np.ndarray, row: int, column: int) -> list[int]:
    """A pixel of block (row, column) of 2 x 2 on a 128 x 128 picture, away from lines and numbers."""
    pixel: list[int] = picture[64 * row + 45, 64 * column + 45].tolist()
    return pixel


def test_the_veil_lies_on_the_bad_block_in_its_frames() -> None:
    """Strength 0.7 for the worst, half of it half-way, none for the best; block 0 along time holds frame 0 alone."""
    values = np.ones((2, 2, 2))
    values[1, 0, 1], values[1, 1, 1], values[1, 1, 0] = 0.0, 0.5, np.nan
    found = draw_patches(FRAMES, values, 2, min_side=128)
    assert found.shape[0] == 5 and found.shape[2] == 128 and found.dtype == np.uint8
    assert [middle(found[0], row, column) for row in (0, 1) for column in (0, 1)] == [[100] * 3] * 4
    for picture in found[1:]:
        assert middle(picture, 0, 0) == [100] * 3
        assert middle(picture, 0, 1) == [round(0.3 * 100 + 0.7 * colour) for colour in BAD]
        assert middle(picture, 1, 1) == pytest.approx([0.65 * 100 + 0.35 * colour for colour in BAD], abs=0.51)
        assert middle(picture, 1, 0) == pytest.approx([0.65 * 100 + 0.35 * colour for colour in UNKNOWN], abs=0.51)


def test_a_given_scale_makes_clips_comparable() -> None:
    """A clip whose blocks are all equal has no veil of its own; on a scale from 0 to 2 a 1 is half-way."""
    values = np.ones((1, 2, 2))
    assert middle(draw_patches(FRAMES, values, 2, min_side=128)[0], 0, 0) == [100] * 3
    found = middle(draw_patches(FRAMES, values, 2, (0.0, 2.0), 128)[0], 0, 0)
    assert found == pytest.approx([0.65 * 100 + 0.35 * colour for colour in BAD], abs=0.51)


def test_the_numbers_are_written() -> None:
    one, other = (draw_patches(FRAMES, np.full((1, 2, 2), value), 2, (0.0, 5.0), 320) for value in (2.001, 2.009))
    assert not np.array_equal(one[0][:40, :80], other[0][:40, :80])  # 2.00 and 2.01


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(VideoError, match="rising scale"):
        draw_patches(FRAMES, np.ones((1, 2, 2)), 2, (1.0, 1.0))
    with pytest.raises(VideoError, match="time, row and column"):
        draw_patches(FRAMES, np.ones((2, 2)), 2)
    with pytest.raises(ConfigError):
        draw_patches(FRAMES, np.ones((1, 3, 2)), 2)
    with pytest.raises(ConfigError):
        draw_patches(FRAMES, np.ones((3, 2, 2)), 2)
