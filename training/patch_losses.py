"""What a patch reward is trained with: losses of labels that may be missing (NaN), and the rank correlation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor


def reward_loss(one: Tensor, other: Tensor, labels: tuple[Tensor, Tensor], margin: float, preference: float) -> Tensor:
    """Squared error to the labels, plus ``preference`` times the Bradley-Terry loss of the pairs.

    Args:
        one, other: values ``(n,)`` of co-located blocks, or of whole clips, of two clips of one prompt.
        labels: theirs; NaN for unknown.
        margin: pairs whose labels differ by no more count for the squared error alone.
        preference: weight of ``-log sigmoid(better - worse)``.
    """
    import torch
    from torch.nn import functional

    first, second = labels
    target = torch.cat([first, second])
    known = ~target.isnan()
    error = torch.where(known, torch.cat([one, other]) - target.nan_to_num(), 0.0)
    squared = error.square().sum() / known.sum().clamp_min(1)
    difference = first - second
    decided = difference.abs() > margin  # false for NaN
    logit = torch.where(decided, difference.nan_to_num().sign() * (one - other), 0.0)
    ordered = torch.where(decided, functional.softplus(-logit), 0.0).sum() / decided.sum().clamp_min(1)
    total: Tensor = squared + preference * ordered
    return total


def rank_correlation(one: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    """Spearman's: Pearson's correlation of the ranks, ties sharing their mean rank; NaN where either does not vary."""
    known = ~(np.isnan(one) | np.isnan(other))
    ranks = [_ranks(values[known]) for values in (one, other)]
    centred = [values - values.mean() for values in ranks] if known.any() else ranks
    scale = float(np.linalg.norm(centred[0]) * np.linalg.norm(centred[1]))
    return float(centred[0] @ centred[1]) / scale if scale > 0 else float("nan")


def _ranks(values: NDArray[np.floating]) -> NDArray[np.float64]:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2
    return np.asarray(mean_rank[which], dtype=np.float64)
