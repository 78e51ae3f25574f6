"""Ranking and rates of results, by hand-made scores."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from spatialalign import DSR, DsrScore, Relation, Tracks, dsr_score
from spatialalign.errors import DataError
from spatialalign.summary import RULES, rank, ranking_text, score_by, summarise, summary_lines

LR = DSR("cat", "box", Relation.LEFT, Relation.RIGHT)


def result(score: float | None) -> DsrScore:
    """A result with this score; its robust score is one minus it."""
    boxes = np.array([[[5 * i, 0, 5 * i + 10, 10], [35, 0, 45, 10]] for i in range(16)], dtype=float)
    boxes[:] = np.nan if score is None else boxes
    found = dsr_score(Tracks(boxes, np.ones((16, 2)), ("cat", "box"), (20, 100), 8), LR)
    if score is None:
        return found
    assert found.robust is not None
    return replace(found, score=score, robust=replace(found.robust, score=1 - score))


def test_ranks_put_invalid_last_and_keep_the_order_of_equals() -> None:
    results = [result(score) for score in (None, 0.0, 0.5, 1.0, None, 0.5)]
    assert rank(results, "paper") == [3, 2, 5, 1, 0, 4]
    assert rank(results, "robust") == [1, 2, 5, 3, 0, 4]
    assert rank(results[:1] * 3, "normalised") == [0, 1, 2]
    assert rank([], "paper") == []


def test_a_result_without_a_robust_score_is_last_by_that_rule() -> None:
    bare = replace(result(0.9), robust=None)
    assert [score_by(bare, rule) for rule in RULES] == [0.9, 0.9, None]
    assert rank([bare, result(0.9)], "robust") == [1, 0]


def test_the_ranking_names_clips_by_their_index() -> None:
    text = ranking_text([result(0.25), result(None), result(0.75)], "normalised")
    assert text.splitlines()[:3] == ["by the normalised score:", "1. clip 2: 0.750", "2. clip 0: 0.250"]
    assert text.splitlines()[3].startswith("3. clip 1: INVALID, frames: 0 of 16 frames")


def test_a_summary_is_plain_json() -> None:
    summary = summarise([result(score) for score in (0.7, 0.2, None)], 0.7)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert (summary["correct"], summary["invalid_rate"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    # One minus: 0.3 and 0.8, of three clips.
    assert summary["robust_correct"] == pytest.approx(1 / 3) and summary["types"] == ["LR"] * 3
    assert summary_lines(summary)[0].startswith("Correct@0.7: 33.3% of 3 clips, 95% interval ")


def test_nothing_to_summarise_is_refused() -> None:
    with pytest.raises(DataError, match="no scores"):
        summarise([])
