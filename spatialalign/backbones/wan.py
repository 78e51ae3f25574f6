"""Wan 2.1 and 2.2 text-to-video from a diffusers ``WanPipeline`` folder.

Of Wan 2.2, TI2V-5B has another autoencoder, and A14B has two transformers, see :mod:`.experts`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigError, ModelError
from .base import ExpertName, LoraTargets, SampleSettings
from .checkpointing import is_compiled
from .experts import Experts
from .latent_space import LatentSpace
from .loading import check_parts, load_model, load_part, load_text, pick_device, pick_dtype, read_index, read_settings
from .padding import collapse_padding, cross_attention_bias, pad_text
from .parts import PartedBackbone
from .sampling import Adjust, Flow
from .targets import lora_targets

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

TEXT_LENGTH = 512
"""Tokens of text context that every Wan model attends to, padding included."""

A14B_SETTINGS = SampleSettings(height=720, width=1280, steps=40, guidance=4.0, guidance_2=3.0, shift=12.0)
"""What Wan 2.2 T2V-A14B was published with; 16 frames per second."""

TI2V_5B_SETTINGS = SampleSettings(frames=121, height=704, width=1280)
"""What Wan 2.2 TI2V-5B was published with; 24 frames per second."""

_PARTS = {
    "transformer": "WanTransformer3DModel",
    "vae": "AutoencoderKLWan",
    "text_encoder": "UMT5EncoderModel",
    "tokenizer": None,
}


class WanBackbone(PartedBackbone):
    """A Wan model behind :class:`~spatialalign.backbones.base.Backbone`.

    Of a model with two experts, ``transformer`` is the chosen one; the other is loaded when first sampled with.
    """

    def __init__(
        self,
        model_id: str,
        transformer: WanTransformer3DModel,
        load_vae: Callable[[], AutoencoderKLWan],
        load_text: Callable[[], tuple[PreTrainedTokenizerBase, UMT5EncoderModel]],
        vae_config: dict[str, Any],
        settings: SampleSettings | None = None,
        fps: float = 16.0,
        device: str = "cpu",
        experts: Experts | None = None,
    ) -> None:
        """Assemble from parts; :meth:`from_pretrained` is the usual way.

        Args:
            model_id: name recorded in files.
            transformer: on any device; moved to ``device``, frozen, in evaluation mode.
            load_vae: returns the VAE, in float32.
            load_text: returns the tokenizer and the encoder.
            vae_config: the VAE's configuration (``base_dim``, ``latents_mean``, ``latents_std``, ``scale_factor_*``).
            settings: default sampling settings; None for the paper's.
            fps: frames per second of decoded clips.
            device: where everything runs.
            experts: of a model with two, which one ``transformer`` is.
        """
        compression = vae_config.get("scale_factor_temporal", 4), vae_config.get("scale_factor_spatial", 8)
        space, chosen = LatentSpace.from_config(vae_config), settings or SampleSettings()
        super().__init__(model_id, transformer, load_vae, load_text, space, compression, chosen, fps, device)
        self._experts = experts

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        device: str = "auto",
        dtype: str = "auto",
        model_id: str | None = None,
        expert: ExpertName | None = None,
    ) -> WanBackbone:
        """Load a diffusers ``WanPipeline`` folder or hub id.

        Args:
            source: folder or hub id.
            device: see :func:`load_backbone`.
            dtype: likewise.
            model_id: name recorded in files; None for ``source``.
            expert: of Wan 2.2 A14B, the one that may be trained or carry a LoRA; None for "high".

        Raises:
            ModelError: a part is missing or of another kind; the message names it.
            ConfigError: an expert is asked of a model that has one transformer.
        """
        from diffusers import AutoencoderKLWan, WanTransformer3DModel
        from transformers import UMT5EncoderModel

        source = str(source)
        where = pick_device(device)
        precision = pick_dtype(dtype, where)
        index = read_index(source)
        check_parts(source, index, _PARTS)
        chosen, experts = "transformer", None
        if index.get("boundary_ratio") is not None:
            check_parts(source, index, {"transformer_2": "WanTransformer3DModel"})
            chosen, other = ("transformer_2", "transformer") if expert == "low" else ("transformer", "transformer_2")
            boundary = float(index["boundary_ratio"])
            experts = Experts(
                expert or "high", boundary, lambda: load_model(WanTransformer3DModel, source, other, precision)
            )
        elif expert is not None:
            raise ConfigError(f"expert {expert!r} needs a model with two (Wan 2.2 A14B); {source} has one transformer")
        transformer = load_model(WanTransformer3DModel, source, chosen, precision)
        if (
            transformer.config.image_dim is not None
            or transformer.config.in_channels != transformer.config.out_channels
        ):
            raise ModelError(f"{source} is an image-to-video Wan model; a text-to-video one is needed")
        settings, fps = read_settings(source, *_published(index))
        return cls(
            model_id or source,
            transformer,
            # the decoder is not stable below float32, and diffusers' own documentation keeps it there
            load_vae=lambda: load_model(AutoencoderKLWan, source, "vae", torch.float32),
            load_text=lambda: load_text(UMT5EncoderModel, source, precision),
            vae_config=load_part(source, "vae", lambda: dict(AutoencoderKLWan.load_config(source, subfolder="vae"))),
            settings=settings,
            fps=fps,
            device=where,
            experts=experts,
        )

    @property
    def _weight(self) -> Tensor:
        return self.transformer.patch_embedding.weight

    @property
    def _patch(self) -> tuple[int, int, int]:
        return self.transformer.config.patch_size

    @property
    def expert(self) -> ExpertName | None:
        """Which expert ``transformer`` is; None for a model with one transformer."""
        return None if self._experts is None else self._experts.name

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Noise levels of ``transformer``: all, or those of the chosen expert."""
        return (0.0, 1.0) if self._experts is None else self._experts.sigma_range

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> list[Tensor]:
        """Embed prompts as ``WanPipeline`` does; each ``(n_i, text_dim)`` holds the real tokens only (at most 512)."""
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        tokenizer, encoder = self._text
        tokens = tokenizer(
            [prompt_clean(prompt) for prompt in prompts],
            padding="longest",
            max_length=TEXT_LENGTH,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        mask = tokens.attention_mask.to(encoder.device)
        hidden = encoder(tokens.input_ids.to(encoder.device), mask).last_hidden_state
        return [row[:count].clone() for row, count in zip(hidden, mask.sum(1).tolist(), strict=True)]

    def velocity(self, x: Tensor, sigma: Tensor, text: Sequence[Tensor]) -> Tensor:
        """Predict ``noise - x0``.

        Args:
            x: noisy latents ``(b, c, f, h, w)``.
            sigma: noise level of each, ``(b,)`` in [0, 1].
            text: one trimmed embedding ``(n_i, text_dim)`` per clip.

        Returns:
            ``(b, c, f, h, w)`` in float32, on the model's device.

        Raises:
            ConfigError: a noise level that is the other expert's.
        """
        if self._experts is not None:
            self._experts.check(sigma)
        return self._predict(self.transformer, x, sigma, text)

    def _predict(self, transformer: Any, x: Tensor, sigma: Tensor, text: Sequence[Tensor]) -> Tensor:
        weight = transformer.patch_embedding.weight
        rows = [row.to(weight.device, weight.dtype) for row in text]
        # One timestep for a clip also for TI2V-5B, which takes one for each token: without a first frame to keep they
        # are all equal, and broadcasting one saves 6 vectors of the model's width for each token.
        x, timestep = x.to(weight.device, weight.dtype), (sigma.to(weight.device, torch.float32) * 1000)
        # Attention kernels on CUDA are fastest without a mask and the text is 1 % of the work there; blocks recomputed
        # by gradient checkpointing would not see the mask. A pass without gradients takes the same way, so that a
        # reference differs from the model by the adapter alone and not by rounding.
        # Compiled blocks would be compiled anew for every mask.
        fixed = transformer.gradient_checkpointing or is_compiled(transformer)
        if weight.device.type in ("cuda", "meta") or fixed:
            padded = pad_text(rows, TEXT_LENGTH)
            return transformer(x, timestep, padded, return_dict=False)[0].float()
        short, bias = collapse_padding(rows, TEXT_LENGTH)
        with cross_attention_bias(transformer, bias):
            return transformer(x, timestep, short, return_dict=False)[0].float()

    @contextmanager
    def flow(
        self, text: Sequence[Tensor], negative: Tensor, settings: SampleSettings, adjust: Adjust | None = None
    ) -> Iterator[Flow]:
        """The sampler of clips of these texts; two experts take turns at the boundary, both with their own guidance."""
        experts = self._experts
        if experts is None and settings.guidance_2 is not None:
            raise ConfigError(f"guidance_2 ({settings.guidance_2}) needs a model with two experts; leave it out")
        low = settings.guidance if settings.guidance_2 is None else settings.guidance_2

        def guidance(sigma: float) -> float:
            return low if experts is not None and experts.at(sigma) == "low" else settings.guidance

        with nullcontext(lambda _: self.transformer) if experts is None else experts.switching(self.transformer) as at:

            def predict(x: Tensor, sigma: float, rows: Sequence[Tensor]) -> Tensor:
                return self._predict(at(sigma), x, torch.full((len(x),), sigma), rows)

            yield Flow(predict, guidance, text, negative, settings, self.device, adjust)

    def _decode(self, raw: Tensor) -> Tensor:
        return self.vae.decode(raw, return_dict=False)[0]

    def lora_targets(self, kind: LoraTargets) -> list[str]:
        """Names of the linears a LoRA of this kind sits on (methods: official train.py for ``"spatialalign"``)."""
        return lora_targets(self.transformer, kind, "condition_embedder.text_embedder.", "blocks.")


def _published(index: dict[str, Any]) -> tuple[SampleSettings, float]:
    """Settings and frames per second that a model was published with, by what tells it from Wan 2.1."""
    if index.get("boundary_ratio") is not None:
        return A14B_SETTINGS, 16.0
    return (TI2V_5B_SETTINGS, 24.0) if index.get("expand_timesteps") else (SampleSettings(), 16.0)
