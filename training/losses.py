"""Preference losses for flow models: pure functions on tensors, no model inside.

Shapes: b pairs; predictions and targets ``(b, c, f, h, w)``; every result per pair ``(b,)`` in float32.

Two steps, so that the second can be used where the predictions of winner and loser are never in memory together:
:func:`gains` reduces the predictions of one side to a few numbers a pair, :func:`preference` makes the loss of them,
and :func:`pair_loss` is one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from spatialalign.blocks import BlockGrid
from training.objective import Form, Objective, Reduction

Side = Literal["winner", "loser"]


@dataclass(frozen=True)
class Weights:
    """How much each pair counts, ``(b,)`` each: in the preference term, and its two clips in ``rwr``."""

    pair: Tensor
    winner: Tensor
    loser: Tensor


@dataclass(frozen=True)
class Predictions:
    """Velocities of one side (winner or loser) of b pairs: by the model, by the reference, and the true one."""

    model: Tensor
    reference: Tensor
    target: Tensor


@dataclass(frozen=True)
class Gains:
    """All that the loss needs to know of one side of b pairs; every field ``(b,)`` float32.

    Attributes:
        error: the model's squared error, reduced as the objective says.
        reference_error: the same of the reference; no gradient.
        drift: mean squared distance of the model from the reference (zero where the arm has no anchor).
        supervised: the model's mean squared error (zero where the arm does not learn from this side's clips).
        norm: |v_model|, without gradient.
        reference_norm: |v_reference|.
        block_gain: reference error minus model error in each block ``(b, F, R, C)``, where the objective is granular.
    """

    error: Tensor
    reference_error: Tensor
    drift: Tensor
    supervised: Tensor
    norm: Tensor
    reference_norm: Tensor
    block_gain: Tensor | None = None

    @property
    def gain(self) -> Tensor:
        """Reference error minus model error; positive is better."""
        return self.reference_error - self.error


@dataclass(frozen=True)
class PairLoss:
    """The loss of b pairs in its parts; every field ``(b,)``.

    Attributes:
        total: what is minimised.
        dpo: the preference term before a pair's weight; ``-log sigmoid(margin)`` in the sigmoid form.
        anchor: the zeroth-order anchor before its weight (zero where the arm has none).
        sft: the flow-matching error before its weight: the winner's, or in ``rwr`` half the sum of both, each times its
            clip's weight (zero where the arm has none).
        difference: what beta multiplies: positive when the model prefers the winner more than the reference does.
        margin: the difference times beta, clipped.
        winner_gain: reference error minus model error on the winner; positive is better.
        loser_gain: the same on the loser.
        norm_ratio: |v_model| / |v_reference| over both sides; growth means over-saturation.
        granular: the preference term over blocks before its weight (zero where there is none).
    """

    total: Tensor
    dpo: Tensor
    anchor: Tensor
    sft: Tensor
    difference: Tensor
    margin: Tensor
    winner_gain: Tensor
    loser_gain: Tensor
    norm_ratio: Tensor
    granular: Tensor

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


def block_error(prediction: Tensor, target: Tensor, grid: BlockGrid, reduction: Reduction = "mean") -> Tensor:
    """What each block of a grid has in the error of a velocity ``(b, c, f, h, w)``: ``(b, F, R, C)`` float32.

    The blocks of a clip sum to its :func:`flow_error`.
    """
    squared = grid.cut((prediction.float() - target.float()).square().movedim(1, -1)).flatten(4)
    return squared.mean(4) / math.prod(grid.shape) if reduction == "mean" else squared.sum(4)


def block_preferences(winner: Tensor, loser: Tensor, tie: float = 0.0) -> Tensor:
    """Which clip each block is better in, and how much that counts: ``s_k a_k``, of rewards ``(b, F, R, C)`` of both.

    ``s_k`` is the sign of the difference of the rewards, ``a_k`` its magnitude over the mean magnitude of the pair's
    blocks. Differences up to ``tie`` count 0; so does a pair that has no others.
    """
    difference = (winner - loser).float()
    difference = torch.where(difference.abs() > tie, difference, 0.0)
    mean = difference.abs().mean((1, 2, 3), keepdim=True)
    return torch.where(mean > 0, difference / mean, 0.0)


def level_weight(sigma: Tensor) -> Tensor:
    """``(1 - sigma)^2``, the squared error of the implied noise over that of the velocity, for ``sigma (b,)``.

    With ``x = (1 - sigma) x0 + sigma eps`` and ``v = eps - x0`` the noise is ``eps = x + (1 - sigma) v``. ``x`` is
    given, so a velocity prediction implies a noise prediction whose error is ``(1 - sigma)`` times its own (methods:
    Flow-DPO, lemma). Hence beta on errors of the noise, which is Diffusion-DPO's margin, is ``beta (1 - sigma)^2`` on
    errors of the velocity, which is the exact derivation in Flow-DPO; its authors recommend to leave the factor out.
    """
    return (1 - sigma).square()


def dpo_margin(winner_gain: Tensor, loser_gain: Tensor, beta: float, clip: float | None = 5.0) -> Tensor:
    """``clip(beta (s_w - s_l), -clip, clip)`` (methods: official train.py; no factor 1/2, unlike Flow-DPO)."""
    return _clipped(beta * (winner_gain - loser_gain), clip)


def preference_term(margin: Tensor, beta: float, form: Form = "sigmoid", label_smoothing: float = 0.0) -> Tensor:
    """The loss of a margin ``m (b,)``.

    * sigmoid: ``-(1 - e) log sigmoid(m) - e log sigmoid(-m)`` with the label smoothing ``e`` (DPO; with e > 0 its
      conservative form).
    * hinge: ``max(0, 1 - m)`` (SLiC).
    * ipo: ``(m / beta - 1 / (2 beta))^2`` (IPO, eq. 17, with beta for tau): it pulls the difference ``m / beta``
      towards ``1 / (2 beta)`` from either side, so the margin must not be clipped.
    """
    if form == "hinge":
        return F.relu(1 - margin)
    if form == "ipo":
        return ((margin - 0.5) / beta).square()
    if label_smoothing == 0:
        return -F.logsigmoid(margin)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def gains(side: Predictions, which: Side, objective: Objective, grid: BlockGrid | None = None) -> Gains:
    """Reduce one side's predictions to what the objective needs of it; ``grid`` where that is granular."""
    reduction, arm = objective.reduction, objective.arm
    reference_error = flow_error(side.reference, side.target, reduction)
    error = flow_error(side.model, side.target, reduction)
    nothing = torch.zeros_like(error)
    learns = arm == "rwr" or (which == "winner" and arm in ("dpo+sft", "sft"))
    return Gains(
        error=error,
        reference_error=reference_error,
        drift=flow_error(side.model, side.reference) if arm == "dpo+zo" else nothing,
        supervised=flow_error(side.model, side.target) if learns else nothing,
        norm=_norm(side.model),
        reference_norm=_norm(side.reference),
        block_gain=_block_gain(side, grid, reduction) if objective.granular_weight and grid is not None else None,
    )


