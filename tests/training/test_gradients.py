"""Every way of forming a pair's gradient gives the same one, on the shipped miniature, in float32."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from spatialalign.backbones import load_backbone
from spatialalign.backbones.wan import WanBackbone
from spatialalign.lora import unload_lora
from training.config import TrainSettings
from training.gradients import Side, adapter_off, evaluate_pairs, pair_gradients, reference_predictions
from training.losses import PairLoss, Predictions, Weights, flow_error, pair_loss
from training.memory import set_up, take_down
from training.presets import PRESETS
from training.trainer import ADAPTER, add_adapter

SIGMA = torch.tensor([0.3, 0.8])
TEXT_TOKENS = 512
"""A text that fills Wan's 512 tokens: its form with padding and its short form, which CPUs use where nothing is
computed again, are then the same numbers."""


@pytest.fixture(scope="module")
def miniature(miniature_weights: object) -> Iterator[tuple[WanBackbone, dict[str, Any]]]:
    """The shipped model with a LoRA that is no longer at its start."""
    backbone = load_backbone("miniature", "cpu")
    parameters = add_adapter(backbone, PRESETS["spatialalign"])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.normal_(std=0.05, generator=generator)
    yield backbone, parameters
    unload_lora(backbone.transformer, ADAPTER)


def sides(backbone: WanBackbone, tokens: int = TEXT_TOKENS) -> tuple[Side, Side]:
    """Winners and losers of two pairs with random content."""
    generator = torch.Generator().manual_seed(1)
    shape = 2, *backbone.latent_shape(backbone.default_settings())
    text = [torch.randn(tokens, 4096, generator=generator) for _ in range(2)]
    clean = [torch.randn(shape, generator=generator) for _ in range(4)]
    winner, loser = (Side.of(clean[i], clean[i + 2], SIGMA, SIGMA, text, "cpu") for i in range(2))
    return winner, loser


def run(
    model: tuple[WanBackbone, dict[str, Any]],
    pair: tuple[Side, Side],
    settings: TrainSettings,
    passes: Any,
    reference: Any = None,
) -> tuple[dict[str, Tensor], PairLoss]:
    """Gradients and losses as the trainer forms them."""
    backbone, parameters = model
    set_up(backbone, settings, pair[0].noisy.shape[1:])
    for parameter in parameters.values():
        parameter.grad = None
    weights = Weights(torch.tensor([0.5, 1.5]), torch.tensor([2.0, 0.3]), torch.tensor([0.7, 1.1]))

    def loss(winner: Predictions, loser: Predictions) -> PairLoss:
        return pair_loss(winner, loser, settings.objective(), SIGMA, weights)

    losses = pair_gradients(backbone, *pair, loss, 2, passes, reference)
    take_down(backbone)
    assert not any(value.requires_grad for value in vars(losses).values())
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in parameters.items()}, losses


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert any(value.any() for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0, msg=lambda text, name=name: f"{name}: {text}")


SETTINGS = TrainSettings(beta=20.0, checkpointing="none")


@pytest.fixture(scope="module")
def plain(miniature: Any) -> tuple[dict[str, Tensor], PairLoss]:
    return run(miniature, sides(miniature[0]), SETTINGS, "separate")


@pytest.mark.parametrize("passes", ["separate", "one-sample"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"checkpointing": "full"},
        {"checkpointing": "selective"},
        {"checkpointing": "full", "offload_inputs": True},
        {"checkpointing": "selective", "offload_inputs": True},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()) or "none",
)
def test_all_modes_give_the_same_gradients(miniature: Any, plain: Any, changes: dict[str, Any], passes: str) -> None:
    found, losses = run(miniature, sides(miniature[0]), replace(SETTINGS, **changes), passes)
    assert_same(found, plain[0])
    assert all(torch.equal(value, vars(plain[1])[name]) for name, value in vars(losses).items())


@pytest.mark.parametrize("passes", ["separate", "one-sample"])
def test_a_known_reference_gives_the_same_gradients(miniature: Any, plain: Any, passes: Any) -> None:
    pair = sides(miniature[0])
    reference = reference_predictions(miniature[0], *pair, "separate")
    assert_same(run(miniature, pair, SETTINGS, passes, reference)[0], plain[0])


def test_batched_passes_differ_by_rounding(miniature: Any, plain: Any) -> None:
    """Another batch size sums in another order. In float64 every entry agrees; in float32 the gradients are near each
    other, and the batched one is not farther from float64's. With batched passes, too, the three kinds of checkpointing
    give one gradient."""
    pair = sides(miniature[0])
    batched, _ = run(miniature, pair, SETTINGS, "batched")
    exact = in_float64(miniature)
    precise, _ = run(exact, pair, SETTINGS, "separate")
    assert_same(run(exact, pair, SETTINGS, "batched")[0], precise)
    for name, value in plain[0].items():
        assert (batched[name] - value).norm() <= 5e-6 * value.norm()
        errors = [float((found[name] - precise[name]).norm()) for found in (batched, plain[0])]
        assert errors[0] <= 1.2 * errors[1]
    for kind in ("full", "selective"):
        assert_same(run(miniature, pair, replace(SETTINGS, checkpointing=kind), "batched")[0], batched)  # type: ignore[arg-type]


def in_float64(model: tuple[WanBackbone, dict[str, Any]]) -> tuple[WanBackbone, dict[str, Any]]:
    """The same weights, so that what is left of a difference is no rounding."""
    backbone = copy.copy(model[0])
    backbone.transformer = copy.deepcopy(backbone.transformer).double()
    return backbone, {name: p for name, p in backbone.transformer.named_parameters() if p.requires_grad}


OBJECTIVES: list[dict[str, Any]] = [
    {"arm": "dpo"},
    {"arm": "dpo+zo"},
    {"arm": "dpo+sft"},
    {"arm": "sft"},
    {"arm": "rwr"},
    {"arm": "dpo", "form": "hinge", "clip": None},
    {"arm": "dpo", "form": "ipo", "clip": None},
    {"arm": "dpo", "error_of": "noise", "reduction": "sum", "beta": 0.01, "label_smoothing": 0.1},
]


@pytest.mark.parametrize("changes", OBJECTIVES, ids=lambda changes: "-".join(str(value) for value in changes.values()))
def test_one_sample_at_a_time_is_exact_for_every_loss(miniature: Any, changes: dict[str, Any]) -> None:
    pair, settings = sides(miniature[0], tokens=9), replace(SETTINGS, **changes)
    expected, losses = run(miniature, pair, settings, "separate")
    found, same_losses = run(miniature, pair, settings, "one-sample")
    assert_same(found, expected)
    assert torch.equal(same_losses.total, losses.total)


@pytest.mark.parametrize(
    ("arm", "passes", "graphs"),
    [
        ("dpo", "batched", [4]),
        ("dpo", "separate", [2, 2]),
        ("dpo", "one-sample", [2, 2]),
        ("sft", "one-sample", [2]),  # the loss takes no account of the losers
    ],
)
def test_forward_passes(miniature: Any, arm: Any, passes: Any, graphs: list[int]) -> None:
    """Clips in each pass with a graph; those without are the reference's two and, one sample at a time, the loser's."""
    backbone, _ = miniature
    seen: list[tuple[int, bool]] = []
    plain_velocity = backbone.velocity

    def velocity(x: Tensor, *rest: Any) -> Tensor:
        out = plain_velocity(x, *rest)
        seen.append((len(x), out.requires_grad))
        return out

    backbone.velocity = velocity
    try:
        run(miniature, sides(backbone, tokens=9), replace(SETTINGS, arm=arm), passes)
    finally:
        del backbone.velocity
    assert [count for count, graph in seen if graph] == graphs
    without = [count for count, graph in seen if not graph]
    assert without == {"batched": [4], "separate": [2, 2], "one-sample": [2, 2, 2]}[passes]


def test_the_gradient_is_that_of_two_models_and_one_backward_pass(miniature: Any) -> None:
    """Independently: the reference a deep copy without adapter, the paper's loss written out, torch's autograd."""
    backbone, parameters = miniature
    winner, loser = sides(backbone, tokens=9)
    settings = replace(SETTINGS, beta=1.0)
    found, _ = run(miniature, (winner, loser), settings, "one-sample")
    other = copy.copy(backbone)
    other.transformer = copy.deepcopy(backbone.transformer)
    unload_lora(other.transformer, ADAPTER)
    for parameter in parameters.values():
        parameter.grad = None
    (model_w, ref_w), (model_l, ref_l) = (
        [which.velocity(side.noisy, SIGMA, side.text) for which in (backbone, other)] for side in (winner, loser)
    )
    gain_w = flow_error(ref_w, winner.target) - flow_error(model_w, winner.target)
    gain_l = flow_error(ref_l, loser.target) - flow_error(model_l, loser.target)
    preference = -torch.sigmoid(torch.clamp(gain_w - gain_l, -5, 5)).log() * torch.tensor([0.5, 1.5])
    anchor = 0.5 * (flow_error(model_w, ref_w) + flow_error(model_l, ref_l))
    (preference + 0.5 * anchor).mean().backward()
    for name, parameter in parameters.items():
        assert (found[name] - parameter.grad).norm() <= 1e-5 * parameter.grad.norm()


def test_evaluation_leaves_no_gradient(miniature: Any, plain: Any) -> None:
    backbone, parameters = miniature
    pair = sides(backbone)
    for parameter in parameters.values():
        parameter.grad = None
    reference = reference_predictions(backbone, *pair, "separate")
    losses = evaluate_pairs(
        backbone, *pair, lambda w, other: pair_loss(w, other, SETTINGS.objective(), SIGMA), "separate", reference
    )
    assert torch.equal(losses.margin, plain[1].margin)
    assert not losses.total.requires_grad
    assert all(parameter.grad is None for parameter in parameters.values())


def test_the_adapter_is_on_again_after_an_error(miniature: Any) -> None:
    backbone, _ = miniature
    with pytest.raises(RuntimeError, match="in between"), adapter_off(backbone.transformer):
        raise RuntimeError("in between")
    winner, _ = sides(backbone, tokens=9)
    assert backbone.velocity(winner.noisy, SIGMA, winner.text).requires_grad
