"""Wan 2.1 text-to-video from a diffusers ``WanPipeline`` folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, DataError, ModelError
from ..files import read_json
from .base import LoraTargets, SampleSettings
from .checkpointing import is_compiled
from .flow import euler_step, guided, sampling_sigmas
from .latent_space import LatentSpace
from .padding import collapse_padding, cross_attention_bias, pad_text

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan, WanTransformer3DModel
    from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

TEXT_LENGTH = 512
"""Tokens of text context that every Wan model attends to, padding included."""

SETTINGS_FILE = "spatialalign.json"
"""Optional file in a model folder: ``fps`` and any of the fields of :class:`SampleSettings`."""

_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")

_PARTS = {
    "transformer": "WanTransformer3DModel",
    "vae": "AutoencoderKLWan",
    "text_encoder": "UMT5EncoderModel",
    "tokenizer": None,
}


class WanBackbone:
    """A Wan model behind :class:`~spatialalign.backbones.base.Backbone`.

    The VAE and the text encoder are loaded when first used, so a training run on cached latents and embeddings holds
    the transformer alone.
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
        """
        self.transformer = transformer.to(device).eval().requires_grad_(False)
        self._model_id = model_id
        self._load_vae = load_vae
        self._load_text = load_text
        self._vae_config = vae_config
        self._space = LatentSpace.from_config(vae_config)
        self._settings = settings or SampleSettings()
        self._fps = fps

    @classmethod
    def from_pretrained(
        cls, source: str | Path, device: str = "auto", dtype: str = "auto", model_id: str | None = None
    ) -> WanBackbone:
        """Load a diffusers ``WanPipeline`` folder or hub id; raises :class:`ModelError` naming what is missing."""
        source = str(source)
        where = pick_device(device)
        precision = pick_dtype(dtype, where)
        if Path(source).is_dir():
            _check_folder(Path(source))
        elif source.count("/") != 1 or source.startswith((".", "/", "~")):
            raise ModelError(
                f"{source} is neither a folder nor a hub id of the form owner/name; "
                "give a diffusers WanPipeline folder, a hub id, or 'miniature'"
            )
        from diffusers import AutoencoderKLWan, WanTransformer3DModel

        transformer = _load_part(
            source,
            "transformer",
            lambda: WanTransformer3DModel.from_pretrained(source, subfolder="transformer", torch_dtype=precision),
        )
        if transformer.config.image_dim is not None:
            raise ModelError(f"{source} is an image-to-video Wan model; a text-to-video one is needed")
        settings, fps = _read_settings(source)
        return cls(
            model_id or source,
            transformer,
            load_vae=lambda: _load_part(
                # the decoder is not stable below float32, and diffusers' own documentation keeps it there
                source,
                "vae",
                lambda: AutoencoderKLWan.from_pretrained(source, subfolder="vae", torch_dtype=torch.float32),
            ),
            load_text=lambda: _load_text(source, precision),
            vae_config=_load_part(source, "vae", lambda: dict(AutoencoderKLWan.load_config(source, subfolder="vae"))),
            settings=settings,
            fps=fps,
            device=where,
        )

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
        return self.transformer.patch_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision the transformer computes in (its norms and time embedding stay in float32)."""
        return self.transformer.patch_embedding.weight.dtype

    @property
    def latent_space(self) -> str:
        """``wan-vae:`` and a digest of the VAE's width and normalisation constants."""
        return self._space.name

    @cached_property
    def vae(self) -> AutoencoderKLWan:
        """The video VAE, loaded on first use."""
        return self._load_vae().to(self.device).eval().requires_grad_(False)

    @cached_property
    def _text(self) -> tuple[PreTrainedTokenizerBase, UMT5EncoderModel]:
        tokenizer, encoder = self._load_text()
        return tokenizer, encoder.to(self.device).eval().requires_grad_(False)

    def release_text_encoder(self) -> None:
        """Free the text encoder's memory; it is loaded again when next used."""
        self.__dict__.pop("_text", None)

    def default_settings(self) -> SampleSettings:
        """The settings of ``spatialalign.json`` in the model folder, else the paper's."""
        return self._settings

    def latent_shape(self, settings: SampleSettings) -> tuple[int, int, int, int]:
        """``(c, f, h, w)`` of one clip; raises :class:`ConfigError` when the size does not fit the patches."""
        time, space = self._vae_config.get("scale_factor_temporal", 4), self._vae_config.get("scale_factor_spatial", 8)
        step = space * self.transformer.config.patch_size[1]
        if settings.height % step or settings.width % step or (settings.frames - 1) % time:
            raise ConfigError(
                f"{settings.frames} frames of {settings.width}x{settings.height} do not fit {self.model_id}: "
                f"frames must be {time} k + 1, height and width multiples of {step}"
            )
        frames = (settings.frames - 1) // time + 1
        return self.transformer.config.in_channels, frames, settings.height // space, settings.width // space

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
        """
        rows = [row.to(self.device, self.dtype) for row in text]
        x, timestep = x.to(self.device, self.dtype), (sigma.to(self.device, torch.float32) * 1000)
        # Attention kernels on CUDA are fastest without a mask and the text is 1 % of the work there; blocks recomputed
        # by gradient checkpointing would not see the mask. A pass without gradients takes the same way, so that a
        # reference differs from the model by the adapter alone and not by rounding.
        # Compiled blocks would be compiled anew for every mask.
        fixed = self.transformer.gradient_checkpointing or is_compiled(self.transformer)
        if self.device.type in ("cuda", "meta") or fixed:
            padded = pad_text(rows, TEXT_LENGTH)
            return self.transformer(x, timestep, padded, return_dict=False)[0].float()
        short, bias = collapse_padding(rows, TEXT_LENGTH)
        with cross_attention_bias(self.transformer, bias):
            return self.transformer(x, timestep, short, return_dict=False)[0].float()

    def noise(self, seeds: Sequence[int], settings: SampleSettings) -> Tensor:
        """The Gaussian noise each seed starts from, ``(b, c, f, h, w)`` float32, the same on every device."""
        shape = self.latent_shape(settings)
        return torch.stack([torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds])

    @torch.no_grad()
    def sample(
        self,
        text: Sequence[Tensor],
        negative: Tensor,
        seeds: Sequence[int],
        settings: SampleSettings,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Generate clips with Euler steps on the shifted flow schedule.

        Each clip's noise comes from its own seed, so a clip does not depend on what else is in the batch (beyond the
        last bits of floating-point sums).

        Args:
            text: one trimmed embedding per clip.
            negative: embedding of the negative prompt, ``(n, text_dim)``; unused when guidance is 1.
            seeds: one per clip.
            settings: size, steps, guidance and shift.
            progress: called after each step with (steps done, steps in all).

        Returns:
            Normalised latents ``(b, c, f, h, w)``, float32 on the CPU.
        """
        if len(text) != len(seeds):
            raise ConfigError(f"one text per seed is needed, found {len(text)} texts and {len(seeds)} seeds")
        x = self.noise(seeds, settings).to(self.device)
        sigmas = sampling_sigmas(settings.steps, settings.shift).tolist()
        for step, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
            level = torch.full((len(seeds),), sigma)
            velocity = self.velocity(x, level, text)
            if settings.guidance > 1:
                without = self.velocity(x, level, [negative] * len(seeds))
                velocity = guided(velocity, without, settings.guidance)
            x = euler_step(x, velocity, sigma, following)
            if progress is not None:
                progress(step + 1, settings.steps)
        return x.cpu()

    @torch.no_grad()
    def decode(self, latents: Tensor, names: Sequence[str] | None = None) -> np.ndarray:
        """Decode normalised latents ``(b, c, f, h, w)`` to uint8 frames ``(b, T, H, W, 3)``.

        ``names`` (one per clip) are used in the :class:`DataError` raised when latents or frames are not finite.
        """
        labels = list(names) if names is not None else [f"clip {index} of the batch" for index in range(len(latents))]
        _require_finite(latents, labels, "latents")
        raw = self._space.denormalise(latents.to(self.device, torch.float32))
        video = self.vae.decode(raw, return_dict=False)[0]
        _require_finite(video, labels, "decoded frames")
        pixels = ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return np.ascontiguousarray(pixels.permute(0, 2, 3, 4, 1).cpu().numpy())

    @torch.no_grad()
    def encode(self, frames: np.ndarray) -> Tensor:
        """Encode uint8 frames ``(b, T, H, W, 3)``, ``T = 4 k + 1``, to normalised latents (the posterior's mode)."""
        if frames.dtype != np.uint8 or frames.ndim != 5 or frames.shape[-1] != 3:
            raise DataError(f"frames must be uint8 (b, T, H, W, 3), found {frames.dtype} {frames.shape}")
        video = torch.from_numpy(np.ascontiguousarray(frames)).to(self.device).permute(0, 4, 1, 2, 3)
        posterior = self.vae.encode(video.float() / 127.5 - 1).latent_dist
        return self._space.normalise(posterior.mode()).cpu()

    def lora_targets(self, kind: LoraTargets) -> list[str]:
        """Names of the linears a LoRA of this kind sits on (methods: official train.py for ``"spatialalign"``)."""
        linears = [name for name, module in self.transformer.named_modules() if isinstance(module, torch.nn.Linear)]
        text = [name for name in linears if name.startswith("condition_embedder.text_embedder.")]
        cross = [name for name in linears if name.endswith((".attn2.to_k", ".attn2.to_v"))]
        if kind == "spatialalign":
            return text + cross
        if kind == "cross-kv":
            return cross
        if kind == "attention":
            ends = tuple(f".{attention}.{part}" for attention in ("attn1", "attn2") for part in _PROJECTIONS)
            return [name for name in linears if name.endswith(ends)]
        if kind == "all-linear":
            return text + [name for name in linears if name.startswith("blocks.")]
        known = "'spatialalign', 'cross-kv', 'attention' or 'all-linear'"
        raise ConfigError(f"LoRA targets must be {known}, found {kind!r}")


