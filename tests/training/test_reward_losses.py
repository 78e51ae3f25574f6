"""The losses of labelled pairs against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from training.reward_losses import PairLabels, bradley_terry, bradley_terry_ties, pair_losses, regression, tie_model

NAN = math.nan


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def labels(preference: Tensor, first: Tensor | None = None, second: Tensor | None = None) -> PairLabels:
    nothing = torch.full_like(preference, NAN)
    return PairLabels(preference, nothing if first is None else first, nothing if second is None else second)


@pytest.mark.parametrize("theta", [1.5, 5.0, 20.0])
def test_the_three_outcomes_make_one(theta: float) -> None:
    difference = torch.linspace(-9, 9, 37, dtype=torch.float64)
    first, tie, second = tie_model(difference, theta)
    torch.testing.assert_close(first + tie + second, torch.ones_like(difference))
    torch.testing.assert_close(first, second.flip(0))
    assert (first.diff() > 0).all()
    # at D = 0: both sigmoids are 1 / (1 + k), so the tie has (k^2 - 1) / (1 + k)^2 = (k - 1) / (k + 1), its highest
    assert tie[18].item() == pytest.approx((theta - 1) / (theta + 1))
    assert tie.argmax() == 18


def test_the_loss_with_ties() -> None:
    """theta 5. At D = ln 5 the better clip has sigmoid(0) = 1/2, the worse one sigmoid(-2 ln 5) = 1 / 26, and a tie
    24 / 52."""
    difference = column(math.log(5), math.log(5), math.log(5), math.log(5))
    preference = column(1, -1, 0, NAN)
    expected = column(math.log(2), math.log(26), math.log(52 / 24), 0)
    torch.testing.assert_close(bradley_terry_ties(difference, preference, 5.0), expected)


def test_a_tie_pulls_scores_together() -> None:
    difference = column(2.0, -2.0, 0.0).requires_grad_()
    bradley_terry_ties(difference, column(0, 0, 0), 5.0).sum().backward()
    assert difference.grad is not None
    up, down, level = difference.grad.flatten().tolist()
    assert up > 0 > down and up == pytest.approx(-down) and level == pytest.approx(0)


def test_bradley_terry_says_nothing_of_ties() -> None:
    """D = ln 3: the better clip has 3/4, the worse one 1/4."""
    difference = torch.full((4, 1), math.log(3), dtype=torch.float64, requires_grad=True)
    loss = bradley_terry(difference, column(1, -1, 0, NAN))
    torch.testing.assert_close(loss, column(math.log(4 / 3), math.log(4), 0, 0))
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert difference.grad is not None
    torch.testing.assert_close(difference.grad, column(-1 / 4, 3 / 4, 0, 0))


def test_margins_of_three_kinds() -> None:
    """The label says A in row 0 and B in the others; D is 1 for the labelled clip throughout. The ratings differ by 2
    in its favour, by 2 against it (a gap of 0), and are unknown."""
    preference = column(1, -1, -1)
    first, second = column(1, 0, 0), column(0, 1, 1)
    said = labels(preference, column(5, 4, NAN), column(3, 2, 2))
    assert said.gap[:2].tolist() == [[2.0], [0.0]] and said.gap[2].isnan()

    def cost(logit: float) -> float:
        return math.log1p(math.exp(-logit))

    def losses(name: str) -> list[float]:
        return pair_losses(name, first, second, said, margin=0.57).flatten().tolist()  # type: ignore[arg-type]

    assert losses("bt") == pytest.approx([cost(1)] * 3)
    assert losses("bt-ratings") == pytest.approx([cost(1 - 2), cost(1), 0])
    assert losses("bt-constant") == pytest.approx([cost(1 - 0.57)] * 3)
    assert losses("bt-scaled") == pytest.approx([2 * cost(1), 0, 0])


def test_regression_of_ratings() -> None:
    """A rating of 5 is a score of 2. Clip A is off by 1, clip B by 3: (1 + 9) / 2; where B's is missing, 1 / 2."""
    said = labels(column(1, NAN), column(5, 5), column(1, NAN))
    assert pair_losses("regression", column(1, 1), column(1, 1), said).flatten().tolist() == [5.0, 0.5]
    score = torch.zeros(2, requires_grad=True)
    regression(score, torch.tensor([4.0, NAN])).sum().backward()  # type: ignore[no-untyped-call]
    assert score.grad is not None and score.grad.tolist() == [-2.0, 0.0]


def test_far_apart_scores_stay_finite() -> None:
    difference = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    for preference in (torch.ones(2, 1), torch.zeros(2, 1)):
        loss = bradley_terry_ties(difference, preference, 5.0)
        assert loss.isfinite().all()
        loss.sum().backward()  # type: ignore[no-untyped-call]
    assert difference.grad is not None and difference.grad.isfinite().all()
