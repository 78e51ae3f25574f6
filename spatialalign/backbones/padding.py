"""Exact shortcut for zero-padded text in Wan's cross-attention.

Wan pads every text embedding with zero rows to 512 and attends to all of them without a mask, so the padding is part of
the model. All those rows are equal, and ``n`` equal keys in a softmax weigh as much as one key whose logit is raised by
``log n``. With short prompts the model therefore needs only the real rows and one zero row with that bias, which makes
the text side of a small model many times cheaper and changes the result by rounding alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def pad_text(text: Sequence[Tensor], length: int = 512) -> Tensor:
    """Stack embeddings ``(n_i, d)`` into ``(b, length, d)``, zero rows behind, as Wan's pipelines do."""
    out = text[0].new_zeros(len(text), length, text[0].shape[-1])
    for row, embedding in zip(out, text, strict=True):
        row[: min(len(embedding), length)] = embedding[:length]
    return out


def collapse_padding(text: Sequence[Tensor], length: int = 512) -> tuple[Tensor, Tensor]:
    """The same text in its short form.

    Returns embeddings ``(b, m, d)`` with ``m = min(max n_i + 1, length)`` and an additive attention bias ``(b, m)``: 0
    on real rows; on the zero rows of sample i, ``log((length - n_i) / (m - n_i))``, so that together they weigh as much
    as the ``length - n_i`` rows they stand for.
    """
    counts = [min(len(embedding), length) for embedding in text]
    short = min(max(counts) + 1, length)
    embeddings = pad_text(text, short)
    bias = embeddings.new_zeros(len(text), short, dtype=torch.float32)
    for row, count in zip(bias, counts, strict=True):
        if count < short:
            row[count:] = torch.log(torch.tensor((length - count) / (short - count)))
    return embeddings, bias


@contextmanager
def cross_attention_bias(transformer: nn.Module, bias: Tensor) -> Iterator[None]:
    """Add ``bias`` (b, m) to the cross-attention logits of a ``WanTransformer3DModel`` inside the ``with`` block.

    Blocks recomputed later by gradient checkpointing would miss the bias: use :func:`pad_text` there.
    """
    mask = bias[:, None, None, :]

    def add(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, text = args[0], args[1]
        return (hidden, text, mask.to(hidden.dtype), *args[3:])

    attentions: list[nn.Module] = [m for n, m in transformer.named_modules() if n.split(".")[-1] == "attn2"]
    hooks = [attention.register_forward_pre_hook(add) for attention in attentions]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
