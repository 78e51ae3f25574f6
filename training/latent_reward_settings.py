"""Settings of the training of a latent reward."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from spatialalign.errors import ConfigError
from training.config import cosine_rate, require


@dataclass(frozen=True)
class RewardSettings:
    """Everything the weights of a latent reward depend on, besides model and labels.

    The string below a field is its help on the command line.
    """

    blocks: int = 2
    """Blocks of the transformer that the reward begins with: its price, in blocks."""
    noisy: bool = True
    """Train on latents at every noise level; false: on finished clips only, for comparison."""
    steps: int = 1200
    """Optimiser steps."""
    batch_pairs: int = 24
    """Pairs of clips per optimiser step."""
    micro_pairs: int = 24
    """Pairs in memory at once; batch_pairs must be a multiple."""
    lr: float = 1e-3
    """Peak learning rate of AdamW for the head; a matrix with more inputs than the trunk is wide gets less."""
    trunk_lr: float = 0.5
    """Learning rate of the pretrained blocks, in parts of lr."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    warmup_steps: int = 30
    """Steps of linear warm-up; a cosine to 0 follows."""
    max_grad_norm: float = 1.0
    """Gradient clipping."""
    seed: int = 0
    """Seed of the head's initial values, the pairs, the captions, the noise and the noise levels."""
    shift: float = 3.0
    """Timestep shift of the training noise levels."""
    even_levels: float = 0.25
    """Share of the pairs whose noise level is drawn evenly from 0 to 1, so that low levels are learnt too."""
    own_caption: float = 0.4
    """Share of the pairs with the caption that the first clip was made with; the others get one of all types."""
    curve_weight: float = 1.0
    """Weight of the squared error of the SSR curves."""
    score_weight: float = 4.0
    """Weight of the squared error of the DSR-Score."""
    valid_weight: float = 0.3
    """Weight of the cross-entropy of clips being valid."""
    preference_weight: float = 0.3
    """Weight of the Bradley-Terry loss, of the DSR-Score and of each further dimension."""
    sharpness: float = 8.0
    """Bradley-Terry logit of a difference of 1 in DSR-Score."""
    margin: float = 0.1
    """Pairs whose labels differ by no more do not count; for further dimensions in standard deviations."""
    regress: bool = True
    """Also fit further dimensions, whose labels are then taken as numbers and not as an order alone."""
    head_width: int = 128
    """Features inside the head."""
    held_out: float = 0.1
    """Share of the subject, object and scene triples that is kept out of training and only watched."""
    held_out_every: int = 200
    """Steps between two looks at them."""
    checkpoint_every: int = 200
    """Steps between two checkpoints."""
    keep_checkpoints: int = 1
    """How many of the newest checkpoints are kept; 0: all."""
    max_bad_steps: int = 5
    """Steps in a row that may be skipped because loss or gradient is not finite before training stops."""

    def __post_init__(self) -> None:
        above = "blocks steps batch_pairs micro_pairs lr trunk_lr max_grad_norm shift sharpness head_width".split()
        for name in (*above, "held_out_every", "checkpoint_every", "max_bad_steps"):
            require(0 < getattr(self, name) < math.inf, name, "above 0 and finite", getattr(self, name))
        weights = ("curve_weight", "score_weight", "valid_weight", "preference_weight")
        for name in (*weights, "weight_decay", "warmup_steps", "seed", "margin", "keep_checkpoints"):
            require(0 <= getattr(self, name) < math.inf, name, "0 or more and finite", getattr(self, name))
        for name in ("even_levels", "own_caption"):
            require(0 <= getattr(self, name) <= 1, name, "in [0, 1]", getattr(self, name))
        require(0 <= self.held_out < 1, "held_out", "in [0, 1)", self.held_out)
        if self.batch_pairs % self.micro_pairs:
            raise ConfigError(
                f"batch_pairs ({self.batch_pairs}) must be a multiple of micro_pairs ({self.micro_pairs})"
            )
        if self.warmup_steps >= self.steps:
            raise ConfigError(f"warmup_steps ({self.warmup_steps}) must be below steps ({self.steps})")

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        return dataclasses.asdict(self)

    def rate(self, step: int) -> float:
        """Factor of the learning rate at optimiser step ``step`` (from 0): linear warm-up, then a cosine to 0."""
        return cosine_rate(step, self.warmup_steps, self.steps)
