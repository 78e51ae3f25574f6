"""ID consistency: does the subject keep its looks? DINOv2 features of its crops, compared over the frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from .errors import DataError, ModelError
from .tracking.parts import WEIGHTS, guarded, require_local
from .tracks import Tracks
from .video import Video

PAPER_MODEL = "facebook/dinov2-base"
"""DINOv2 ViT-B/14, which the paper measures with."""
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_LONGEST = 4


def identity_consistency(features: ArrayLike) -> float:
    """Mean over the frames after the first of (cosine to the first + cosine to the one before) / 2, in [-1, 1].

    ``features`` (n, d), one row a frame in time order. Methods: ``calc_metric.py`` of the paper, which begins at the
    frame that its tracker was seeded from and not at the first one. Raises :class:`DataError` for fewer than two rows.
    """
    rows = np.asarray(features, dtype=np.float64)
    if rows.ndim != 2 or len(rows) < 2 or not np.isfinite(rows).all():
        raise DataError(f"expected finite features (n, d) of at least two frames, found shape {rows.shape}")
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    first, before = unit[1:] @ unit[0], (unit[1:] * unit[:-1]).sum(axis=1)
    return float(np.clip((first + before).mean() / 2, -1.0, 1.0))


def subject_crops(video: Video, tracks: Tracks, used: NDArray[np.int64]) -> list[NDArray[np.uint8]]:
    """The subject's box cut out of the frames ``used``, whole pixels, within the picture.

    Raises :class:`DataError` when video and tracks are of other sizes or lengths.
    """
    if video.size != tracks.size or len(video.frames) != tracks.frames:
        raise DataError(
            f"the video has {len(video.frames)} frames of {video.size}, its tracks {tracks.frames} of {tracks.size}; "
            "track it again"
        )
    height, width = video.size
    crops = []
    for place in used:
        x1, y1, x2, y2 = tracks.subject[place]
        left, top = min(max(0, int(x1)), width - 1), min(max(0, int(y1)), height - 1)
        right, bottom = min(width, int(np.ceil(x2))), min(height, int(np.ceil(y2)))
        crops.append(video.frames[place, top : max(bottom, top + 1), left : max(right, left + 1)])
    return crops


def prepare(crop: NDArray[np.uint8], side: int) -> torch.Tensor:
    """A crop (h, w, 3) as DINOv2 takes it: (3, side, side).

    The short side is resized to ``side`` (bicubic, antialiased), the middle cut out, and ImageNet's mean and deviation
    taken off.
    """
    height, width = crop.shape[:2]
    short = min(height, width)
    # What is far from the middle is cut off before, or a sliver one pixel wide would become a picture of a hundred MB.
    top, left = (max(0, (length - _LONGEST * short) // 2) for length in (height, width))
    part = np.ascontiguousarray(crop[top : height - top, left : width - left])
    size = [int(side * length / short) for length in part.shape[:2]]
    picture = torch.from_numpy(part).permute(2, 0, 1)[None].float()
    large = torch.nn.functional.interpolate(picture, size, mode="bicubic", antialias=True, align_corners=False)[0]
    top, left = (round((length - side) / 2) for length in large.shape[1:])
    middle = large[:, top : top + side, left : left + side].round().clamp(0, 255) / 255
    return (middle - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_STD)[:, None, None]


class IdentityEncoder:
    """DINOv2 of transformers as the measure of ID consistency.

    Attributes:
        name: of the model, for the record.
        side: pictures are ``side`` x ``side`` pixels, as the model was trained (518 for the released ones).
    """

    def __init__(self, model: Any, name: str, batch: int = 8) -> None:
        """``model``: a ``Dinov2Model`` in evaluation mode; ``batch`` crops at once."""
        self.model, self.name, self.batch = model, name, batch
        self.side = int(model.config.image_size)

    @classmethod
    def from_pretrained(cls, name: str | Path, device: str = "cpu", batch: int = 8) -> IdentityEncoder:
        """Load a folder or hub id such as ``facebook/dinov2-base``; :class:`ModelError` when it is no DINOv2."""
        from transformers import AutoConfig, AutoModel

        require_local(name, ["config.json", WEIGHTS])
        kind = str(guarded(str(name), lambda: AutoConfig.from_pretrained(str(name))).model_type)
        if not kind.startswith("dinov2"):
            raise ModelError(f"{name}: model type {kind!r} is no DINOv2; expected a model such as {PAPER_MODEL}")
        model = guarded(str(name), lambda: AutoModel.from_pretrained(str(name)))
        return cls(model.float().to(device).eval(), Path(name).name, batch)

    @torch.inference_mode()
    def features(self, crops: list[NDArray[np.uint8]]) -> NDArray[np.float64]:
        """Features (n, d) of crops (h, w, 3): the class token after the last norm."""
        rows = []
        for start in range(0, len(crops), self.batch):
            pictures = torch.stack([prepare(crop, self.side) for crop in crops[start : start + self.batch]])
            out = self.model(pixel_values=pictures.to(self.model.device))
            rows.append(out.pooler_output.double().cpu().numpy())
        return np.concatenate(rows)

    def score(self, video: Video, tracks: Tracks, used: NDArray[np.int64]) -> float | None:
        """ID consistency of the subject over the valid frames ``used``; None for fewer than two.

        Raises :class:`DataError` as :func:`subject_crops`.
        """
        if len(used) < 2:
            return None
        return identity_consistency(self.features(subject_crops(video, tracks, used)))
