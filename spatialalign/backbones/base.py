"""What the trainer, the sampler and the nodes may ask of a video generator."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from .sampling import Adjust, Flow

LoraTargets = Literal["spatialalign", "cross-kv", "attention", "all-linear"]
"""Which linears a LoRA sits on: the paper's set (text embedding and cross-attention k, v), its cross-attention part
alone, Flow-DPO's set (q, k, v and output of every attention), or every linear of blocks and text embedding."""

ExpertName = Literal["high", "low"]
"""Of a model with two transformers, the one for high or the one for low noise levels."""

NEGATIVE_PROMPT = (
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, overall "
    "gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly drawn hands, "
    "poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, messy background, three "
    "legs, many people in the background, walking backwards"
)
"""The negative prompt that the Wan 2.1 documentation of diffusers recommends."""


@dataclass(frozen=True)
class SampleSettings:
    """How a clip is sampled. The defaults are the paper's (Wan2.1-T2V-1.3B through DiffSynth).

    ``guidance`` is the classifier-free guidance scale (1 switches it off) and ``shift`` the timestep shift of the flow
    schedule. ``guidance_2`` is the guidance of the low-noise expert of a model with two, None for the same. Frames must
    be ``4 k + 1``; height and width multiples of 16.
    """

    frames: int = 81
    height: int = 480
    width: int = 832
    steps: int = 50
    guidance: float = 5.0
    shift: float = 5.0
    negative_prompt: str = NEGATIVE_PROMPT
    guidance_2: float | None = None

    def __post_init__(self) -> None:
        if self.frames < 1 or self.frames % 4 != 1:
            raise ConfigError(f"frames must be 4 k + 1 (1, 5, 9, ... 81), found {self.frames}")
        for name, value in (("height", self.height), ("width", self.width)):
            if value < 16 or value % 16:
                raise ConfigError(f"{name} must be a positive multiple of 16, found {value}")
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1, found {self.steps}")
        if self.guidance < 1:
            raise ConfigError(f"guidance must be at least 1 (1 = off), found {self.guidance}")
        if self.guidance_2 is not None and self.guidance_2 < 1:
            raise ConfigError(f"guidance_2 must be at least 1 (1 = off) or left out, found {self.guidance_2}")
        if self.shift <= 0:
            raise ConfigError(f"shift must be positive, found {self.shift}")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values, without ``guidance_2`` where there is none."""
        values = asdict(self)
        if self.guidance_2 is None:
            del values["guidance_2"]
        return values

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that change with any setting."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


class Backbone(Protocol):
    """A latent text-to-video flow model.

    Shapes: b batch, c latent channels, f latent frames, h w latent size; T, H, W frames and pixels. Latents are
    normalised (about zero mean, unit variance): what the transformer sees, not what the VAE's decoder takes.
    """

    transformer: torch.nn.Module
    """The only part that is ever trained."""

    @property
    def model_id(self) -> str:
        """What files record as the base model: ``"miniature"``, a folder or a hub id."""

    @property
    def latent_space(self) -> str:
        """Name of the space the latents live in; two models that share it can read each other's latents."""

    @property
    def fps(self) -> float:
        """Frames per second of a decoded clip."""

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""

    @property
    def dtype(self) -> torch.dtype:
        """Precision the transformer computes in."""

    @property
    def expert(self) -> ExpertName | None:
        """Which expert ``transformer`` is, of a model that has two; else None."""

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Noise levels that ``transformer`` can be asked about: the lowest, and the one they are below; (0, 1) for all.

        A range that ends at 1 includes it.
        """

    def default_settings(self) -> SampleSettings:
        """The settings this model was made for."""

    def latent_shape(self, settings: SampleSettings) -> tuple[int, int, int, int]:
        """``(c, f, h, w)`` of one clip."""

    def tokens(self, shape: Sequence[int]) -> int:
        """Length of the self-attention for latents of ``shape (c, f, h, w)``."""

    def encode_text(self, prompts: Sequence[str]) -> list[Tensor]:
        """Embed prompts; each result is ``(n_i, text_dim)``, real tokens only."""

    def release_text_encoder(self) -> None:
        """Free the memory of the text encoder until it is next used."""

    def velocity(self, x: Tensor, sigma: Tensor, text: Sequence[Tensor]) -> Tensor:
        """Predict ``noise - x0`` for ``x (b, c, f, h, w)`` at levels ``sigma (b,)`` in ``sigma_range``; float32."""

    def noise(self, seeds: Sequence[int], settings: SampleSettings) -> Tensor:
        """What each seed starts from, ``(b, c, f, h, w)`` float32 on the CPU, the same for every device."""

    def flow(
        self, text: Sequence[Tensor], negative: Tensor, settings: SampleSettings, adjust: Adjust | None = None
    ) -> AbstractContextManager[Flow]:
        """The sampler of clips of these texts, to be stepped inside a ``with`` block; ``adjust`` guides it."""

    def sample(
        self,
        text: Sequence[Tensor],
        negative: Tensor,
        seeds: Sequence[int],
        settings: SampleSettings,
        progress: Callable[[int, int], None] | None = None,
        adjust: Adjust | None = None,
    ) -> Tensor:
        """Generate one clip per text and seed; float32 latents ``(b, c, f, h, w)`` on the CPU."""

    def decode(self, latents: Tensor, names: Sequence[str] | None = None) -> np.ndarray:
        """Latents to uint8 frames ``(b, T, H, W, 3)``; raises DataError naming a clip that is not finite."""

    def encode(self, frames: np.ndarray) -> Tensor:
        """uint8 frames ``(b, T, H, W, 3)`` to float32 latents ``(b, c, f, h, w)``."""

    def lora_targets(self, kind: LoraTargets) -> list[str]:
        """Module names of ``transformer`` that a LoRA of this kind sits on."""
