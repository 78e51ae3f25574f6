"""Grounding DINO and MM-Grounding-DINO from transformers as a :class:`~spatialalign.tracking.detect.Detector`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import ConfigError, ModelError
from ..video import check_frames
from .detect import Detections, caption, clean_phrase, from_spans, from_texts, phrase_scores, token_spans
from .parts import PROCESSOR, TOKENIZER, WEIGHTS, Progress, guarded, require_local
from .preprocess import Preprocess

Forward = Callable[[torch.Tensor, str], tuple[torch.Tensor, torch.Tensor, Sequence[int]]]
"""(pixels (b, 3, h, w), caption) -> token logits (b, q, n), boxes (b, q, 4) as relative cx cy w h, token ids."""


@dataclass(frozen=True)
class Matching:
    """How boxes become detections.

    ``labels`` "spans" matches phrases by their token positions, keeps boxes above ``threshold`` and merges boxes of one
    phrase that overlap by more than ``overlap``. "official" is the paper's string rule: boxes above ``threshold``
    keep the text of all tokens above ``text_threshold``, which must equal a phrase; nothing is merged.
    """

    labels: Literal["spans", "official"] = "spans"
    threshold: float = 0.3
    text_threshold: float = 0.3
    overlap: float = 0.7

    def __post_init__(self) -> None:
        if self.labels not in ("spans", "official"):
            raise ConfigError(f"labels must be 'spans' or 'official', found {self.labels!r}")
        if not all(0 <= value <= 1 for value in (self.threshold, self.text_threshold, self.overlap)):
            raise ConfigError(f"thresholds must lie in [0, 1]: {self}")


OFFICIAL = Matching("official", threshold=0.4, text_threshold=0.3)
"""The paper's constants (official ``detection.py``)."""


@dataclass(frozen=True)
class GroundingDinoDetector:
    """Batched open-vocabulary detection.

    ``model`` is a ``GroundingDinoForObjectDetection`` or ``MMGroundingDinoForObjectDetection``; the frames go through
    ``preprocess`` at any size, so a model with a small processor size works on tiny clips.
    """

    model: Any
    tokenizer: Any
    preprocess: Preprocess
    matching: Matching = field(default_factory=Matching)
    batch: int = 8

    @classmethod
    def from_pretrained(
        cls, name: str | Path, device: str | torch.device = "cpu", matching: Matching | None = None, batch: int = 8
    ) -> GroundingDinoDetector:
        """Load a folder or hub id such as ``openmmlab-community/mm_grounding_dino_tiny_o365v1_goldg_v3det``.

        Raises :class:`~spatialalign.errors.ModelError` naming the part that is missing.
        """
        from transformers import AutoModelForZeroShotObjectDetection, AutoTokenizer

        require_local(name, ["config.json", WEIGHTS, PROCESSOR, TOKENIZER])
        preprocess = Preprocess.from_pretrained(name)
        tokenizer = guarded(str(name), lambda: AutoTokenizer.from_pretrained(str(name)))
        model = guarded(str(name), lambda: AutoModelForZeroShotObjectDetection.from_pretrained(str(name)))
        return cls(model.to(device).eval(), tokenizer, preprocess, matching or Matching(), batch)

    def detect(
        self, frames: NDArray[np.uint8], phrases: Sequence[str], progress: Progress | None = None
    ) -> list[Detections]:
        """See :meth:`spatialalign.tracking.detect.Detector.detect`."""
        return detect_frames(
            self._forward,
            self.tokenizer,
            self.preprocess,
            self.matching,
            frames,
            phrases,
            self.batch,
            _place(self.model),
            progress,
        )

    def _forward(self, pixels: torch.Tensor, text: str) -> tuple[torch.Tensor, torch.Tensor, Sequence[int]]:
        encoded = self.tokenizer([text] * len(pixels), return_tensors="pt", return_token_type_ids=True)
        encoded = {key: value.to(pixels.device) for key, value in encoded.items()}
        mask = torch.ones(pixels.shape[0], *pixels.shape[-2:], dtype=torch.long, device=pixels.device)
        # transformers 4 computes positions of words in float32, which its own half-precision layers would refuse
        with torch.autocast(pixels.device.type, pixels.dtype, enabled=pixels.dtype != torch.float32):
            output = self.model(pixel_values=pixels, pixel_mask=mask, **encoded)
        return output.logits, output.pred_boxes, encoded["input_ids"][0].tolist()


def _place(model: Any) -> tuple[torch.device, torch.dtype]:
    parameter = next(model.parameters())
    return parameter.device, parameter.dtype


def detect_frames(
    forward: Forward,
    tokenizer: Any,
    preprocess: Preprocess,
    matching: Matching,
    frames: NDArray[np.uint8],
    phrases: Sequence[str],
    batch: int,
    place: tuple[torch.device, torch.dtype],
    progress: Progress | None = None,
) -> list[Detections]:
    """Run any Grounding DINO over ``frames`` (T, H, W, 3): the shared part of the two backends."""
    check_frames(frames)
    if not phrases:
        raise ConfigError("detect needs at least one phrase")
    text, spans = caption(phrases)
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    tokens = token_spans([(int(a), int(b)) for a, b in offsets], spans)
    names = [clean_phrase(phrase) for phrase in phrases]
    found: list[Detections] = []
    for start in range(0, len(frames), batch):
        chunk = frames[start : start + batch]
        with torch.inference_mode():
            logits, relative, ids = forward(preprocess(chunk, *place), text)
        probabilities = logits.float().sigmoid().cpu().numpy().astype(np.float64)
        if not np.isfinite(probabilities).all():
            raise ModelError(
                "the detector's scores are NaN; load it in float32, half precision overflows in some versions"
            )
        corners = _pixels(relative.float().cpu().numpy().astype(np.float64), chunk.shape[1], chunk.shape[2])
        for boxes, p in zip(corners, probabilities, strict=True):
            if matching.labels == "official":
                found.append(_official(boxes, p, ids, tokenizer, names, matching))
            else:
                inside = boxes.clip(0, [chunk.shape[2], chunk.shape[1]] * 2)
                scores = phrase_scores(p, tokens)
                found.append(from_spans(inside, scores, names, matching.threshold, matching.overlap))
        if progress is not None:
            progress(len(found), len(frames))
    return found


def _official(
    boxes: NDArray[np.float64],
    probabilities: NDArray[np.float64],
    ids: Sequence[int],
    tokenizer: Any,
    names: Sequence[str],
    matching: Matching,
) -> Detections:
    scores = probabilities.max(axis=1)
    kept = np.flatnonzero(scores > matching.threshold)
    active = probabilities[kept] > matching.text_threshold
    # As in the library: the first position is [CLS] and the last column is never a word.
    active[:, 0] = active[:, -1] = False
    texts = [tokenizer.decode([ids[int(i)] for i in np.flatnonzero(row)]) for row in active]
    return from_texts(boxes[kept], scores[kept], texts, names)


def _pixels(relative: NDArray[np.float64], height: int, width: int) -> NDArray[np.float64]:
    centre, half = relative[..., :2], relative[..., 2:] / 2
    return np.concatenate([centre - half, centre + half], axis=-1) * np.array([width, height, width, height])
