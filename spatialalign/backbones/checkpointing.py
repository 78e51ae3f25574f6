"""Activation checkpointing of a diffusers transformer: what its blocks keep for the backward pass.

``full`` keeps the input of each block and computes the block again in the backward pass; ``selective`` also keeps the
outputs of its attentions, whose second computation costs most at video lengths (at 32,760 tokens 71 % of a forward pass
of Wan 2.1 1.3B). Inputs can wait in host memory. Gradients are those of a pass that keeps everything.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Checkpointing = Literal["none", "full", "selective"]

SDPA_OPS = frozenset(
    f"aten::_scaled_dot_product_{kind}"
    for kind in (
        "flash_attention",
        "flash_attention_for_cpu",
        "cudnn_attention",
        "efficient_attention",
        "fused_attention_overrideable",
        "flash_attention_for_mps",
    )
) | {"aten::_scaled_dot_product_attention_math_for_mps"}
"""Every fused kernel that ``scaled_dot_product_attention`` picks from; its unfused way has a softmax instead."""

COMPILE_BACKEND = "inductor"

_PACKAGES = ("flash_attn", "flash-attn", "sage", "xformers", "aiter")
_PASSES = ("forward", "fwd")
_SOFTMAX = frozenset({"aten::_softmax", "aten::_safe_softmax"})
_PRODUCT = frozenset({"aten::bmm", "aten::baddbmm"})


def is_attention(op: Any) -> bool:
    """Whether a torch operator is a fused attention: one of SDPA's, or the forward op of an attention package.

    Packages (flash-attn 2, 3 and 4, their hub kernels, diffusers' wrappers of them) name their ops freely, hub kernels
    with a hash in the namespace, so a package is recognised by its name and its op by "fwd" or "forward".
    """
    name = str(op._schema.name).lower()
    namespace, _, function = name.partition("::")
    if namespace == "aten":
        return name in SDPA_OPS
    return any(package in name for package in _PACKAGES) and any(word in function for word in _PASSES)


class KeepAttention:
    """The policy of selective checkpointing for one block: keep what an attention returns, compute the rest again.

    Where SDPA falls back to separate operators (its "math" way), the product that follows a softmax is the attention's
    output; the softmax itself, ``n x n``, is never kept.
    """

    def __init__(self) -> None:
        """Start at the entry of a block."""
        self._after_softmax = False

    def __call__(self, _context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        """The policy for one operator, in the order in which they run."""
        name = op._schema.name
        if is_attention(op):
            return CheckpointPolicy.MUST_SAVE
        if name in _SOFTMAX:
            self._after_softmax = True
        elif self._after_softmax and name in _PRODUCT:
            self._after_softmax = False
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE


def selective_contexts() -> tuple[Any, Any]:
    """The pair of contexts that ``torch.utils.checkpoint.checkpoint`` asks of its ``context_fn``."""
    return create_selective_checkpoint_contexts(KeepAttention())


def checkpoint_function(
    kind: Literal["full", "selective"], offload_inputs: bool = False, compiled: bool = False
) -> Callable[..., Any]:
    """What ``enable_gradient_checkpointing`` takes: ``(block, hidden_states, *others) -> hidden_states``.

    Args:
        kind: what to keep.
        offload_inputs: keep a block's input ``(b, n, d)`` in host memory, pinned where the device is CUDA.
        compiled: compile the block together with its checkpoint, so that the policy sees inside (``selective`` only;
            a block compiled by itself is one opaque operator to it).
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        options["context_fn"] = selective_contexts
        if offload_inputs and "respect_saved_tensors_hooks" in inspect.signature(checkpoint).parameters:
            options["respect_saved_tensors_hooks"] = False  # block inputs go to the host, attention outputs stay

    def run(block: nn.Module, *args: Any) -> Any:
        return checkpoint(block.__call__, *args, **options)

    if compiled:
        return torch.compile(run, backend=COMPILE_BACKEND)
    if not offload_inputs:
        return run

    def run_offloaded(block: nn.Module, hidden: Tensor, *args: Any) -> Any:
        with offloaded(hidden):
            return run(block, hidden, *args)

    return run_offloaded


def offloaded(hidden: Tensor) -> AbstractContextManager[Any]:
    """Inside the ``with`` block, what autograd saves of ``hidden`` is kept in host memory; the rest is left alone."""

    form = hidden.untyped_storage()._cdata, hidden.shape  # not the tensor itself: the hooks live as long as the graph

    def pack(saved: Tensor) -> Tensor | HostCopy:
        return HostCopy(saved) if (saved.untyped_storage()._cdata, saved.shape) == form else saved

    def unpack(saved: Tensor | HostCopy) -> Tensor:
        return saved.restore() if isinstance(saved, HostCopy) else saved

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class HostCopy:
    """A tensor in host memory that can be brought back to where it was.

    On CUDA the copies are asynchronous, in the order of the current stream. A tensor on the meta device has no data, so
    only its form is remembered.
    """

    def __init__(self, tensor: Tensor) -> None:
        """Copy the tensor."""
        self._device = tensor.device
        self._form = (tensor.shape, tensor.dtype)
        self._data: Tensor | None = None
        if tensor.device.type != "meta":
            pinned = tensor.device.type == "cuda"
            self._data = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
            self._data.copy_(tensor, non_blocking=pinned)

    def restore(self) -> Tensor:
        """The tensor on its device again; always a copy of its own."""
        if self._data is None:
            return torch.empty(self._form[0], dtype=self._form[1], device=self._device)
        return self._data.to(self._device, non_blocking=self._data.is_pinned(), copy=True)


def enable_checkpointing(
    transformer: Any, kind: Checkpointing, offload_inputs: bool = False, compile_blocks: bool = False
) -> None:
    """Set a diffusers transformer up for training; ``kind`` "none" keeps everything.

    ``compile_blocks`` compiles each block with ``torch.compile``.
    """
    transformer.disable_gradient_checkpointing()
    compiled_checkpoint = compile_blocks and kind == "selective"
    if compile_blocks:
        # one graph for the first block (its input needs no gradient), the others, and each of them without gradients
        torch._dynamo.config.recompile_limit = max(16, torch._dynamo.config.recompile_limit)
        for block in repeated_blocks(transformer):
            block.compile(backend=COMPILE_BACKEND)
    if kind != "none":
        transformer.enable_gradient_checkpointing(checkpoint_function(kind, offload_inputs, compiled_checkpoint))


def disable_checkpointing(transformer: Any) -> None:
    """Undo :func:`enable_checkpointing`."""
    transformer.disable_gradient_checkpointing()
    stop_compiling(transformer)


def stop_compiling(transformer: nn.Module) -> None:
    """Run the blocks as they are written again."""
    for block in repeated_blocks(transformer):
        block._compiled_call_impl = None


def is_compiled(transformer: nn.Module) -> bool:
    """Whether the blocks are compiled."""
    return any(block._compiled_call_impl is not None for block in repeated_blocks(transformer)[:1])


def repeated_blocks(transformer: nn.Module) -> list[nn.Module]:
    """The transformer blocks, by the class names that a diffusers model lists as repeated."""
    names = set(getattr(transformer, "_repeated_blocks", None) or ())
    return [module for module in transformer.modules() if type(module).__name__ in names]