def preference(
    winner: Gains,
    loser: Gains,
    objective: Objective,
    sigma: Tensor | None = None,
    weights: Weights | None = None,
    blocks: Tensor | None = None,
) -> PairLoss:
    """The objective from the numbers of both sides.

    The margin is ``clip(beta (s_w - s_l), -clip, clip)`` with ``s`` = reference error - model error (methods: official
    train.py); ``half_beta`` halves beta, and ``error_of="noise"`` weighs each pair by :func:`level_weight`. Anchor and
    flow-matching error are means over elements whatever the reduction, so that their weights keep their meaning.

    With a ``granular_weight`` the preference term becomes ``term(m) + granular_weight sum_k a_k term(s_k m_k)``, where
    ``m_k`` is block ``k``'s part of the unclipped margin and the ``a_k`` have the mean 1, so that at the start blocks
    that all agree pull as hard as the clip. This is our reading of HALO's Gran-DPO (arXiv 2502.06812), whose formula is
    not public; methods 3 has the mean error of a block in the place of its part, and ``a_k`` that sum to 1. The slope
    is the same at the start, but those terms saturate early.

    Args:
        winner: of b pairs.
        loser: of the same pairs.
        objective: what is minimised.
        sigma: noise level of each pair ``(b,)``; needed for ``error_of="noise"``.
        weights: of pairs and clips; None for 1. Weights of pairs act on the preference term alone, those of clips on
            the arm ``rwr`` alone.
        blocks: ``s_k a_k (b, F, R, C)``, see :func:`block_preferences`; needed where the objective is granular.
    """
    difference = _scaled(winner.gain - loser.gain, objective, sigma)
    margin = _clipped(objective.beta * difference, objective.clip)
    dpo = preference_term(margin, objective.beta, objective.form, objective.label_smoothing)
    granular = torch.zeros_like(dpo)
    if objective.granular_weight:
        granular = _granular(winner, loser, objective, sigma, blocks)
    anchor = 0.5 * (winner.drift + loser.drift)
    sft = winner.supervised
    if objective.arm == "rwr":
        if weights is None:
            raise ValueError("the arm rwr needs the weights of both clips of each pair")
        sft = 0.5 * (weights.winner.to(sft) * winner.supervised + weights.loser.to(sft) * loser.supervised)
    preferred = dpo + objective.granular_weight * granular if objective.granular_weight else dpo
    if weights is not None:
        preferred = weights.pair.to(dpo) * preferred
    supervised_only = objective.arm in ("sft", "rwr")
    return PairLoss(
        total=(0 if supervised_only else preferred) + objective.anchor_weight * anchor + objective.sft_weight * sft,
        dpo=dpo,
        anchor=anchor,
        sft=sft,
        difference=difference,
        margin=margin,
        winner_gain=winner.gain,
        loser_gain=loser.gain,
        norm_ratio=torch.hypot(winner.norm, loser.norm) / torch.hypot(winner.reference_norm, loser.reference_norm),
        granular=granular,
    )


