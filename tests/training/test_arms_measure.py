"""Numbers of an arms comparison: the best-of-n estimator against counting, and every row by hand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest

from spatialalign.errors import DataError
from training.arms_measure import ArmClips, Cost, at_cost, best_of_chances, compare
from training.measure import Scored


def arm(name: str, scores: Sequence[float | None], evaluations: float, pools: Sequence[Sequence[float | None]] = ()):
    """An arm of two prompts with two seeds each."""
    clips = [
        Scored("ab"[k // 2], k % 2, "LR", score, score, score, None if score else "x: y")
        for k, score in enumerate(scores)
    ]
    return ArmClips(name, clips, [Cost(evaluations, 1.0, 0.5)] * 4, pools)


def random_pools() -> list[list[float | None]]:
    """Twenty pools of six candidates, some INVALID."""
    rng = np.random.default_rng(0)
    return [[None if rng.random() < 0.3 else float(rng.random()) for _ in range(6)] for _ in range(20)]


def share(draws: Sequence[Sequence[float | None]]) -> float:
    """Of some draws, the share whose best reaches 0.7."""
    return sum(max((s for s in draw if s is not None), default=0.0) >= 0.7 for draw in draws) / len(draws)


def test_best_of_n_is_the_mean_over_all_draws_with_the_first() -> None:
    pools = random_pools()
    for pool, chances in zip(pools, best_of_chances(pools, 0.7), strict=True):
        draws = [[(pool[0], *rest) for rest in combinations(pool[1:], n - 1)] for n in range(1, 7)]
        np.testing.assert_allclose(chances, [share(each) for each in draws], atol=1e-12)


def test_best_of_n_has_no_bias() -> None:
    # Whichever candidate comes first, the mean is that over all draws of n.
    for pool in random_pools():
        turns = [[*pool[k:], *pool[:k]] for k in range(6)]
        expected = [share(list(combinations(pool, n))) for n in range(1, 7)]
        np.testing.assert_allclose(best_of_chances(turns, 0.7).mean(0), expected, atol=1e-12)


def test_a_score_of_exactly_the_threshold_is_correct() -> None:
    assert best_of_chances([[0.7, 0.6], [0.6999, 0.7]], 0.7).tolist() == [[1.0, 1.0], [0.0, 1.0]]


def test_pools_of_different_sizes_are_refused() -> None:
    with pytest.raises(DataError, match=r"\[1, 2\]"):
        best_of_chances([[0.1], [0.1, 0.2]])
    with pytest.raises(DataError, match=r"\[0\]"):
        best_of_chances([[]])


def test_a_cost_between_two_whole_numbers_is_a_mixture_of_both() -> None:
    chances = np.array([[0.2, 0.4, 1.0], [0.0, 0.5, 0.5]])
    for count, expected in ((1, [0.2, 0.0]), (2.25, [0.55, 0.5]), (3, [1.0, 0.5])):
        np.testing.assert_allclose(at_cost(chances, count), expected)
    # A cost that rounding left beside a whole number is that number, and what the pool cannot say is not said.
    np.testing.assert_allclose(at_cost(chances, 3 + 1e-9), [1.0, 0.5])
    assert at_cost(chances, 3.01) is None and at_cost(chances, 0.9) is None


def test_every_row_by_hand() -> None:
    base = arm("base", [0.8, 0.2, None, 0.3], 10)
    # Best of 3, of pools with 1, 1, 0 and 2 correct candidates.
    pools = [[0.8, 0.1, None], [0.2, 0.9, 0.1], [None, 0.1, 0.2], [0.3, 0.7, 0.8]]
    best = arm("best-of-3", [0.8, 0.9, 0.2, 0.8], 30, pools)
    middle = arm("guidance", [0.8, 0.8, None, 0.3], 15)
    dear = arm("particles-8", [0.8, 0.8, 0.8, 0.8], 80)
    result = compare([base, middle, best, dear], "best-of-3")
    rows = {row["name"]: row for row in result["arms"]}
    assert list(rows) == ["base", "guidance", "best-of-3", "particles-8"]
    assert [row["correct_at_0.7"]["value"] for row in rows.values()] == [0.25, 0.5, 0.75, 1.0]
    assert [row["cost"]["relative"] for row in rows.values()] == [1.0, 1.5, 3.0, 8.0]
    assert rows["base"]["difference"] is None and rows["best-of-3"]["difference"]["correct_at_0.7"]["value"] == 0.5
    # Clip by clip: the first candidate is correct; one of the other two is; none is; both others are.
    # One candidate: 1, 0, 0, 0; two: 1, 1/2, 0, 1; three: 1, 1, 0, 1.
    curve = result["best_of"]["correct_at_0.7"]
    assert result["best_of"]["arm"] == "best-of-3"
    assert [entry["value"] for entry in curve] == pytest.approx([1 / 4, 5 / 8, 3 / 4])
    # At 1.5 candidates: 1, 1/4, 0, 1/2, where the arm has 1, 1, 0, 0.
    equal = rows["guidance"]["equal_compute"]
    assert equal["n"] == 1.5 and equal["best_of_n"]["value"] == pytest.approx(7 / 16)
    assert equal["difference"]["value"] == pytest.approx(1 / 16)
    # By prompt the gains are 3/8 and -1/4: two prompts can be drawn as a a, a b or b b.
    assert (equal["difference"]["low"], equal["difference"]["high"]) == pytest.approx((-1 / 4, 3 / 8))
    assert rows["best-of-3"]["equal_compute"] is None, "it would be compared with itself"
    assert rows["particles-8"]["equal_compute"] is None, "the pool of 3 says nothing about 8"


def test_without_a_pool_there_is_no_comparison_at_equal_compute() -> None:
    result = compare([arm("base", [0.8] * 4, 10), arm("lora", [0.9] * 4, 10)], None)
    assert result["best_of"] is None and result["arms"][1]["equal_compute"] is None
    assert result["arms"][1]["difference"]["mean_score"]["value"] == pytest.approx(0.1)


def test_an_arm_without_a_clip_has_no_cost() -> None:
    lost = arm("lora", [None] * 4, 10)
    with pytest.raises(DataError, match="arm 'lora': not one clip"):
        compare([arm("base", [0.8] * 4, 10), ArmClips("lora", lost.clips, [])], None)
