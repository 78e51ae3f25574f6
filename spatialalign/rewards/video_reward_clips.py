"""Clips as the vision tower of VideoReward sees them: which frames, how large, cut into patches (methods: 2.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import VideoError
from ..tracking.preprocess import Preprocess
from ..video import Video

MIN_PIXELS = 128 * 28 * 28
"""Area of a frame as the network sees it, at least; smaller clips are enlarged."""
MIN_FRAMES, MAX_FRAMES = 4, 768
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_MAX_RATIO = 200
_BICUBIC = 3


@dataclass(frozen=True)
class ClipRule:
    """Frames, sizes and patches.

    Attributes:
        fps: frames a second.
        frames: number of frames, whatever the length; None to go by ``fps``.
        max_pixels: area of a frame at most; it comes before the least area.
        patch, merge, pair: pixels of a patch's side, patches of a token's side, frames of a patch.
    """

    fps: float
    frames: int | None
    max_pixels: int
    patch: int = 14
    merge: int = 2
    pair: int = 2

    def indices(self, total: int, fps: float) -> list[int]:
        """Which of ``total`` frames at ``fps`` are looked at, spread evenly from the first to the last.

        Raises:
            VideoError: fewer frames than one patch holds.
        """
        longest = _floor(total, self.pair)
        if longest < self.pair:
            raise VideoError(f"a clip of {total} frames cannot be scored: VideoReward needs at least {self.pair}")
        if self.frames is None:
            wanted = min(max(total / fps * self.fps, MIN_FRAMES), _floor(min(MAX_FRAMES, total), self.pair))
        else:
            wanted = min(self.frames, longest)
        count = round(wanted / self.pair) * self.pair
        # torch's, since where a place falls between two frames others round differently
        return [int(index) for index in torch.linspace(0, total - 1, count).round().long()]

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width to which a frame is brought: multiples of a token's side, nearly the old proportions.

        Raises:
            VideoError: one side more than 200 times the other.
        """
        if max(height, width) > _MAX_RATIO * min(height, width):
            raise VideoError(f"frames of {height} x {width} cannot be scored: the sides differ by more than 200 times")
        side = self.patch * self.merge
        near = max(side, round(height / side) * side), max(side, round(width / side) * side)
        if near[0] * near[1] > self.max_pixels:
            shrink = math.sqrt(height * width / self.max_pixels)
            return max(side, _floor(height / shrink, side)), max(side, _floor(width / shrink, side))
        if near[0] * near[1] < MIN_PIXELS:
            grow = math.sqrt(MIN_PIXELS / (height * width))
            return math.ceil(height * grow / side) * side, math.ceil(width * grow / side) * side
        return near

    def tokens(self, grid: tuple[int, int, int]) -> int:
        """Tokens of a clip whose patches are so many in time, height and width."""
        return grid[0] * grid[1] * grid[2] // self.merge**2

    def patches(self, video: Video, device: torch.device) -> tuple[Tensor, tuple[int, int, int]]:
        """Patches ``(p, 3 * pair * patch**2)`` float32 of a clip, and how many in time, height and width.

        Raises:
            VideoError: see :meth:`indices` and :meth:`size`.
        """
        height, width = self.size(*video.size)
        frames = video.frames[self.indices(len(video.frames), video.fps)]
        resize = Preprocess({"height": height, "width": width}, _MEAN, _STD, resample=_BICUBIC)
        pixels = resize(frames, device, torch.float32)
        grid = (len(frames) // self.pair, height // self.patch, width // self.patch)
        split = pixels.view(
            *(grid[0], self.pair, 3),
            *(grid[1] // self.merge, self.merge, self.patch),
            *(grid[2] // self.merge, self.merge, self.patch),
        )
        # the patches of one token lie together; inside a patch: colour, frame, row, column
        return split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).flatten(5).flatten(0, 4), grid


def _floor(value: float, step: int) -> int:
    return math.floor(value / step) * step
