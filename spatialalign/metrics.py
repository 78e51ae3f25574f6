"""Rates over many scored videos, with intervals that know that the seeds of one prompt are not independent.

Scores are ``float`` in [0, 1] or ``None`` for INVALID, one per video. Numpy only; everything random is seeded.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import DataError

Floats = NDArray[np.float64]
Scores = Sequence[float | None]
Prompt = TypeVar("Prompt", bound=Hashable)


def thresholds(convention: Literal["exact", "official"] = "exact") -> Floats:
    """The ten thresholds 0, 0.1, ..., 0.9 of Correct@tau.

    ``official`` reproduces the floating steps of ``calc_correctness.py``, where "0.3", "0.6" and "0.7" come out one
    unit in the last place too high, so that a score of exactly 0.7 is a training winner and yet not Correct@0.7.
    ``exact`` are the nearest numbers to the decimals.
    """
    steps = np.arange(10, dtype=np.float64)
    return np.asarray(steps * 0.1 if convention == "official" else steps / 10, dtype=np.float64)


def correct_at(scores: Scores, threshold: float = 0.7) -> float:
    """Share of *all* videos with a score of at least ``threshold``; INVALID counts as wrong."""
    return float(_correct(scores, threshold).mean())


def correct_curve(scores: Scores, taus: ArrayLike | None = None) -> Floats:
    """Correct@tau for every threshold in ``taus`` (k,), by default :func:`thresholds`; Correct@0 is the valid rate."""
    grid = thresholds() if taus is None else np.asarray(taus, dtype=np.float64)
    return np.array([correct_at(scores, float(tau)) for tau in grid])


def invalid_rate(scores: Scores) -> float:
    """Share of INVALID videos."""
    return float(np.isnan(_values(scores)).mean())


def mean_score(scores: Scores) -> float | None:
    """Mean over the valid videos, None when there are none. Report it beside :func:`invalid_rate` only."""
    values = _values(scores)
    return None if np.isnan(values).all() else float(np.nanmean(values))


@dataclass(frozen=True)
class Interval:
    """An estimate with a two-sided bootstrap interval of confidence ``level``."""

    estimate: float
    low: float
    high: float
    level: float = 0.95

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low > 0 or self.high < 0


def cluster_bootstrap(
    values: ArrayLike, clusters: Sequence[Hashable], *, level: float = 0.95, resamples: int = 4000, seed: int = 0
) -> Interval:
    """Percentile bootstrap of the mean of ``values`` (n,), resampling whole clusters; NaN values are left out.

    With few clusters, or values that are all alike, the interval is too narrow: it cannot show what was never drawn.
    Raises :class:`DataError` for empty input, lengths that differ, or nothing but NaN.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or len(numbers) == 0 or len(numbers) != len(clusters):
        raise DataError(f"expected values and clusters of one positive length, found {numbers.shape}, {len(clusters)}")
    if not 0 < level < 1 or resamples < 1:
        raise DataError(f"expected a level between 0 and 1 and at least one resample, found {level}, {resamples}")
    usable = ~np.isnan(numbers)
    if not usable.any():
        raise DataError("no usable value: every one is NaN or belongs to an INVALID video")
    names = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    member = np.array([names[name] for name in clusters])
    sums = np.bincount(member[usable], weights=numbers[usable], minlength=len(names))
    counts = np.bincount(member[usable], minlength=len(names)).astype(np.float64)
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    totals = draws @ counts
    # A resample of clusters without a single valid video has no mean.
    means = (draws @ sums)[totals > 0] / totals[totals > 0]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(numbers[usable].mean()), float(low), float(high), level)


def rate_interval(
    scores: Scores, prompts: Sequence[Hashable], threshold: float = 0.7, *, resamples: int = 4000, seed: int = 0
) -> Interval:
    """Correct@threshold with its 95 % interval, clustered by prompt."""
    return cluster_bootstrap(_correct(scores, threshold), prompts, resamples=resamples, seed=seed)


def mean_interval(scores: Scores, prompts: Sequence[Hashable], *, resamples: int = 4000, seed: int = 0) -> Interval:
    """Mean score of the valid videos with its 95 % interval, clustered by prompt."""
    return cluster_bootstrap(_values(scores), prompts, resamples=resamples, seed=seed)


