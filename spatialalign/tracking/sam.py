"""SAM (transformers ``SamModel``) frame by frame, prompted with boxes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ..errors import ModelError, TracksError
from ..video import check_frames
from .parts import PROCESSOR, WEIGHTS, Progress, guarded, require_local
from .preprocess import Preprocess
from .segment import Propagation


@dataclass(frozen=True)
class SamFrameSegmenter:
    """A :class:`~spatialalign.tracking.segment.FrameSegmenter`: one mask per box and frame, frames in batches.

    A box leaves no doubt about the extent, so SAM's single-mask output is used rather than its three guesses. The score
    is SAM's own IoU estimate, clipped to [0, 1].
    """

    model: Any
    preprocess: Preprocess
    batch: int = 8

    def __post_init__(self) -> None:
        size = int(self.model.config.vision_config.image_size)
        if self.preprocess.pad is None:
            object.__setattr__(self, "preprocess", _padded(self.preprocess, size))
        if self.preprocess.pad != (size, size):
            raise ModelError(f"the processor pads to {self.preprocess.pad}, the model takes {size} x {size} pixels")

    @classmethod
    def from_pretrained(cls, name: str | Path, device: str | torch.device = "cpu", batch: int = 8) -> SamFrameSegmenter:
        """Load a folder or hub id such as ``facebook/sam-vit-base``.

        Raises :class:`~spatialalign.errors.ModelError` naming the part that is missing.
        """
        from transformers import SamModel

        require_local(name, ["config.json", WEIGHTS, PROCESSOR])
        preprocess = Preprocess.from_pretrained(name)
        model = guarded(str(name), lambda: SamModel.from_pretrained(str(name)))
        return cls(model.to(device).eval(), preprocess, batch)

    def segment(
        self, frames: NDArray[np.uint8], boxes: NDArray[np.float64], progress: Progress | None = None
    ) -> Propagation:
        """See :meth:`spatialalign.tracking.segment.FrameSegmenter.segment`."""
        check_prompts(frames, boxes)
        height, width = frames.shape[1:3]
        present = ~np.isnan(boxes[..., 0])
        masks, scores = np.zeros((len(frames), 2, height, width), dtype=bool), np.zeros((len(frames), 2))
        wanted = np.flatnonzero(present.any(axis=1))
        # A missing box is asked for as the whole picture, and its answer thrown away: batches stay rectangular.
        prompts = np.where(present[..., None], boxes, [0.0, 0.0, width, height])
        for start in range(0, len(wanted), self.batch):
            chosen = wanted[start : start + self.batch]
            logits, quality = self._forward(frames[chosen], prompts[chosen])
            masks[chosen] = (logits > 0).cpu().numpy()
            scores[chosen] = quality.float().clamp(0, 1).cpu().numpy()
            if progress is not None:
                progress(start + len(chosen), len(wanted))
        masks &= present[..., None, None]
        return Propagation(masks, np.where(present, scores, 0.0))

    @torch.inference_mode()
    def _forward(self, frames: NDArray[np.uint8], boxes: NDArray[np.float64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask logits (b, 2, H, W) at the frames' size and IoU estimates (b, 2)."""
        parameter = next(self.model.parameters())
        pixels = self.preprocess(frames, parameter.device, parameter.dtype)
        height, width = frames.shape[1:3]
        target = self.preprocess.target(height, width)
        scale = np.array([target[1] / width, target[0] / height] * 2)
        # In half precision a coordinate would be off by pixels; the model casts what it computes from them.
        prompts = torch.as_tensor(boxes * scale, device=parameter.device, dtype=torch.float32)
        output = self.model(pixel_values=pixels, input_boxes=prompts, multimask_output=False)
        logits = F.interpolate(output.pred_masks[:, :, 0].float(), self.preprocess.pad, mode="bilinear")
        logits = logits[..., : target[0], : target[1]]
        return F.interpolate(logits, (height, width), mode="bilinear"), output.iou_scores[:, :, 0]


def check_prompts(frames: NDArray[np.uint8], boxes: NDArray[np.float64]) -> None:
    """Raise unless ``frames`` are frames and ``boxes`` are (T, 2, 4) for them."""
    check_frames(frames)
    if boxes.shape != (len(frames), 2, 4):
        raise TracksError(f"boxes to segment must have the shape {(len(frames), 2, 4)}, found {boxes.shape}")


def _padded(preprocess: Preprocess, size: int) -> Preprocess:
    return Preprocess(preprocess.size, preprocess.mean, preprocess.std, (size, size), preprocess.resample)
