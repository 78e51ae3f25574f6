"""The losses against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spatialalign.backbones.flow import add_noise, velocity_target
from training.losses import (
    Gains,
    PairLoss,
    Predictions,
    Weights,
    dpo_margin,
    flow_error,
    gains,
    level_weight,
    pair_loss,
    preference,
    preference_term,
)
from training.objective import Objective


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
    loss = pair_loss(WINNER, LOSER, Objective(arm="dpo", beta=1.0))
    assert loss.winner_gain.item() == pytest.approx(1.0)
    assert loss.loser_gain.item() == pytest.approx(-1.5)
    assert loss.margin.item() == pytest.approx(2.5)
    assert loss.dpo.item() == pytest.approx(math.log(1 + math.exp(-2.5)))
    assert loss.total.item() == pytest.approx(loss.dpo.item())
    assert loss.gradient_factor.item() == pytest.approx(1 / (1 + math.exp(2.5)))
    assert loss.accuracy.item() == 1


def test_sum_reduction_doubles_the_margin_of_two_elements() -> None:
    assert pair_loss(WINNER, LOSER, Objective(arm="dpo", beta=0.5, reduction="sum")).margin.item() == pytest.approx(2.5)


def test_anchor_by_hand() -> None:
    """Winner (1-2)^2 + (1-0)^2 over 2 = 1; loser (3-1)^2 + (1-2)^2 over 2 = 2.5; half the sum is 1.75."""
    loss = pair_loss(WINNER, LOSER, Objective(arm="dpo+zo", beta=1.0, anchor_weight=0.5, reduction="sum"))
    assert loss.anchor.item() == pytest.approx(1.75)
    assert loss.total.item() == pytest.approx(math.log(1 + math.exp(-5.0)) + 0.875)


def test_sft_by_hand() -> None:
    """The winner's own error is 1."""
    loss = pair_loss(WINNER, LOSER, Objective(arm="dpo+sft", beta=1.0, sft_weight=0.25))
    assert loss.sft.item() == pytest.approx(1.0)
    assert loss.total.item() == pytest.approx(math.log(1 + math.exp(-2.5)) + 0.25)


def test_the_supervised_control_leaves_the_losers_out() -> None:
    loss = pair_loss(WINNER, LOSER, Objective(arm="sft", beta=1.0, sft_weight=0.5))
    assert loss.total.item() == pytest.approx(0.5)
    assert loss.margin.item() == pytest.approx(2.5)  # still monitored


def test_margin_is_clipped_at_five_either_way() -> None:
    gains = torch.tensor([1.0, -1.0])
    assert dpo_margin(gains, -gains, beta=100.0).tolist() == [5.0, -5.0]
    assert dpo_margin(gains, -gains, beta=100.0, clip=None).tolist() == [200.0, -200.0]


def test_norm_ratio_by_hand() -> None:
    """Model norms 1 + 1 + 9 + 1 = 12; reference 4 + 0 + 1 + 4 = 9."""
    assert pair_loss(WINNER, LOSER, Objective(arm="dpo", beta=1.0)).norm_ratio.item() == pytest.approx(
        math.sqrt(12 / 9)
    )


@pytest.mark.parametrize("arm", ["dpo", "dpo+zo"])
@pytest.mark.parametrize(("beta", "reduction"), [(1.0, "mean"), (500.0, "mean"), (5000.0, "sum")])
def test_at_initialisation_the_loss_is_log_two(arm: str, beta: float, reduction: str) -> None:
    """Model equal to reference: margin 0, anchor 0, and the anchor has no gradient there."""
    reference = torch.randn(3, 2, 1, 2, 2)
    model = reference.clone().requires_grad_()
    side = Predictions(model, reference, torch.randn(3, 2, 1, 2, 2))
    loss: PairLoss = pair_loss(side, side, Objective(arm, beta=beta, reduction=reduction))  # type: ignore[arg-type]
    assert loss.total.tolist() == pytest.approx([math.log(2)] * 3)
    assert loss.accuracy.tolist() == [0.5] * 3
    loss.anchor.sum().backward() if arm == "dpo+zo" else None
    assert model.grad is None or not model.grad.any()