def pick_device(device: str) -> str:
    """Resolve ``"auto"`` to CUDA, MPS or CPU, in this order of preference."""
    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def pick_dtype(dtype: str, device: str) -> torch.dtype:
    """Resolve a dtype name; ``"auto"`` is bfloat16 on CUDA and float32 elsewhere."""
    if dtype == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise ConfigError(f"dtype must be auto, {', '.join(known)}; found {dtype!r}")
    return known[dtype]


def _check_folder(folder: Path) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelError(f"{folder} has no model_index.json, so it is not a diffusers WanPipeline folder")
    entries = read_json(index)
    if entries.get("boundary_ratio") is not None:
        raise ModelError(f"{folder} is a two-expert Wan 2.2 model; a single-transformer Wan 2.1 one is needed")
    for part, expected in _PARTS.items():
        found = (entries.get(part) or [None, None])[1]
        if expected is not None and found != expected:
            raise ModelError(f"{index} names {found} as {part}, expected {expected}")
        files = list((folder / part).glob("*"))
        if not files:
            raise ModelError(f"{folder} lacks its part {part!r} (no files in {folder / part}); copy it there again")
        if part != "tokenizer":
            if not (folder / part / "config.json").is_file():
                raise ModelError(f"{folder / part} lacks config.json; copy the folder again")
            if not any(file.suffix in (".safetensors", ".bin") for file in files):
                raise ModelError(f"{folder / part} lacks weights (*.safetensors); copy the folder again")


