"""The linears of a Wan transformer: diffusers' names and the original ones, which ComfyUI has."""

from __future__ import annotations

import re

_TO_ORIGINAL = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "condition_embedder.image_embedder.ff.net.0.proj": "img_emb.proj.1",
    "condition_embedder.image_embedder.ff.net.2": "img_emb.proj.3",
    "patch_embedding": "patch_embedding",
    "proj_out": "head.head",
}
_TO_ORIGINAL_IN_BLOCK = {
    "attn1.to_q": "self_attn.q",
    "attn1.to_k": "self_attn.k",
    "attn1.to_v": "self_attn.v",
    "attn1.to_out.0": "self_attn.o",
    "attn2.to_q": "cross_attn.q",
    "attn2.to_k": "cross_attn.k",
    "attn2.to_v": "cross_attn.v",
    "attn2.to_out.0": "cross_attn.o",
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
_TO_DIFFUSERS = {original: name for name, original in _TO_ORIGINAL.items()}
_TO_DIFFUSERS_IN_BLOCK = {original: name for name, original in _TO_ORIGINAL_IN_BLOCK.items()}


def original_name(module: str) -> str | None:
    """The original Wan (and ComfyUI) name of a diffusers module; None for a module without one."""
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
    if block is None:
        return _TO_ORIGINAL.get(module)
    inner = _TO_ORIGINAL_IN_BLOCK.get(block[2])
    return None if inner is None else f"blocks.{block[1]}.{inner}"


def diffusers_name(module: str) -> str | None:
    """The diffusers name of a module in original or in diffusers naming; None for an unknown one."""
    if original_name(module) is not None:
        return module
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
    if block is None:
        return _TO_DIFFUSERS.get(module)
    inner = _TO_DIFFUSERS_IN_BLOCK.get(block[2])
    return None if inner is None else f"blocks.{block[1]}.{inner}"


def wan_linears(blocks: int) -> list[str]:
    """The diffusers names of every linear that a Wan transformer with so many blocks can have, of any version."""
    inner = [f"blocks.{block}.{name}" for block in range(blocks) for name in _TO_ORIGINAL_IN_BLOCK]
    return [*(name for name in _TO_ORIGINAL if name != "patch_embedding"), *inner]
