"""The alignment benchmark's own arithmetic; labelling, mining, training and evaluation have tests of their own."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from types import ModuleType

import pytest

from spatialalign.errors import ConfigError
from training.measure import Scored


@pytest.fixture(scope="module")
def alignment(repo_root: Path) -> ModuleType:
    """The module; benchmarks/ is no installed package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repo_root))
        return importlib.import_module("benchmarks.alignment")


def test_a_win_is_one_a_tie_half_and_the_unknown_none(alignment: ModuleType) -> None:
    assert alignment.win_rate([0.5, 0.5, 0.5, math.nan], [0.6, 0.5, 0.4, 1.0]) == [1.0, 0.5, 0.0, None]


def test_every_objective_meets_every_arm_and_unknown_ones_are_named(alignment: ModuleType) -> None:
    chosen = alignment.Alignment(arms="sft,dpo-level")
    assert chosen.plan() == [(o, a) for o in ("dsr", "dsr+quality") for a in ("sft", "dpo-level")]
    with pytest.raises(ConfigError, match="found 'dpo'"):
        alignment.Alignment(arms="dpo").plan()
    with pytest.raises(ConfigError, match="found 'quality'"):
        alignment.Alignment(objectives="quality").plan()


def test_the_arms_differ_in_the_loss_alone(alignment: ModuleType) -> None:
    args = alignment.Alignment(steps=8)
    settings = {arm: args.settings(arm).to_dict() for arm in alignment.ARMS}
    for arm, kind, error in (
        ("sft", "sft", "velocity"),
        ("rwr", "rwr", "velocity"),
        ("dpo-level", "dpo", "noise"),
        ("dpo-constant", "dpo", "velocity"),
    ):
        assert (settings[arm]["arm"], settings[arm]["error_of"]) == (kind, error)
        assert {**settings[arm], "arm": "dpo", "error_of": "velocity"} == settings["dpo-constant"]


def test_the_row_of_a_model(alignment: ModuleType) -> None:
    """Against the base: INVALID becomes 0.8 (a win), 0.9 INVALID (a loss), 0.4 stays (a tie), 0.2 becomes 0.7 (a win).

    The picture: 30 to 31 (a win), 40 to 38 (a loss), twice unknown on either side.
    """

    def clips(*values: tuple[float | None, float]) -> list[object]:
        made = []
        for number, (score, quality) in enumerate(values):
            reason = None if score is not None else "frames: none"
            scored = Scored(f"p{number}", 0, "LR", score, score, score, reason)
            made.append(alignment.Measured(scored, quality))
        return made

    base = clips((None, 30.0), (0.9, 40.0), (0.4, math.nan), (0.2, 35.0))
    found = clips((0.8, 31.0), (None, 38.0), (0.4, 36.0), (0.7, math.nan))
    row = alignment.row_of("dsr", "sft", base, found, {"norm_ratio": 1.25})
    assert row["wins"]["value"] == pytest.approx(2.5 / 4)
    assert row["quality_wins"]["value"] == pytest.approx(1 / 2)
    assert row["correct_at_0.7"]["value"] == pytest.approx(2 / 4)
    assert row["invalid_rate"]["value"] == pytest.approx(1 / 4)
    assert row["mean_score"]["value"] == pytest.approx(1.9 / 3)
    assert row["quality"]["value"] == pytest.approx(35)
    lines = alignment.table([alignment.row_of("", "base", base, base, None), row]).splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    assert "| 62.5 [" in lines[3] and lines[3].endswith("| 1.250 |")
