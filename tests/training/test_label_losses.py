"""Losses of labels that may be missing, and monitors: the numbers, derived by hand."""

from __future__ import annotations

import math

import pytest
import torch

from training.label_losses import correlation, pair_accuracy, preference, regression


def test_regression_counts_known_targets_alone() -> None:
    """Errors 1 and -2 count, the mean of their squares is 5/2; the slope at the unknown one is 0 and not NaN."""
    predicted = torch.tensor([1.0, 7.0, 1.0], requires_grad=True)
    loss = regression(predicted, torch.tensor([0.0, math.nan, 3.0]))
    loss.backward()
    assert loss.item() == pytest.approx(2.5) and predicted.grad is not None
    assert predicted.grad.tolist() == [1.0, 0.0, -2.0]
    assert regression(predicted, torch.full((3,), math.nan)).item() == 0


def test_preference_is_bradley_terry() -> None:
    """Of three pairs one is decided for the first (logit 2 * 0.5) and one for the second (logit 2 * -0.25).

    The mean of log(1 + exp(-1)) and log(1 + exp(1/2)).
    """
    one, other = torch.tensor([0.5, 0.0, 9.0, 9.0]), torch.tensor([0.0, -0.25, 0.0, 0.0])
    difference = torch.tensor([0.3, -0.2, 0.1, math.nan])
    expected = (math.log1p(math.exp(-1)) + math.log1p(math.exp(0.5))) / 2
    assert preference(one, other, difference, 0.1, 2.0).item() == pytest.approx(expected)
    assert preference(one, other, difference, 1.0).item() == 0


def test_monitors_by_hand() -> None:
    """Within group 0 the pairs (1, 0) and (2, 0) count, of which the first is right; group 1 has one, right."""
    target = torch.tensor([0.0, 0.5, 0.9, 0.0, 1.0, math.nan])
    predicted = torch.tensor([0.2, 0.3, 0.1, 0.0, 5.0, 9.0])
    group = torch.tensor([0, 0, 0, 1, 1, 0])
    assert pair_accuracy(predicted, target, group, 0.45) == (2 / 3, 3)
    assert math.isnan(pair_accuracy(predicted, target, group, 2.0)[0])
    assert correlation(torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([2.0, 4.0, 6.0, math.nan])) == pytest.approx(1)
    assert correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, -1.0])) == pytest.approx(-1)
    assert math.isnan(correlation(torch.ones(3), torch.tensor([1.0, 0.0, -1.0])))
