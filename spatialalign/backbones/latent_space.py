"""The space that the latents of a video autoencoder live in: its name, and the way in and out of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

WAN21_WIDTH = 96
"""``base_dim`` of the Wan 2.1 VAE."""
WAN21_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
"""Mean of each latent channel (``vae/config.json`` of Wan2.1-T2V-1.3B-Diffusers)."""
WAN21_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
"""Standard deviation of each latent channel (the same file)."""


@dataclass(frozen=True)
class LatentSpace:
    """What defines the latents of a VAE. The defaults are Wan 2.1's, which Wan 2.2 A14B shares.

    Attributes:
        width: the VAE's ``base_dim``, or another of its sizes that tells it from others of its family.
        mean: mean of each channel of the VAE's own latents.
        std: their standard deviations.
        family: the kind of VAE.
    """

    width: int = WAN21_WIDTH
    mean: tuple[float, ...] = WAN21_MEAN
    std: tuple[float, ...] = WAN21_STD
    family: str = "wan-vae"

    def __post_init__(self) -> None:
        if not self.mean or len(self.mean) != len(self.std) or min(self.std) <= 0:
            raise ModelError(
                f"a VAE needs a mean and a positive deviation for each latent channel, found the means {self.mean} and "
                f"the deviations {self.std}; check latents_mean and latents_std in its config.json"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> LatentSpace:
        """From the ``config.json`` of an ``AutoencoderKLWan``; keys that it lacks are Wan 2.1's, as in diffusers."""
        mean, std = config.get("latents_mean", WAN21_MEAN), config.get("latents_std", WAN21_STD)
        return cls(int(config.get("base_dim", WAN21_WIDTH)), tuple(map(float, mean)), tuple(map(float, std)))

    @property
    def channels(self) -> int:
        """Latent channels."""
        return len(self.mean)

    @property
    def name(self) -> str:
        """Family (``wan-vae:``) and a digest of width and constants: the same for a VAE whichever program loads it."""
        constants = [[round(value, 4) for value in values] for values in (self.mean, self.std)]
        content = json.dumps([self.channels, self.width, *constants])
        return f"{self.family}:" + hashlib.sha256(content.encode()).hexdigest()[:12]

    def normalise(self, latents: Tensor) -> Tensor:
        """The VAE's own latents ``(b, c, f, h, w)`` as the transformer sees them: about zero mean, unit variance."""
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        """Inverse of :meth:`normalise`: what the VAE decodes."""
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        import torch

        shape = 1, self.channels, 1, 1, 1
        mean, std = (torch.tensor(v, device=like.device, dtype=like.dtype).view(shape) for v in (self.mean, self.std))
        return mean, std
