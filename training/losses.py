"""Preference losses for flow models: pure functions on tensors, no model inside.

Shapes: b pairs; predictions and targets ``(b, c, f, h, w)``; every result per pair ``(b,)`` in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Reduction = Literal["mean", "sum"]
Arm = Literal["dpo", "dpo+sft", "dpo+zo", "sft"]


@dataclass(frozen=True)
class Predictions:
    """Velocities of one side (winner or loser) of b pairs: by the model, by the reference, and the true one."""

    model: Tensor
    reference: Tensor
    target: Tensor


@dataclass(frozen=True)
class PairLoss:
    """The loss of b pairs in its parts; every field ``(b,)``.

    Attributes:
        total: what is minimised.
        dpo: ``-log sigmoid(margin)``.
        anchor: the zeroth-order anchor before its weight (zero where the arm has none).
        sft: the winner's flow-matching error before its weight (zero where the arm has none).
        margin: clipped, with beta: positive when the model prefers the winner more than the reference does.
        winner_gain: reference error minus model error on the winner; positive is better.
        loser_gain: the same on the loser.
        norm_ratio: |v_model| / |v_reference| over both sides; growth means over-saturation.
    """

    total: Tensor
    dpo: Tensor
    anchor: Tensor
    sft: Tensor
    margin: Tensor
    winner_gain: Tensor
    loser_gain: Tensor
    norm_ratio: Tensor

    @property
    def gradient_factor(self) -> Tensor:
        """``sigmoid(-margin)``: how strongly a pair still pulls; 1/2 at the start, 0 when the pair is learnt."""
        return torch.sigmoid(-self.margin)

    @property
    def accuracy(self) -> Tensor:
        """1 where the winner is implicitly preferred, 0 where the loser is, 1/2 at a tie."""
        return (torch.sign(self.margin) + 1) / 2


def flow_error(prediction: Tensor, target: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Squared error of a velocity per sample, ``(b,)`` float32: the mean or the sum over its elements."""
    squared = (prediction.float() - target.float()).square().flatten(1)
    return squared.mean(1) if reduction == "mean" else squared.sum(1)


def dpo_margin(winner_gain: Tensor, loser_gain: Tensor, beta: float, clip: float | None = 5.0) -> Tensor:
    """``clip(beta (s_w - s_l), -clip, clip)`` (methods: official train.py; no factor 1/2, unlike Flow-DPO)."""
    margin = beta * (winner_gain - loser_gain)
    return margin if clip is None else margin.clamp(-clip, clip)


def zeroth_order_anchor(winner: Predictions, loser: Predictions) -> Tensor:
    """``1/2 (mean (v_theta - v_ref)^2 on the winner + the same on the loser)`` (methods: official train.py)."""
    return 0.5 * (flow_error(winner.model, winner.reference) + flow_error(loser.model, loser.reference))


def pair_loss(
    winner: Predictions,
    loser: Predictions,
    *,
    arm: Arm,
    beta: float,
    clip: float | None = 5.0,
    anchor_weight: float = 0.5,
    sft_weight: float = 1.0,
    reduction: Reduction = "mean",
) -> PairLoss:
    """The SpatialAlign objective and its ablations.

    ``dpo``: the preference term alone; ``dpo+zo``: plus ``anchor_weight`` times the zeroth-order anchor (the paper's);
    ``dpo+sft``: plus ``sft_weight`` times the winner's flow-matching error; ``sft``: that error alone, a control that
    needs no losers. Anchor and SFT term are means over elements whatever ``reduction`` the margin uses, so that their
    weights keep their meaning.
    """
    winner_gain = flow_error(winner.reference, winner.target, reduction) - flow_error(
        winner.model, winner.target, reduction
    )
    loser_gain = flow_error(loser.reference, loser.target, reduction) - flow_error(loser.model, loser.target, reduction)
    margin = dpo_margin(winner_gain, loser_gain, beta, clip)
    dpo = -F.logsigmoid(margin)
    nothing = torch.zeros_like(dpo)
    anchor = zeroth_order_anchor(winner, loser) if arm == "dpo+zo" else nothing
    sft = flow_error(winner.model, winner.target) if arm in ("dpo+sft", "sft") else nothing
    return PairLoss(
        total=(0 if arm == "sft" else dpo) + anchor_weight * anchor + sft_weight * sft,
        dpo=dpo,
        anchor=anchor,
        sft=sft,
        margin=margin,
        winner_gain=winner_gain,
        loser_gain=loser_gain,
        norm_ratio=_norm(winner.model, loser.model) / _norm(winner.reference, loser.reference),
    )


def _norm(winner: Tensor, loser: Tensor) -> Tensor:
    both = torch.cat([winner.detach().float().flatten(1), loser.detach().float().flatten(1)], dim=1)
    return both.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
