"""The granular preference loss against numbers worked out by hand, and in a training."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from spatialalign.backbones.wan import WanBackbone
from spatialalign.blocks import BlockGrid
from spatialalign.errors import ConfigError, DataError
from training.config import TrainSettings
from training.dpo import train
from training.losses import Predictions, Weights, block_error, block_preferences, flow_error, pair_loss
from training.objective import Objective
from training.patch_scores import PatchScores, write_patches
from training.presets import PRESETS
from training.store import Store

GRANULAR = Objective("dpo", beta=1.0, clip=3.0, granular_weight=0.5)


def field(*values: float) -> Tensor:
    """One sample of two columns, ``(1, 1, 1, 1, 2)``."""
    return torch.tensor(values).reshape(1, 1, 1, 1, 2)


def weights(*values: float) -> Tensor:
    """Signed weights of two blocks side by side."""
    return torch.tensor(values).reshape(1, 1, 1, 2)


# Winner: target (0, 0), reference (2, 0), model (1, 1) -> block errors ref (4, 0), model (1, 1), gains (3, -1).
# Loser:  target (1, 1), reference (1, 2), model (3, 1) -> block errors ref (0, 1), model (4, 0), gains (-4, 1).
# Blocks' parts of the margin at beta 1: (3.5, -1), of which the first is clipped to 3; the whole clips' is 2.5.
WINNER = Predictions(model=field(1, 1), reference=field(2, 0), target=field(0, 0))
LOSER = Predictions(model=field(3, 1), reference=field(1, 2), target=field(1, 1))


def soft(margin: float) -> float:
    """-log sigmoid."""
    return math.log(1 + math.exp(-margin))


def random_pair(seed: int = 0) -> tuple[Predictions, Predictions]:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(3, 2, 4, 4, 6, generator=generator) for _ in range(6)]
    return Predictions(*parts[:3]), Predictions(*parts[3:])


def test_block_errors_by_hand() -> None:
    prediction = torch.arange(16.0).reshape(1, 2, 1, 2, 4)  # two channels
    found = block_error(prediction, torch.zeros_like(prediction), BlockGrid(1, 1, 2))
    # left columns 0 and 1: 0 1 4 5 and 8 9 12 13; right: 2 3 6 7 and 10 11 14 15
    left, right = (sum(v * v for v in values) for values in ((0, 1, 4, 5, 8, 9, 12, 13), (2, 3, 6, 7, 10, 11, 14, 15)))
    assert found.flatten().tolist() == [left / 16, right / 16]
    assert found.sum().item() == flow_error(prediction, torch.zeros_like(prediction)).item()
    sums = block_error(prediction, torch.zeros_like(prediction), BlockGrid(1, 1, 2), "sum")
    assert sums.flatten().tolist() == [left, right]


def test_preferences_of_blocks_by_hand() -> None:
    """Differences 0.5, -0.3, 0.1 and unknown; beyond a tie of 0.2: 0.5 and -0.3 over a mean of 0.8 / 4."""
    winner = torch.tensor([0.9, 0.2, 0.6, math.nan]).reshape(1, 1, 2, 2)
    loser = torch.tensor([0.4, 0.5, 0.5, 0.5]).reshape(1, 1, 2, 2)
    assert block_preferences(winner, loser, 0.2).flatten().tolist() == pytest.approx([2.5, -1.5, 0, 0])
    assert block_preferences(winner, loser, 1.0).flatten().tolist() == [0, 0, 0, 0]


def test_the_granular_loss_by_hand() -> None:
    """0.75 on the left in favour of the winner, 0.25 on the right of the loser, whose margin there is 1."""
    loss = pair_loss(WINNER, LOSER, GRANULAR, blocks=weights(0.75, -0.25))
    expected = 0.75 * soft(3.0) + 0.25 * soft(1.0)
    assert loss.granular.item() == pytest.approx(expected)
    assert loss.dpo.item() == pytest.approx(soft(2.5))
    assert loss.total.item() == pytest.approx(soft(2.5) + 0.5 * expected)
    pair = torch.tensor([3.0])
    weighted = pair_loss(WINNER, LOSER, GRANULAR, weights=Weights(pair, pair, pair), blocks=weights(0.75, -0.25))
    assert weighted.total.item() == pytest.approx(3 * loss.total.item())


def test_without_weight_it_is_flow_dpo_to_the_bit() -> None:
    winner, loser = random_pair()
    sigma = torch.tensor([0.2, 0.5, 0.9])
    blocks = block_preferences(torch.randn(3, 2, 2, 3), torch.randn(3, 2, 2, 3))
    flow_dpo = PRESETS["flow-dpo"].objective()
    granular = replace(PRESETS["gran-dpo"], granular_weight=0.0).objective()
    assert PRESETS["gran-dpo"].objective() == replace(flow_dpo, granular_weight=1.0)
    expected, found = (
        pair_loss(winner, loser, flow_dpo, sigma),
        pair_loss(winner, loser, granular, sigma, None, blocks),
    )
    assert torch.equal(found.total, expected.total) and torch.equal(found.margin, expected.margin)
    assert not found.granular.any()


@pytest.mark.parametrize("form", ["sigmoid", "hinge", "ipo"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_one_block_with_the_clips_label_is_one_plus_lambda_times_flow_dpo(form: str, reduction: str) -> None:
    winner, loser = random_pair(1)
    sigma = torch.tensor([0.2, 0.5, 0.9])
    plain = Objective("dpo", beta=0.3, half_beta=True, error_of="noise", clip=None, form=form, reduction=reduction)  # type: ignore[arg-type]
    one = torch.ones(3, 1, 1, 1)
    expected = pair_loss(winner, loser, plain, sigma).total
    found = pair_loss(winner, loser, replace(plain, granular_weight=0.7), sigma, None, one).total
    torch.testing.assert_close(found, 1.7 * expected)
    assert expected.std() > 1e-3


def test_the_order_of_the_blocks_does_not_matter() -> None:
    """Columns of both clips and of the weights are swapped alike; swapping the clips alone changes the loss."""
    winner, loser = random_pair(2)
    generator = torch.Generator().manual_seed(0)
    blocks = block_preferences(*(torch.rand(3, 2, 2, 3, generator=generator) for _ in range(2)))

    def mirrored(side: Predictions) -> Predictions:
        return Predictions(*(part.flip(-1) for part in (side.model, side.reference, side.target)))

    found = pair_loss(winner, loser, GRANULAR, blocks=blocks).total
    torch.testing.assert_close(
        pair_loss(mirrored(winner), mirrored(loser), GRANULAR, blocks=blocks.flip(-1)).total, found
    )
    assert (pair_loss(mirrored(winner), mirrored(loser), GRANULAR, blocks=blocks).total - found).abs().min() > 1e-3


def test_its_gradient_pulls_each_block_to_the_better_clip() -> None:
    """Model equal to reference, the winner better on the left alone: the step lowers its error there, raises it right.

    The video term is left out by taking its gradient away.
    """
    reference, target = field(1.0, 1.0), field(0.0, 0.0)
    pulls = []
    for objective in (GRANULAR, replace(GRANULAR, granular_weight=0.0)):
        model = reference.clone().requires_grad_()
        side, other = Predictions(model, reference, target), Predictions(reference, reference, target)
        pair_loss(side, other, objective, blocks=weights(0.5, -0.5)).total.sum().backward()
        assert model.grad is not None
        pulls.append(model.grad.flatten())
    left, right = (pulls[0] - pulls[1]).tolist()
    assert left == pytest.approx(-right) and left > 0


def test_a_granular_objective_needs_blocks() -> None:
    with pytest.raises(ValueError, match="blocks"):
        pair_loss(WINNER, LOSER, GRANULAR)


def test_settings_that_contradict_each_other() -> None:
    for change, words in (
        ({"arm": "sft", "granular_weight": 1.0}, "arm .* granular_weight"),
        ({"granular_tie": 0.1}, "granular_weight .* granular_tie"),
        ({"granular_weight": -1.0}, "granular_weight"),
    ):
        with pytest.raises(ConfigError, match=words):
            replace(PRESETS["spatialalign"], **change)  # type: ignore[arg-type]


SETTINGS = TrainSettings(
    arm="dpo",
    steps=4,
    batch_pairs=2,
    rank=2,
    beta=20.0,
    lr=5e-3,
    warmup_steps=1,
    held_out=0.3,
    held_out_pairs=2,
    checkpointing="none",
    tensorboard=False,
)


def block_scores(store: Store, better: float) -> PatchScores:
    """The left half of every winner is better by this, the right half worse by a third of it."""
    value = np.array([better, -better / 3], np.float32).reshape(1, 1, 2)
    values = {(p.prompt_id, seed): value * (seed == 0) for p in store.prompts() for seed in (0, 1, 2)}
    return PatchScores(BlockGrid(1, 1, 2), "by hand", values)


def test_a_training_with_block_scores(backbone: WanBackbone, paired_store: Store, tmp_path: Path) -> None:
    """It differs from one without, resumes only with the same scores, and its log has the term."""
    pairs, path = paired_store.root / "pairs.json", tmp_path / "patches.safetensors"
    write_patches(path, block_scores(paired_store, 0.5))
    granular = replace(SETTINGS, granular_weight=1.0)
    plain = train(backbone, paired_store, pairs, tmp_path / "plain", SETTINGS)
    found = train(backbone, paired_store, pairs, tmp_path / "granular", granular, patches=path)
    assert plain.held_out is not None and found.held_out is not None
    assert plain.held_out["granular"] == 0 < found.held_out["granular"]
    assert found.held_out["margin"] != plain.held_out["margin"]
    write_patches(path, block_scores(paired_store, 0.6))
    with pytest.raises(ConfigError, match="patches_digest"):
        train(backbone, paired_store, pairs, tmp_path / "granular", granular, patches=path)


def test_block_scores_and_weight_belong_together(backbone: WanBackbone, paired_store: Store, tmp_path: Path) -> None:
    pairs, path = paired_store.root / "pairs.json", tmp_path / "patches.safetensors"
    scores = block_scores(paired_store, 0.5)
    write_patches(path, scores)
    with pytest.raises(ConfigError, match="patches"):
        train(backbone, paired_store, pairs, tmp_path / "a", replace(SETTINGS, granular_weight=1.0))
    with pytest.raises(ConfigError, match="patches"):
        train(backbone, paired_store, pairs, tmp_path / "b", SETTINGS, patches=path)
    values = {clip: value for clip, value in scores.values.items() if clip != ("0002_RL", 1)}
    write_patches(path, replace(scores, values=values))
    with pytest.raises(DataError, match="0002_RL/1"):
        train(backbone, paired_store, pairs, tmp_path / "c", replace(SETTINGS, granular_weight=1.0), patches=path)
