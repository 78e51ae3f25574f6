"""The official training step, emulated on the same transformer: what the benchmarks compare with.

A deep copy of the model as reference, four forward passes of one clip each, every block checkpointed, one backward
pass; beta 1, the margin clipped at 5 and half the output anchor (methods: official train.py).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spatialalign.backbones.wan import TEXT_LENGTH
from training.gradients import Side


def reference_copy(transformer: nn.Module) -> nn.Module:
    """The reference: a second model. Made before an adapter is put on the first."""
    return copy.deepcopy(transformer).requires_grad_(False)


def official_gradients(transformer: Any, reference: nn.Module, winner: Side, loser: Side) -> Tensor:
    """Add the gradient of one pair's loss to the adapter of ``transformer``, whose checkpointing is switched on."""
    with torch.no_grad():
        reference_winner, reference_loser = _velocity(reference, winner), _velocity(reference, loser)
    model_winner, model_loser = _velocity(transformer, winner), _velocity(transformer, loser)
    gain_winner = F.mse_loss(reference_winner, winner.target) - F.mse_loss(model_winner, winner.target)
    gain_loser = F.mse_loss(reference_loser, loser.target) - F.mse_loss(model_loser, loser.target)
    preference = -torch.log(torch.sigmoid(torch.clamp(gain_winner - gain_loser, -5, 5)))
    anchor = 0.5 * (F.mse_loss(model_winner, reference_winner) + F.mse_loss(model_loser, reference_loser))
    loss = preference + 0.5 * anchor
    loss.backward()
    return loss.detach()


def _velocity(transformer: Any, side: Side) -> Tensor:
    weight = transformer.patch_embedding.weight
    text = torch.stack([F.pad(row, (0, 0, 0, TEXT_LENGTH - len(row))) for row in side.text])
    timestep = (side.told * 1000).to(weight.device)
    out: Tensor = transformer(
        side.noisy.to(weight.dtype), timestep, text.to(weight.device, weight.dtype), return_dict=False
    )[0]
    return out.float()
