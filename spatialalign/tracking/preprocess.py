"""Frames to model input, the same on every machine.

The image processors of transformers pick a resize backend by what is installed (torchvision or PIL), and their results
differ. Here the numbers of the model's own processor file are used, with one resize: antialiased, in float, rounded
to whole grey levels as both backends do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ..errors import ModelError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_MODES = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Preprocess:
    """Resize, scale to 0..1, normalise, pad at right and bottom with zeros.

    ``size`` is one of ``{"shortest_edge": s, "longest_edge": l}`` (Grounding DINO), ``{"longest_edge": l}`` (SAM) and
    ``{"height": h, "width": w}`` (SAM 2); ``pad`` (height, width) or None; ``resample`` 2 bilinear, 3 bicubic.
    """

    size: Mapping[str, int]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    pad: tuple[int, int] | None = None
    resample: int = 2

    def __post_init__(self) -> None:
        kinds = ({"shortest_edge", "longest_edge"}, {"longest_edge"}, {"height", "width"})
        if set(self.size) not in kinds or min(self.size.values()) < 1:
            raise ModelError(
                f"image size {dict(self.size)}: expected shortest_edge with longest_edge, longest_edge alone, "
                "or height with width"
            )
        if self.resample not in _MODES:
            raise ModelError(f"resample {self.resample}: expected 2 (bilinear) or 3 (bicubic)")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Preprocess:
        """From the dict of a transformers image processor file. Raises :class:`ModelError` naming what is missing."""
        if "size" not in config:
            raise ModelError("the image processor file has no 'size'; it does not belong to a detector or segmenter")
        size = {key: int(value) for key, value in dict(config["size"]).items() if value is not None}
        pad = config.get("pad_size") if config.get("do_pad", True) else None
        return cls(
            size=size,
            mean=tuple(config.get("image_mean") or IMAGENET_MEAN),
            std=tuple(config.get("image_std") or IMAGENET_STD),
            pad=(int(pad["height"]), int(pad["width"])) if pad else None,
            resample=int(config.get("resample", 2)),
        )

    @classmethod
    def from_pretrained(cls, name: str | Path) -> Preprocess:
        """From the processor file of a model folder or hub id."""
        from transformers.image_processing_base import ImageProcessingMixin

        try:
            config, _ = ImageProcessingMixin.get_image_processor_dict(str(name))
        except OSError as error:
            raise ModelError(
                f"{name}: no preprocessor_config.json or processor_config.json could be read ({error})"
            ) from error
        return cls.from_config(config)

    def target(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that a frame of ``height`` x ``width`` is resized to, before padding."""
        size = self.size
        if "height" in size:
            return size["height"], size["width"]
        if "shortest_edge" not in size:
            scale = size["longest_edge"] / max(height, width)
            return int(height * scale + 0.5), int(width * scale + 0.5)
        short, long = min(height, width), max(height, width)
        edge: float = size["shortest_edge"]
        if long / short * edge > size["longest_edge"]:
            edge = size["longest_edge"] * short / long
        whole = round(edge)
        if short == whole:
            return height, width
        # The long side follows from the unrounded edge, as in the library (and in DETR before it).
        other = int(edge * long / short)
        return (whole, other) if height <= width else (other, whole)

    def __call__(self, frames: NDArray[np.uint8], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """``frames`` uint8 (b, h, w, 3) -> (b, 3, H, W) on ``device``."""
        x = torch.from_numpy(np.ascontiguousarray(frames)).to(device).permute(0, 3, 1, 2).float()
        target = self.target(x.shape[-2], x.shape[-1])
        if target != tuple(x.shape[-2:]):
            x = F.interpolate(x, target, mode=_MODES[self.resample], antialias=True).round().clamp(0, 255)
        mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (self.mean, self.std))
        x = (x / 255 - mean) / std
        if self.pad is not None:
            extra = self.pad[0] - x.shape[-2], self.pad[1] - x.shape[-1]
            if min(extra) < 0:
                raise ModelError(
                    f"frames of {tuple(x.shape[-2:])} after resizing do not fit the padded size {self.pad}"
                )
            x = F.pad(x, (0, extra[1], 0, extra[0]))
        return x.to(dtype)
