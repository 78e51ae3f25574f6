"""What a LoRA file says of its model, from the sizes that the published models have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from spatialalign.lora import LoraPair, read_lora, write_pairs
from spatialalign.lora_architecture import guess_base

TEXT = "condition_embedder.text_embedder.linear_1"
LTX_TEXT = "caption_projection.linear_1"
"""4,096 values of the text encoder in, for all of them."""


def pairs(modules: list[str], text: str, width: int) -> dict[str, LoraPair]:
    """Attention layers of this width and the first layer of the text embedding, rank 1."""
    out = {module: LoraPair(torch.zeros(1, width), torch.zeros(width, 1)) for module in modules}
    return out | {text: LoraPair(torch.zeros(1, 4096), torch.zeros(width, 1))}


def wan(width: int) -> dict[str, LoraPair]:
    return pairs(["blocks.0.attn2.to_k", "blocks.0.attn2.to_v"], TEXT, width)


def ltx(width: int) -> dict[str, LoraPair]:
    return pairs(["transformer_blocks.0.attn2.to_k", "transformer_blocks.0.attn2.to_v"], LTX_TEXT, width)


@pytest.mark.parametrize(
    ("adapter", "notes", "base", "architecture", "repository"),
    [
        (wan(1536), {}, "Wan 1.3B", "wan-2_1-text2video-1_3b/lora", "Wan2.1"),
        (wan(5120), {}, "Wan 14B", "wan-2_1-text2video-14b/lora", "Wan2.1"),
        (wan(5120), {"expert": "low"}, "Wan 14B", "wan-2_2-text2video-14b/lora", "Wan2.2"),
        (wan(5120), {"base_model": "Wan2.2-T2V-A14B"}, "Wan 14B", "wan-2_2-text2video-14b/lora", "Wan2.2"),
        (wan(5120), {"base_model": "Wan2.1-T2V-14B"}, "Wan 14B", "wan-2_1-text2video-14b/lora", "Wan2.1"),
        (wan(3072), {}, "Wan 2.2 5B", "wan-2_2-ti2v-5b/lora", "Wan2.2"),
        (wan(128), {}, "the miniature", "wan2.1/lora", "Wan2.1"),
        (wan(12), {}, None, "wan2.1/lora", "Wan2.1"),
        (ltx(2048), {}, "LTX-Video 2B", "lightricks-ltx-video/lora", "LTX-Video"),
        (ltx(4096), {}, "LTX-Video 13B", "lightricks-ltx-video/lora", "LTX-Video"),
        (ltx(24), {}, None, "lightricks-ltx-video/lora", "LTX-Video"),
    ],
)
def test_the_model_is_told_by_its_sizes_and_notes(
    adapter: dict[str, LoraPair],
    notes: dict[str, Any],
    base: str | None,
    architecture: str,
    repository: str,
    tmp_path: Path,
) -> None:
    assert guess_base(adapter) == base
    comfy, diffusers = tmp_path / "c.safetensors", tmp_path / "d.safetensors"
    write_pairs(adapter, comfy, diffusers, notes)
    for path in (comfy, diffusers):
        metadata = read_lora(path)[1]
        assert metadata["modelspec.architecture"] == architecture
        assert metadata["modelspec.implementation"].endswith(repository)
