"""Pure functions on the course of a subject about an object: gaps, jumps, reversals. The parts of the robust score."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def fill_gaps(values: Floats, longest: int) -> tuple[Floats, NDArray[np.bool_]]:
    """Interpolate linearly over runs of at most ``longest`` NaN rows that have a known row on both sides.

    ``values`` is (T, k), a row being known when it has no NaN. Nothing is extrapolated. Returns the filled copy
    and a (T,) bool of the rows that were filled.
    """
    known = np.flatnonzero(~np.isnan(values).any(axis=1))
    result, filled = values.copy(), np.zeros(len(values), dtype=np.bool_)
    for a, b in zip(known[:-1], known[1:], strict=True):
        if 1 < b - a <= longest + 1:
            share = (np.arange(a + 1, b) - a)[:, None] / (b - a)
            result[a + 1 : b] = (1 - share) * values[a] + share * values[b]
            filled[a + 1 : b] = True
    return result, filled


def is_jump(apart: Ints, step: Floats, limit: float, longest_gap: int) -> NDArray[np.bool_]:
    """Whether steps of ``step`` body lengths over ``apart`` frames are too large to be motion.

    ``limit`` body lengths are allowed from one frame to the next, twice that over a gap that may be filled, however
    long, and ``limit`` alone over a longer one: what happened there was not seen.
    """
    allowed = np.where(apart - 1 > longest_gap, 1, np.minimum(apart, 2)) * limit
    return np.asarray(step > allowed)


def glitches(times: Ints, positions: Floats, limit: float, longest: int, longest_gap: int) -> Ints:
    """Indices into ``times`` (n,) of misdetections: at most ``longest`` frames that jump away and back.

    ``positions`` is (n, 2) in body lengths. A jump that is not undone is no glitch, except that so short a piece at
    either end, cut off from the rest by a jump, is taken for one (where there is enough of a rest to say so).
    """
    found: list[int] = []
    i = 0
    if len(times) > 4 * longest:
        ends = [(k, len(times) - k) for k in range(1, longest + 1)]
        head = max((k for k, _ in ends if _jumps(times, positions, k - 1, k, limit, longest_gap)), default=0)
        tail = min((k for _, k in ends if _jumps(times, positions, k - 1, k, limit, longest_gap)), default=len(times))
        found = [*range(head), *range(tail, len(times))]
        i = head
    while i < len(times) - 2:
        step = 1
        if _jumps(times, positions, i, i + 1, limit, longest_gap):
            for back in range(2, min(longest + 1, len(times) - 1 - i) + 1):
                if not _jumps(times, positions, i, i + back, limit, longest_gap):
                    found.extend(range(i + 1, i + back))
                    step = back
                    break
        i += step
    return np.unique(np.asarray(found, dtype=np.int64))


def turning_points(curve: Floats, tolerance: float) -> Floats:
    """The values where a curve (n,) turns, with hysteresis: reversals of less than ``tolerance`` are not seen.

    Begins with the first value of the curve and ends with the last extreme; at least one value.
    """
    points = [float(curve[0])]
    low = high = float(curve[0])
    rising: bool | None = None
    for value in map(float, curve[1:]):
        low, high = min(low, value), max(high, value)
        if rising is None:
            if value - low >= tolerance or high - value >= tolerance:
                rising = value - low >= tolerance
                points.append(low if rising else high)
                low = high = value
        elif rising and high - value >= tolerance:
            points.append(high)
            rising, low, high = False, value, value
        elif not rising and value - low >= tolerance:
            points.append(low)
            rising, low, high = True, value, value
    if rising is not None:
        points.append(high if rising else low)
    return np.asarray(points)


def efficiency(curve: Floats, tolerance: float) -> float:
    """Net rise of a curve over its whole way, in [0, 1]: 1 when it only rises, 0 when it gains nothing.

    Reversals of less than ``tolerance`` do not count; a curve that never leaves that band has efficiency 1.
    """
    points = turning_points(curve, tolerance)
    way = float(np.abs(np.diff(points)).sum())
    return 1.0 if way == 0 else max(0.0, float(points[-1] - points[0])) / way


def sign_changes(curve: Floats, band: float) -> int:
    """How often a curve (n,) changes sign, counting only excursions beyond ``band``."""
    sides = np.sign(curve[np.abs(curve) >= band])
    return int(np.count_nonzero(np.diff(sides)))


def _jumps(times: Ints, positions: Floats, a: int, b: int, limit: float, longest_gap: int) -> bool:
    step = np.hypot(*(positions[b] - positions[a]))
    return bool(is_jump(times[b] - times[a], step, limit, longest_gap))
