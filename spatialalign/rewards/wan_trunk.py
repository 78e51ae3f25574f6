"""The first blocks of a Wan transformer in plain torch: what a latent reward reads noisy clips with.

Parameters have the names of diffusers' ``WanTransformer3DModel`` and the tokens are the same, but nothing of diffusers
is needed: the trunk also runs inside ComfyUI. Text comes unpadded, see :mod:`..backbones.padding`. Norms, the time
embedding and the residual stream's modulation are computed in float32 whatever the weights' precision, as there.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..backbones.padding import collapse_padding
from ..errors import ModelError

TEXT_LENGTH = 512
"""Tokens of text that a Wan model attends to, zero padding included."""


@dataclass(frozen=True)
class TrunkConfig:
    """Sizes of a Wan text-to-video transformer, and how much of it is kept.

    Attributes:
        blocks: transformer blocks of the trunk, from the first on.
        depth: blocks of the whole transformer.
        heads, head_dim: attention; their product is the width.
        in_channels, text_dim: channels of the latents, and width of the text embeddings.
        freq_dim, ffn_dim: width of the sinusoidal time features, and inner width of the feed-forward part.
        patch: latent rows and columns of a token (a token has one latent frame in every Wan model).
        cross_attn_norm: whether a norm with weights stands before the cross-attention.
        eps: of the norms.
    """

    blocks: int
    depth: int
    heads: int
    head_dim: int
    in_channels: int
    text_dim: int
    freq_dim: int
    ffn_dim: int
    patch: tuple[int, int] = (2, 2)
    cross_attn_norm: bool = True
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if not 1 <= self.blocks <= self.depth:
            raise ModelError(f"a trunk has 1 to {self.depth} blocks (all of the transformer's), found {self.blocks}")

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any], blocks: int) -> TrunkConfig:
        """From the ``config.json`` of a ``WanTransformer3DModel``.

        Raises:
            ModelError: more blocks than it has, an image-to-video model, or tokens of several latent frames.
        """
        if config.get("added_kv_proj_dim") is not None or config.get("image_dim") is not None:
            raise ModelError("the trunk of a reward needs a text-to-video Wan transformer; this one is image-to-video")
        frames, *patch = config["patch_size"]
        if frames != 1:
            raise ModelError(f"the trunk of a reward needs tokens of one latent frame, found {frames}")
        return cls(
            blocks=blocks,
            depth=config["num_layers"],
            heads=config["num_attention_heads"],
            head_dim=config["attention_head_dim"],
            in_channels=config["in_channels"],
            text_dim=config["text_dim"],
            freq_dim=config["freq_dim"],
            ffn_dim=config["ffn_dim"],
            patch=(patch[0], patch[1]),
            cross_attn_norm=config["cross_attn_norm"],
            eps=config["eps"],
        )

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class EmbeddedText:
    """The texts of a batch as the blocks read them; see :meth:`WanTrunk.embed_text`.

    Attributes:
        rows: ``(b, m, width)``, real tokens and then padding.
        bias: ``(b, m)`` float32, what is added to the attention's logits.
        real: ``(b, m)`` bool, True for real tokens.
    """

    rows: Tensor
    bias: Tensor
    real: Tensor


@dataclass(frozen=True)
class Features:
    """What the trunk makes of a batch.

    Attributes:
        tokens: ``(b, f, h, w, width)``, tokens after the last block by latent frame, row and column of patches.
        time: ``(b, width)`` float32, the embedding of the noise level.
        text: the texts.
    """

    tokens: Tensor
    time: Tensor
    text: EmbeddedText


class WanTrunk(nn.Module):
    """Patch embedding, conditions, rotary positions and the first blocks of a Wan 2.1 or 2.2 transformer."""

    def __init__(self, config: TrunkConfig) -> None:
        """With random weights; :meth:`from_weights` and :meth:`from_transformer` copy a model's."""
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Conv3d(config.in_channels, config.width, (1, *config.patch), (1, *config.patch))
        self.condition_embedder = _Conditions(config)
        self.blocks = nn.ModuleList([_Block(config) for _ in range(config.blocks)])

    @classmethod
    def from_weights(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], blocks: int) -> WanTrunk:
        """From a diffusers transformer's configuration and state dict, of which a part is copied as float32.

        Raises:
            ModelError: the configuration does not allow it, or weights are missing or of another shape.
        """
        trunk = cls(TrunkConfig.from_diffusers(config, blocks))
        wanted = trunk.state_dict()
        missing = [
            name for name, weight in wanted.items() if name not in tensors or tensors[name].shape != weight.shape
        ]
        if missing:
            raise ModelError(
                f"the transformer lacks {missing[0]} (and {len(missing) - 1} more) in the shape its configuration "
                "says; take a LoRA off before, or load the model again"
            )
        trunk.load_state_dict({name: tensors[name].float() for name in wanted})
        return trunk

    @classmethod
    def from_transformer(cls, transformer: Any, blocks: int) -> WanTrunk:
        """From a loaded diffusers ``WanTransformer3DModel`` without adapters; on its device, float32, trainable."""
        trunk = cls.from_weights(transformer.config, transformer.state_dict(), blocks)
        return trunk.to(transformer.patch_embedding.weight.device)

    def embed_text(self, text: Sequence[Tensor]) -> EmbeddedText:
        """Bring trimmed text embeddings ``(n_i, text_dim)``, one per clip, to the width of the blocks.

        It does not depend on clips or noise levels: a sampler does it once. All rows go through the layer without
        padding, and one zero row stands for all of that.
        """
        weight = self.patch_embedding.weight
        trimmed = [row[:TEXT_LENGTH].to(weight.device, weight.dtype) for row in text]
        counts = [len(row) for row in trimmed]
        zero = weight.new_zeros(1, self.config.text_dim)
        *rows, padding = self.condition_embedder.text_embedder(torch.cat([*trimmed, zero])).split([*counts, 1])
        # the bias comes from the counts alone: narrow rows are enough to ask for it
        _, bias = collapse_padding([row.new_zeros(len(row), 1) for row in trimmed], TEXT_LENGTH)
        length = bias.shape[1]
        filled = [torch.cat([row, padding.expand(length - len(row), -1)]) for row in rows]
        places = torch.arange(length, device=weight.device)
        return EmbeddedText(torch.stack(filled), bias, places < torch.tensor(counts, device=weight.device)[:, None])

    def forward(self, x: Tensor, sigma: Tensor, text: EmbeddedText) -> Features:
        """Read clips ``x (b, c, f, h, w)`` at noise levels ``sigma (b,)`` in [0, 1]."""
        weight = self.patch_embedding.weight
        patches = self.patch_embedding(x.to(weight.device, weight.dtype))
        grid = patches.shape[2:]
        tokens = patches.flatten(2).transpose(1, 2)
        time, modulation = self.condition_embedder(sigma.to(weight.device, torch.float32))
        rotation = _rotation(grid, self.config.head_dim, weight.device)
        bias = text.bias[:, None, None, :].to(tokens.dtype)
        for block in self.blocks:
            tokens = block(tokens, text.rows, bias, modulation, rotation)
        return Features(tokens.unflatten(1, grid), time, text)


