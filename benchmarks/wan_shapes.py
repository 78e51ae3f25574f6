"""Wan transformers of a given shape with random weights or none, and what they would be trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spatialalign.backbones.wan import TEXT_LENGTH, WanBackbone
from training.gradients import Side

WAN_1_3B = {
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "ffn_dim": 8960,
    "num_layers": 30,
    "text_dim": 4096,
    "freq_dim": 256,
}
"""Wan2.1-T2V-1.3B: 1.419 billion parameters."""


@dataclass(frozen=True)
class Shape:
    """A transformer and the clip it is given; the default is the paper's, 81 frames of 832 x 480, 32,760 tokens.

    Attributes:
        transformer: arguments of diffusers' ``WanTransformer3DModel``.
        latents: ``(c, f, h, w)`` of a clip.
    """

    transformer: dict[str, int]
    latents: tuple[int, int, int, int] = (16, 21, 60, 104)

    @property
    def tokens(self) -> int:
        """Length of the self-attention: patches of 1 x 2 x 2."""
        _, frames, height, width = self.latents
        return frames * (height // 2) * (width // 2)


FULL = Shape(WAN_1_3B)
MEAN_SIGMA = 0.748

TINY = Shape(
    {**WAN_1_3B, "num_attention_heads": 2, "attention_head_dim": 24, "ffn_dim": 64, "num_layers": 2, "text_dim": 16},
    (16, 2, 4, 4),
)
"""For tests of the benchmarks themselves."""


def build(shape: Shape, device: str, dtype: torch.dtype = torch.bfloat16) -> WanBackbone:
    """A frozen backbone with random weights (none on the meta device), in ``dtype`` but for what diffusers keeps in
    float32."""
    from diffusers import WanTransformer3DModel

    with torch.device(device):
        transformer: Any = WanTransformer3DModel(cross_attn_norm=True, **shape.transformer)
    kept = set(transformer._keep_in_fp32_modules)
    for name, parameter in transformer.named_parameters():
        if not kept & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return WanBackbone("random", transformer, _no_part, _no_part, {}, device=device)


def _no_part() -> Any:
    raise NotImplementedError("only the transformer is built")


def side(shape: Shape, device: str, pairs: int = 1, seed: int = 0, text_tokens: int = TEXT_LENGTH) -> Side:
    """One side of ``pairs`` pairs with random content, at the mean noise level of the paper's schedule."""
    generator = torch.Generator().manual_seed(seed)
    size, text = (pairs, *shape.latents), (text_tokens, shape.transformer["text_dim"])
    if device == "meta":
        noisy, target = (torch.empty(size, device=device) for _ in range(2))
        return Side(noisy, target, torch.empty(pairs, device=device), [torch.empty(text, device=device)] * pairs)
    noisy, target = (torch.randn(size, generator=generator).to(device) for _ in range(2))
    texts = [torch.randn(text, generator=generator) for _ in range(pairs)]
    return Side(noisy, target, torch.full((pairs,), MEAN_SIGMA), texts)


def tensors_of(*modules: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers."""
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
