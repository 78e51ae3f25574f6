"""Frames as people see them, uint8, and as video autoencoders do, float32 in [-1, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError


def to_video(frames: np.ndarray, device: torch.device) -> Tensor:
    """uint8 frames ``(b, T, H, W, 3)`` as float32 ``(b, 3, T, H, W)``; raises :class:`DataError` for anything else."""
    if frames.dtype != np.uint8 or frames.ndim != 5 or frames.shape[-1] != 3:
        raise DataError(f"frames must be uint8 (b, T, H, W, 3), found {frames.dtype} {frames.shape}")
    video = torch.from_numpy(np.ascontiguousarray(frames)).to(device).permute(0, 4, 1, 2, 3)
    return video.float() / 127.5 - 1


def to_frames(video: Tensor) -> np.ndarray:
    """Float ``(b, 3, T, H, W)`` as uint8 frames ``(b, T, H, W, 3)``."""
    pixels = ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return np.ascontiguousarray(pixels.permute(0, 2, 3, 4, 1).cpu().numpy())


def clip_names(names: Sequence[str] | None, count: int) -> list[str]:
    """The names given, or some for messages."""
    return list(names) if names is not None else [f"clip {index} of the batch" for index in range(count)]


def require_finite(values: Tensor, names: Sequence[str], what: str) -> None:
    """Raise :class:`DataError` naming the first of b clips whose values are not finite."""
    for row, name in zip(values, names, strict=True):
        if not torch.isfinite(row).all():
            raise DataError(f"{name}: its {what} are not finite (NaN or infinite); generate it again")
