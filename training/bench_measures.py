"""From labels and scores to the numbers of a reward benchmark: plain values for JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from spatialalign.agreement import (
    accuracy_with_ties,
    accuracy_without_ties,
    chance_with_ties,
    official_accuracy_with_ties,
    spearman,
)
from training.bench_pairs import Benchmark, Clip, Pair
from training.bench_scorers import ClipScore

TOTAL = "Overall"

Scores = Mapping[Clip, ClipScore]


def column(values: Sequence[float | None], names: Sequence[str], label: str, overall: Sequence[str]) -> float | None:
    """The number of a clip that is compared for ``label``; None without a score.

    It is the scorer's column of that name, or else its Overall, or else the sum of its columns. For the label Overall,
    the columns named by ``overall`` are summed instead, if the scorer has them.
    """
    if label == TOTAL and overall and set(overall) <= set(names):
        chosen = list(overall)
    elif label in names or TOTAL in names:
        chosen = [label if label in names else TOTAL]
    else:
        chosen = list(names)
    picked = [values[list(names).index(name)] for name in chosen]
    return None if None in picked else float(sum(value for value in picked if value is not None))


def label_counts(benchmark: Benchmark) -> dict[str, dict[str, int]]:
    """How often each dimension says A, B, same, or nothing."""
    words = {1: "A", -1: "B", 0: "same", None: "none"}
    counts = {name: dict.fromkeys(words.values(), 0) for name in benchmark.dimensions}
    for pair in benchmark.pairs:
        for name in benchmark.dimensions:
            counts[name][words[pair.labels.get(name)]] += 1
    return counts


def measure(benchmark: Benchmark, scores: Scores, names: Sequence[str], overall: Sequence[str] = ()) -> dict[str, Any]:
    """What a scorer reaches on each dimension, and on each generator's pairs.

    Pairs whose clips are not both in ``scores``, because their files are absent, do not count. A pair of which a clip
    has no score does: ``without_ties`` and ``with_ties`` are over the scored pairs, ``of_all`` over all of them, where
    an unscored pair is wrong.
    """
    pairs = [pair for pair in benchmark.pairs if pair.first in scores and pair.second in scores]
    results = {name: _dimension(pairs, scores, names, name, overall) for name in benchmark.dimensions}
    return {"dimensions": results, "generators": _generators(pairs, scores, names, benchmark.dimensions[-1], overall)}


def _margins(
    pairs: Sequence[Pair], scores: Scores, names: Sequence[str], label: str, overall: Sequence[str]
) -> list[tuple[Pair, float, float]]:
    """The pairs with this label and both scores, and these."""
    rows = []
    for pair in pairs:
        first, second = (column(scores[clip].values, names, label, overall) for clip in (pair.first, pair.second))
        if label in pair.labels and first is not None and second is not None:
            rows.append((pair, first, second))
    return rows


def _dimension(
    pairs: Sequence[Pair], scores: Scores, names: Sequence[str], label: str, overall: Sequence[str]
) -> dict[str, Any]:
    labels = [pair.labels[label] for pair in pairs if label in pair.labels]
    rows = _margins(pairs, scores, names, label, overall)
    result: dict[str, Any] = {
        "pairs": len(labels),
        "scored": len(rows),
        "chance_with_ties": chance_with_ties(labels) if labels else None,
        "without_ties": None,
        "with_ties": None,
        "threshold": None,
        "with_ties_official": None,
        "of_all": {"without_ties": None, "with_ties": None},
    }
    if not rows:
        return result
    given, margins = [pair.labels[label] for pair, _, _ in rows], [first - second for _, first, second in rows]
    without, ties = accuracy_without_ties(given, margins), accuracy_with_ties(given, margins)
    decided = np.count_nonzero(given) / np.count_nonzero(labels) if np.any(labels) else None
    return {
        **result,
        "without_ties": without,
        "with_ties": ties.accuracy,
        "threshold": ties.threshold,
        "with_ties_official": official_accuracy_with_ties(given, margins),
        "of_all": {
            "without_ties": None if decided is None else (without or 0.0) * decided,
            "with_ties": ties.accuracy * len(rows) / len(labels),
        },
    }


def _generators(
    pairs: Sequence[Pair], scores: Scores, names: Sequence[str], label: str, overall: Sequence[str]
) -> dict[str, Any]:
    """For each generator, how often people and the scorer prefer its clips, a tie being half; on the scored pairs."""
    rows = _margins(pairs, scores, names, label, overall)
    table: list[dict[str, Any]] = []
    for model in sorted({model for pair, _, _ in rows for model in pair.models if model}):
        own = [(side, row) for row in rows for side, name in zip((1, -1), row[0].models, strict=True) if name == model]
        wins = [side * row[0].labels[label] for side, row in own]
        margins = [side * (row[1] - row[2]) for side, row in own]
        table.append(
            {
                "model": model,
                "pairs": len(own),
                "human_wins": float(np.mean([(win + 1) / 2 for win in wins])),
                "scorer_wins": float(np.mean((np.sign(margins) + 1) / 2)),
                "without_ties": accuracy_without_ties(wins, margins),
                "mean_score": float(np.mean([row[1] if side > 0 else row[2] for side, row in own])),
            }
        )
    table.sort(key=lambda row: -row["human_wins"])
    ranks = spearman([row["human_wins"] for row in table], [row["scorer_wins"] for row in table])
    return {"label": label, "spearman_of_wins": ranks, "rows": table}
