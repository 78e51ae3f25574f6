"""CLIP-IQA: picture quality as CLIP's choice between a good and a bad description, averaged over the frames."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .errors import ModelError
from .tracking.parts import PROCESSOR, TOKENIZER, WEIGHTS, guarded, require_local
from .video import check_frames

PAPER_MODEL = "clip_iqa"
"""The model of torchmetrics that the paper measures with: CLIP's ResNet-50 without its place embedding."""
DIMENSIONS = ("natural", "quality")
_USUAL = "openai/clip-vit-base-patch16"
_PROMPTS = (("Natural photo.", "Synthetic photo."), ("Good photo.", "Bad photo."))
_SHARPNESS = 100.0


class ClipIqa:
    """The share that CLIP gives to the good one of two descriptions, for each of :data:`DIMENSIONS`.

    Attributes:
        model: takes frames uint8 (n, h, w, 3) and returns (n, 2) in [0, 1], computed on the device where its weights
            are; it may be moved.
        name: of the model, for the record.
        batch: frames given to it at once.
    """

    def __init__(self, model: torch.nn.Module, name: str, batch: int = 8) -> None:
        self.model, self.name, self.batch = model, name, batch

    @classmethod
    def from_pretrained(cls, name: str | Path, device: str = "cpu", batch: int = 8) -> ClipIqa:
        """Load ``"clip_iqa"``, the paper's model, through torchmetrics, or a CLIP of transformers by folder or hub id.

        The former is downloaded by piq and torchmetrics. Numbers of one model do not compare with those of another:
        a transformers CLIP sees frames at its own size and with its place embedding.

        Raises:
            ModelError: the model or a package is missing, or the model is no CLIP.
        """
        if str(name) == PAPER_MODEL:
            return cls(_OfTorchmetrics().to(device), PAPER_MODEL, batch)
        return cls(_OfTransformers(str(name)).to(device), Path(name).name, batch)

    @torch.inference_mode()
    def score(self, frames: NDArray[np.uint8]) -> tuple[float, float]:
        """Means over all frames (t, h, w, 3) of "natural" and of "quality", in [0, 1]."""
        check_frames(frames)
        parts = [self.model(frames[start : start + self.batch]) for start in range(0, len(frames), self.batch)]
        natural, quality = torch.cat(parts).double().mean(dim=0).tolist()
        return natural, quality


class _OfTorchmetrics(torch.nn.Module):
    """The paper's model."""

    def __init__(self) -> None:
        super().__init__()
        try:
            from torchmetrics.multimodal.clip_iqa import CLIPImageQualityAssessment
        except ImportError as error:
            raise ModelError(f"CLIP-IQA needs torchmetrics and piq ({error}); install spatialalign[metrics]") from error
        self.metric = guarded(
            PAPER_MODEL, lambda: CLIPImageQualityAssessment(PAPER_MODEL, data_range=1.0, prompts=DIMENSIONS)
        )

    def forward(self, frames: NDArray[np.uint8]) -> torch.Tensor:
        self.metric.reset()
        shares = self.metric(torch.from_numpy(frames).permute(0, 3, 1, 2).float().to(self.metric.device) / 255)
        # Of a single frame it returns numbers without a dimension.
        return torch.stack([shares[name].reshape(len(frames)) for name in DIMENSIONS], dim=1)


class _OfTransformers(torch.nn.Module):
    """A CLIP of transformers: it reads the descriptions once, then only what sees is kept."""

    anchors: torch.Tensor

    def __init__(self, name: str) -> None:
        # Not through torchmetrics: there a CLIP of transformers gets pictures scaled to [0, 1] twice, and fails with
        # transformers 5.
        from transformers import AutoConfig, CLIPModel, CLIPProcessor

        super().__init__()
        require_local(name, ["config.json", WEIGHTS, PROCESSOR, (*TOKENIZER, "vocab.json")])
        kind = str(guarded(name, lambda: AutoConfig.from_pretrained(name)).model_type)
        if kind != "clip":
            raise ModelError(f"{name}: model type {kind!r} is no CLIP; expected a model such as {_USUAL}")
        model: Any = guarded(name, lambda: CLIPModel.from_pretrained(name)).float().eval()
        processor: Any = guarded(name, lambda: CLIPProcessor.from_pretrained(name))
        words = processor.tokenizer([text for pair in _PROMPTS for text in pair], return_tensors="pt", padding=True)
        with torch.inference_mode():
            anchors = _unit(model.text_projection(model.text_model(**words).pooler_output))
        self.register_buffer("anchors", anchors)
        self.vision, self.projection = model.vision_model, model.visual_projection
        self._prepare = processor.image_processor

    def forward(self, frames: NDArray[np.uint8]) -> torch.Tensor:
        device = self.projection.weight.device
        pictures = self._prepare(list(frames), return_tensors="pt")["pixel_values"].to(device)
        features = _unit(self.projection(self.vision(pixel_values=pictures).pooler_output))
        likeness = _SHARPNESS * features @ self.anchors.to(device).T
        return likeness.reshape(len(frames), len(_PROMPTS), 2).softmax(dim=-1)[..., 0]


def _unit(rows: torch.Tensor) -> torch.Tensor:
    return rows / rows.norm(dim=-1, keepdim=True)