def rate_difference(
    base: Scores,
    aligned: Scores,
    prompts: Sequence[Hashable],
    threshold: float = 0.7,
    *,
    resamples: int = 4000,
    seed: int = 0,
) -> Interval:
    """Correct@threshold of ``aligned`` minus that of ``base``; both hold the same prompts and seeds in one order."""
    _same_length(base, aligned)
    gains = _correct(aligned, threshold) - _correct(base, threshold)
    return cluster_bootstrap(gains, prompts, resamples=resamples, seed=seed)


def mean_difference(
    base: Scores, aligned: Scores, prompts: Sequence[Hashable], *, resamples: int = 4000, seed: int = 0
) -> Interval:
    """Mean score of ``aligned`` minus that of ``base`` over the videos that are valid in both."""
    _same_length(base, aligned)
    return cluster_bootstrap(_values(aligned) - _values(base), prompts, resamples=resamples, seed=seed)


def invalid_difference(
    base: Scores, aligned: Scores, prompts: Sequence[Hashable], *, resamples: int = 4000, seed: int = 0
) -> Interval:
    """INVALID rate of ``aligned`` minus that of ``base``."""
    _same_length(base, aligned)
    gains = np.isnan(_values(aligned)).astype(np.float64) - np.isnan(_values(base))
    return cluster_bootstrap(gains, prompts, resamples=resamples, seed=seed)


def pair_up(
    base: Mapping[tuple[Prompt, int], float | None], aligned: Mapping[tuple[Prompt, int], float | None]
) -> tuple[list[Prompt], list[float | None], list[float | None]]:
    """(prompts, base scores, aligned scores) in one order, from scores by (prompt, seed).

    Raises :class:`DataError` naming the first sample that only one of the two has.
    """
    lonely = [key for key in (*base, *aligned) if key not in base or key not in aligned]
    if lonely:
        prompt, seed = lonely[0]
        owner = "base" if lonely[0] in base else "aligned"
        raise DataError(
            f"prompt {prompt!r}, seed {seed}: only the {owner} model has this sample ({len(lonely)} such); "
            "evaluate both on the same prompts and seeds"
        )
    return [prompt for prompt, _ in base], list(base.values()), [aligned[key] for key in base]


def pass_at_k(correct: Sequence[int], total: Sequence[int], k: int) -> float:
    """Chance that at least one of k videos of a prompt is correct, averaged over prompts.

    The unbiased estimator 1 - C(n - c, k) / C(n, k) of Chen et al. 2021 (arXiv 2107.03374) from c correct ones among n.
    Raises :class:`DataError` when a prompt has fewer than ``k`` videos.
    """
    if len(correct) != len(total) or not len(total):
        raise DataError(f"expected counts of one positive length, found {len(correct)} and {len(total)}")
    chances = []
    for c, n in zip(correct, total, strict=True):
        if not 0 <= c <= n or not 1 <= k <= n:
            raise DataError(f"pass@{k}: expected 0 <= correct <= total and 1 <= k <= total, found {c} of {n}")
        # The product of (1 - k / i) for i = n - c + 1 .. n is that ratio of binomials without large numbers.
        chances.append(1.0 - float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1))) if n - c >= k else 1.0)
    return float(np.mean(chances))


def _values(scores: Scores) -> Floats:
    """(n,) with NaN for INVALID."""
    if not len(scores):
        raise DataError("no scores: nothing was evaluated")
    values = np.array([np.nan if score is None else score for score in scores], dtype=np.float64)
    wrong = [score for score in scores if score is not None and not 0 <= score <= 1]
    if wrong:
        raise DataError(f"expected scores in [0, 1] or None for INVALID, found {wrong[0]}")
    return values


def _correct(scores: Scores, threshold: float) -> Floats:
    # A comparison with NaN is false: INVALID is wrong at every threshold.
    return (_values(scores) >= threshold).astype(np.float64)


def _same_length(base: Scores, aligned: Scores) -> None:
    if len(base) != len(aligned):
        raise DataError(f"expected the same prompts and seeds for both models, found {len(base)} and {len(aligned)}")
