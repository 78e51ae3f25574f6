"""Several rewards of the same clips as one number, so that clips can be ranked by all of them. Numpy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import ConfigError, DataError

Floats = NDArray[np.float64]


def standardised(values: ArrayLike) -> Floats:
    """Values (n,) less their mean, in deviations from it (divisor n); NaN stays and counts in neither.

    All 0 where every value is the same: such a column says nothing about which clip is better.
    """
    column = np.asarray(values, dtype=np.float64)
    known = column[~np.isnan(column)]
    if not len(known) or known.min() == known.max():
        return np.where(np.isnan(column), np.nan, 0.0)
    return np.asarray((column - known.mean()) / known.std(), dtype=np.float64)


def mixed(columns: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> Floats:
    """Sum (n,) of ``weight * standardised(column)`` over the names of ``weights``; higher is better.

    A clip that lacks a value which counts has NaN: what it would have been is not guessed.

    Raises:
        ConfigError: a weight without its column.
        DataError: an infinite value, or columns of different lengths.
    """
    missing = [name for name in weights if name not in columns]
    if missing:
        raise ConfigError(f"weights: there is no {missing[0]!r} here; there are {', '.join(columns)}")
    lengths = {len(column) for column in columns.values()}
    if len(lengths) != 1 or any(np.isinf(column).any() for column in columns.values()):
        raise DataError(f"expected finite values or NaN, one for each clip in every column, found lengths {lengths}")
    parts = [weight * standardised(columns[name]) for name, weight in weights.items() if weight]
    return np.sum(parts, axis=0) if parts else np.zeros(lengths.pop())


def order(values: Floats) -> list[int]:
    """Indices from the highest to the lowest, NaN last, equal ones in the given order."""
    return sorted(range(len(values)), key=lambda i: (bool(np.isnan(values[i])), -values[i]))
