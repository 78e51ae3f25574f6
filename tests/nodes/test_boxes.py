"""Boxes in every form that other nodes use, read as the same arrays."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CORE = {"x": 10, "y": 20, "width": 30, "height": 5}
CORNERS = [10, 20, 40, 25]


@pytest.fixture
def boxes_of(module: Callable[[str], ModuleType]) -> Any:
    return module("boxes").boxes_of


@pytest.fixture
def tracks_error(module: Callable[[str], ModuleType]) -> Any:
    return module("spatialalign.errors").TracksError


@pytest.mark.parametrize(
    ("value", "frames"),
    [
        (CORE, 1),
        (CORNERS, 1),
        (tuple(CORNERS), 1),
        ([CORE, CORE], 2),
        ([CORNERS, CORNERS, CORNERS], 3),
        ([[CORE], [CORE]], 2),
        ([[CORNERS]], 1),
        ([{**CORE, "label": "cat", "metadata": {"id": 3}}], 1),
        (np.array([CORNERS, CORNERS]), 2),
        (torch.tensor([CORNERS, CORNERS], dtype=torch.float32), 2),
        ([torch.tensor([CORNERS])], 1),
        ([{key: np.float32(side) for key, side in CORE.items()}], 1),
    ],
)
def test_every_form_of_one_box(boxes_of: Any, value: Any, frames: int) -> None:
    boxes, scores = boxes_of(value, "subject_boxes")
    np.testing.assert_array_equal(boxes, [CORNERS] * frames)
    np.testing.assert_array_equal(scores, [1.0] * frames)


def test_the_best_score_of_a_frame_is_taken(boxes_of: Any) -> None:
    worse, better = {**CORE, "score": 0.4}, {"x": 1, "y": 2, "width": 3, "height": 4, "score": 0.9}
    boxes, scores = boxes_of([[worse, better], [better, worse], [worse]], "boxes")
    np.testing.assert_array_equal(boxes, [[1, 2, 4, 6], [1, 2, 4, 6], CORNERS])
    np.testing.assert_array_equal(scores, [0.9, 0.9, 0.4])


@pytest.mark.parametrize("nothing", [None, [], [None], [[]], {"x": 0, "y": 0, "width": 0, "height": 0}, [5, 5, 5, 9]])
def test_absent_is_nan_with_score_zero(boxes_of: Any, nothing: Any) -> None:
    alone, score = boxes_of(nothing, "boxes")
    assert alone.shape == (1, 4) and np.isnan(alone).all() and score.tolist() == [0]
    if nothing not in ([None], [[]]):
        boxes, scores = boxes_of([CORE, nothing, [CORNERS]], "boxes")
        np.testing.assert_array_equal(boxes, [CORNERS, [np.nan] * 4, CORNERS])
        assert scores.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([CORE, "box"], r"subject_boxes: frame 1: expected a box \{x, y, width, height\} or \[x1, y1, x2, y2\]"),
        ([CORE, {"x": 1, "y": 2}], "subject_boxes: frame 1: expected a box"),
        ([[1, 2, 3]], "subject_boxes: frame 0: expected a box"),
        ([[[1, 2, 3, "4"]]], "subject_boxes: frame 0: expected a box"),
        (7, "subject_boxes: frame 0: expected a box"),
        ([CORE, [40, 20, 10, 25]], r"subject_boxes: frame 1: expected finite pixels with x1 <= x2"),
        ([{**CORE, "height": -5}], "subject_boxes: frame 0: expected finite pixels"),
        ([[1.0, 2.0, float("nan"), 4.0]], "subject_boxes: frame 0: expected finite pixels"),
        ([{**CORE, "score": float("inf")}], "subject_boxes: frame 0: expected finite pixels"),
        ([[0.1, 0.2, 0.4, 0.5]], "subject_boxes: no coordinate is above 1, so these are fractions"),
    ],
)
def test_what_is_no_box_is_named_with_its_frame(boxes_of: Any, tracks_error: Any, value: Any, message: str) -> None:
    with pytest.raises(tracks_error, match=message):
        boxes_of(value, "subject_boxes")


side = st.integers(0, 500)
box = st.builds(
    lambda x, y, w, h: {"x": x, "y": y, "width": w, "height": h}, side, side, st.integers(2, 99), st.integers(2, 99)
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.none(), box, st.lists(box, max_size=3)), min_size=1, max_size=12))
def test_one_row_per_frame_whatever_was_found(boxes_of: Any, frames: list[Any]) -> None:
    boxes, scores = boxes_of(frames, "boxes")
    assert boxes.shape == (len(frames), 4) and scores.shape == (len(frames),)
    for row, score, entry in zip(boxes, scores, frames, strict=True):
        assert np.isnan(row).all() == (not entry) and score == (1.0 if entry else 0.0)
