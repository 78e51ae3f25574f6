"""Labels: their file, standardising and mixing, against numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from spatialalign.errors import ConfigError, DataError
from training.labels import LabelTable, join, read_table, write_table

NAN = math.nan
TABLE = LabelTable(
    (("a", 0), ("a", 1), ("b", 0), ("b", 1)),
    ("dsr", "VQ"),
    np.array([[0.2, 30.0], [0.4, 10.0], [0.6, 20.0], [1.0, NAN]]),
)


def test_spread_is_that_within_prompts() -> None:
    """dsr: 0.1 from the mean twice, 0.2 twice: root of 0.1 / 4. VQ: 10 twice, and 0 of the clip that is alone."""
    assert TABLE.spread("dsr") == pytest.approx(math.sqrt(0.025))
    assert TABLE.spread("VQ") == pytest.approx(math.sqrt(200 / 3))


def test_one_dimension_is_standardised() -> None:
    """Mean 0.55 over all clips."""
    expected = {
        clip: (value - 0.55) / math.sqrt(0.025) for clip, value in zip(TABLE.clips, (0.2, 0.4, 0.6, 1.0), strict=True)
    }
    assert TABLE.mixed({"dsr": 7.0, "VQ": 0.0}) == pytest.approx(expected)


def test_a_mix_is_the_weighted_mean_where_everything_is_known() -> None:
    mixed = TABLE.mixed({"dsr": 3, "VQ": 1})
    assert set(mixed) == {("a", 0), ("a", 1), ("b", 0)}
    dsr, vq = 0.2 / math.sqrt(0.025), -20 / math.sqrt(200 / 3)
    assert mixed["a", 1] - mixed["a", 0] == pytest.approx((3 * dsr + vq) / 4)


def test_units_do_not_matter() -> None:
    other = LabelTable(TABLE.clips, TABLE.names, TABLE.values * [1, 1000] + [5, -3])
    assert other.mixed({"dsr": 1, "VQ": 1}) == pytest.approx(TABLE.mixed({"dsr": 1, "VQ": 1}))


@pytest.mark.parametrize("weights", [{"MQ": 1.0}, {"dsr": -1.0}, {"dsr": 0.0}, {}, {"dsr": math.inf}])
def test_weights_that_mean_nothing(weights: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="no labels 'MQ'; there are dsr, VQ|weights must be 0 or more"):
        TABLE.mixed(weights)


def test_a_dimension_that_tells_no_two_clips_of_a_prompt_apart() -> None:
    flat = LabelTable(TABLE.clips, ("scene",), np.array([[1.0], [1.0], [2.0], [2.0]]))
    with pytest.raises(DataError, match="'scene' tell no two clips of one prompt apart"):
        flat.mixed({"scene": 1.0})


def test_join_keeps_the_first_ones_clips() -> None:
    other = LabelTable((("b", 0), ("c", 5)), ("MQ",), np.array([[7.0], [8.0]]))
    both = join([TABLE, other])
    assert both.clips == TABLE.clips
    assert both.names == ("dsr", "VQ", "MQ")
    assert both.column("MQ") == {("b", 0): 7.0}
    with pytest.raises(DataError, match="two sources have a dimension 'VQ'"):
        join([TABLE, LabelTable((), ("VQ",), np.empty((0, 1)))])


def test_the_file_holds_everything(tmp_path: Path) -> None:
    write_table(tmp_path / "labels.csv", TABLE)
    assert (tmp_path / "labels.csv").read_text().splitlines()[-1] == "b,1,1,"
    back = read_table(tmp_path / "labels.csv")
    assert (back.clips, back.names) == (TABLE.clips, TABLE.names)
    np.testing.assert_array_equal(back.values, TABLE.values)


def test_rows_and_columns_must_fit() -> None:
    with pytest.raises(DataError, match=r"shape \(1, 1\), expected \(2, 1\)"):
        LabelTable((("a", 0), ("a", 1)), ("dsr",), np.zeros((1, 1)))
