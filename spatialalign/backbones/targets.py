"""Which linears of a transformer a LoRA sits on."""

from __future__ import annotations

import torch

from ..errors import ConfigError
from .base import LoraTargets

_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


def lora_targets(transformer: torch.nn.Module, kind: LoraTargets, text: str, blocks: str) -> list[str]:
    """Names of the linears a LoRA of this kind sits on (methods: official train.py for ``"spatialalign"``).

    Args:
        transformer: of diffusers, with self-attention ``attn1`` and cross-attention ``attn2`` in its blocks.
        kind: which of them.
        text: what the names of the text embedding's linears begin with.
        blocks: what those of the blocks begin with.

    Raises:
        ConfigError: no such kind.
    """
    linears = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    embedding = [name for name in linears if name.startswith(text)]
    cross = [name for name in linears if name.endswith((".attn2.to_k", ".attn2.to_v"))]
    if kind == "spatialalign":
        return embedding + cross
    if kind == "cross-kv":
        return cross
    if kind == "attention":
        ends = tuple(f".{attention}.{part}" for attention in ("attn1", "attn2") for part in _PROJECTIONS)
        return [name for name in linears if name.endswith(ends)]
    if kind == "all-linear":
        return embedding + [name for name in linears if name.startswith(blocks)]
    known = "'spatialalign', 'cross-kv', 'attention' or 'all-linear'"
    raise ConfigError(f"LoRA targets must be {known}, found {kind!r}")
