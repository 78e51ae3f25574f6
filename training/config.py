"""Settings of a preference training, its presets and the learning-rate schedule."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from spatialalign.errors import ConfigError

Preset = Literal["paper", "miniature"]
HARMLESS = frozenset({"checkpoint_every", "keep_checkpoints", "held_out_every", "tensorboard"})
"""Settings that may change between a run and its continuation, because no weight depends on them."""


def _require(holds: bool, name: str, expected: str, found: object) -> None:
    if not holds:
        raise ConfigError(f"{name} must be {expected}, found {found}")


@dataclass(frozen=True)
class TrainSettings:
    """Everything the weights of a trained LoRA depend on, besides model and pairs. The defaults are the paper's.

    Attributes:
        arm: "dpo", "dpo+zo" (the paper's, with the zeroth-order anchor), "dpo+sft", or "sft" (winners only, a control).
        seed: of the LoRA's initial values, the pairs, the noise and the noise levels.
        steps: optimiser steps.
        batch_pairs: pairs per optimiser step.
        micro_pairs: pairs in memory at once; batch_pairs is a multiple of it.
        rank: rank of the LoRA.
        alpha: the LoRA's alpha; its update is scaled by alpha / rank.
        targets: which linears carry the LoRA.
        beta: weight of the error differences in the margin; it means something only together with ``reduction``.
        clip: the margin is clipped to [-clip, clip]; None for no clipping.
        reduction: whether an error is the mean or the sum over a clip's latent elements.
        anchor_weight: weight of the zeroth-order anchor (arm dpo+zo).
        sft_weight: weight of the winner's flow-matching error (arms dpo+sft and sft).
        noise: whether winner and loser of a pair get independent noise (the paper) or share it (most other codes).
        shift: timestep shift of the schedule the noise levels are drawn from.
        lr: peak learning rate of AdamW.
        weight_decay: of AdamW.
        warmup_steps: linear warm-up; a cosine to 0 at ``steps`` follows.
        max_grad_norm: gradient clipping; None for none.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        held_out: share of the prompts that is kept out of training and only watched.
        held_out_pairs: pairs drawn from them, each with a fixed noise and noise level.
        held_out_every: steps between two evaluations on the held-out pairs.
        checkpoint_every: steps between two checkpoints.
        keep_checkpoints: how many of the newest are kept; 0 keeps all.
        tensorboard: write TensorBoard files beside the JSONL log, when it is installed.
    """

    arm: Literal["dpo", "dpo+sft", "dpo+zo", "sft"] = "dpo+zo"
    seed: int = 0
    steps: int = 3000
    batch_pairs: int = 48
    micro_pairs: int = 1
    rank: int = 16
    alpha: float = 16.0
    targets: Literal["spatialalign", "cross-kv", "all-linear"] = "spatialalign"
    beta: float = 1.0
    clip: float | None = 5.0
    reduction: Literal["mean", "sum"] = "mean"
    anchor_weight: float = 0.5
    sft_weight: float = 1.0
    noise: Literal["independent", "shared"] = "independent"
    shift: float = 5.0
    lr: float = 1e-4
    weight_decay: float = 0.01
    warmup_steps: int = 300
    max_grad_norm: float | None = None
    gradient_checkpointing: bool = True
    held_out: float = 0.1
    held_out_pairs: int = 32
    held_out_every: int = 100
    checkpoint_every: int = 100
    keep_checkpoints: int = 0
    tensorboard: bool = True

    def __post_init__(self) -> None:
        positive = (
            "steps batch_pairs micro_pairs rank alpha beta shift lr held_out_pairs held_out_every checkpoint_every"
        )
        for name in positive.split():
            _require(getattr(self, name) > 0, name, "above 0", getattr(self, name))
        for name in ("seed", "anchor_weight", "sft_weight", "weight_decay", "warmup_steps", "keep_checkpoints"):
            _require(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        _require(self.clip is None or self.clip > 0, "clip", "above 0, or none", self.clip)
        _require(self.max_grad_norm is None or self.max_grad_norm > 0, "max_grad_norm", "above 0", self.max_grad_norm)
        _require(0 <= self.held_out < 1, "held_out", "in [0, 1)", self.held_out)
        if self.batch_pairs % self.micro_pairs:
            raise ConfigError(
                f"batch_pairs ({self.batch_pairs}) must be a multiple of micro_pairs ({self.micro_pairs}); "
                "lower micro_pairs"
            )
        if self.warmup_steps >= self.steps:
            raise ConfigError(
                f"warmup_steps ({self.warmup_steps}) must be below steps ({self.steps}): the learning rate would "
                "never reach its peak"
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return dataclasses.asdict(self)

    def learning_rate(self, step: int) -> float:
        """Learning rate of optimiser step ``step`` (from 0): linear warm-up, cosine to 0, and 0 for ever after."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        done = min(1.0, (step - self.warmup_steps) / (self.steps - self.warmup_steps))
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))


PRESETS: dict[Preset, TrainSettings] = {
    "paper": TrainSettings(),
    "miniature": TrainSettings(
        arm="dpo+sft",
        steps=200,
        batch_pairs=16,
        micro_pairs=16,
        targets="all-linear",
        beta=50.0,
        sft_weight=10.0,
        noise="shared",
        shift=3.0,
        lr=5e-4,
        warmup_steps=20,
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        held_out_every=25,
        checkpoint_every=50,
        keep_checkpoints=2,
    ),
}


def fingerprint(identity: dict[str, Any]) -> str:
    """Sixteen hexadecimal digits of a JSON value."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def describe_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between the identity of a checkpoint and that of this run, harmless settings left out."""
    names = sorted((before.keys() | now.keys()) - HARMLESS)
    return [f"{name}: {before.get(name)!r} -> {now.get(name)!r}" for name in names if before.get(name) != now.get(name)]
