"""Floating-point operations and live bytes of a program, without running it: for tensors on the meta device."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward


class Meter(TorchDispatchMode):
    """Counts what runs inside its ``with`` block.

    Operations are counted with torch's own formulas, two for each multiplication and addition, but for the backward
    pass of attention: there the four products that are needed (``8 b h n m d``) and not the fifth that a flash kernel
    computes again in every recipe. Bytes are those of storages that are alive at once; what an allocator adds is not
    seen.

    Attributes:
        flops: operations so far.
        live: bytes alive now.
        peak: most bytes alive at once so far.
    """

    def __init__(self, alive: Iterable[Tensor] = ()) -> None:
        """Begin with tensors that are alive already, such as weights."""
        super().__init__()
        self.flops = 0
        self.live = 0
        self.peak = 0
        self._seen: set[int] = set()
        for tensor in alive:
            self._see(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and count it."""
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet is _FLASH_BACKWARD:
            query, key = args[1], args[2]
            self.flops += 8 * prod(query.shape) * key.shape[-2]
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        identity = storage._cdata
        if identity in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(identity)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, identity, size)

    def _forget(self, identity: int, size: int) -> None:
        self._seen.discard(identity)
        self.live -= size


@contextmanager
def attention_in_one_operator() -> Iterator[None]:
    """Inside the ``with`` block torch's attention is the one operator of its flash kernel, as on a CUDA device.

    On the meta device it would fall apart into products and an ``n x n`` softmax, which no video fits into memory with.
    """

    def flash(query: Tensor, key: Tensor, value: Tensor, *_args: Any, **_options: Any) -> Tensor:
        out: Tensor = _FLASH(query, key, value)[0]
        return out

    with patch.object(F, "scaled_dot_product_attention", flash):
        yield