class _Conditions(nn.Module):
    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.freq_dim = config.freq_dim
        self.time_embedder = _TwoLinears(config.freq_dim, config.width, nn.SiLU())
        self.time_proj = nn.Linear(config.width, 6 * config.width)
        self.text_embedder = _TwoLinears(config.text_dim, config.width, nn.GELU("tanh"))

    def forward(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """The time embedding ``(b, width)`` and the blocks' modulation ``(b, 6, width)``, both float32."""
        half = self.freq_dim // 2
        rates = torch.exp(-math.log(10000.0) * torch.arange(half, device=sigma.device, dtype=torch.float32) / half)
        angles = 1000 * sigma[:, None] * rates
        first, second = self.time_embedder.linear_1, self.time_embedder.linear_2
        # these two in float32 always, as diffusers keeps them
        hidden = _float_linear(torch.cat([angles.cos(), angles.sin()], dim=-1), first)
        time = _float_linear(functional.silu(hidden), second)
        modulation = self.time_proj(functional.silu(time).to(self.time_proj.weight.dtype))
        return time, modulation.float().unflatten(1, (6, -1))


class _TwoLinears(nn.Module):
    def __init__(self, into: int, width: int, activation: nn.Module) -> None:
        super().__init__()
        self.linear_1, self.activation, self.linear_2 = nn.Linear(into, width), activation, nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(self.activation(self.linear_1(x)))
        return out


class _Block(nn.Module):
    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.attn1, self.attn2 = _Attention(config), _Attention(config)
        self.norm2 = nn.LayerNorm(config.width, config.eps) if config.cross_attn_norm else None
        self.ffn = _FeedForward(config.width, config.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, config.width) / config.width**0.5)

    def forward(self, x: Tensor, text: Tensor, bias: Tensor, modulation: Tensor, rotation: Tensor) -> Tensor:
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.scale_shift_table.float() + modulation).chunk(6, 1)
        normed = self._normed(x, 1 + scale, shift)
        x = (x.float() + self.attn1(normed, normed, rotation=rotation) * gate).type_as(x)
        asking = x
        if self.norm2 is not None:
            asking = self._normed(x, self.norm2.weight.float(), self.norm2.bias.float())
        x = x + self.attn2(asking, text, bias=bias)
        changed = self.ffn(self._normed(x, 1 + ffn_scale, ffn_shift))
        return (x.float() + changed.float() * ffn_gate).type_as(x)

    def _normed(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        normed = functional.layer_norm(x.float(), x.shape[-1:], eps=self.eps)
        return (normed * scale + shift).type_as(x)


class _Attention(nn.Module):
    def __init__(self, config: TrunkConfig) -> None:
        super().__init__()
        self.heads, width = config.heads, config.width
        self.to_q, self.to_k, self.to_v = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.to_out = nn.Sequential(nn.Linear(width, width))
        self.norm_q, self.norm_k = nn.RMSNorm(width, config.eps), nn.RMSNorm(width, config.eps)

    def forward(self, x: Tensor, context: Tensor, bias: Tensor | None = None, rotation: Tensor | None = None) -> Tensor:
        query, key = self._by_head(self.norm_q(self.to_q(x))), self._by_head(self.norm_k(self.to_k(context)))
        if rotation is not None:
            query, key = _rotate(query, rotation), _rotate(key, rotation)
        mixed = functional.scaled_dot_product_attention(query, key, self._by_head(self.to_v(context)), bias)
        out: Tensor = self.to_out(mixed.transpose(1, 2).flatten(2))
        return out

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class _FeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        first = nn.Sequential(OrderedDict(proj=nn.Linear(width, inner)))
        self.net = nn.Sequential(first, nn.GELU("tanh"), nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


def _float_linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return functional.linear(x, layer.weight.float(), layer.bias.float())


def _rotation(grid: Sequence[int], head_dim: int, device: torch.device) -> Tensor:
    """Cosines and sines of the rotary positions of ``f h w`` tokens, ``(2, n, head_dim / 2)`` float32.

    A third of the pairs of features, rounded in favour of time, turn with each of frame, row and column.
    """
    space = 2 * (head_dim // 6)
    # in float64 where there is one, as in Wan's code
    exact = torch.float32 if device.type == "mps" else torch.float64
    angles = []
    for axis, (size, width) in enumerate(zip(grid, (head_dim - 2 * space, space, space), strict=True)):
        rates = 10000.0 ** (-torch.arange(0, width, 2, device=device, dtype=exact) / width)
        turns = torch.arange(size, device=device, dtype=exact)[:, None] * rates
        shape = [1, 1, 1, -1]
        shape[axis] = size
        angles.append(turns.view(shape).expand(*grid, -1))
    full = torch.cat(angles, dim=-1).flatten(0, 2)
    return torch.stack([full.cos(), full.sin()]).float()


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn neighbouring pairs of features of ``x (b, heads, n, head_dim)``."""
    cos, sin = rotation
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)
