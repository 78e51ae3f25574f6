"""What ways of sampling gain for what they cost: pure functions from scores and costs to numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spatialalign.errors import DataError
from spatialalign.metrics import cluster_bootstrap, pass_at_k
from training.measure import TAU, Scored, difference, entry, summarise

Floats = NDArray[np.float64]
Pool = Sequence[float | None]
"""The scores of every candidate of one delivered clip, the plain clip's first; None for INVALID."""


@dataclass(frozen=True)
class Cost:
    """What one delivered clip took.

    Attributes:
        evaluations: passes of the transformer over one clip; classifier-free guidance makes two in a step.
        scorings: how many candidates and previews were decoded and tracked for the choice.
        seconds: sampling, and the decoding and tracking for the choice; clips searched together share them evenly.
    """

    evaluations: float
    scorings: float
    seconds: float


@dataclass(frozen=True)
class ArmClips:
    """The clips of one arm.

    Attributes:
        name: of the arm.
        clips: by prompt and seed, the same ones in every arm.
        costs: of the clips that could be made.
        pools: of best-of-N, one for each clip; empty ones for every other arm.
    """

    name: str
    clips: Sequence[Scored]
    costs: Sequence[Cost]
    pools: Sequence[Pool] = ()


def best_of_chances(pools: Sequence[Pool], tau: float = TAU) -> Floats:
    """For each pool of N candidates, the chance that best-of-n reaches ``tau``: (pools, N), n = 1 ... N.

    The n are the first candidate, which starts from the noise that every arm starts from, and n - 1 of the others drawn
    without replacement: 1 where the first is correct, else :func:`~spatialalign.metrics.pass_at_k` of the others. As
    candidates are exchangeable, the mean over prompts and seeds is without bias what best-of-n reaches; it begins at
    the base's own clips and ends at best-of-N's.

    Raises:
        DataError: no pools, or of different sizes.
    """
    sizes = {len(pool) for pool in pools}
    if len(sizes) != 1 or 0 in sizes:
        raise DataError(f"the pools must hold the same number of candidates, at least 1, found {sorted(sizes)}")
    others = sizes.pop() - 1
    rows = []
    for pool in pools:
        first, *rest = (score is not None and score >= tau for score in pool)
        drawn = [0.0, *(pass_at_k([sum(rest)], [others], k) for k in range(1, others + 1))]
        rows.append([1.0] * len(drawn) if first else drawn)
    return np.array(rows)


def at_cost(chances: Floats, count: float) -> Floats | None:
    """The chances at a number of candidates that need not be whole; None outside what the pool holds.

    Linear in between: whoever draws 2 candidates for half of the clips and 3 for the others pays for 2.5 and reaches
    the mean of both.
    """
    total = chances.shape[1]
    if not 1 - 1e-6 <= count <= total + 1e-6:
        return None
    place = min(max(count, 1.0), float(total)) - 1
    below = int(place)
    above = min(below + 1, total - 1)
    return np.asarray(chances[:, below] + (place - below) * (chances[:, above] - chances[:, below]))


def compare(arms: Sequence[ArmClips], reference: str | None) -> dict[str, Any]:
    """Every arm's numbers, what it gains over the first arm, and over best-of-n for the same number of evaluations.

    Args:
        arms: the base first; the same prompts and seeds in the same order.
        reference: name of the best-of-N arm whose candidates give the best-of-n curve, None for no such comparison.

    Returns:
        ``arms``: a list with ``name``, the numbers of :func:`~training.measure.summarise`, ``cost`` (means over clips;
        ``relative`` is evaluations over the base's), ``difference`` and ``equal_compute`` (``n``, the Correct@0.7 of
        best-of-n and the arm's gain over it; None where n is outside the curve, for the base and for the reference).
        ``best_of``: ``arm`` and ``correct_at_0.7`` for n = 1, 2, ... N; None without a reference.
    """
    base, prompts = arms[0], [clip.prompt_id for clip in arms[0].clips]
    unit = mean_cost(base)["evaluations"]
    pool = next((arm for arm in arms if arm.name == reference), None)
    chances = None if pool is None else best_of_chances(pool.pools)
    rows = []
    for arm in arms:
        cost = mean_cost(arm)
        cost["relative"] = cost["evaluations"] / unit
        equal = None
        if chances is not None and arm is not base and arm is not pool:
            equal = equal_compute(arm.clips, chances, cost["relative"])
        rows.append(
            {
                "name": arm.name,
                **summarise(arm.clips),
                "cost": cost,
                "difference": None if arm is base else difference(base.clips, arm.clips),
                "equal_compute": equal,
            }
        )
    curve = None
    if chances is not None:
        curve = {"arm": reference, "correct_at_0.7": [entry(cluster_bootstrap(c, prompts)) for c in chances.T]}
    return {"arms": rows, "best_of": curve}


def mean_cost(arm: ArmClips) -> dict[str, float]:
    """The mean cost of a delivered clip; raises :class:`DataError` when not one was made."""
    if not arm.costs:
        raise DataError(f"arm {arm.name!r}: not one clip could be made, so that it has no cost")
    means = np.mean([astuple(cost) for cost in arm.costs], axis=0)
    return {field.name: float(mean) for field, mean in zip(fields(Cost), means, strict=True)}


def equal_compute(clips: Sequence[Scored], chances: Floats, count: float) -> dict[str, Any] | None:
    """The arm against best-of-``count`` of the same prompts and seeds, clip by clip; None outside the curve."""
    expected = at_cost(chances, count)
    if expected is None:
        return None
    prompts = [clip.prompt_id for clip in clips]
    correct = np.array([clip.score is not None and clip.score >= TAU for clip in clips], dtype=np.float64)
    return {
        "n": count,
        "best_of_n": entry(cluster_bootstrap(expected, prompts)),
        "difference": entry(cluster_bootstrap(correct - expected, prompts)),
    }
