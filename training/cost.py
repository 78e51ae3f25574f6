"""What a training pair costs, by formula: operations and peak memory of a transformer, before anything is run.

Operations are exact but for norms and the LoRA itself (2 for a multiplication and addition; the four products of the
attention's backward pass that are needed). Memory is fitted to what ``benchmarks.dpo_cost`` counts for Wan2.1-T2V-1.3B
at 32,760 tokens; at other shapes it is an estimate. A CUDA context and an allocator's waste come on top.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from training.config import TrainSettings

_KEPT = {"full": 1.0, "selective": 3.0, "none": 23.2}
"""Activations kept until the backward pass, a block and clip, in units of its input: the input alone; it and the
outputs of both attentions; everything."""
_WORKING = 40.0
"""The working set of one block and clip in that unit, and of a batched pair below."""
_WORKING_BATCHED = 75.0
_FP8_SAVES = 0.5
"""Of the 16-bit bytes of the linears in the blocks, nearly all weights."""
_TOGETHER = 3
"""Blocks whose weights are put together at once where they are sharded: the one at work, the next, and its buffer."""


@dataclass(frozen=True)
class WanShape:
    """A Wan transformer, or LTX-Video's, which has the same products; and the clips it is trained on.

    Attributes:
        blocks: their number.
        width: channels of a token.
        hidden: width of the feed-forward layers.
        text_width: of the text embedding.
        patch: latent values that a token stands for.
        tokens: of a clip.
        text_tokens: of a text, padding included.
    """

    blocks: int
    width: int
    hidden: int
    text_width: int
    patch: int
    tokens: int
    text_tokens: int = 512

    @classmethod
    def of(cls, config: Mapping[str, Any], latents: Sequence[int]) -> WanShape:
        """From the transformer's ``config.json`` and the shape ``(c, f, h, w)`` of a clip's latents."""
        if "caption_channels" in config:
            return cls._of_ltx(config, latents)
        size = config["patch_size"]
        return cls(
            blocks=config["num_layers"],
            width=config["num_attention_heads"] * config["attention_head_dim"],
            hidden=config["ffn_dim"],
            text_width=config["text_dim"],
            patch=config["in_channels"] * prod(size),
            tokens=prod(length // part for length, part in zip(latents[1:], size, strict=True)),
        )

    @classmethod
    def _of_ltx(cls, config: Mapping[str, Any], latents: Sequence[int]) -> WanShape:
        """The same for LTX-Video: its feed-forward layers are four times as wide, texts have at most 128 tokens."""
        size = (config["patch_size_t"], config["patch_size"], config["patch_size"])
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return cls(
            blocks=config["num_layers"],
            width=width,
            hidden=4 * width,
            text_width=config["caption_channels"],
            patch=config["in_channels"],
            tokens=prod(length // part for length, part in zip(latents[1:], size, strict=True)),
            text_tokens=128,
        )

    @property
    def block(self) -> int:
        """Weights of a block, without biases and norms."""
        return 8 * self.width * self.width + 2 * self.width * self.hidden

    @property
    def around(self) -> int:
        """Weights around the blocks, likewise."""
        d = self.width
        return 7 * d * d + 256 * d + (self.text_width + d + 2 * self.patch) * d

    @property
    def parameters(self) -> int:
        """Weights of the transformer, without biases and norms (0.3 % at 1.3B)."""
        return self.blocks * self.block + self.around

    @property
    def attention(self) -> int:
        """Operations of both attentions' products in a forward pass of one clip."""
        return 4 * self.blocks * self.tokens * (self.tokens + self.text_tokens) * self.width

    @property
    def forward(self) -> int:
        """Operations of a forward pass of one clip."""
        d, n = self.width, self.tokens
        linears = n * (12 * d * d + 4 * d * self.hidden) + 4 * self.text_tokens * d * d
        ends = 4 * n * self.patch * d + 2 * self.text_tokens * (self.text_width + d) * d
        return self.attention + self.blocks * linears + ends

    @property
    def backward(self) -> int:
        """Operations of a backward pass of one clip to the first cross-attention, the base's weights being frozen."""
        d, n = self.width, self.tokens
        attention = 2 * self.attention - 8 * n * n * d
        linears = self.blocks * n * (12 * d * d + 4 * d * self.hidden) - 8 * n * d * d
        return attention + linears + 2 * n * self.patch * d


def pair_flops(shape: WanShape, settings: TrainSettings) -> int:
    """Operations of one training pair; kept predictions of the reference count as there already where they are used
    more than once (``reference_draws``)."""
    again = {"none": 0, "selective": shape.forward - shape.attention, "full": shape.forward}[settings.checkpointing]
    found = 2 * (shape.forward + shape.backward + again)
    if not (settings.reference_cache != "off" and settings.reference_draws):
        found += 2 * shape.forward
    return found + (shape.forward if settings.passes == "one-sample" else 0)


def pair_peak(shape: WanShape, settings: TrainSettings, batched: bool, bytes_each: int, processes: int = 1) -> float:
    """Bytes alive at once in each process while ``micro_pairs`` pairs are trained on.

    Args:
        shape: of model and clips.
        settings: of the training.
        batched: whether the passes of a pair are made at once.
        bytes_each: of a value, 2 or 4.
        processes: that share the weights where ``settings.shard``; else each holds all of them.
    """
    unit = shape.tokens * shape.width * bytes_each * settings.micro_pairs
    kept = _KEPT[settings.checkpointing] - (1.0 if settings.offload_inputs else 0.0)
    graphs = 1 if settings.passes == "one-sample" else 2
    weights = shape.parameters * (bytes_each if settings.base_dtype == "model" else bytes_each * _FP8_SAVES)
    if settings.shard:
        weights = weights / processes + (shape.around + _TOGETHER * shape.block) * bytes_each
    return weights + graphs * kept * shape.blocks * unit + (_WORKING_BATCHED if batched else _WORKING) * unit
