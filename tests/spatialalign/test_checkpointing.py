"""Activation checkpointing on a tiny Wan of the real class: same gradients, and what is computed how often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode

from spatialalign.backbones import checkpointing
from spatialalign.backbones.checkpointing import (
    HostCopy,
    disable_checkpointing,
    enable_checkpointing,
    is_attention,
    is_compiled,
)

BLOCKS = 3
ON_CPU = "aten::_scaled_dot_product_flash_attention_for_cpu"


@pytest.fixture(scope="module")
def built() -> Any:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=BLOCKS
    )
    return model.requires_grad_(False)


@pytest.fixture
def model(built: Any) -> Iterator[Any]:
    """A linear at the bottom is trained, so the backward pass goes through every attention but none is skipped."""
    built.patch_embedding.requires_grad_(True)
    yield built
    disable_checkpointing(built)
    assert not built.gradient_checkpointing


def gradient(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(1, 16, 2, 4, 4, generator=generator), torch.randn(1, 7, 16, generator=generator)
    model.zero_grad()
    model(x, torch.tensor([500.0]), text, return_dict=False)[0].square().mean().backward()
    found: Tensor = model.patch_embedding.weight.grad.clone()
    return found


class Counting(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["none", "full", "selective"])
@pytest.mark.parametrize("offload", [False, True])
def test_gradients_are_equal_to_the_bit(model: Any, kind: Any, offload: bool) -> None:
    expected = gradient(model)
    enable_checkpointing(model, kind, offload)
    assert torch.equal(gradient(model), expected)
    assert expected.abs().sum() > 0


@pytest.mark.parametrize(("kind", "calls"), [("none", 1), ("full", 2), ("selective", 1)])
def test_selective_computes_no_attention_twice(model: Any, kind: Any, calls: int) -> None:
    """Two attentions a block, in the forward pass and, with full checkpointing, once more in the backward pass."""
    enable_checkpointing(model, kind)
    with Counting() as counting:
        gradient(model)
    assert counting.names[ON_CPU] == 2 * BLOCKS * calls
    assert counting.names[f"{ON_CPU}_backward"] == 2 * BLOCKS


@pytest.mark.parametrize(("kind", "products"), [("none", 2), ("full", 4), ("selective", 3)])
def test_the_unfused_attention_keeps_its_output_and_not_its_softmax(model: Any, kind: Any, products: int) -> None:
    """An attention is two products; its backward pass four more, or two where the text needs no gradient. The first
    product is needed again for the softmax, which is never kept; the second, the output, is not."""
    with sdpa_kernel(SDPBackend.MATH):
        expected = gradient(model)
        enable_checkpointing(model, kind)
        with Counting() as counting:
            found = gradient(model)
    assert counting.names["aten::bmm"] == BLOCKS * (2 * products + 4 + 2)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("aten::_scaled_dot_product_flash_attention", True),
        ("aten::_scaled_dot_product_cudnn_attention", True),
        ("aten::_scaled_dot_product_efficient_attention", True),
        (ON_CPU, True),
        ("aten::_scaled_dot_product_fused_attention_overrideable", True),
        ("flash_attn::_flash_attn_forward", True),
        ("flash_attn_3::fwd", True),
        ("_diffusers_flash_attn_3::_flash_attn_forward", True),
        ("_flash_attn3_a1b2c3d::fwd", True),
        ("xformers_flash::flash_fwd", True),
        ("aten::_scaled_dot_product_flash_attention_backward", False),
        ("flash_attn::_flash_attn_backward", False),
        ("_flash_attn3_a1b2c3d::bwd", False),
        ("aten::bmm", False),
        ("aten::mm", False),
        ("aten::_softmax", False),
    ],
)
def test_attention_is_recognised_by_name(name: str, kept: bool) -> None:
    assert is_attention(SimpleNamespace(_schema=SimpleNamespace(name=name))) is kept


def test_every_fused_kernel_of_this_torch_is_known() -> None:
    """What SDPA can dispatch to, by torch's own list: a kernel of a new release must not go unnoticed."""
    found = {
        name.partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("aten::_scaled_dot_product") and "backward" not in name
    }
    composite = {"aten::_scaled_dot_product_attention_math"}  # falls apart into products before a policy sees it
    assert found - composite - checkpointing.SDPA_OPS == set()
    assert ON_CPU in found


