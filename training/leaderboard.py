"""From the values of many clips of several models to a leaderboard, and how far the metrics agree: pure functions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from spatialalign.agreement import confusion, spearman
from spatialalign.errors import DataError
from spatialalign.metrics import cluster_bootstrap, rate_difference, rate_interval, thresholds
from training.measure import TAU, entry, invalid_entry, mean_entry, nothing
from training.metric_values import Row

RESAMPLES = 400
"""Of the bootstrap of a rank correlation, which takes longer than that of a mean."""


@dataclass(frozen=True)
class Column:
    """A number of the leaderboard.

    Attributes:
        key: its name in the files.
        title: its name for people.
        source: the column of :class:`~training.metric_values.Row` that it is made of.
        rate: the share of all clips at or above a threshold, INVALID counting as below; else the mean of what there is.
        threshold: of the rate.
        share: shown in per cent.
        lower: lower is better; None where neither is.
    """

    key: str
    title: str
    source: str
    rate: bool = False
    threshold: float = TAU
    share: bool = False
    lower: bool | None = False


COLUMNS = (
    Column("correct_at_0.7", "Correct@0.7", "score", rate=True, share=True),
    Column(
        "official_correct_at_0.7",
        "Correct@0.7, official threshold",
        "score",
        rate=True,
        threshold=float(thresholds("official")[7]),
        share=True,
    ),
    Column("invalid_rate", "INVALID", "score", share=True, lower=True),
    Column("mean_score", "mean DSR-Score", "score"),
    Column("robust_correct_at_0.7", "robust Correct@0.7", "robust", rate=True, share=True),
    Column("vbench", "VBench spatial rule", "vbench"),
    Column("compbench", "T2V-CompBench spatial rule", "compbench"),
    Column("vbench2", "VBench-2.0 questions", "vbench2", share=True),
    Column("identity", "ID consistency", "identity"),
    Column("clip_iqa_natural", "CLIP-IQA natural", "clip_iqa_natural"),
    Column("clip_iqa_quality", "CLIP-IQA quality", "clip_iqa_quality"),
    Column("smoothness", "linear smoothness", "smoothness"),
    Column("frame_change", "frame change", "frame_change", lower=None),
)
SPATIAL = ("score", "robust", "vbench", "compbench", "vbench2")
"""Values that judge the relation, on a scale from 0 to 1."""
NAMES: Mapping[str, str] = {
    "score": "DSR-Score",
    "robust": "robust score",
    **{column.source: column.title for column in COLUMNS if column.key == column.source},
}
"""What the values are called."""


def leaderboard(rows: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Every number of every model, its gain over the first model, and the agreement of the metrics over all clips.

    The first model stays first; the others follow by Correct@0.7, the best one first.

    Raises:
        DataError: no model, or models of other prompts.
    """
    check_same_prompts(rows)
    first = next(iter(rows.values()))
    there = columns_of([row for some in rows.values() for row in some])
    models: list[dict[str, Any]] = [
        {
            "name": name,
            "videos": len(some),
            "prompts": len({row.prompt_id for row in some}),
            **{column.key: value_of(some, column) for column in there},
            "correct_at": curve(some),
            "invalid_reasons": invalid_reasons(some),
            "over_first": None if some is first else {c.key: gain_of(first, some, c) for c in there},
        }
        for name, some in rows.items()
    ]
    everything = [row for some in rows.values() for row in some]
    models[1:] = sorted(models[1:], key=lambda model: -float(model["correct_at_0.7"]["value"]))
    return {
        "models": models,
        "columns": [asdict(column) for column in there],
        "agreement": correlations(everything),
        "confusion_at_0.7": confusions(everything),
    }


def check_same_prompts(rows: Mapping[str, Sequence[Row]]) -> None:
    """Raise :class:`DataError` unless there are models, and all of the same prompts."""
    if not rows or not all(rows.values()):
        raise DataError("no clips to measure: give at least one store with scored clips")
    sets = {name: {row.prompt_id for row in some} for name, some in rows.items()}
    every, shared = set().union(*sets.values()), set.intersection(*sets.values())
    for name, prompts in sets.items():
        lacking = sorted(every - prompts)
        if lacking:
            raise DataError(
                f"{name} lacks {len(lacking)} prompts that another model has (first {lacking[0]}), so their numbers do "
                f"not compare; generate them, or take only the {len(shared)} prompts of all with --shared true"
            )


def only_shared(rows: Mapping[str, Sequence[Row]]) -> dict[str, list[Row]]:
    """The rows of prompts that every model has."""
    shared = set.intersection(*({row.prompt_id for row in some} for some in rows.values()))
    return {name: [row for row in some if row.prompt_id in shared] for name, some in rows.items()}


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """The columns that any row has something for."""
    found = {key for row in rows for key in row.values}
    return [column for column in COLUMNS if column.source in found]


