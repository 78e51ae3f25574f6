"""The losses against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from training.losses import PairLoss, Predictions, dpo_margin, flow_error, pair_loss


def field(*values: float) -> Tensor:
    """One sample of 2 elements per pair of values, (b, 1, 1, 1, 2)."""
    return torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1, 1, 2)


# Winner: target (0, 0), reference (2, 0), model (1, 1)   -> e_ref = 4/2 = 2, e_model = 2/2 = 1, gain 1
# Loser:  target (1, 1), reference (1, 2), model (3, 1)   -> e_ref = 1/2,     e_model = 4/2 = 2, gain -1.5
# margin = beta (1 + 1.5) = 2.5 beta; with sums every error doubles: 5 beta
WINNER = Predictions(model=field(1, 1), reference=field(2, 0), target=field(0, 0))
LOSER = Predictions(model=field(3, 1), reference=field(1, 2), target=field(1, 1))


def test_flow_error_means_and_sums() -> None:
    prediction, target = field(1, 2, 3, 4), field(0, 0, 3, 0)
    assert flow_error(prediction, target).tolist() == [2.5, 8.0]
    assert flow_error(prediction, target, "sum").tolist() == [5.0, 16.0]


def test_errors_are_taken_in_float32() -> None:
    """In bfloat16, (1.0039 - 1)^2 would be lost in rounding of the sum."""
    assert flow_error(field(1, 1).bfloat16(), field(1, 1.5).bfloat16()).dtype == torch.float32


def test_dpo_by_hand() -> None:
    loss = pair_loss(WINNER, LOSER, arm="dpo", beta=1.0)
    assert loss.winner_gain.item() == pytest.approx(1.0)
    assert loss.loser_gain.item() == pytest.approx(-1.5)
    assert loss.margin.item() == pytest.approx(2.5)
    assert loss.dpo.item() == pytest.approx(math.log(1 + math.exp(-2.5)))
    assert loss.total.item() == pytest.approx(loss.dpo.item())
    assert loss.gradient_factor.item() == pytest.approx(1 / (1 + math.exp(2.5)))
    assert loss.accuracy.item() == 1


def test_sum_reduction_doubles_the_margin_of_two_elements() -> None:
    assert pair_loss(WINNER, LOSER, arm="dpo", beta=0.5, reduction="sum").margin.item() == pytest.approx(2.5)


def test_anchor_by_hand() -> None:
    """Winner (1-2)^2 + (1-0)^2 over 2 = 1; loser (3-1)^2 + (1-2)^2 over 2 = 2.5; half the sum is 1.75."""
    loss = pair_loss(WINNER, LOSER, arm="dpo+zo", beta=1.0, anchor_weight=0.5, reduction="sum")
    assert loss.anchor.item() == pytest.approx(1.75)
    assert loss.total.item() == pytest.approx(math.log(1 + math.exp(-5.0)) + 0.875)


def test_sft_by_hand() -> None:
    """The winner's own error is 1."""
    loss = pair_loss(WINNER, LOSER, arm="dpo+sft", beta=1.0, sft_weight=0.25)
    assert loss.sft.item() == pytest.approx(1.0)
    assert loss.total.item() == pytest.approx(math.log(1 + math.exp(-2.5)) + 0.25)


def test_the_supervised_control_leaves_the_losers_out() -> None:
    loss = pair_loss(WINNER, LOSER, arm="sft", beta=1.0, sft_weight=0.5)
    assert loss.total.item() == pytest.approx(0.5)
    assert loss.margin.item() == pytest.approx(2.5)  # still monitored


def test_margin_is_clipped_at_five_either_way() -> None:
    gains = torch.tensor([1.0, -1.0])
    assert dpo_margin(gains, -gains, beta=100.0).tolist() == [5.0, -5.0]
    assert dpo_margin(gains, -gains, beta=100.0, clip=None).tolist() == [200.0, -200.0]


def test_norm_ratio_by_hand() -> None:
    """Model norms 1 + 1 + 9 + 1 = 12; reference 4 + 0 + 1 + 4 = 9."""
    assert pair_loss(WINNER, LOSER, arm="dpo", beta=1.0).norm_ratio.item() == pytest.approx(math.sqrt(12 / 9))


@pytest.mark.parametrize("arm", ["dpo", "dpo+zo"])
@pytest.mark.parametrize(("beta", "reduction"), [(1.0, "mean"), (500.0, "mean"), (5000.0, "sum")])
def test_at_initialisation_the_loss_is_log_two(arm: str, beta: float, reduction: str) -> None:
    """Model equal to reference: margin 0, anchor 0, and the anchor has no gradient there."""
    reference = torch.randn(3, 2, 1, 2, 2)
    model = reference.clone().requires_grad_()
    side = Predictions(model, reference, torch.randn(3, 2, 1, 2, 2))
    loss: PairLoss = pair_loss(side, side, arm=arm, beta=beta, reduction=reduction)  # type: ignore[arg-type]
    assert loss.total.tolist() == pytest.approx([math.log(2)] * 3)
    assert loss.accuracy.tolist() == [0.5] * 3
    loss.anchor.sum().backward() if arm == "dpo+zo" else None
    assert model.grad is None or not model.grad.any()


def test_gradient_pulls_with_the_gradient_factor() -> None:
    """d loss / d v_w = sigmoid(-m) * beta * 2 (v_w - target) / n: at m = 2.5, v_w - target = (1, 1), n = 2."""
    model = field(1, 1).requires_grad_()
    winner = Predictions(model, WINNER.reference, WINNER.target)
    pair_loss(winner, LOSER, arm="dpo", beta=1.0).total.sum().backward()
    assert model.grad is not None
    assert model.grad.flatten().tolist() == pytest.approx([1 / (1 + math.exp(2.5))] * 2)


def test_the_other_conventions_are_a_choice_of_beta_and_reduction() -> None:
    """Flow-DPO writes -(beta/2)(...) on the mean, Diffusion-DPO the same form: theirs at beta 5 is ours at 2.5."""
    theirs = -math.log(1 / (1 + math.exp(-(1.0 / 2) * 2.5)))
    assert pair_loss(WINNER, LOSER, arm="dpo", beta=0.5).dpo.item() == pytest.approx(theirs)
