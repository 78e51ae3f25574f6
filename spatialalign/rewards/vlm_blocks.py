"""A vision-language model as the judge of single space-time blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .vlm_judge import VlmJudge

Teacher = Callable[[NDArray[np.uint8], str], float]
"""The score of a block, from its pixels ``(t, h, w, 3)`` and the clip's prompt; larger is better, NaN for unknown."""

QUESTION = (
    "Is this part of a video free of visible defects, such as noise, smears or broken shapes? Answer with yes or no "
    "only."
)


def vlm_teacher(judge: VlmJudge) -> Teacher:
    """A vision-language model as a teacher: 1 where it calls a block free of defects, 0 where it does not, else NaN.

    It sees ``judge.window`` frames of the block, spread evenly, and not the prompt.
    """
    worth = {"yes": 1.0, "no": 0.0, "unclear": float("nan")}

    def teacher(frames: NDArray[np.uint8], prompt: str) -> float:
        shown = np.linspace(0, len(frames) - 1, min(judge.window, len(frames))).round().astype(int)
        return worth[judge(frames[shown], QUESTION)]

    return teacher
