"""What rewards learn labels with: losses of labels that may be missing (NaN), and the monitors; on tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def regression(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over the known targets; 0, with a gradient of 0, where none is known. Any one shape."""
    known = ~target.isnan()
    error = torch.where(known, predicted - target.nan_to_num(), 0.0)
    return error.square().sum() / known.sum().clamp_min(1)


def preference(one: Tensor, other: Tensor, difference: Tensor, margin: float, sharpness: float = 1.0) -> Tensor:
    """Bradley-Terry loss of utilities: ``-log sigmoid(sharpness (winner - loser))``, mean over decided pairs.

    ``difference`` is the label of ``one`` less that of ``other``; a pair is decided where it is known and larger
    than ``margin`` either way. 0, with a gradient of 0, where no pair is. Any one shape.
    """
    decided = difference.abs() > margin  # false for NaN
    logit = torch.where(decided, sharpness * difference.nan_to_num().sign() * (one - other), 0.0)
    return torch.where(decided, functional.softplus(-logit), 0.0).sum() / decided.sum().clamp_min(1)


def correlation(predicted: Tensor, target: Tensor) -> float:
    """Pearson's correlation over the known targets ``(n,)``; NaN where either does not vary."""
    known = ~target.isnan()
    one, two = predicted[known].double(), target[known].double()
    one, two = one - one.mean(), two - two.mean()
    scale = float(one.norm() * two.norm())
    return float(one @ two) / scale if len(one) > 1 and scale > 0 else float("nan")


def pair_accuracy(predicted: Tensor, target: Tensor, group: Tensor, margin: float) -> tuple[float, int]:
    """Share of pairs within a group whose order is right, and how many pairs there are.

    Args:
        predicted: ``(n,)``.
        target: ``(n,)``, NaN where unknown.
        group: ``(n,)``; clips with the same number can be compared.
        margin: pairs whose targets differ by no more do not count.
    """
    difference = target[:, None] - target[None, :]
    counts = (group[:, None] == group[None, :]) & (difference > margin)
    pairs = int(counts.sum())
    right = counts & (predicted[:, None] > predicted[None, :])
    return (int(right.sum()) / pairs if pairs else float("nan")), pairs
