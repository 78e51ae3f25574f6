"""From the scores of two models on the same prompts and seeds to the numbers of an evaluation: pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spatialalign.errors import DataError
from spatialalign.metrics import (
    Interval,
    cluster_bootstrap,
    invalid_difference,
    mean_difference,
    rate_difference,
    rate_interval,
    thresholds,
)

TAU = 0.7
"""The working point: winners in training, and the headline of an evaluation."""


@dataclass(frozen=True)
class Scored:
    """One clip with its scores.

    Attributes:
        prompt_id, seed: which clip.
        type_code: the relationship it was asked for.
        score: the paper's DSR-Score in [0, 1], None when INVALID.
        normalised: the same on the scale that all types share.
        robust: the robust score, None when that rule finds the clip INVALID.
        reason: why the clip is INVALID by the paper's rule, else None.
        others: the paper's score for every type the clip was *not* asked for, None where INVALID.
    """

    prompt_id: str
    seed: int
    type_code: str
    score: float | None
    normalised: float | None
    robust: float | None
    reason: str | None
    others: tuple[float | None, ...] = ()


def entry(interval: Interval) -> dict[str, float]:
    """An interval as plain values."""
    return {"value": interval.estimate, "low": interval.low, "high": interval.high}


def nothing() -> dict[str, None]:
    """What stands where no clip gave a value, for instance the mean score when every clip is INVALID."""
    return {"value": None, "low": None, "high": None}


def mean_entry(values: Sequence[float | None], prompts: Sequence[str]) -> dict[str, Any]:
    """Mean of the values that are there, with its interval."""
    numbers = [math.nan if value is None else value for value in values]
    return nothing() if all(math.isnan(v) for v in numbers) else entry(cluster_bootstrap(numbers, prompts))


def invalid_entry(scores: Sequence[float | None], prompts: Sequence[str]) -> dict[str, Any]:
    """Share of INVALID clips with its interval."""
    return mean_entry([float(score is None) for score in scores], prompts)


def summarise(clips: Sequence[Scored]) -> dict[str, Any]:
    """Every number of one model.

    ``correct_at`` and ``robust_correct_at`` hold a row for each tau of 0, 0.1, ... 0.9. ``official`` in a row is the
    share at the published program's floating threshold, where 0.3, 0.6 and 0.7 are one unit in the last place higher.
    """
    if not clips:
        raise DataError("no scored clips: nothing was evaluated")
    prompts = [clip.prompt_id for clip in clips]
    scores = [clip.score for clip in clips]
    normalised, robust = [clip.normalised for clip in clips], [clip.robust for clip in clips]
    codes = sorted({clip.type_code for clip in clips})
    return {
        "videos": len(clips),
        "correct_at_0.7": entry(rate_interval(scores, prompts, TAU)),
        "invalid_rate": invalid_entry(scores, prompts),
        "mean_score": mean_entry(scores, prompts),
        "normalised_correct_at_0.7": entry(rate_interval(normalised, prompts, TAU)),
        "mean_normalised": mean_entry(normalised, prompts),
        "robust_correct_at_0.7": entry(rate_interval(robust, prompts, TAU)),
        "robust_invalid_rate": invalid_entry(robust, prompts),
        "mean_robust": mean_entry(robust, prompts),
        "correct_at": curve(scores, prompts),
        "robust_correct_at": curve(robust, prompts),
        "per_type": {code: type_summary([clip for clip in clips if clip.type_code == code]) for code in codes},
        "invalid_reasons": reasons(clips),
    }


def curve(scores: Sequence[float | None], prompts: Sequence[str]) -> list[dict[str, float]]:
    """Correct@tau with intervals for tau = 0, 0.1, ... 0.9."""
    rows = []
    for exact, official in zip(thresholds("exact"), thresholds("official"), strict=True):
        row = {"tau": float(exact), **entry(rate_interval(scores, prompts, float(exact)))}
        rows.append({**row, "official": rate_interval(scores, prompts, float(official), resamples=1).estimate})
    return rows


def type_summary(clips: Sequence[Scored]) -> dict[str, Any]:
    """The headline numbers of one type."""
    prompts, scores = [clip.prompt_id for clip in clips], [clip.score for clip in clips]
    return {
        "videos": len(clips),
        "correct_at_0.7": entry(rate_interval(scores, prompts, TAU)),
        "normalised_correct_at_0.7": entry(rate_interval([clip.normalised for clip in clips], prompts, TAU)),
        "robust_correct_at_0.7": entry(rate_interval([clip.robust for clip in clips], prompts, TAU)),
        "invalid_rate": invalid_entry(scores, prompts),
        "mean_score": mean_entry(scores, prompts),
    }


def reasons(clips: Sequence[Scored]) -> dict[str, int]:
    """How many clips are INVALID for each kind of reason (the words before the colon)."""
    counts: dict[str, int] = {}
    for clip in clips:
        if clip.score is None:
            kind = (clip.reason or "unknown").split(":")[0]
            counts[kind] = counts.get(kind, 0) + 1
    return dict(sorted(counts.items()))


def difference(base: Sequence[Scored], aligned: Sequence[Scored]) -> dict[str, Any]:
    """Aligned minus base on the same prompts and seeds, with 95 % intervals over prompts.

    The mean score is compared on the clips that are valid in both, so that a model cannot gain by losing its bad ones.

    Raises:
        DataError: the two do not hold the same prompts and seeds.
    """
    keys = [(clip.prompt_id, clip.seed) for clip in base]
    if keys != [(clip.prompt_id, clip.seed) for clip in aligned]:
        raise DataError("base and aligned clips are not of the same prompts and seeds; evaluate both again")
    prompts = [clip.prompt_id for clip in base]
    one, two = [clip.score for clip in base], [clip.score for clip in aligned]
    robust = [clip.robust for clip in base], [clip.robust for clip in aligned]
    both = any(a is not None and b is not None for a, b in zip(one, two, strict=True))
    return {
        "correct_at_0.7": entry(rate_difference(one, two, prompts, TAU)),
        "invalid_rate": entry(invalid_difference(one, two, prompts)),
        "mean_score": entry(mean_difference(one, two, prompts)) if both else nothing(),
        "robust_correct_at_0.7": entry(rate_difference(*robust, prompts, TAU)),
        "robust_invalid_rate": entry(invalid_difference(*robust, prompts)),
    }


def chance(clips: Sequence[Scored]) -> dict[str, Any]:
    """Correct@0.7 of the same clips, each scored for the types it was not asked for: what the wrong prompt reaches."""
    pairs = [(clip.prompt_id, other) for clip in clips for other in clip.others]
    if not pairs:
        raise DataError("no clip carries scores for other types")
    return entry(rate_interval([other for _, other in pairs], [prompt for prompt, _ in pairs], TAU))


def plain(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The headline numbers of :func:`summarise` without intervals."""
    return {key: summary[key]["value"] for key in ("correct_at_0.7", "invalid_rate", "mean_score")}


