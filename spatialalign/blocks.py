"""A grid of equal space-time blocks over a clip: their means in latents, and their pixels in frames."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class BlockGrid:
    """How many blocks a clip is cut into along time, height and width."""

    frames: int
    rows: int
    columns: int

    def __post_init__(self) -> None:
        if min(self.shape) < 1:
            raise ConfigError(f"a grid of blocks needs at least one block along each axis, found {self}")

    @classmethod
    def parse(cls, text: str) -> BlockGrid:
        """From a text such as ``"2x4x4"``: time, height, width."""
        parts = text.split("x")
        if len(parts) != 3 or not all(part.isascii() and part.isdigit() for part in parts):
            raise ConfigError(f"a grid of blocks is written as time x height x width, such as 2x4x4; found {text!r}")
        return cls(*(int(part) for part in parts))

    def __str__(self) -> str:
        return "x".join(str(size) for size in self.shape)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Blocks along time, height and width."""
        return self.frames, self.rows, self.columns

    def block_size(self, size: tuple[int, ...], what: str = "latents") -> tuple[int, int, int]:
        """Frames, rows and columns of one block of ``what`` with ``size (f, h, w)``.

        Raises:
            ConfigError: the blocks would not be equal.
        """
        if len(size) != 3 or any(whole % parts for whole, parts in zip(size, self.shape, strict=False)):
            raise ConfigError(
                f"{what} of {' x '.join(map(str, size))} (time x height x width) cannot be cut into {self} equal "
                "blocks; take divisors of these sizes"
            )
        return size[0] // self.frames, size[1] // self.rows, size[2] // self.columns

    def cut(self, x: Tensor, what: str = "latents") -> Tensor:
        """``x (b, f, h, w, ...)`` by block: ``(b, F, R, C, f / F, h / R, w / C, ...)``."""
        sizes = zip(self.shape, self.block_size(tuple(x.shape[1:4]), what), strict=True)
        for axis, (blocks, inside) in enumerate(sizes):
            x = x.unflatten(1 + 2 * axis, (blocks, inside))
        return x.movedim((3, 5), (2, 3))


def latent_frame_slices(frames: int, latent_frames: int) -> list[slice]:
    """The frames that each latent frame holds: the first frame is one of its own, the others share the rest equally.

    So have it the autoencoders of Wan and LTX. Raises :class:`DataError` where the numbers do not fit.
    """
    rest = latent_frames - 1
    if frames < 1 or latent_frames < 1 or (rest == 0) != (frames == 1) or (rest and (frames - 1) % rest):
        raise DataError(f"{frames} frames do not fit {latent_frames} latent frames; decode the clip again")
    step = (frames - 1) // rest if rest else 1
    return [slice(0, 1)] + [slice(1 + i * step, 1 + (i + 1) * step) for i in range(rest)]


def frame_slices(grid: BlockGrid, frames: int, latent_frames: int) -> list[slice]:
    """The frames of the blocks along time."""
    held = latent_frame_slices(frames, latent_frames)
    if latent_frames % grid.frames:
        raise ConfigError(f"{latent_frames} latent frames cannot be cut into {grid.frames} equal blocks along time")
    each = latent_frames // grid.frames
    return [slice(held[i * each].start, held[(i + 1) * each - 1].stop) for i in range(grid.frames)]


def crops(frames: NDArray[np.uint8], grid: BlockGrid, latent_frames: int) -> list[NDArray[np.uint8]]:
    """The pixels ``(t, h, w, 3)`` of every block of ``frames (T, H, W, 3)``: time, then rows, then columns."""
    times = frame_slices(grid, len(frames), latent_frames)
    size = (grid.frames, frames.shape[1], frames.shape[2])  # blocks along time may differ in frames, others not
    _, height, width = grid.block_size(size, "frames")
    return [
        frames[time, row * height : (row + 1) * height, column * width : (column + 1) * width]
        for time in times
        for row in range(grid.rows)
        for column in range(grid.columns)
    ]