def test_gradient_pulls_with_the_gradient_factor() -> None:
    """d loss / d v_w = sigmoid(-m) * beta * 2 (v_w - target) / n: at m = 2.5, v_w - target = (1, 1), n = 2."""
    model = field(1, 1).requires_grad_()
    winner = Predictions(model, WINNER.reference, WINNER.target)
    pair_loss(winner, LOSER, Objective(arm="dpo", beta=1.0)).total.sum().backward()
    assert model.grad is not None
    assert model.grad.flatten().tolist() == pytest.approx([1 / (1 + math.exp(2.5))] * 2)


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def test_flow_dpo_with_constant_beta() -> None:
    """Eq. 6: ``-log sigmoid(-(beta/2) [(e_w - e_ref,w) - (e_l - e_ref,l)])``, e the squared errors.

    Means: (1 - 2) - (2 - 1/2) = -2.5, so at beta 0.8 the argument is 0.4 * 2.5 = 1. Squared norms as the paper writes
    them are sums: (2 - 4) - (4 - 1) = -5, so the same argument is reached at beta 0.4.
    """
    for beta, reduction in ((0.8, "mean"), (0.4, "sum")):
        objective = Objective("dpo", beta=beta, half_beta=True, reduction=reduction, clip=None)  # type: ignore[arg-type]
        loss = pair_loss(WINNER, LOSER, objective)
        assert loss.margin.item() == pytest.approx(1.0)
        assert loss.total.item() == pytest.approx(-log_sigmoid(1.0))
        assert loss.winner_gain.item() == pytest.approx(1.0 if reduction == "mean" else 2.0)  # gains keep no beta


def test_flow_dpo_as_derived_has_beta_times_one_minus_t_squared() -> None:
    """At t = 0.75 the factor is 1/16: 0.5 * 8 * 2.5 / 16 = 0.625; at t = 1, pure noise, no margin is left."""
    objective = Objective("dpo", beta=8.0, half_beta=True, error_of="noise", clip=None)
    assert pair_loss(WINNER, LOSER, objective, torch.tensor([0.75])).margin.item() == pytest.approx(0.625)
    at_noise = pair_loss(WINNER, LOSER, objective, torch.tensor([1.0]))
    assert at_noise.total.item() == pytest.approx(math.log(2))
    with pytest.raises(ValueError, match="sigma"):
        pair_loss(WINNER, LOSER, objective)


def test_diffusion_dpo_is_computed_on_the_noise_a_velocity_implies() -> None:
    """Diffusion-DPO's loss written with noise predictions, ``eps = x + (1 - t) v``, which our margin never makes.

    -log sigmoid(-(beta/2) [(|eps - eps_w|^2 - |eps - eps_ref,w|^2) - (the same of l)]), means over elements, beta 5000.
    """
    generator = torch.Generator().manual_seed(0)
    clean, noise, wrong, wrong_reference = (torch.randn(4, 2, 1, 3, 3, generator=generator).double() for _ in range(4))
    sigma = torch.tensor([0.1, 0.4, 0.7, 0.9]).double()
    x, v = add_noise(clean, noise, sigma), velocity_target(clean, noise)
    model, reference = v + 0.01 * wrong, v + 0.01 * wrong_reference
    remaining = (1 - sigma).reshape(-1, 1, 1, 1, 1)
    torch.testing.assert_close(x + remaining * v, noise)  # the true velocity implies the true noise

    def noise_error(velocity: Tensor) -> Tensor:
        return (x + remaining * velocity - noise).square().flatten(1).mean(1)

    advantage = noise_error(model) - noise_error(reference)
    winner, loser = slice(0, 2), slice(2, 4)
    sigma[loser] = sigma[winner]  # one noise level for both clips of a pair
    x, v = add_noise(clean, noise, sigma), velocity_target(clean, noise)
    remaining = (1 - sigma).reshape(-1, 1, 1, 1, 1)
    advantage = noise_error(model) - noise_error(reference)
    expected = -torch.nn.functional.logsigmoid(-(5000 / 2) * (advantage[winner] - advantage[loser]))
    won, lost = (Predictions(model[side], reference[side], v[side]) for side in (winner, loser))
    objective = Objective("dpo", beta=5000.0, half_beta=True, error_of="noise", clip=None)
    found = pair_loss(won, lost, objective, sigma[winner])
    torch.testing.assert_close(found.total, expected.float(), rtol=2e-3, atol=2e-3)  # errors are float32
    torch.testing.assert_close(level_weight(torch.tensor([0.0, 0.5, 1.0])), torch.tensor([1.0, 0.25, 0.0]))


def test_hinge_by_hand() -> None:
    """max(0, 1 - m): margin 2.5 beta is 0.5 at beta 0.2, and beyond 1 nothing is left to learn."""
    assert pair_loss(WINNER, LOSER, Objective("dpo", beta=0.2, form="hinge")).total.item() == pytest.approx(0.5)
    assert pair_loss(WINNER, LOSER, Objective("dpo", beta=1.0, form="hinge")).total.item() == 0


