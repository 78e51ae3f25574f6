"""Names of whole models. That they are all the original's is tried on ComfyUI's classes in tests/host."""

from __future__ import annotations

from pathlib import Path

import pytest

from spatialalign.errors import ModelError
from spatialalign.wan_names import transformer_to_original, vae_to_original


@pytest.mark.parametrize(
    ("diffusers", "original"),
    [
        ("scale_shift_table", "head.modulation"),
        ("proj_out.bias", "head.head.bias"),
        ("patch_embedding.weight", "patch_embedding.weight"),
        ("condition_embedder.time_proj.weight", "time_projection.1.weight"),
        ("blocks.12.scale_shift_table", "blocks.12.modulation"),
        ("blocks.12.norm2.weight", "blocks.12.norm3.weight"),
        ("blocks.12.attn1.norm_q.weight", "blocks.12.self_attn.norm_q.weight"),
        ("blocks.12.attn2.to_out.0.bias", "blocks.12.cross_attn.o.bias"),
    ],
)
def test_transformer(diffusers: str, original: str) -> None:
    assert transformer_to_original({diffusers: 1}) == {original: 1}  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("diffusers", "original"),
    [
        ("quant_conv.weight", "conv1.weight"),
        ("post_quant_conv.bias", "conv2.bias"),
        ("encoder.conv_in.weight", "encoder.conv1.weight"),
        ("decoder.norm_out.gamma", "decoder.head.0.gamma"),
        ("decoder.conv_out.weight", "decoder.head.2.weight"),
        ("encoder.mid_block.resnets.1.conv2.weight", "encoder.middle.2.residual.6.weight"),
        ("encoder.mid_block.attentions.0.to_qkv.weight", "encoder.middle.1.to_qkv.weight"),
        ("encoder.down_blocks.3.conv_shortcut.weight", "encoder.downsamples.3.shortcut.weight"),
        ("encoder.down_blocks.5.time_conv.bias", "encoder.downsamples.5.time_conv.bias"),
        ("decoder.up_blocks.1.resnets.2.norm1.gamma", "decoder.upsamples.6.residual.0.gamma"),
        ("decoder.up_blocks.2.upsamplers.0.resample.1.bias", "decoder.upsamples.11.resample.1.bias"),
    ],
)
def test_autoencoder(diffusers: str, original: str) -> None:
    assert vae_to_original({diffusers: 1}) == {original: 1}  # type: ignore[dict-item]


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_no_weight_of_the_miniature_is_lost(miniature_weights: Path, part: str) -> None:
    from safetensors.torch import load_file

    convert = {"transformer": transformer_to_original, "vae": vae_to_original}[part]
    shipped = load_file(miniature_weights / "wan" / part / "diffusion_pytorch_model.safetensors")
    renamed = convert(shipped)
    assert len(renamed) == len(shipped)
    assert {id(value) for value in renamed.values()} == {id(value) for value in shipped.values()}
    text = " ".join(renamed)
    assert not any(word in text for word in ("attn1", "attn2", "norm2", "scale_shift", "resnets", "_block", "conv_in"))


@pytest.mark.parametrize(
    "key", ["blocks.0.attn2.add_k_proj_norm.weight", "blocks.0.norm9.weight", "decoder", "x.weight"]
)
def test_strange_transformer_keys_are_refused(key: str) -> None:
    with pytest.raises(ModelError, match=key):
        transformer_to_original({key: 1})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "key",
    ["decoder.up_blocks.0.resnets.3.conv1.weight", "middle.conv_in.weight", "encoder.mid_block.attentions.1.x.y", "b"],
)
def test_strange_autoencoder_keys_are_refused(key: str) -> None:
    with pytest.raises(ModelError, match=key):
        vae_to_original({key: 1})  # type: ignore[dict-item]
