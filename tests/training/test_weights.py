"""Weights of pairs and clips against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from spatialalign.errors import DataError
from training.config import TrainSettings
from training.pairs import PairStream, PreferencePair, PromptPairs
from training.store import Store
from training.weights import (
    Weighting,
    advantages,
    effective_sample_size,
    read_scores,
    reward_weights,
    weighting,
)

PROMPTS = [PromptPairs("a", (0,), (1, 2, 3)), PromptPairs("b", (0, 1), (2, 3))]
SCORES = {
    **{("a", seed): score for seed, score in enumerate((0.9, 0.1, 0.1, 0.1))},
    **{("b", seed): score for seed, score in enumerate((0.8, 0.8, 0.6, 0.6))},
}


def test_advantages_are_normalised_within_a_prompt() -> None:
    """0, 0, 1: mean 1/3, variance 2/9, so (0 - 1/3) / (sqrt 2 / 3) = -1/sqrt 2 and sqrt 2."""
    assert advantages([0, 0, 1]).tolist() == pytest.approx([-1 / math.sqrt(2), -1 / math.sqrt(2), math.sqrt(2)])
    assert advantages([5, 5, 8]).tolist() == pytest.approx(advantages([0, 0, 1]).tolist())
    assert advantages([0.3, 0.3]).tolist() == [0, 0]


def test_reward_weights_have_a_temperature_and_a_limit() -> None:
    """exp(2 / 0.5) = 54.6 is cut to 20; exp(-1 / 0.5) = 0.1353."""
    assert reward_weights(np.array([2.0, -1.0]), 0.5, 20.0).tolist() == pytest.approx([20.0, math.exp(-2)])


def test_effective_sample_size_counts_equal_weights_and_sees_one_that_dominates() -> None:
    """(3 + 1)^2 / (9 + 1) = 1.6."""
    assert effective_sample_size([2, 2, 2]) == pytest.approx(3)
    assert effective_sample_size([3, 1]) == pytest.approx(1.6)


def test_margin_weights() -> None:
    """Differences 0.8 in prompt a and 0.2 in b, prompts drawn alike: mean 0.5, weights 1.6 and 0.4."""
    weights = Weighting(PROMPTS, [], SCORES, TrainSettings(pair_weight="margin"))
    pairs = [PreferencePair("a", 0, 2), PreferencePair("b", 1, 2)]
    assert weights.of(pairs).pair.tolist() == pytest.approx([1.6, 0.4])


def test_rarity_weights() -> None:
    """Shares of the 8 clips: 0.9 has 1/8, 0.1 3/8, 0.8 and 0.6 2/8 each.

    With the power 1 the pairs of a weigh 8 * 8/3 = 21.33 and those of b 4 * 4 = 16; mean 18.67.
    """
    weights = Weighting(PROMPTS, [], SCORES, TrainSettings(pair_weight="rarity", rarity_power=1.0))
    found = weights.of([PreferencePair("a", 0, 2), PreferencePair("b", 1, 2)]).pair.tolist()
    mean = (64 / 3 + 16) / 2
    assert found == pytest.approx([64 / 3 / mean, 16 / mean])


@pytest.mark.parametrize("kind", ["margin", "rarity"])
def test_the_mean_weight_of_the_pairs_that_are_drawn_is_one(kind: str) -> None:
    weights = Weighting(PROMPTS, [], SCORES, TrainSettings(pair_weight=kind))  # type: ignore[arg-type]
    stream = PairStream(PROMPTS, 0)
    drawn = weights.of([stream.pair(index) for index in range(4000)]).pair
    assert drawn.mean().item() == pytest.approx(1, abs=4 * drawn.std().item() / 4000**0.5)


def test_reward_weights_of_drawn_pairs_average_over_the_clips_of_a_prompt() -> None:
    """Prompt a: advantages sqrt 3 and three times -1/sqrt 3. Pairs hold the one winner and one of three losers.

    Half the sum of a pair's two terms must be, in the mean, that of its four clips with a quarter each.
    """
    weights = Weighting(PROMPTS, [], SCORES, TrainSettings(arm="rwr", rwr_temperature=2.0))
    win, lose = math.exp(math.sqrt(3) / 2), math.exp(-1 / math.sqrt(3) / 2)
    of = weights.of([PreferencePair("a", 0, seed) for seed in (1, 2, 3)])
    assert of.winner.tolist() == pytest.approx([win / 2] * 3)  # 2 * 1 / 4
    assert of.loser.tolist() == pytest.approx([lose * 1.5] * 3)  # 2 * 3 / 4
    mean = sum(0.5 * (w + lost) for w, lost in zip(of.winner.tolist(), of.loser.tolist(), strict=True)) / 3
    assert mean == pytest.approx((win + 3 * lose) / 4)


def test_effective_share_of_the_training_clips() -> None:
    """One prompt whose clips weigh e and 1/e (advantages 1 and -1): mean cosh 1, mean square cosh 2."""
    prompt, scores = PromptPairs("a", (0,), (1,)), {("a", 0): 1.0, ("a", 1): 0.0}
    weights = Weighting([prompt], [], scores, TrainSettings(arm="rwr"))
    assert weights.effective_share == pytest.approx(math.cosh(1) ** 2 / math.cosh(2))


def test_held_out_clips_have_weights_but_no_say() -> None:
    alone = Weighting(PROMPTS[:1], [], SCORES, TrainSettings(arm="rwr"))
    both = Weighting(PROMPTS[:1], PROMPTS[1:], SCORES, TrainSettings(arm="rwr"))
    assert both.effective_share == alone.effective_share
    assert both.of([PreferencePair("b", 0, 2)]).winner.item() == pytest.approx(math.e)  # 2 winners of 4: factor 1


def test_no_scores_are_read_unless_weights_are_wanted(paired_store: Store) -> None:
    """The store of the tests has none."""
    prompts = [PromptPairs("0001_LR", (0,), (1, 2))]
    assert weighting(paired_store, prompts, [], TrainSettings(), "official") is None
    with pytest.raises(DataError, match=r"score\.json"):
        weighting(paired_store, prompts, [], TrainSettings(pair_weight="margin"), "official")
    with pytest.raises(DataError, match=r"0001_LR/0/score\.json"):
        read_scores(paired_store, prompts, "robust")


def test_labels_of_the_pairs_weigh_instead_of_the_store(paired_store: Store) -> None:
    """Advantages of labels 3 and 1 are 1 and -1."""
    prompts, labels = [PromptPairs("0001_LR", (0,), (1,))], {("0001_LR", 0): 3.0, ("0001_LR", 1): 1.0}
    weights = weighting(paired_store, prompts, [], TrainSettings(arm="rwr"), labels)
    assert weights is not None
    of = weights.of([PreferencePair("0001_LR", 0, 1)])
    assert (of.winner.item(), of.loser.item()) == pytest.approx((math.e, 1 / math.e))
    with pytest.raises(DataError, match="no score of clip 0001_LR/2"):
        read_scores(paired_store, [PromptPairs("0001_LR", (0,), (1, 2))], labels)
