"""What ``model_config.json`` says of a VideoReward checkpoint (methods: 2.4)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelError

SCORED = ("VQ", "MQ", "TA")
"""Visual quality, motion quality, text alignment: the dimensions that the network answers, in its order."""

MAX_PIXELS = 448 * 448
MAX_LENGTH = 6144


@dataclass(frozen=True)
class LoraSettings:
    """The adapters of a checkpoint.

    Attributes:
        rank, alpha, dropout, rank_stabilised: as in peft.
        exclude: a linear layer has no adapter if one of these is part of its name.
        last: adapters on this many last layers only; all if not positive.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    rank_stabilised: bool = False
    exclude: tuple[str, ...] = ("lm_head", "rm_head", "embed_tokens", "visual")
    last: int = -1

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ModelError(f"the rank of the adapters must be at least 1, found lora_r {self.rank}")

    @property
    def scaling(self) -> float:
        """What ``B @ A`` is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def wrapped(self, linear: Sequence[str]) -> list[str]:
        """Those of the linear layers that have an adapter."""
        names = [name for name in linear if not any(part in name for part in self.exclude)]
        return names[-self.last :] if self.last > 0 else names


@dataclass(frozen=True)
class VideoRewardConfig:
    """The part of the settings that scoring needs.

    Attributes:
        base: name or folder of the base model.
        outputs: rows of the head: 1, shared by the three dimensions, or 3, one for each.
        lora: the adapters, None if every weight was trained itself.
        max_pixels: area of a frame as the network sees it, at most.
        fps: frames a second that it sees.
        frames: number of frames that it sees whatever a clip's length, None to go by ``fps``.
        max_length: tokens of clip and text together, at most.
        mean, std: a score is the network's answer less ``mean``, over ``std``, by dimension; None for the bare answer.
    """

    base: str = "Qwen/Qwen2-VL-2B-Instruct"
    outputs: int = 1
    lora: LoraSettings | None = None
    max_pixels: int = MAX_PIXELS
    fps: float = 2.0
    frames: int | None = None
    max_length: int = MAX_LENGTH
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.outputs not in (1, len(SCORED)):
            raise ModelError(f"output_dim must be 1 (shared) or 3 (one for each dimension), found {self.outputs}")
        if not (
            self.max_pixels > 0 and self.fps > 0 and self.max_length > 0 and (self.frames is None or self.frames > 1)
        ):
            raise ModelError(f"max_frame_pixels, fps and max_length must be positive, num_frames at least 2: {self}")
        if self.std is not None and not all(value > 0 for value in self.std):
            raise ModelError(f"the deviations in inference_config must be positive, found {self.std}")

    @classmethod
    def load(cls, path: Path) -> VideoRewardConfig:
        """Read ``model_config.json``. Raises :class:`~spatialalign.errors.ModelError` naming what cannot be used."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls._parse(content)
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ModelError(f"{path} cannot be read as JSON ({error}); download it again") from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, ModelError):
                raise ModelError(f"{path}: {error}") from error
            raise ModelError(f"{path}: a setting is missing or of another kind ({error!r})") from error

    @classmethod
    def _parse(cls, content: Mapping[str, Any]) -> VideoRewardConfig:
        data, model, constants = content["data_config"], content["model_config"], content.get("inference_config")
        if not model.get("use_special_tokens") or model.get("reward_token", "special") != "special":
            raise ModelError("only rewards read at their special tokens are supported (use_special_tokens true)")
        if data.get("sample_type", "uniform") != "uniform":
            raise ModelError(f"only sample_type 'uniform' is supported, found {data['sample_type']!r}")
        frames = data.get("num_frames")
        return cls(
            base=str(model["model_name_or_path"]),
            outputs=int(model["output_dim"]),
            lora=_lora(content.get("peft_lora_config") or {}),
            max_pixels=int(data.get("max_frame_pixels") or MAX_PIXELS),
            fps=float(data.get("fps") or 2.0),
            frames=None if frames is None else int(frames),
            max_length=int((content.get("training_args") or {}).get("max_length") or MAX_LENGTH),
            mean=tuple(float(constants[f"{name}_mean"]) for name in SCORED) if constants else None,
            std=tuple(float(constants[f"{name}_std"]) for name in SCORED) if constants else None,
        )


def _lora(content: Mapping[str, Any]) -> LoraSettings | None:
    if not content.get("lora_enable"):
        return None
    exclude = content.get("lora_namespan_exclude") or []
    # a list of one is stored as that one
    names = [exclude] if isinstance(exclude, str) else list(exclude)
    if not content.get("vision_lora"):
        names.append("visual")
    return LoraSettings(
        rank=int(content["lora_r"]),
        alpha=float(content["lora_alpha"]),
        dropout=float(content.get("lora_dropout") or 0.0),
        rank_stabilised=bool(content.get("use_rslora")),
        exclude=tuple(names),
        last=int(content.get("num_lora_modules", -1)),
    )
