"""What every reward of finished clips offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ..video import Video


class VideoReward(Protocol):
    """Scores finished clips against the prompts that they were made for; higher is better.

    Attributes:
        name: what files record beside its scores.
        dimensions: names of the columns, such as ``("VQ", "MQ", "TA")``.
    """

    @property
    def name(self) -> str: ...

    @property
    def dimensions(self) -> tuple[str, ...]: ...

    def score(self, videos: Sequence[Video], prompts: Sequence[str]) -> np.ndarray:
        """Scores ``(n, len(dimensions))`` float64 of clips, each with its prompt; NaN where one cannot be scored."""
        ...
