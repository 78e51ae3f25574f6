"""The linears of the transformers a LoRA can be for: diffusers' names and the original ones, which ComfyUI has.

Wan's are in :mod:`.wan_modules`. LTX-Video's linears with a LoRA, those of its blocks and of its text embedding, have
one and the same name in both; none of them is the name of a Wan layer.
"""

from __future__ import annotations

import re

from . import wan_modules

_LTX = re.compile(
    r"caption_projection\.linear_[12]|"
    r"transformer_blocks\.\d+\.(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.(0\.proj|2))"
)
_LTX_IN_BLOCK = (
    *(f"attn{number}.to_{part}" for number in (1, 2) for part in ("q", "k", "v", "out.0")),
    "ff.net.0.proj",
    "ff.net.2",
)


def is_ltx(module: str) -> bool:
    """Whether a name is that of an LTX-Video linear."""
    return _LTX.fullmatch(module) is not None


def original_name(module: str) -> str | None:
    """The original (and ComfyUI) name of a diffusers module; None for a module without one."""
    return module if is_ltx(module) else wan_modules.original_name(module)


def diffusers_name(module: str) -> str | None:
    """The diffusers name of a module in original or in diffusers naming; None for an unknown one."""
    return module if is_ltx(module) else wan_modules.diffusers_name(module)


def linears(blocks: int) -> list[str]:
    """The diffusers names of every linear that a Wan or LTX-Video transformer with so many blocks can have."""
    inner = [f"transformer_blocks.{block}.{name}" for block in range(blocks) for name in _LTX_IN_BLOCK]
    return [*wan_modules.wan_linears(blocks), "caption_projection.linear_1", "caption_projection.linear_2", *inner]