def test_an_op_of_an_attention_package_is_kept(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As flash-attention 3 comes: an operator of its own namespace with its own backward pass."""
    forward, _backward = _own_attention()
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda query, key, value, **_options: forward(query, key, value)[0],
    )
    expected = gradient(model)
    for kind, calls in (("full", 2), ("selective", 1)):
        enable_checkpointing(model, kind)  # type: ignore[arg-type]
        with Counting() as counting:
            assert torch.equal(gradient(model), expected)
        assert counting.names["spatialalign_test_flash_attn::fwd"] == 2 * BLOCKS * calls


def _own_attention() -> tuple[Any, Any]:
    @torch.library.custom_op("spatialalign_test_flash_attn::fwd", mutates_args=())
    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1)
        return weights @ v, weights

    @torch.library.custom_op("spatialalign_test_flash_attn::bwd", mutates_args=())
    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inner = grad @ v.transpose(-1, -2)
        inner = weights * (inner - (inner * weights).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
        return inner @ k, inner.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ grad

    def save(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs, output[1])

    forward.register_autograd(lambda ctx, grad, _: backward(grad, *ctx.saved_tensors), setup_context=save)
    return forward, backward


def test_block_inputs_wait_on_the_host(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One copy to the host a block, of its input ``(1, 8 tokens, 24)`` and of nothing else, and one back."""
    copies, restored = [], []
    plain_init, plain_restore = HostCopy.__init__, HostCopy.restore

    def init(self: HostCopy, tensor: Tensor) -> None:
        copies.append(tuple(tensor.shape))
        plain_init(self, tensor)

    def restore(self: HostCopy) -> Tensor:
        restored.append(self)
        return plain_restore(self)

    monkeypatch.setattr(HostCopy, "__init__", init)
    monkeypatch.setattr(HostCopy, "restore", restore)
    for kind in ("full", "selective"):
        enable_checkpointing(model, kind, offload_inputs=True)  # type: ignore[arg-type]
        gradient(model)
    assert copies == [(1, 8, 24)] * (2 * BLOCKS)
    assert len(restored) == 2 * BLOCKS


def test_a_host_copy_comes_back_as_it_went() -> None:
    tensor = torch.randn(3, 4).t()
    copy = HostCopy(tensor)
    assert torch.equal(copy.restore(), tensor)
    assert copy.restore().data_ptr() != copy.restore().data_ptr()
    meta = HostCopy(torch.empty(3, 4, dtype=torch.bfloat16, device="meta")).restore()
    assert (meta.shape, meta.dtype, meta.device.type) == ((3, 4), torch.bfloat16, "meta")


@pytest.mark.parametrize(("kind", "calls"), [("none", 1), ("full", 2), ("selective", 1)])
def test_compiled_blocks(model: Any, kind: Any, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled too, selective checkpointing sees the attention inside a block. aot_eager: the graphs without C++."""
    monkeypatch.setattr(checkpointing, "COMPILE_BACKEND", "aot_eager")
    expected = gradient(model)
    enable_checkpointing(model, kind, compile_blocks=True)
    assert is_compiled(model)
    gradient(model)
    with profile() as profiled:
        found = gradient(model)
    counts = {event.key: event.count for event in profiled.key_averages()}
    assert counts[ON_CPU] == 2 * BLOCKS * calls
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    disable_checkpointing(model)
    assert not is_compiled(model)
    assert torch.equal(gradient(model), expected)