def _load_part(source: str, part: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except ModelError:
        raise
    except Exception as error:  # the libraries raise many kinds, with messages that do not name the part
        raise ModelError(f"the part {part!r} of {source} cannot be loaded: {type(error).__name__}: {error}") from error


def _load_text(source: str, dtype: torch.dtype) -> tuple[PreTrainedTokenizerBase, UMT5EncoderModel]:
    from transformers import AutoTokenizer, UMT5EncoderModel

    tokenizer = _load_part(source, "tokenizer", lambda: AutoTokenizer.from_pretrained(source, subfolder="tokenizer"))
    encoder = _load_part(
        source, "text_encoder", lambda: UMT5EncoderModel.from_pretrained(source, subfolder="text_encoder", dtype=dtype)
    )
    return tokenizer, encoder


def _read_settings(source: str) -> tuple[SampleSettings, float]:
    path = Path(source) / SETTINGS_FILE
    if not path.is_file():
        return SampleSettings(), 16.0
    values = read_json(path)
    fps = float(values.pop("fps", 16.0))
    try:
        return SampleSettings(**values), fps
    except TypeError as error:
        known = ", ".join(["fps", *SampleSettings.__dataclass_fields__])
        raise ModelError(f"{path} holds an unknown key ({error}); known keys: {known}") from error


def _require_finite(values: Tensor, names: Sequence[str], what: str) -> None:
    for row, name in zip(values, names, strict=True):
        if not torch.isfinite(row).all():
            raise DataError(f"{name}: its {what} are not finite (NaN or infinite); generate it again")
