"""What all backbones are made of: a transformer, and a video autoencoder and text encoder that are loaded when used."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError
from .base import ExpertName, SampleSettings
from .latent_space import LatentSpace
from .pixels import clip_names, require_finite, to_frames, to_video
from .sampling import Adjust, Flow, seeded_noise


class PartedBackbone(ABC):
    """The part of :class:`.base.Backbone` that does not depend on the family of the model.

    The VAE and the text encoder are loaded when first used, so a training run on cached latents and embeddings holds
    the transformer alone.
    """

    def __init__(
        self,
        model_id: str,
        transformer: Any,
        load_vae: Callable[[], Any],
        load_text: Callable[[], tuple[Any, Any]],
        space: LatentSpace,
        compression: tuple[int, int],
        settings: SampleSettings,
        fps: float,
        device: str,
    ) -> None:
        """Assemble.

        Args:
            model_id: name recorded in files.
            transformer: on any device; moved to ``device``, frozen, in evaluation mode.
            load_vae: returns the VAE, in float32.
            load_text: returns the tokenizer and the encoder.
            space: of the latents.
            compression: frames and pixels (a side) of a latent.
            settings: default sampling settings.
            fps: frames per second of decoded clips.
            device: where everything runs.
        """
        self.transformer = transformer.to(device).eval().requires_grad_(False)
        self._model_id = model_id
        self._load_vae, self._load_text = load_vae, load_text
        self._space, self._compression = space, compression
        self._settings, self._fps = settings, fps

    @property
    @abstractmethod
    def _weight(self) -> Tensor:
        """A weight of the transformer that has its device and the precision it computes in."""

    @property
    @abstractmethod
    def _patch(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns of a token."""

    @abstractmethod
    def _decode(self, raw: Tensor) -> Tensor:
        """The VAE's frames ``(b, 3, T, H, W)`` of its own latents ``(b, c, f, h, w)``."""

    @abstractmethod
    def flow(
        self, text: Sequence[Tensor], negative: Tensor, settings: SampleSettings, adjust: Adjust | None = None
    ) -> AbstractContextManager[Flow]:
        """The sampler of clips of these texts, for use inside the ``with`` block.

        Args:
            text: one trimmed embedding per clip.
            negative: embedding of the negative prompt, ``(n, text_dim)``; unused when guidance is 1.
            settings: size, steps, guidance and shift.
            adjust: what is done to every velocity after classifier-free guidance.

        Raises:
            ConfigError: ``guidance_2`` for a model with one transformer.
        """

    @property
    def model_id(self) -> str:
        """What files record as the base model."""
        return self._model_id

    @property
    def fps(self) -> float:
        """Frames per second of a decoded clip."""
        return self._fps

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        return self._weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision the transformer computes in (its norms and time embedding may stay in float32)."""
        return self._weight.dtype

    @property
    def latent_space(self) -> str:
        """The kind of the VAE and a digest of its size and normalisation constants."""
        return self._space.name

    @property
    def expert(self) -> ExpertName | None:
        """None: there is one transformer."""
        return None

    @property
    def sigma_range(self) -> tuple[float, float]:
        """All noise levels."""
        return 0.0, 1.0

    @cached_property
    def vae(self) -> Any:
        """The video VAE, loaded on first use."""
        return self._load_vae().to(self.device).eval().requires_grad_(False)

    @cached_property
    def _text(self) -> tuple[Any, Any]:
        tokenizer, encoder = self._load_text()
        return tokenizer, encoder.to(self.device).eval().requires_grad_(False)

    def release_text_encoder(self) -> None:
        """Free the text encoder's memory; it is loaded again when next used."""
        self.__dict__.pop("_text", None)

    def default_settings(self) -> SampleSettings:
        """The settings of ``spatialalign.json`` in the model folder, else those the model was published with."""
        return self._settings

    def latent_shape(self, settings: SampleSettings) -> tuple[int, int, int, int]:
        """``(c, f, h, w)`` of one clip; raises :class:`ConfigError` when the size does not fit the patches."""
        time, space = self._compression
        frames = (settings.frames - 1) // time + 1
        step, group = space * self._patch[1], self._patch[0]
        if settings.height % step or settings.width % step or (settings.frames - 1) % time or frames % group:
            raise ConfigError(
                f"{settings.frames} frames of {settings.width}x{settings.height} do not fit {self.model_id}: "
                f"frames must be {time} k + 1, height and width multiples of {step}"
            )
        return self._space.channels, frames, settings.height // space, settings.width // space

    def tokens(self, shape: Sequence[int]) -> int:
        """Length of the self-attention for latents of ``shape (c, f, h, w)``."""
        return prod(shape[1:]) // prod(self._patch)

    def noise(self, seeds: Sequence[int], settings: SampleSettings) -> Tensor:
        """The Gaussian noise each seed starts from, ``(b, c, f, h, w)`` float32, the same on every device."""
        return seeded_noise(seeds, self.latent_shape(settings))

    def sample(
        self,
        text: Sequence[Tensor],
        negative: Tensor,
        seeds: Sequence[int],
        settings: SampleSettings,
        progress: Callable[[int, int], None] | None = None,
        adjust: Adjust | None = None,
    ) -> Tensor:
        """Generate clips with Euler steps on the shifted flow schedule.

        Each clip's noise comes from its own seed, so a clip does not depend on what else is in the batch (beyond the
        last bits of floating-point sums).

        Args:
            text: one trimmed embedding per clip.
            negative: see :meth:`flow`.
            seeds: one per clip.
            settings: size, steps, guidance and shift.
            progress: called after each step with (steps done, steps in all).
            adjust: see :meth:`flow`.

        Returns:
            Normalised latents ``(b, c, f, h, w)``, float32 on the CPU.

        Raises:
            ConfigError: not one text per seed, or as :meth:`flow`.
        """
        with self.flow(text, negative, settings, adjust) as flow:
            return flow.run(self.noise(seeds, settings), progress=progress)

    @torch.no_grad()
    def decode(self, latents: Tensor, names: Sequence[str] | None = None) -> np.ndarray:
        """Decode normalised latents ``(b, c, f, h, w)`` to uint8 frames ``(b, T, H, W, 3)``.

        ``names`` (one per clip) are used in the :class:`DataError` raised when latents or frames are not finite.
        """
        labels = clip_names(names, len(latents))
        require_finite(latents, labels, "latents")
        video = self._decode(self._space.denormalise(latents.to(self.device, torch.float32)))
        require_finite(video, labels, "decoded frames")
        return to_frames(video)

    @torch.no_grad()
    def encode(self, frames: np.ndarray) -> Tensor:
        """Encode uint8 frames ``(b, T, H, W, 3)`` to normalised latents (the posterior's mode).

        ``T`` is a multiple of the frames of a latent and one more.
        """
        posterior = self.vae.encode(to_video(frames, self.device)).latent_dist
        return self._space.normalise(posterior.mode()).cpu()
