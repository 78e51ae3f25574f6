"""Rules for winners and losers against choices worked out by hand, and against brute force."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.pair_rules import Judged, agreement, best_worst, by_margin, by_threshold, choose
from training.pairs import PromptPairs


def clips(*scores: float) -> list[Judged]:
    return [Judged(seed, score, 0.5) for seed, score in enumerate(scores)]


def test_threshold_takes_every_clip_by_its_own_threshold() -> None:
    assert by_threshold([Judged(0, 0.5, 0.5), Judged(1, 0.6, 0.7), Judged(2, -3.0, 0.0)]) == ((0,), (1, 2))


@pytest.mark.parametrize(
    ("scores", "margin", "expected"),
    [
        ((0, 1, 2, 3), 1.0, ((2, 3), (0, 1))),  # 2 x 2 pairs; 1 x 3 and 3 x 1 are fewer
        ((0, 1, 2, 3), 2.0, ((2, 3), (0,))),  # as many as ((3,), (0, 1)), and both gaps are 2: fewer losers
        ((0, 1, 2, 3.5), 2.0, ((3,), (0, 1))),  # as many, and the wider gap: 2.5 against 2
        ((0, 1, 2, 3), 3.5, ((), ())),
        ((2.0, 0.0, 0.0, 2.0), 2.0, ((0, 3), (1, 2))),
        ((1.0,), 0.1, ((), ())),
        ((), 0.1, ((), ())),
    ],
)
def test_margin(scores: tuple[float, ...], margin: float, expected: tuple[tuple[int, ...], ...]) -> None:
    assert by_margin(clips(*scores), margin) == expected


@given(scores=st.lists(st.integers(-4, 4), max_size=7), margin=st.integers(1, 5))
def test_no_other_choice_has_more_pairs_that_far_apart(scores: list[int], margin: int) -> None:
    winners, losers = by_margin(clips(*scores), margin)
    assert all(scores[w] - scores[lost] >= margin for w in winners for lost in losers)
    assert bool(winners) == bool(losers)
    every = range(len(scores))
    subsets = [set(some) for size in every for some in combinations(every, size + 1)]
    most = max(  # for any losers, all that are far enough above the best of them
        (len(some) * sum(s - max(scores[i] for i in some) >= margin for s in scores) for some in subsets), default=0
    )
    assert len(winners) * len(losers) == most


def test_best_against_worst() -> None:
    assert best_worst(clips(0.2, 0.9, 0.1, 0.9, 0.1)) == ((1,), (2,))
    assert best_worst(clips(0.4, 0.4)) == ((), ())
    assert best_worst([]) == ((), ())
    assert best_worst(clips(0.2, 0.5), margin=0.4) == ((), ())


def test_the_rule_is_chosen_by_name() -> None:
    values = clips(0.0, 0.4, 0.6, 1.0)
    assert choose(values, "threshold", 0.0) == ((2, 3), (0, 1))
    assert choose(values, "margin", 0.9) == ((3,), (0,))
    assert choose(values, "best-worst", 0.0) == ((3,), (0,))


def test_agreement_counts_prompts_alike_and_ties_half() -> None:
    """Prompt a: better, worse, equal: (1 + 0 + 1/2) / 3. Prompt b: better once, once unknown: 1. Prompt c: unknown."""
    prompts = [PromptPairs("a", (0,), (1, 2, 3)), PromptPairs("b", (0,), (1, 2)), PromptPairs("c", (0,), (1,))]
    scores = {("a", 0): 1.0, ("a", 1): 0.0, ("a", 2): 2.0, ("a", 3): 1.0, ("b", 0): 5.0, ("b", 1): 4.0, ("c", 0): 1.0}
    assert agreement(prompts, scores) == pytest.approx((0.5 + 1) / 2)
    assert agreement(prompts[2:], scores) is None
