"""A frozen base model kept in 8 bits: half the memory of bfloat16 weights, computed in the model's own precision.

Storage only: every use turns a layer's weights back, so this saves memory and costs a little time. A trained adapter
sees a base rounded to 8 bits (e4m3, one scale for each output row), and so does its reference.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checkpointing import repeated_blocks

BaseDtype = Literal["model", "fp8"]

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


class Fp8Linear(nn.Module):
    """A frozen linear whose weights ``(out, in)`` are stored as e4m3 with one float32 scale a row."""

    weight8: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        """Round the weights of ``linear``; its bias is kept as it is."""
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / _LARGEST
        self.register_buffer("weight8", (weight / scale).to(torch.float8_e4m3fn))
        self.register_buffer("scale", scale)
        self.bias = linear.bias
        self.dtype = linear.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., in)`` to ``(..., out)``."""
        return _Fp8Product.apply(x, self.weight8, self.scale, self.bias)

    def to_linear(self) -> nn.Linear:
        """An ordinary frozen linear with the rounded weights."""
        rounded = dequantised(self.weight8, self.scale, self.dtype)
        linear = nn.Linear(rounded.shape[1], rounded.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(rounded, requires_grad=False)
        linear.bias = self.bias
        return linear


def dequantised(weight8: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights that are computed with."""
    return (weight8.float() * scale).to(dtype)


class _Fp8Product(torch.autograd.Function):
    """A linear that turns its weights back in both directions: no full-size copy waits for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight8: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight8, scale)
        return F.linear(x, dequantised(weight8, scale, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        weight8, scale = ctx.saved_tensors
        return grads[0] @ dequantised(weight8, scale, grads[0].dtype), None, None, None


def store_in_fp8(transformer: nn.Module) -> int:
    """Store every frozen linear inside the transformer's blocks in 8 bits; returns the bytes saved.

    Adapters must be on already: they are left alone, as is everything outside the blocks.
    """
    saved = 0
    for parent, name, linear in _linears(transformer, nn.Linear):
        if not linear.weight.requires_grad:
            stored = Fp8Linear(linear)
            saved += linear.weight.nbytes - stored.weight8.nbytes - stored.scale.nbytes
            setattr(parent, name, stored)
    return saved


def restore_linears(transformer: nn.Module) -> None:
    """Put ordinary linears back, with the rounded weights; nothing happens where there are none."""
    for parent, name, stored in _linears(transformer, Fp8Linear):
        setattr(parent, name, stored.to_linear())


def _linears(transformer: nn.Module, kind: type[Any]) -> list[tuple[nn.Module, str, Any]]:
    return [
        (parent, name, child)
        for block in repeated_blocks(transformer)
        for parent in block.modules()
        for name, child in parent.named_children()
        if isinstance(child, kind)
    ]
