"""Mixes of rewards, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from spatialalign.errors import ConfigError, DataError
from spatialalign.mix import mixed, order, standardised

NAN = math.nan


def test_standardised_by_hand() -> None:
    # Mean 2, deviation sqrt((1 + 1) / 2) = 1; the missing one counts in neither.
    np.testing.assert_allclose(standardised([1, NAN, 3]), [-1, NAN, 1])
    # Mean 3, squares 9 + 1 + 16 = 26.
    np.testing.assert_allclose(standardised([0, 2, 7]), np.array([-3, -1, 4]) / math.sqrt(26 / 3))


@pytest.mark.parametrize("same", [[0.1] * 3, [NAN, 5.0, NAN]])
def test_equal_values_say_nothing(same: list[float]) -> None:
    """Also where the mean of equal numbers is not quite that number."""
    assert [value for value in standardised(same) if not math.isnan(value)] == [0.0] * (3 - same.count(NAN))


def test_scale_does_not_decide() -> None:
    """A reward in hundreds counts as much as one in hundredths of the same order."""
    small, large = [0.01, 0.02, 0.03], [300.0, 200.0, 100.0]
    np.testing.assert_allclose(mixed({"a": small, "b": large}, {"a": 1, "b": 1}), 0, atol=1e-12)
    assert order(mixed({"a": small, "b": large}, {"a": 1, "b": 0.5})) == [2, 1, 0]
    assert order(mixed({"a": small, "b": large}, {"a": 0.5, "b": 1})) == [0, 1, 2]
    assert order(mixed({"a": small, "b": large}, {"a": -1})) == [0, 1, 2]


def test_a_missing_value_is_last_only_where_it_counts() -> None:
    columns = {"a": [1.0, 2.0, 3.0], "b": [1.0, 2.0, NAN]}
    assert order(mixed(columns, {"a": 1, "b": 1})) == [1, 0, 2]
    assert order(mixed(columns, {"a": 1})) == order(mixed(columns, {"a": 1, "b": 0})) == [2, 1, 0]


def test_ties_keep_their_order() -> None:
    assert order(np.array([NAN, 1.0, 2.0, 1.0, NAN])) == [2, 1, 3, 0, 4]


def test_what_cannot_be_mixed() -> None:
    with pytest.raises(ConfigError, match=r"no 'c' here; there are a, b"):
        mixed({"a": [1.0], "b": [2.0]}, {"c": 1})
    with pytest.raises(DataError, match="finite"):
        mixed({"a": [1.0, math.inf]}, {"a": 1})
    with pytest.raises(DataError, match="every column"):
        mixed({"a": [1.0, 2.0], "b": [1.0]}, {"a": 1})
