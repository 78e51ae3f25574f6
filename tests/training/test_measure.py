"""The numbers of an evaluation, from hand-made scores."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spatialalign.errors import DataError
from training.measure import Scored, chance, difference, plain, summarise, table

Others = tuple[float | None, ...]


def clip(prompt: str, seed: int, score: float | None, code: str = "LR", others: Others = ()) -> Scored:
    """A clip whose normalised and robust scores follow the score."""
    robust = None if score is None else max(0.0, score - 0.2)
    return Scored(prompt, seed, code, score, score, robust, None if score is not None else "frames: 3 of 17", others)


BASE = [
    clip("a", 0, 0.9, "LR", (0.8, 0.1)),
    clip("a", 1, 0.7, "LR", (0.2, 0.1)),
    clip("b", 0, 0.3, "TL", (None, 0.7)),
    clip("b", 1, None, "TL", (None, None)),
]
ALIGNED = [clip("a", 0, 0.9), clip("a", 1, 0.8), clip("b", 0, 0.95, "TL"), clip("b", 1, None, "TL")]


def test_the_numbers_of_one_model() -> None:
    found = summarise(BASE)
    assert found["videos"] == 4
    mean = pytest.approx((0.9 + 0.7 + 0.3) / 3)
    assert plain(found) == {"correct_at_0.7": 0.5, "invalid_rate": 0.25, "mean_score": mean}
    curve = {row["tau"]: row for row in found["correct_at"]}
    assert [curve[k / 10]["value"] for k in range(10)] == [0.75, 0.75, 0.75, 0.75, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25]
    # 0.7 misses the published program's 0.7000000000000001, and 0.3 its 0.30000000000000004.
    assert curve[0.7]["official"] == 0.25 and curve[0.3]["official"] == 0.5
    assert found["per_type"]["LR"]["correct_at_0.7"]["value"] == 1.0
    assert found["per_type"]["TL"]["invalid_rate"]["value"] == 0.5
    assert found["invalid_reasons"] == {"frames": 1}
    # robust = score - 0.2: of 0.7, 0.5 and 0.1 only the first reaches 0.7.
    assert found["robust_correct_at_0.7"]["value"] == 0.25


def test_the_difference_is_paired() -> None:
    found = difference(BASE, ALIGNED)
    assert found["correct_at_0.7"]["value"] == pytest.approx(0.25)
    assert found["invalid_rate"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert found["mean_score"]["value"] == pytest.approx((0.0 + 0.1 + 0.65) / 3)
    # Prompt a changes by 0 and prompt b by one half, so resampled prompts give 0 to one half.
    assert (found["correct_at_0.7"]["low"], found["correct_at_0.7"]["high"]) == (0.0, 0.5)
    with pytest.raises(DataError, match="same prompts and seeds"):
        difference(BASE, ALIGNED[::-1])


def test_chance_counts_the_types_not_asked_for() -> None:
    assert chance(BASE)["value"] == 2 / 8, "0.8 and 0.7 of eight scores, three of them INVALID"
    with pytest.raises(DataError, match="other types"):
        chance(ALIGNED)


def test_a_model_whose_every_clip_is_invalid_has_numbers() -> None:
    nothing = [clip("a", 0, None), clip("b", 0, None)]
    found = summarise(nothing)
    assert plain(found) == {"correct_at_0.7": 0.0, "invalid_rate": 1.0, "mean_score": None}
    change = difference([clip("a", 0, 0.9), clip("b", 0, 0.9)], nothing)
    assert change["invalid_rate"]["value"] == 1.0 and change["mean_score"]["value"] is None
    with pytest.raises(DataError, match="nothing was evaluated"):
        summarise([])


def test_the_table_holds_every_number() -> None:
    result = {
        "base": summarise(BASE),
        "aligned": summarise(ALIGNED),
        "difference": difference(BASE, ALIGNED),
        "controls": {"chance": {"base": chance(BASE), "aligned": chance(BASE)}, "swapped": None},
    }
    lines = table(result).splitlines()
    assert len({len(line) for line in lines}) == 1, "columns are aligned"
    assert "50.0" in lines[2] and "75.0" in lines[2] and "+25.0" in lines[2]
    assert lines[3].startswith("| INVALID") and "25.0" in lines[3]


scores = st.one_of(st.none(), st.floats(0, 1))


@given(st.lists(st.tuples(st.sampled_from("abcd"), scores), min_size=1, max_size=20))
def test_rates_are_consistent(rows: list[tuple[str, float | None]]) -> None:
    clips = [clip(prompt, seed, score) for seed, (prompt, score) in enumerate(rows)]
    found = summarise(clips)
    values = [row["value"] for row in found["correct_at"]]
    assert values == sorted(values, reverse=True), "a higher threshold is never reached more often"
    assert values[0] == pytest.approx(1 - found["invalid_rate"]["value"]), "Correct@0 is the valid rate"
    for row in found["correct_at"]:
        assert -1e-12 <= row["low"] <= row["high"] <= 1 + 1e-12
        assert math.isfinite(row["value"])
    same = difference(clips, clips)
    assert same["correct_at_0.7"] == {"value": 0.0, "low": 0.0, "high": 0.0}
