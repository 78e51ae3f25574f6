"""LTX-Video text-to-video from a diffusers ``LTXPipeline`` folder.

Its transformer takes tokens, one a latent of 32 x 32 pixels and 8 frames, with the frame rate in their positions; like
Wan's it predicts ``noise - x0`` and is told ``1000 sigma``. diffusers stretches its schedule so that it ends on level
0.1; here it is the schedule of all backbones, which with 50 steps and shift 5 ends there by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, ModelError
from .base import LoraTargets, SampleSettings
from .latent_space import LatentSpace
from .loading import check_parts, load_model, load_part, load_text, pick_device, pick_dtype, read_index, read_settings
from .padding import pad_text
from .parts import PartedBackbone
from .sampling import Adjust, Flow
from .targets import lora_targets

TEXT_LENGTH = 128
"""Tokens that the text encoder sees, padding included; the transformer sees the real ones."""

LTX_SETTINGS = SampleSettings(
    frames=161,
    height=480,
    width=704,
    guidance=3.0,
    negative_prompt="worst quality, inconsistent motion, blurry, jittery, distorted",
)
"""What diffusers' documentation samples with; 25 frames per second."""

_PARTS = {
    "transformer": "LTXVideoTransformer3DModel",
    "vae": "AutoencoderKLLTXVideo",
    "text_encoder": "T5EncoderModel",
    "tokenizer": None,
}


