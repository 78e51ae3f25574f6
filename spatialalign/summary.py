"""Many scored clips: which of them is best, and how many are correct."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from .metrics import correct_at, correct_curve, invalid_rate, mean_score, rate_interval, thresholds
from .score import DsrScore

Rule = Literal["paper", "normalised", "robust"]
RULES: tuple[Rule, ...] = ("paper", "normalised", "robust")
"""The DSR-Score; the same on a scale that all types share; the score that also looks between the ends."""


def score_by(result: DsrScore, rule: Rule) -> float | None:
    """The score of a clip by a rule; None when it is INVALID by that rule."""
    if rule == "robust":
        return None if result.robust is None else result.robust.score
    return result.score if rule == "paper" else result.normalised


def rank(results: Sequence[DsrScore], rule: Rule) -> list[int]:
    """Indices from best to worst: INVALID clips last, equal ones in the given order."""
    values = [score_by(result, rule) for result in results]
    # No score is negative, so that INVALID clips are behind a score of 0.
    return sorted(range(len(values)), key=lambda i: 1.0 if (value := values[i]) is None else -value)


def ranking_text(results: Sequence[DsrScore], rule: Rule) -> str:
    """A line for every clip from best to worst, named by its index from 0."""
    order = rank(results, rule)
    lines = [f"by the {rule} score:"]
    if all(score_by(result, rule) is None for result in results):
        lines = ["every clip is INVALID; the first is handed on:"]
    for place, i in enumerate(order, start=1):
        value, robust = score_by(results[i], rule), results[i].robust
        reason = robust.reason if rule == "robust" and robust is not None else results[i].reason
        lines.append(f"{place}. clip {i}: " + (f"INVALID, {reason}" if value is None else f"{value:.3f}"))
    return "\n".join(lines)


def summarise(results: Sequence[DsrScore], threshold: float = 0.7) -> dict[str, Any]:
    """Correct@threshold of some clips and what belongs beside it, as plain values for JSON.

    ``interval_95`` is a bootstrap over the clips, which takes them to be independent; None for a single clip, which
    says nothing about others. Raises :class:`~spatialalign.errors.DataError` without results.
    """
    scores = {rule: [score_by(result, rule) for result in results] for rule in RULES}
    paper = scores["paper"]
    interval = rate_interval(paper, range(len(results)), threshold)
    curve = zip(thresholds(), correct_curve(paper), strict=True)
    return {
        "clips": len(results),
        "threshold": threshold,
        "correct": interval.estimate,
        "interval_95": [interval.low, interval.high] if len(results) > 1 else None,
        "invalid": paper.count(None),
        "invalid_rate": invalid_rate(paper),
        "mean_score": mean_score(paper),
        "robust_correct": correct_at(scores["robust"], threshold),
        "curve": [{"threshold": float(at), "correct": float(share)} for at, share in curve],
        "types": [result.type_code for result in results],
        "scores": scores,
    }


def clips(number: int) -> str:
    """``1 clip``, ``2 clips``, ..."""
    return f"{number} clip" if number == 1 else f"{number} clips"


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """The main figures of :func:`summarise` in words."""
    interval, mean = summary["interval_95"], summary["mean_score"]
    spread = "" if interval is None else f", 95% interval {interval[0]:.0%} to {interval[1]:.0%}"
    return [
        f"Correct@{summary['threshold']:g}: {summary['correct']:.1%} of {clips(summary['clips'])}{spread}",
        f"INVALID, counted as wrong: {summary['invalid']} of {summary['clips']}",
        "no clip has a score" if mean is None else f"mean score of the valid clips: {mean:.3f}",
        f"correct by the robust score: {summary['robust_correct']:.1%}",
    ]
