"""Rates, intervals and estimators against closed forms and brute force."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from spatialalign.errors import DataError
from spatialalign.metrics import (
    Interval,
    cluster_bootstrap,
    correct_at,
    correct_curve,
    invalid_difference,
    invalid_rate,
    mean_difference,
    mean_interval,
    mean_score,
    pair_up,
    pass_at_k,
    rate_difference,
    rate_interval,
    thresholds,
)

scores = st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=1, max_size=40)


def test_by_hand() -> None:
    values = [0.9, 0.7, 0.2, None]
    assert correct_at(values) == 0.5
    assert invalid_rate(values) == 0.25
    assert mean_score(values) == pytest.approx(0.6)
    assert mean_score([None, None]) is None
    assert correct_curve(values).tolist() == [0.75, 0.75, 0.75, 0.5, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25]


def test_both_threshold_conventions() -> None:
    # The official steps overshoot at these three; a score of exactly 0.7 is a winner and yet not Correct@0.7 there.
    over = thresholds("official") > thresholds("exact")
    assert np.flatnonzero(over).tolist() == [3, 6, 7]
    assert thresholds("official").tolist() == np.arange(0, 1, 0.1).tolist()
    assert thresholds("exact").tolist() == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert correct_curve([0.7], thresholds("official"))[7] == 0
    assert correct_curve([0.7], thresholds("exact"))[7] == correct_at([0.7]) == 1


@given(scores)
def test_the_curve_falls_from_the_valid_rate(values: list[float | None]) -> None:
    curve = correct_curve(values)
    assert curve[0] == pytest.approx(1 - invalid_rate(values))
    assert (np.diff(curve) <= 0).all()
    for tau, rate in zip(thresholds(), curve, strict=True):
        assert rate == sum(v is not None and v >= tau for v in values) / len(values)


def test_cluster_bootstrap_matches_theory() -> None:
    # 400 clusters of 5 equal values: the mean of 400 independent ones, not of 2,000.
    rng = np.random.default_rng(0)
    each = rng.normal(0, 1, 400)
    clusters = [i for i in range(400) for _ in range(5)]
    interval = cluster_bootstrap(np.repeat(each, 5), clusters)
    half = 1.96 * each.std() / np.sqrt(400)
    assert interval.estimate == pytest.approx(each.mean())
    assert interval.high - interval.estimate == pytest.approx(half, rel=0.1)
    assert interval.estimate - interval.low == pytest.approx(half, rel=0.1)
    naive = cluster_bootstrap(np.repeat(each, 5), range(2000))
    assert (naive.high - naive.low) * np.sqrt(5) == pytest.approx(interval.high - interval.low, rel=0.1)


def test_cluster_bootstrap_covers() -> None:
    # 95 % intervals of a rate must hold the truth about 95 times of 100 (4 standard errors of slack and few clusters).
    hits = 0
    rng = np.random.default_rng(1)
    for trial in range(200):
        chance = rng.beta(2, 2, 60)  # true mean 1/2, prompts unlike each other
        wins = (rng.random((60, 4)) < chance[:, None]).astype(float).ravel()
        interval = cluster_bootstrap(wins, np.repeat(np.arange(60), 4).tolist(), resamples=500, seed=trial)
        hits += interval.low <= 0.5 <= interval.high
    assert 175 <= hits <= 199


def test_bootstrap_is_seeded_and_level_widens() -> None:
    values, clusters = np.arange(30) % 7, [i // 3 for i in range(30)]
    assert cluster_bootstrap(values, clusters, seed=4) == cluster_bootstrap(values, clusters, seed=4)
    wide, narrow = (cluster_bootstrap(values, clusters, level=level) for level in (0.99, 0.5))
    assert wide.low < narrow.low <= narrow.high < wide.high


def test_pairing_narrows_the_difference() -> None:
    rng = np.random.default_rng(2)
    base = np.clip(rng.normal(0.5, 0.2, 200), 0, 0.9)
    aligned = base + 0.05
    prompts = [i // 4 for i in range(200)]
    gain = mean_difference(base.tolist(), aligned.tolist(), prompts)
    assert (gain.estimate, gain.low, gain.high) == pytest.approx((0.05, 0.05, 0.05))
    assert gain.excludes_zero
    rate = rate_difference(base.tolist(), aligned.tolist(), prompts)
    expected = correct_at(aligned.tolist()) - correct_at(base.tolist())
    assert rate.estimate == pytest.approx(expected)
    assert rate.low <= expected <= rate.high


def test_invalid_ones() -> None:
    base: list[float | None] = [None, 0.8, 0.2, 0.4]
    aligned: list[float | None] = [0.9, None, 0.6, 0.4]
    prompts = ["a", "a", "b", "b"]
    # Wrong where invalid: one won, one lost; nothing on balance.
    assert rate_difference(base, aligned, prompts).estimate == 0
    # Valid in both: gains of 0.4 and 0.
    assert mean_difference(base, aligned, prompts).estimate == pytest.approx(0.2)
    assert invalid_difference(base, aligned, prompts).estimate == 0
    assert mean_interval(base, prompts).estimate == pytest.approx(1.4 / 3)
    assert rate_interval(base, prompts).estimate == 0.25
    with pytest.raises(DataError, match="no usable value"):
        mean_interval([None], ["a"])


def test_pair_up() -> None:
    base = {("a", 0): 0.1, ("a", 1): None}
    aligned = {("a", 1): 0.5, ("a", 0): 0.4}
    assert pair_up(base, aligned) == (["a", "a"], [0.1, None], [0.4, 0.5])
    with pytest.raises(DataError, match="prompt 'b', seed 3: only the aligned model"):
        pair_up(base, {**aligned, ("b", 3): 0.4})


@given(st.integers(1, 9), st.data())
def test_pass_at_k_counts_subsets(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k([c], [n], k) == pytest.approx(sum(any(draw) for draw in draws) / len(draws))


def test_pass_at_k_averages_prompts_and_refuses_too_few_videos() -> None:
    assert_allclose(pass_at_k([1, 0], [2, 2], 1), 0.25)
    with pytest.raises(DataError, match="pass@3"):
        pass_at_k([1], [2], 3)


def test_bad_scores() -> None:
    with pytest.raises(DataError, match="no scores"):
        correct_at([])
    with pytest.raises(DataError, match=r"expected scores in \[0, 1\] or None"):
        correct_at([0.5, -100.0])
    with pytest.raises(DataError, match=r"expected scores in \[0, 1\] or None"):
        correct_at([float("nan")])
    with pytest.raises(DataError, match="one positive length"):
        rate_interval([0.5], ["a", "b"])
    with pytest.raises(DataError, match="same prompts and seeds"):
        rate_difference([0.5], [0.5, 0.6], ["a"])
    assert Interval(0.0, -0.1, 0.1).excludes_zero is False
