"""Agreement of judgements: the sweeps against plain loops over every threshold, ranks against scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from spatialalign.agreement import (
    TieAccuracy,
    accuracy_with_ties,
    accuracy_without_ties,
    chance_with_ties,
    confusion,
    official_accuracy_with_ties,
    spearman,
)
from spatialalign.errors import DataError

PAIRS = st.lists(
    st.tuples(st.sampled_from((-1, 0, 1)), st.integers(-4, 4).map(lambda k: k / 2)), min_size=1, max_size=14
)
"""Margins of few sizes, so that equal ones, zeros and both signs of a size are common."""


def accuracy_at(pairs: list[tuple[int, float]], threshold: float) -> float:
    """Accuracy when margins up to ``threshold`` are called ties; written out from the definition."""
    agreeing = 0
    for label, margin in pairs:
        if abs(margin) <= threshold:
            agreeing += label == 0
        else:  # a margin of 0 that is no tie says neither A nor B
            agreeing += label * margin > 0
    return agreeing / len(pairs)


@given(PAIRS)
@example([(1, 1.0)])
@example([(0, 0.0), (1, 0.0)])
def test_with_ties_is_the_best_of_all_thresholds(pairs: list[tuple[int, float]]) -> None:
    sizes = sorted({abs(margin) for _, margin in pairs})
    between = [(a + b) / 2 for a, b in zip(sizes, sizes[1:], strict=False)]
    accuracies = {threshold: accuracy_at(pairs, threshold) for threshold in [-1.0, *sizes, *between, sizes[-1] + 1]}
    found = accuracy_with_ties(*zip(*pairs, strict=True))
    assert found.accuracy == max(accuracies.values())
    assert accuracies[-1.0 if found.threshold is None else found.threshold] == found.accuracy


def official_by_hand(pairs: list[tuple[int, float]]) -> float:
    """The same pairs one after the other, each turned into a tie, counted anew after every one; never none of them."""
    ordered = sorted(pairs, key=lambda pair: abs(pair[1]))
    best = 0.0
    for last in range(1, len(ordered) + 1):
        ties = sum(label == 0 for label, _ in ordered[:last])
        right = sum(label * margin > 0 for label, margin in ordered[last:])
        best = max(best, (ties + right) / len(ordered))
    return best


@given(PAIRS)
def test_the_official_variant_counts_pair_by_pair(pairs: list[tuple[int, float]]) -> None:
    assert official_accuracy_with_ties(*zip(*pairs, strict=True)) == official_by_hand(pairs)


@given(st.lists(st.tuples(st.sampled_from((-1, 0, 1)), st.sampled_from((-1, 1))), min_size=1, max_size=12))
def test_the_variants_agree_on_distinct_margins_unless_no_tie_is_best(pairs: list[tuple[int, int]]) -> None:
    labels, margins = [label for label, _ in pairs], [sign * (k + 1) for k, (_, sign) in enumerate(pairs)]
    proper, official = accuracy_with_ties(labels, margins), official_accuracy_with_ties(labels, margins)
    assert official <= proper.accuracy
    assert official == proper.accuracy or proper.threshold is None


def test_the_two_quirks_of_the_official_variant() -> None:
    # Right in every pair: nothing should be called a tie, which the official one cannot say.
    assert accuracy_with_ties([1], [2.0]) == TieAccuracy(1.0, None)
    assert official_accuracy_with_ties([1], [2.0]) == 0.0
    assert official_accuracy_with_ties([1, -1, 1, 1], [1.0, -2.0, 3.0, 4.0]) == 0.75
    # Equal margins are all ties or none: 2 of 4 either way. Stopping after the first two of them gives 4 of 4.
    labels, margins = [0, 0, 1, 1], [1.0, 1.0, 1.0, 1.0]
    assert accuracy_with_ties(labels, margins).accuracy == 0.5
    assert official_accuracy_with_ties(labels, margins) == 1.0
    assert official_accuracy_with_ties(labels[::-1], margins) == 0.5, "and it depends on the order of the file"


def test_without_ties_by_hand() -> None:
    # Decided: +1 right, -1 wrong, +1 with margin 0 wrong; the tie is not asked.
    assert accuracy_without_ties([1, -1, 1, 0], [0.5, 0.1, 0.0, 3.0]) == 1 / 3
    assert accuracy_without_ties([0, 0], [1.0, 2.0]) is None
    assert accuracy_without_ties([1, 1], [1.0, 2.0]) == 1.0


def test_ties_everywhere() -> None:
    assert accuracy_with_ties([0, 0, 0], [1.0, -5.0, 2.0]) == TieAccuracy(1.0, 5.0)
    assert chance_with_ties([0, 0, 0]) == 1.0


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        pytest.param([1] * 5 + [-1] * 5, 0.5, id="no ties: a coin"),
        pytest.param([0] * 4 + [1] * 6, 0.4, id="many ties: always a tie"),
        pytest.param([0, 1, -1], 1 / 3, id="as many of each: the least there is"),
    ],
)
def test_chance(labels: list[int], expected: float) -> None:
    assert chance_with_ties(labels) == pytest.approx(expected)


def test_random_margins_reach_chance() -> None:
    rng = np.random.default_rng(0)
    for ties in (0.1, 0.42):
        labels = rng.choice([0, 1, -1], size=40_000, p=[ties, (1 - ties) / 2, (1 - ties) / 2])
        found = accuracy_with_ties(labels, rng.standard_normal(40_000)).accuracy
        # The standard deviation of a share of 40,000 is at most 0.0025.
        assert found == pytest.approx(chance_with_ties(labels), abs=0.008)


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=12))
def test_spearman_is_scipys(points: list[tuple[int, int]]) -> None:
    stats = pytest.importorskip("scipy.stats")
    first, second = zip(*points, strict=True)
    found = spearman(first, second)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(stats.spearmanr(first, second).statistic)


def test_spearman_by_hand() -> None:
    # Ranks 1 2 3 4 against 1 2 4 3: 1 - 6 * (0 + 0 + 1 + 1) / (4 * 15) = 0.8.
    assert spearman([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(0.8)
    assert spearman([1], [2]) is None


def test_confusion_by_hand() -> None:
    found = confusion([0.7, 0.9, 0.1, 0.2], [0.8, 0.6, 0.7, 0.0])
    assert (found.both, found.first_only, found.second_only, found.neither) == (1, 1, 1, 1)
    assert found.agreement == 0.5
    assert confusion([], []).agreement is None
    assert confusion([1.0], [0.4], second_threshold=0.4).both == 1


@pytest.mark.parametrize(
    ("labels", "margins", "message"),
    [
        ([], [], "no pairs"),
        ([1, 0], [1.0], "one length"),
        ([2], [1.0], "found 2"),
        ([22, 1], [1.0, 1.0], "found 22"),
        ([1], [math.nan], "NaN"),
        ([1], [math.inf], "infinite"),
    ],
)
def test_what_is_not_pairs_is_refused(labels: list[int], margins: list[float], message: str) -> None:
    for measure in (accuracy_with_ties, accuracy_without_ties, official_accuracy_with_ties):
        with pytest.raises(DataError, match=message):
            measure(labels, margins)