class LtxBackbone(PartedBackbone):
    """An LTX-Video model behind :class:`~spatialalign.backbones.base.Backbone`."""

    @classmethod
    def from_pretrained(
        cls, source: str | Path, device: str = "auto", dtype: str = "auto", model_id: str | None = None
    ) -> LtxBackbone:
        """Load a diffusers ``LTXPipeline`` folder or hub id; raises :class:`ModelError` naming what is missing."""
        from diffusers import AutoencoderKLLTXVideo, DiffusionPipeline, LTXVideoTransformer3DModel
        from transformers import T5EncoderModel

        folder = name = str(source)
        where = pick_device(device)
        precision = pick_dtype(dtype, where)
        index = read_index(name)
        if not Path(name).is_dir():  # the constants of the latents are read from a file
            folder = str(load_part(name, "pipeline", lambda: DiffusionPipeline.download(name)))
        check_parts(folder, index, _PARTS)
        config = load_part(folder, "vae", lambda: AutoencoderKLLTXVideo.load_config(folder, subfolder="vae"))
        settings, fps = read_settings(folder, LTX_SETTINGS, 25.0)
        return cls(
            model_id or name,
            load_model(LTXVideoTransformer3DModel, folder, "transformer", precision),
            load_vae=lambda: load_model(AutoencoderKLLTXVideo, folder, "vae", torch.float32),
            load_text=lambda: load_text(T5EncoderModel, folder, precision),
            space=load_part(folder, "vae", lambda: read_space(Path(folder) / "vae", config)),
            compression=_compression(config),
            settings=settings,
            fps=fps,
            device=where,
        )

    @property
    def _weight(self) -> Tensor:
        return self.transformer.proj_out.weight

    @property
    def _patch(self) -> tuple[int, int, int]:
        config = self.transformer.config
        return config.patch_size_t, config.patch_size, config.patch_size

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> list[Tensor]:
        """Embed prompts as ``LTXPipeline`` does, padding in the encoder's sight; each ``(n_i, text_dim)``, n_i <= 128,
        holds the real tokens only."""
        tokenizer, encoder = self._text
        tokens = tokenizer(
            list(prompts), padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
        )
        hidden = encoder(tokens.input_ids.to(encoder.device)).last_hidden_state
        counts = tokens.attention_mask.sum(1).tolist()
        return [row[:count].clone() for row, count in zip(hidden, counts, strict=True)]

    def velocity(self, x: Tensor, sigma: Tensor, text: Sequence[Tensor]) -> Tensor:
        """Predict ``noise - x0``.

        Args:
            x: noisy latents ``(b, c, f, h, w)``.
            sigma: noise level of each, ``(b,)`` in [0, 1].
            text: one trimmed embedding ``(n_i, text_dim)`` per clip.

        Returns:
            ``(b, c, f, h, w)`` in float32, on the model's device.
        """
        rows = [row.to(self.device, self.dtype) for row in text]
        counts = [len(row) for row in rows]
        longest = max(counts)
        mask = None  # where no row is padded: some attention kernels take none
        if min(counts) < longest:
            mask = torch.arange(longest, device=self.device) < torch.tensor(counts, device=self.device)[:, None]
        frames, height, width = (size // patch for size, patch in zip(x.shape[2:], self._patch, strict=True))
        time, space = self._compression
        found = self.transformer(
            hidden_states=pack(x.to(self.device, self.dtype), self._patch),
            encoder_hidden_states=pad_text(rows, longest),
            timestep=1000 * sigma.to(self.device, torch.float32),
            encoder_attention_mask=mask,
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(time / self._fps, space, space),
            return_dict=False,
        )[0]
        return unpack(found.float(), self._patch, (frames, height, width))

    @contextmanager
    def flow(
        self, text: Sequence[Tensor], negative: Tensor, settings: SampleSettings, adjust: Adjust | None = None
    ) -> Iterator[Flow]:
        """The sampler of clips of these texts; see :meth:`.parts.PartedBackbone.flow`."""
        if settings.guidance_2 is not None:
            raise ConfigError(f"guidance_2 ({settings.guidance_2}) needs a model with two experts; leave it out")

        def predict(x: Tensor, sigma: float, rows: Sequence[Tensor]) -> Tensor:
            return self.velocity(x, torch.full((len(x),), sigma), rows)

        yield Flow(predict, lambda _: settings.guidance, text, negative, settings, self.device, adjust)

    def _decode(self, raw: Tensor) -> Tensor:
        # A decoder that takes a noise level is told 0, as by LTXPipeline; noise that it adds itself is always the same.
        level = raw.new_zeros(len(raw)) if self.vae.config.timestep_conditioning else None
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(0)
            return self.vae.decode(raw, level, return_dict=False)[0]

    def lora_targets(self, kind: LoraTargets) -> list[str]:
        """Names of the linears a LoRA of this kind sits on."""
        return lora_targets(self.transformer, kind, "caption_projection.", "transformer_blocks.")


def pack(latents: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Latents ``(b, c, f, h, w)`` as tokens ``(b, n, c * prod(patch))``, in the order of frame, row, column."""
    b, c, f, h, w = latents.shape
    t, p, q = patch
    cells = latents.reshape(b, c, f // t, t, h // p, p, w // q, q)
    return cells.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, -1, c * t * p * q)


def unpack(tokens: Tensor, patch: tuple[int, int, int], grid: tuple[int, int, int]) -> Tensor:
    """Inverse of :func:`pack`, for a ``grid`` of so many patches in time, height and width."""
    t, p, q = patch
    cells = tokens.reshape(len(tokens), *grid, -1, t, p, q).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return cells.reshape(len(tokens), -1, grid[0] * t, grid[1] * p, grid[2] * q)


def _compression(config: dict[str, Any]) -> tuple[int, int]:
    """Frames and pixels (a side) of a latent of the VAE."""
    halved = 2 ** sum(config["spatio_temporal_scaling"])
    return (
        config.get("temporal_compression_ratio") or config["patch_size_t"] * halved,
        config.get("spatial_compression_ratio") or config["patch_size"] * halved,
    )


def read_space(folder: Path, config: dict[str, Any]) -> LatentSpace:
    """The latent space of a VAE in ``folder``: its constants lie among the weights."""
    from safetensors import safe_open

    path = folder / "diffusion_pytorch_model.safetensors"
    if not path.is_file():
        raise ModelError(f"{path} is missing; it holds the mean and deviation of the latents: copy the folder again")
    with safe_open(path, framework="pt") as file:
        mean, std = (file.get_tensor(name).double() for name in ("latents_mean", "latents_std"))
    std = std / config.get("scaling_factor", 1.0)
    return LatentSpace(config["block_out_channels"][0], tuple(mean.tolist()), tuple(std.tolist()), "ltx-vae")
