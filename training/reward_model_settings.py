"""Settings of the training of a VideoReward network."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from spatialalign.errors import ConfigError
from training.config import require

RewardLoss = Literal["btt", "bt", "regression", "bt-ratings", "bt-constant", "bt-scaled"]


@dataclass(frozen=True)
class RewardModelSettings:
    """Everything the weights of a VideoReward network depend on, besides base model, instruction and pairs.

    Defaults are the paper's (methods: 2.4). The string below a field is its help on the command line.
    """

    loss: RewardLoss = "btt"
    """btt: Bradley-Terry with ties; bt: without; regression of the ratings; bt-ratings, bt-constant: bt with a margin;
    bt-scaled: bt times the difference of the ratings."""
    theta: float = 5.0
    """Tie parameter of btt; at equal scores a tie has the probability (theta - 1) / (theta + 1)."""
    margin: float = 0.57
    """Margin of bt-constant."""
    tokens: Literal["special", "last"] = "special"
    """Read the scores at a token of each dimension, or all at the last token."""
    outputs: int = 1
    """Rows of the head: 1, shared by the three dimensions, or 3, one for each; last needs 3."""
    vision: Literal["full", "merger", "frozen"] = "full"
    """What of the vision tower is trained."""
    rank: int = 64
    """Rank of the LoRA on the language model."""
    alpha: float = 128.0
    """Its scale: alpha / rank."""
    dropout: float = 0.0
    """Its dropout."""
    fps: float = 2.0
    """Frames a second that the network sees."""
    frames: int | None = None
    """Number of frames that it sees whatever a clip's length; null to go by fps."""
    max_pixels: int = 448 * 448
    """Area of a frame as it sees it, at most."""
    max_length: int = 6144
    """Tokens of clip and text together, at most; longer ones are left out."""
    epochs: float = 2.0
    """How often every pair is seen."""
    steps: int | None = None
    """Optimiser steps, instead of epochs."""
    batch_pairs: int = 32
    """Pairs per optimiser step."""
    micro_pairs: int = 1
    """Pairs in memory at once; batch_pairs must be a multiple."""
    lr: float = 2e-6
    """Learning rate of Adam: of the LoRA, and of what has no other below."""
    vision_lr: float | None = None
    """Learning rate of the vision tower; null for lr."""
    token_lr: float | None = None
    """Learning rate of the embeddings of the three new tokens; null for lr."""
    head_lr: float | None = None
    """Learning rate of the head; null for lr."""
    warmup: float = 0.05
    """Share of the steps with linear warm-up; the rate is constant after it."""
    weight_decay: float = 0.0
    """Weight decay of AdamW; 0 makes it Adam."""
    max_grad_norm: float = 1.0
    """Gradient clipping."""
    checkpointing: bool = False
    """Keep the inputs of layers alone and compute the rest again: less memory, more time."""
    seed: int = 0
    """Seed of new weights, of the order of the pairs, of dropout, and of the held-out prompts."""
    held_out: float = 0.05
    """Share of the prompts that is kept out of training and only watched, unless validation pairs are given."""
    held_out_every: int = 200
    """Steps between two looks at them."""
    checkpoint_every: int = 200
    """Steps between two checkpoints."""
    keep_checkpoints: int = 1
    """How many of the newest checkpoints are kept; 0: all."""
    max_bad_steps: int = 5
    """Steps in a row that may be skipped, as not finite or without a pair of use, before training stops."""
    cache_mb: int = 512
    """Prepared clips are kept in so much memory."""

    def __post_init__(self) -> None:
        above = "rank alpha fps max_pixels max_length epochs batch_pairs micro_pairs lr max_grad_norm".split()
        for name in (*above, "held_out_every", "checkpoint_every", "max_bad_steps"):
            require(0 < getattr(self, name) < math.inf, name, "above 0 and finite", getattr(self, name))
        for name in ("weight_decay", "margin", "seed", "keep_checkpoints", "cache_mb"):
            require(0 <= getattr(self, name) < math.inf, name, "0 or more and finite", getattr(self, name))
        for name in ("steps", "vision_lr", "token_lr", "head_lr"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, name, "null, or above 0 and finite", value)
        for name in ("dropout", "held_out", "warmup"):
            require(0 <= getattr(self, name) < 1, name, "in [0, 1)", getattr(self, name))
        require(1 < self.theta < math.inf, "theta", "above 1 and finite", self.theta)
        require(self.outputs in (1, 3), "outputs", "1 or 3", self.outputs)
        require(self.frames is None or self.frames > 1, "frames", "null or at least 2", self.frames)
        if self.tokens == "last" and self.outputs == 1:
            raise ConfigError("tokens last with outputs 1 gives one number for three dimensions; set outputs to 3")
        if self.batch_pairs % self.micro_pairs:
            raise ConfigError(
                f"batch_pairs ({self.batch_pairs}) must be a multiple of micro_pairs ({self.micro_pairs})"
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return dataclasses.asdict(self)

    def total_steps(self, pairs: int) -> int:
        """Optimiser steps of a training on so many pairs."""
        return self.steps or max(1, math.floor(self.epochs * pairs / self.batch_pairs))

    def rate(self, step: int, total: int) -> float:
        """Factor of the learning rates at optimiser step ``step`` (from 0) of ``total``."""
        return min(1.0, (step + 1) / max(1.0, self.warmup * total))
