"""A base stored in 8 bits: the gradients of the rounded weights, and half the memory of bfloat16 ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spatialalign.backbones.storage import Fp8Linear, dequantised, restore_linears, store_in_fp8


@pytest.fixture
def model() -> Any:
    """A tiny Wan with a LoRA on text embedding and cross-attention."""
    from diffusers import WanTransformer3DModel
    from peft import LoraConfig

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2
    ).requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, target_modules=["attn2.to_k", "attn2.to_v"], init_lora_weights=False))
    return model


def gradients(model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(1, 16, 2, 4, 4, generator=generator), torch.randn(1, 7, 16, generator=generator)
    model.zero_grad()
    model(x, torch.tensor([500.0]), text, return_dict=False)[0].square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def linears(model: nn.Module, kind: type) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kind) and "lora_" not in name]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_rounded_weights(model: Any, checkpointing: bool) -> None:
    """Restored, the model is an ordinary one with the same values: equal to the bit, and near the original."""
    exact, names = gradients(model), linears(model.blocks, nn.Linear)
    if checkpointing:
        model.enable_gradient_checkpointing()
    store_in_fp8(model)
    assert linears(model.blocks, Fp8Linear) == names
    stored = gradients(model)
    restore_linears(model)
    assert linears(model.blocks, nn.Linear) == names
    assert not linears(model, Fp8Linear)
    rounded = gradients(model)
    assert stored.keys() == exact.keys() == rounded.keys()
    for name, value in stored.items():
        assert torch.equal(value, rounded[name])
        assert not torch.equal(value, exact[name])
        assert (value - exact[name]).norm() < 0.3 * exact[name].norm()


def test_adapters_are_left_alone_and_still_switch(model: Any) -> None:
    before = {name: p.clone() for name, p in model.named_parameters() if "lora_" in name}
    store_in_fp8(model)
    after = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert before.keys() == after.keys()
    assert all(p.requires_grad and torch.equal(p, before[name]) for name, p in after.items())
    on = gradients(model)
    model.disable_adapters()
    x, text = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 7, 16)
    with torch.no_grad():
        off = model(x, torch.tensor([500.0]), text, return_dict=False)[0]
        model.enable_adapters()
        assert not torch.equal(model(x, torch.tensor([500.0]), text, return_dict=False)[0], off)
    assert on


def test_bytes_saved(model: Any) -> None:
    """A block of width 24: 8 attention linears 24 x 24 and two feed-forward ones 24 x 32, float32; each is stored in a
    byte a weight and 4 bytes a row."""
    weights, rows = 8 * 24 * 24 + 2 * 24 * 32, 8 * 24 + 32 + 24
    assert store_in_fp8(model) == 2 * (4 * weights - weights - 4 * rows)


def test_rounding_error_of_a_weight() -> None:
    """e4m3 has three bits after the leading one: a weight is off by at most 1/16 of itself, or, far below its row's
    largest one (448 units), by half the smallest step of 2^-9 units."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 32)
    with torch.no_grad():
        linear.weight[3] *= 1e-4  # rows of any size keep their precision
        linear.weight[5] = 0
    stored = Fp8Linear(linear)
    found = dequantised(stored.weight8, stored.scale, torch.float32)
    error = (found - linear.weight).abs()
    assert torch.all(error <= linear.weight.abs() / 16 * 1.0001 + stored.scale * 2**-10)
    assert torch.equal(found[5], torch.zeros(64))
    assert torch.equal(stored.to_linear().weight, found)
    assert stored.to_linear().bias is linear.bias
