"""What a reward of clips is trained with: losses of pairs with a human label (methods: 2.3), as pure functions.

Shapes: ``b`` pairs, ``d`` dimensions; scores ``(b, d)`` of clips A and B. A label is +1 (A is better), -1 (B is
better), 0 (a tie) or NaN (unknown). A rating is from 1 to 5, or NaN. Every loss is ``(b, d)`` and 0, with a gradient of
0, where its label says nothing to it. The mean over all entries is then that of the authors' code: what says nothing
counts in the number that it divides by.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from training.reward_model_settings import RewardLoss

MIDDLE = 3.0
"""The rating that regression maps to a score of 0."""


@dataclass(frozen=True)
class PairLabels:
    """What people said of b pairs.

    Attributes:
        preference: ``(b, d)``.
        first, second: ratings of the clips A and B, ``(b, d)``.
    """

    preference: Tensor
    first: Tensor
    second: Tensor

    @property
    def gap(self) -> Tensor:
        """By how much the better clip is rated higher, ``(b, d)``; 0 where its rating is the lower one, else NaN where
        unknown."""
        return (self.preference * (self.first - self.second)).clamp_min(0)


def pair_losses(
    loss: RewardLoss, first: Tensor, second: Tensor, labels: PairLabels, theta: float = 5.0, margin: float = 0.57
) -> Tensor:
    """The loss ``(b, d)`` of scores of A (``first``) and B.

    Args:
        loss: ``btt`` and ``bt``; ``regression`` of the ratings; ``bt`` with the difference of the ratings as margin
            (``bt-ratings``), with a constant one (``bt-constant``), or times that difference (``bt-scaled``).
        first, second: scores ``(b, d)``.
        labels: of the same pairs.
        theta: of ``btt``.
        margin: of ``bt-constant``.
    """
    if loss == "regression":
        return 0.5 * (regression(first, labels.first) + regression(second, labels.second))
    difference, preference = first - second, labels.preference
    if loss == "btt":
        return bradley_terry_ties(difference, preference, theta)
    if loss == "bt-constant":
        return bradley_terry(difference, preference, torch.full_like(difference, margin))
    if loss == "bt-ratings":
        return bradley_terry(difference, preference, labels.gap)
    plain = bradley_terry(difference, preference)
    return plain * labels.gap.nan_to_num() if loss == "bt-scaled" else plain


def tie_model(difference: Tensor, theta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities that A is better, of a tie, and that B is better, at score differences A - B; any one shape.

    With ``k = theta``: ``a = sigmoid(D - ln k)``, ``(k^2 - 1) a b`` and ``b = sigmoid(-D - ln k)`` (methods 2.3, in the
    form of the code, which sums to 1). At D = 0 a tie has the probability (k - 1) / (k + 1).
    """
    first, second = (torch.sigmoid(side - math.log(theta)) for side in (difference, -difference))
    return first, (theta**2 - 1) * first * second, second


def bradley_terry_ties(difference: Tensor, preference: Tensor, theta: float) -> Tensor:
    """``-log`` of the probability that :func:`tie_model` gives to the label; differences and labels of one shape."""
    shift = math.log(theta)
    first, second = -logsigmoid(difference - shift), -logsigmoid(-difference - shift)
    tie = first + second - math.log(theta**2 - 1)
    said = torch.where(preference > 0, first, torch.where(preference < 0, second, tie))
    return torch.where(preference.isnan(), 0.0, said)


def bradley_terry(difference: Tensor, preference: Tensor, margin: Tensor | None = None) -> Tensor:
    """``-log sigmoid(better - worse - margin)`` of decided labels, 0 of ties; everything of one shape.

    Where a margin is NaN the pair says nothing.
    """
    sign = preference.nan_to_num()  # NaN times anything would spoil the gradient, even where it is masked
    decided = sign != 0
    logit = sign * difference
    if margin is not None:
        decided, logit = decided & ~margin.isnan(), logit - margin.nan_to_num()
    return torch.where(decided, -logsigmoid(logit), 0.0)


def regression(score: Tensor, rating: Tensor) -> Tensor:
    """``(score - (rating - 3))^2``, 0 where there is no rating; scores and ratings of one shape."""
    return torch.where(rating.isnan(), 0.0, score - (rating.nan_to_num() - MIDDLE)).square()
