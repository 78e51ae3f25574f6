"""Table, chart and page of an arms comparison."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest

from training.arms_chart import _COLOURS, _dodged, arms_chart
from training.arms_report import page, summary, table


def entry(value: float, half: float = 0.1) -> dict[str, float]:
    """A number with its interval."""
    return {"value": value, "low": value - half, "high": value + half}


def arm(name: str, rate: float, relative: float, gain: float | None = None) -> dict[str, Any]:
    """One row of arms.json; ``gain`` is that over best-of-n."""
    equal = None if gain is None else {"n": relative, "best_of_n": entry(rate - gain), "difference": entry(gain)}
    return {
        "name": name,
        "correct_at_0.7": entry(rate),
        "robust_correct_at_0.7": entry(rate - 0.05),
        "invalid_rate": entry(0.1),
        "mean_score": entry(0.6),
        "cost": {"evaluations": 16 * relative, "relative": relative, "scorings": relative - 1, "seconds": 2.5},
        "difference": None if name == "base" else {"correct_at_0.7": entry(rate - 0.3)},
        "equal_compute": equal,
    }


@pytest.fixture
def result() -> dict[str, Any]:
    """Five arms and a best-of-n curve of four."""
    arms = [
        arm("base", 0.3, 1.0),
        arm("lora", 0.5, 1.0, 0.2),
        arm("guidance", 0.3, 2.0, -0.15),
        arm("best-of-4", 0.6, 4.0),
        arm("lora+guidance+pruned-4", 0.65, 3.5, 0.08),
    ]
    curve = {"arm": "best-of-4", "correct_at_0.7": [entry(rate) for rate in (0.3, 0.45, 0.55, 0.6)]}
    settings = {"settings": {"model": "<m>"}, "versions": {"python": "3"}}
    return {"prompts": 12, "seeds": [0, 1], "arms": arms, "best_of": curve, **settings}


def test_the_table_has_a_row_for_every_arm(result: dict[str, Any]) -> None:
    lines = table(result).splitlines()
    assert len(lines) == 7 and len({len(line) for line in lines}) == 1
    cells = [cell.strip() for cell in lines[3].split("|")[1:-1]]
    assert cells[0] == "lora" and cells[1] == "50.0 [40.0, 60.0]" and cells[2] == "+20.0 [+10.0, +30.0]"
    assert cells[6:] == ["16.0", "1.00x", "0.0", "2.50", "30.0 [20.0, 40.0]", "+20.0 [+10.0, +30.0]"]
    assert [cell.strip() for cell in lines[5].split("|")[-3:-1]] == ["–", "–"], (
        "best-of-4 is what the others are held to"
    )


def test_the_summary_reads_directions_off_the_intervals(result: dict[str, Any]) -> None:
    text = summary(result)
    assert "better: lora;" in text and "worse: guidance;" in text
    assert "not told apart on this sample: lora+guidance+pruned-4." in text
    assert "with lora+guidance+pruned-4: <b>65.0 %</b> for 3.50 times" in text
    result["best_of"] = None
    assert "best-of-n" not in summary(result)


def test_points_stand_where_their_numbers_say(result: dict[str, Any]) -> None:
    picture = arms_chart(result, (1200, 680))
    assert picture.shape == (680, 1200, 3) and picture.dtype == np.uint8

    def centre(colour: tuple[int, int, int]) -> tuple[float, float]:
        # A dot is where its colour fills a square of 9 pixels, which no letter does.
        same = (picture == colour).all(-1)
        solid = np.lib.stride_tricks.sliding_window_view(same, (9, 9)).all((2, 3))
        rows, columns = np.nonzero(solid)
        return float(columns.mean()) + 4, float(rows.mean()) + 4

    lora, guidance, both = (centre(_COLOURS[key]) for key in ((True, False), (False, True), (True, True)))
    # The base and the LoRA share a cost, so the LoRA is moved aside by half of 0.9 em; 16 pixels are an em here.
    octave = guidance[0] - (lora[0] - 0.45 * 16)
    assert both[0] - guidance[0] == pytest.approx(math.log2(3.5 / 2) * octave, abs=8)  # beside best-of-4, it may move
    per_share = (guidance[1] - lora[1]) / 0.2
    assert guidance[1] - both[1] == pytest.approx(0.35 * per_share, abs=1.5)


def test_a_chart_without_a_curve_and_with_one_cost(result: dict[str, Any]) -> None:
    result["arms"], result["best_of"] = result["arms"][:1], None
    assert (arms_chart(result, (600, 340)) < 128).any()


def test_bars_of_one_cost_stand_side_by_side() -> None:
    assert _dodged([100, 300, 100, 200], 10) == [95, 300, 105, 200]
    assert _dodged([100, 107], 10) == [98.5, 108.5]


def test_the_page_asks_nothing_of_any_network(result: dict[str, Any]) -> None:
    text = page(result, b"\x89PNG", [])
    assert not re.findall(r'(?:src|href)="(?!data:)', text) and "url(" not in text and "@import" not in text
    assert text.count("<tr>") == 6 and "&lt;m&gt;" in text and "data:image/png;base64,iVBORw==" in text
