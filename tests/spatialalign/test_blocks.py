"""The grid of blocks: which elements and which pixels are in which block."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spatialalign.blocks import BlockGrid, crops, frame_slices, latent_frame_slices
from spatialalign.errors import ConfigError, DataError


def test_a_grid_is_written_as_time_height_width() -> None:
    grid = BlockGrid.parse("2x3x4")
    assert grid == BlockGrid(2, 3, 4) and str(grid) == "2x3x4" and grid.shape == (2, 3, 4)
    for wrong in ("2x3", "2x3x0", "ax1x1", "2 x 3 x 4"):
        with pytest.raises(ConfigError):
            BlockGrid.parse(wrong)


def test_every_element_is_in_the_block_of_its_place() -> None:
    """Each element holds its own frame, row and column, so that a block's smallest and largest tell where it lies."""
    frames, rows, columns, grid = 4, 6, 8, BlockGrid(2, 3, 4)
    places = torch.stack(torch.meshgrid(*map(torch.arange, (frames, rows, columns)), indexing="ij"), dim=-1)
    cut = grid.cut(places[None])
    assert cut.shape == (1, 2, 3, 4, 2, 2, 2, 3)
    for f, r, c in np.ndindex(2, 3, 4):
        block = cut[0, f, r, c].flatten(0, 2)
        assert block.min(0).values.tolist() == [2 * f, 2 * r, 2 * c]
        assert block.max(0).values.tolist() == [2 * f + 1, 2 * r + 1, 2 * c + 1]


def test_unequal_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match="21 x 60 x 104 .* into 2x2x2"):
        BlockGrid(2, 2, 2).block_size((21, 60, 104))
    assert BlockGrid(3, 2, 2).block_size((21, 60, 104)) == (7, 30, 52)


def test_the_first_frame_has_a_latent_frame_of_its_own() -> None:
    """81 frames in 21 latent frames: 1 and then 20 times 4."""
    held = latent_frame_slices(81, 21)
    assert [held[0], held[1], held[20]] == [slice(0, 1), slice(1, 5), slice(77, 81)]
    assert latent_frame_slices(1, 1) == [slice(0, 1)]
    assert frame_slices(BlockGrid(2, 1, 1), 13, 4) == [slice(0, 5), slice(5, 13)]
    for frames, latent_frames in ((12, 4), (5, 1), (1, 2)):
        with pytest.raises(DataError):
            latent_frame_slices(frames, latent_frames)


def test_crops_hold_the_pixels_of_their_blocks() -> None:
    frames = np.zeros((5, 4, 6, 3), np.uint8)
    frames[1:, 2:, :3] = 200  # the later half of time (2 latent frames), below, left
    found = crops(frames, BlockGrid(2, 2, 2), 2)
    assert [crop.shape for crop in found] == [(1, 2, 3, 3)] * 4 + [(4, 2, 3, 3)] * 4
    assert [int(crop.mean()) for crop in found] == [0, 0, 0, 0, 0, 0, 200, 0]