def test_ipo_by_hand() -> None:
    """(d - 1/(2 beta))^2 with d = 2.5: at beta 0.5, (2.5 - 1)^2 = 2.25; at beta 0.2 d is the target and the loss 0.

    Its slope 2 (d - 1/(2 beta)) is 3 at beta 0.5: it pulls back what has gone too far.
    """
    loss = pair_loss(WINNER, LOSER, Objective("dpo", beta=0.5, form="ipo", clip=None))
    assert loss.total.item() == pytest.approx(2.25)
    aimed = pair_loss(WINNER, LOSER, Objective("dpo", beta=0.2, form="ipo", clip=None))
    assert aimed.total.item() == pytest.approx(0, abs=1e-12)
    margin = torch.tensor([1.25], requires_grad=True)
    preference_term(margin, 0.5, "ipo").sum().backward()
    assert margin.grad is not None
    assert margin.grad.item() == pytest.approx(3.0 / 0.5)  # d = m / beta


def test_label_smoothing_by_hand() -> None:
    """0.9 (-log sigmoid 1) + 0.1 (-log sigmoid -1) = 0.9 * 0.313262 + 0.1 * 1.313262 = 0.413262; at m = 0 still ln 2.

    The slope is e - sigmoid(-m), so the loss is least where sigmoid(-m) = e: m = ln 9 for e = 0.1.
    """
    value = pair_loss(WINNER, LOSER, Objective("dpo", beta=0.4, label_smoothing=0.1)).total
    assert value.item() == pytest.approx(0.413262, abs=1e-6)
    margin = torch.tensor([0.0, math.log(9)], requires_grad=True)
    term = preference_term(margin, 1.0, "sigmoid", 0.1)
    assert term[0].item() == pytest.approx(math.log(2))
    term.sum().backward()
    assert margin.grad is not None
    assert margin.grad.tolist() == pytest.approx([-0.4, 0.0], abs=1e-6)


def test_weights_of_pairs_act_on_the_preference_alone() -> None:
    """Weight 3 on ln(1 + e^-2.5), the anchor 1.75 / 2 as before."""
    one = torch.ones(1)
    loss = pair_loss(WINNER, LOSER, Objective("dpo+zo"), weights=Weights(3 * one, 9 * one, 9 * one))
    assert loss.total.item() == pytest.approx(3 * math.log(1 + math.exp(-2.5)) + 0.875)
    assert loss.dpo.item() == pytest.approx(math.log(1 + math.exp(-2.5)))


def test_reward_weighted_regression_by_hand() -> None:
    """Errors 1 (winner) and 2 (loser) with weights 1.5 and 0.25: (1.5 * 1 + 0.25 * 2) / 2 = 1; no preference term."""
    weights = Weights(torch.tensor([7.0]), torch.tensor([1.5]), torch.tensor([0.25]))
    loss = pair_loss(WINNER, LOSER, Objective("rwr", sft_weight=0.5), weights=weights)
    assert loss.sft.item() == pytest.approx(1.0)
    assert loss.total.item() == pytest.approx(0.5)
    with pytest.raises(ValueError, match="weights"):
        pair_loss(WINNER, LOSER, Objective("rwr"))


@pytest.mark.parametrize("arm", ["dpo", "dpo+zo", "dpo+sft", "sft", "rwr"])
def test_the_numbers_of_both_sides_are_enough(arm: str) -> None:
    """The loss from side-wise numbers, and its gradient through them one side at a time, against both sides at once."""
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(2, 2, 1, 3, 3, generator=generator) for _ in range(6)]
    objective, one = Objective(arm, beta=3.0), torch.tensor([1.0, 2.0])  # type: ignore[arg-type]
    weights = Weights(one, 0.5 * one, 0.25 * one)
    models = [tensor.clone().requires_grad_() for tensor in tensors[:2]]
    sides = [Predictions(model, *tensors[2 + 2 * k : 4 + 2 * k]) for k, model in enumerate(models)]
    whole = pair_loss(sides[0], sides[1], objective, weights=weights)
    expected = torch.autograd.grad(whole.total.sum(), models, materialize_grads=True)

    numbers = []
    for side, which in zip(sides, ("winner", "loser"), strict=True):
        found = gains(side, which, objective)  # type: ignore[arg-type]
        leaves = [getattr(found, name).detach().requires_grad_() for name in ("error", "drift", "supervised")]
        numbers.append(
            (found, leaves, Gains(leaves[0], found.reference_error, leaves[1], leaves[2], found.norm, found.norm))
        )
    loss = preference(numbers[0][2], numbers[1][2], objective, weights=weights)
    torch.testing.assert_close(loss.total, whole.total)
    loss.total.sum().backward()
    for model, gradient, (found, leaves, _) in zip(models, expected, numbers, strict=True):
        pulls = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
        parts = [found.error, found.drift, found.supervised]
        total = sum((part * pull).sum() for part, pull in zip(parts, pulls, strict=True))
        assert isinstance(total, Tensor)
        torch.testing.assert_close(torch.autograd.grad(total, model)[0], gradient)