def pair_loss(
    winner: Predictions,
    loser: Predictions,
    objective: Objective,
    sigma: Tensor | None = None,
    weights: Weights | None = None,
    blocks: Tensor | None = None,
) -> PairLoss:
    """The objective from the predictions of both sides: :func:`gains` of each, then :func:`preference`."""
    grid = None if blocks is None else BlockGrid(*blocks.shape[1:])
    won, lost = gains(winner, "winner", objective, grid), gains(loser, "loser", objective, grid)
    return preference(won, lost, objective, sigma, weights, blocks)


def averages(losses: Sequence[PairLoss]) -> dict[str, float]:
    """Means over pairs; errors of winner and loser apart, since both can grow while their difference improves.

    ``difference`` is the mean of its magnitude.
    """

    def mean(values: Sequence[Tensor]) -> float:
        return float(torch.cat([value.detach().float().cpu() for value in values]).mean())

    names = ("dpo", "anchor", "sft", "accuracy", "margin", "winner_gain", "loser_gain", "norm_ratio", "gradient_factor")
    return {
        "loss": mean([loss.total for loss in losses]),
        "granular": mean([loss.granular for loss in losses]),
        **{name: mean([getattr(loss, name) for loss in losses]) for name in names},
        "difference": mean([loss.difference.abs() for loss in losses]),
    }


def _scaled(difference: Tensor, objective: Objective, sigma: Tensor | None) -> Tensor:
    """What beta multiplies, from differences ``(b, ...)`` of the errors of whole clips or of blocks."""
    if objective.half_beta:
        difference = 0.5 * difference
    if objective.error_of == "noise":
        if sigma is None:
            raise ValueError("error_of='noise' needs the noise level sigma of each pair")
        factor = level_weight(sigma).to(difference)
        difference = factor.view(-1, *(1,) * (difference.ndim - 1)) * difference
    return difference


def _granular(winner: Gains, loser: Gains, objective: Objective, sigma: Tensor | None, blocks: Tensor | None) -> Tensor:
    """``sum_k a_k term(s_k m_k)``, ``(b,)``."""
    if blocks is None or winner.block_gain is None or loser.block_gain is None:
        raise ValueError("a granular objective needs the gains and the preferences of blocks")
    blocks = blocks.to(winner.block_gain)
    difference = _scaled(winner.block_gain - loser.block_gain, objective, sigma)
    margin = _clipped(objective.beta * blocks.sign() * difference, objective.clip)
    terms = preference_term(margin, objective.beta, objective.form, objective.label_smoothing)
    return (blocks.abs() * terms).sum((1, 2, 3))


def _block_gain(side: Predictions, grid: BlockGrid, reduction: Reduction) -> Tensor:
    return block_error(side.reference, side.target, grid, reduction) - block_error(
        side.model, side.target, grid, reduction
    )


def _clipped(margin: Tensor, clip: float | None) -> Tensor:
    return margin if clip is None else margin.clamp(-clip, clip)


def _norm(velocity: Tensor) -> Tensor:
    return velocity.detach().float().flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