def value_of(rows: Sequence[Row], column: Column) -> dict[str, Any]:
    """A column of one model with its interval over prompts."""
    prompts, values = [row.prompt_id for row in rows], [row.values.get(column.source) for row in rows]
    if column.rate:
        return entry(rate_interval(values, prompts, column.threshold))
    return invalid_entry(values, prompts) if column.key == "invalid_rate" else mean_entry(values, prompts)


def gain_of(first: Sequence[Row], other: Sequence[Row], column: Column) -> dict[str, Any]:
    """A column of ``other`` minus that of ``first``, clip by clip, over the prompts and seeds that both have.

    A mean is compared on the clips where both have a value.
    """
    before = {(row.prompt_id, row.seed): row.values.get(column.source) for row in first}
    pairs = [row for row in other if (row.prompt_id, row.seed) in before]
    prompts = [row.prompt_id for row in pairs]
    if not pairs:
        return nothing()
    now, then = [row.values.get(column.source) for row in pairs], [before[row.prompt_id, row.seed] for row in pairs]
    if column.rate:
        return entry(rate_difference(then, now, prompts, column.threshold))
    if column.key == "invalid_rate":
        return mean_entry([float(b is None) - float(a is None) for a, b in zip(then, now, strict=True)], prompts)
    gains = [None if a is None or b is None else b - a for a, b in zip(then, now, strict=True)]
    return mean_entry(gains, prompts)


def curve(rows: Sequence[Row]) -> list[dict[str, float]]:
    """Correct@tau for tau = 0, 0.1, ... 0.9 by both conventions of the threshold, without intervals."""
    scores = [row.values["score"] for row in rows]
    known = np.array([math.nan if score is None else score for score in scores])
    return [
        {"tau": float(exact), "exact": float((known >= exact).mean()), "official": float((known >= official).mean())}
        for exact, official in zip(thresholds("exact"), thresholds("official"), strict=True)
    ]


def invalid_reasons(rows: Sequence[Row]) -> dict[str, int]:
    """How many clips are INVALID for each kind of reason (the words before the colon)."""
    kinds = [(row.reason or "unknown").split(":")[0] for row in rows if row.values["score"] is None]
    return dict(sorted(Counter(kinds).items()))


def correlations(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Spearman's rank correlation of every two values over the clips that have both, with its interval over prompts."""
    keys = [key for key in NAMES if any(key in row.values for row in rows)]
    out = []
    for a, b in combinations(keys, 2):
        pairs = [(row.values.get(a), row.values.get(b), row.prompt_id) for row in rows]
        both = [(x, y, prompt) for x, y, prompt in pairs if x is not None and y is not None]
        out.append({"first": a, "second": b, "clips": len(both), **rank_entry(both)})
    return out


def rank_entry(pairs: Sequence[tuple[float, float, str]], resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """Spearman's correlation of (first, second, cluster) and its 95 % percentile bootstrap, whole clusters drawn."""
    first, second = (np.array([pair[k] for pair in pairs], dtype=np.float64) for k in (0, 1))
    rho = spearman(first, second)
    if rho is None:
        return nothing()
    clusters = [pair[2] for pair in pairs]
    members = [np.flatnonzero([name == cluster for name in clusters]) for cluster in dict.fromkeys(clusters)]
    draws = np.random.default_rng(seed).integers(len(members), size=(resamples, len(members)))
    drawn = (np.concatenate([members[k] for k in draw]) for draw in draws)
    # A resample whose values are all alike has no order, hence no correlation.
    found = [value for places in drawn if (value := spearman(first[places], second[places])) is not None]
    low, high = np.quantile(found or [rho], [0.025, 0.975])
    return {"value": rho, "low": float(low), "high": float(high)}


def confusions(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """How often the DSR-Score and another judge of the relation reach 0.7; INVALID does not reach it."""
    out = []
    for key in SPATIAL[1:]:
        # The robust score is None where it finds a clip INVALID; the others where they were not to be had.
        known = [row for row in rows if key in row.values and (key == "robust" or row.values[key] is not None)]
        if not known:
            continue
        counts = confusion([row.values["score"] or 0.0 for row in known], [row.values[key] or 0.0 for row in known])
        agreeing = [float(_reaches(row, "score") == _reaches(row, key)) for row in known]
        agreement = entry(cluster_bootstrap(agreeing, [row.prompt_id for row in known]))
        out.append({"first": "score", "second": key, "clips": len(known), **asdict(counts), "agreement": agreement})
    return out


def _reaches(row: Row, key: str) -> bool:
    return (row.values[key] or 0.0) >= TAU
