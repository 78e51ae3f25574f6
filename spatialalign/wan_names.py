"""Weights of Wan 2.1 models from diffusers' names to the original ones, which ComfyUI's own classes have.

Only names change; shapes and values stay. Text-to-video transformers and the Wan 2.1 video autoencoder are covered.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from .errors import ModelError
from .wan_modules import original_name

if TYPE_CHECKING:
    from torch import Tensor

_NORMS_IN_BLOCK = {
    "attn1.norm_q": "self_attn.norm_q",
    "attn1.norm_k": "self_attn.norm_k",
    "attn2.norm_q": "cross_attn.norm_q",
    "attn2.norm_k": "cross_attn.norm_k",
    "norm2": "norm3",
}
_VAE_TOP = {"quant_conv": "conv1", "post_quant_conv": "conv2"}
_VAE_HALF = {
    "conv_in": "conv1",
    "norm_out": "head.0",
    "conv_out": "head.2",
    "mid_block.resnets.0": "middle.0",
    "mid_block.attentions.0": "middle.1",
    "mid_block.resnets.1": "middle.2",
}
_VAE_IN_BLOCK = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
_STAGE = 4
"""Layers of one stage of the decoder, three residual blocks and an upsampler, which the original numbers in one row."""


def transformer_to_original(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a diffusers ``WanTransformer3DModel`` (text-to-video) in original names.

    Raises:
        ModelError: a key that such a model does not have.
    """
    return {_transformer_key(key): tensor for key, tensor in tensors.items()}


def _transformer_key(key: str) -> str:
    if key == "scale_shift_table":
        return "head.modulation"
    module, _, parameter = key.rpartition(".")
    if parameter == "scale_shift_table":
        return f"{module}.modulation"
    name = original_name(module)
    block = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
    if name is None and block is not None and block[2] in _NORMS_IN_BLOCK:
        name = f"blocks.{block[1]}.{_NORMS_IN_BLOCK[block[2]]}"
    if name is None:
        raise ModelError(f"{key} is no weight of a Wan 2.1 text-to-video transformer in diffusers' names")
    return f"{name}.{parameter}"


def vae_to_original(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a diffusers ``AutoencoderKLWan`` (Wan 2.1, two residual blocks a stage) in original names.

    Raises:
        ModelError: a key that such an autoencoder does not have.
    """
    return {_vae_key(key): tensor for key, tensor in tensors.items()}


def _vae_key(key: str) -> str:
    module, _, parameter = key.rpartition(".")
    if module in _VAE_TOP:
        return f"{_VAE_TOP[module]}.{parameter}"
    half, _, inner = module.partition(".")
    layer, rest = _vae_layer(inner)
    if half not in ("encoder", "decoder") or not layer:
        raise ModelError(f"{key} is no weight of a Wan 2.1 video autoencoder in diffusers' names")
    return ".".join(part for part in (half, layer, _VAE_IN_BLOCK.get(rest, rest), parameter) if part)


def _vae_layer(inner: str) -> tuple[str, str]:
    """The original name of the layer a module of one half is in ("" for none), and the module's name inside it."""
    if inner in _VAE_HALF:
        return _VAE_HALF[inner], ""
    if middle := re.fullmatch(r"(mid_block\.\w+\.\d)\.(.+)", inner):
        return _VAE_HALF.get(middle[1], ""), middle[2]
    if down := re.fullmatch(r"down_blocks\.(\d+)\.(.+)", inner):
        return f"downsamples.{down[1]}", down[2]
    if up := re.fullmatch(r"up_blocks\.(\d+)\.resnets\.([012])\.(.+)", inner):
        return f"upsamples.{_STAGE * int(up[1]) + int(up[2])}", up[3]
    if up := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.(.+)", inner):
        return f"upsamples.{_STAGE * int(up[1]) + _STAGE - 1}", up[2]
    return "", ""
