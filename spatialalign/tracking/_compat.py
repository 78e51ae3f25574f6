"""What groundingdino-py 0.4 expects of transformers and transformers 5 no longer has.

Its ``BertModelWarper`` copies three small methods off a ``BertModel``. They are put back on the class while a model is
being built, and taken off again: the wrapper keeps the bound methods it copied.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def get_extended_attention_mask(
    self: Any, attention_mask: torch.Tensor, input_shape: Any = None, device: Any = None, dtype: Any = None
) -> torch.Tensor:
    """A 0/1 mask (b, n) or (b, n, n) as additive bias (b, 1, 1 or n, n): 0 where seen, the lowest number elsewhere."""
    if attention_mask.dim() not in (2, 3):
        raise ValueError(f"attention mask must have the shape (b, n) or (b, n, n), found {tuple(attention_mask.shape)}")
    wide = attention_mask[:, None, None, :] if attention_mask.dim() == 2 else attention_mask[:, None, :, :]
    kind = dtype or next(self.parameters()).dtype
    return (1.0 - wide.to(kind)) * torch.finfo(kind).min


def invert_attention_mask(self: Any, encoder_attention_mask: torch.Tensor) -> torch.Tensor:
    """As :func:`get_extended_attention_mask`, for cross-attention (BERT as a decoder; Grounding DINO never asks)."""
    return get_extended_attention_mask(self, encoder_attention_mask)


def get_head_mask(self: Any, head_mask: torch.Tensor | None, num_hidden_layers: int) -> list[None]:
    """One None per layer: no head is masked. Masks are refused, since transformers 5 cannot apply them."""
    if head_mask is not None:
        raise ValueError("head masks are not supported by transformers 5; pass None")
    return [None] * num_hidden_layers


_METHODS = {
    "get_extended_attention_mask": get_extended_attention_mask,
    "invert_attention_mask": invert_attention_mask,
    "get_head_mask": get_head_mask,
}


@contextmanager
def bert_with_mask_helpers() -> Iterator[list[str]]:
    """Within the block ``BertModel`` has the three methods; yields the names that had to be added."""
    from transformers import BertModel

    added = [name for name in _METHODS if not hasattr(BertModel, name)]
    for name in added:
        setattr(BertModel, name, _METHODS[name])
    try:
        yield added
    finally:
        for name in added:
            delattr(BertModel, name)