def cell(value: Mapping[str, Any], share: bool, sign: bool = False) -> str:
    """An entry with its interval as text: a share in per cent or a score, or a signed difference of either."""
    if value["value"] is None:
        return "–"
    scale, form = (100, "+.1f" if sign else ".1f") if share else (1, "+.3f" if sign else ".3f")
    low, high = format(scale * value["low"], form), format(scale * value["high"], form)
    return f"{format(scale * value['value'], form)} [{low}, {high}]"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first of them the head, as a Markdown table with even columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = [[text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in padded]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def table(result: Mapping[str, Any]) -> str:
    """The outcome as a Markdown table that also reads well in a terminal."""
    rows = [["", "base", "aligned", "aligned − base"]]
    for key, name, share in (
        ("correct_at_0.7", "Correct@0.7, %", True),
        ("invalid_rate", "INVALID, %", True),
        ("mean_score", "mean score", False),
        ("robust_correct_at_0.7", "robust Correct@0.7, %", True),
    ):
        arms = [cell(result[arm][key], share) for arm in ("base", "aligned")]
        rows.append([name, *arms, cell(result["difference"][key], share, True)])
    for code, base in result["base"]["per_type"].items():
        pair = [cell(arm["correct_at_0.7"], True) for arm in (base, result["aligned"]["per_type"][code])]
        rows.append([f"Correct@0.7 {code}, %", *pair, ""])
    chances = [cell(result["controls"]["chance"][arm], True) for arm in ("base", "aligned")]
    rows.append(["same clips, other types, %", *chances, ""])
    if result["controls"].get("swapped"):
        rows.append(["captions swapped, %", cell(result["controls"]["swapped"]["swapped"], True), "", ""])
    return markdown(rows)
