"""SSR and IoU: numbers worked out by hand, the paper's edge cases, and symmetries."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from spatialalign.dsr import Relation
from spatialalign.errors import TracksError
from spatialalign.geometry import DEPTH_BAND, iou, ssr

L, R, T, U, F, B = Relation
PLANAR = (L, R, T, U)

coordinates = st.floats(-500, 500).map(lambda x: round(x, 3))


@st.composite
def boxes(draw: st.DrawFn) -> np.ndarray:
    x, y = draw(coordinates), draw(coordinates)
    return np.array([x, y, x + draw(st.floats(1, 300)), y + draw(st.floats(1, 300))])


def test_by_hand() -> None:
    # Centres (10, 10) and (40, 50): dx = -30, dy = -40, distance 50. Mean width 20, mean height 100.
    subject, thing = [0, -10, 20, 30], [30, -30, 50, 130]
    # D_x = min(1, 30 / 20) = 1, D_y = 40 / 100.
    assert ssr(subject, thing, L) == pytest.approx(0.6)
    assert ssr(subject, thing, R) == pytest.approx(-0.6)
    assert ssr(subject, thing, T) == pytest.approx(0.8 * 0.4)
    assert ssr(subject, thing, U) == pytest.approx(-0.8 * 0.4)


def test_saturates_when_the_boxes_stop_overlapping() -> None:
    thing = np.array([100.0, 0, 120, 20])
    values = [float(ssr([x, 0, x + 20, 20], thing, R)) for x in (100, 110, 120, 200)]
    assert_allclose(values, [0.0, 0.5, 1.0, 1.0])


@pytest.mark.parametrize(
    ("subject", "thing", "valid"),
    [
        ([0, 0, 10, 10], [5, 5, 15, 15], True),
        ([0, 0, 10, 10], [0, 0, 10, 10], True),  # coinciding centres: valid, and 0
        ([0, 0, 10, 0], [5, 5, 15, 15], True),  # a single zero height is not checked by the official program
        ([0, 0, 10, 0], [5, 5, 15, 5], False),  # both heights are zero
        ([0, 0, 0, 10], [5, 5, 15, 15], False),  # a zero width
        ([0, 0, 10, 10], [5, 5, 5, 15], False),
        ([0, 0, 0, 0], [5, 5, 15, 15], False),  # the official box of an empty mask
        ([np.nan] * 4, [5, 5, 15, 15], False),
    ],
)
@pytest.mark.parametrize("relation", PLANAR)
def test_valid_frames(subject: list[float], thing: list[float], valid: bool, relation: Relation) -> None:
    assert bool(np.isnan(ssr(subject, thing, relation))) is not valid
    if subject == thing:
        assert ssr(subject, thing, relation) == 0


@given(boxes(), boxes())
def test_symmetries(a: np.ndarray, b: np.ndarray) -> None:
    left, right, top, under = (float(ssr(a, b, r)) for r in PLANAR)
    assert left == -right
    assert top == -under
    assert left**2 + top**2 <= 1 + 1e-12
    # Seen from the other thing, the sides swap.
    assert ssr(b, a, L) == pytest.approx(right, abs=1e-12)
    mirror = np.array([-1.0, 1, -1, 1])
    assert ssr((a * mirror)[[2, 1, 0, 3]], (b * mirror)[[2, 1, 0, 3]], L) == pytest.approx(right, abs=1e-9)
    # A quarter turn takes left to top.
    assert ssr(a[[1, 0, 3, 2]], b[[1, 0, 3, 2]], T) == pytest.approx(left, abs=1e-9)


@given(boxes(), boxes(), st.floats(0.1, 10), coordinates, coordinates, st.sampled_from(PLANAR))
def test_scale_and_translation_leave_ssr(
    a: np.ndarray, b: np.ndarray, scale: float, x: float, y: float, relation: Relation
) -> None:
    assume(np.hypot(*(a[:2] + a[2:] - b[:2] - b[2:])) > 1e-3)
    shift = np.array([x, y, x, y])
    assert ssr(a * scale + shift, b * scale + shift, relation) == pytest.approx(float(ssr(a, b, relation)), abs=1e-6)


def test_vectorised_over_videos_and_frames() -> None:
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 50, (3, 7, 2, 2))
    pairs = np.concatenate([low, low + rng.uniform(1, 30, low.shape)], axis=-1)
    for relation in PLANAR:
        together = ssr(pairs[:, :, 0], pairs[:, :, 1], relation)
        assert together.shape == (3, 7)
        assert together[1, 4] == ssr(pairs[1, 4, 0], pairs[1, 4, 1], relation)
    # One object for all frames broadcasts.
    assert ssr(pairs[0, :, 0], pairs[0, 0, 1], L).shape == (7,)


def test_depth_by_hand() -> None:
    # The subject covers half of itself with the object: intersection 5 x 10 of an area of 100.
    subject, thing = [0, 0, 10, 10], [5, -20, 60, 40]
    far = 1.0
    near = far / (1 - DEPTH_BAND / 2)  # half the band nearer: (near - far) / near = DEPTH_BAND / 2
    assert ssr(subject, thing, F, subject_depth=near, object_depth=far) == pytest.approx(0.5 * 0.5)
    assert ssr(subject, thing, B, subject_depth=near, object_depth=far) == pytest.approx(-0.25)
    assert ssr(subject, thing, F, subject_depth=3.0, object_depth=far) == pytest.approx(0.5)
    assert ssr(subject, thing, F, subject_depth=0.0, object_depth=0.0) == 0
    # Beside each other is neither in front nor behind, however near.
    assert ssr(subject, [10, 0, 20, 10], F, subject_depth=9.0, object_depth=1.0) == 0
    assert math.isnan(float(ssr(subject, thing, F, subject_depth=np.nan, object_depth=1.0)))


@given(boxes(), boxes(), st.floats(0, 100), st.floats(0, 100), st.floats(0.01, 100))
def test_depth_symmetries(a: np.ndarray, b: np.ndarray, near: float, far: float, scale: float) -> None:
    front = float(ssr(a, b, F, subject_depth=near, object_depth=far))
    assert -1 <= front <= 1
    assert ssr(b, a, B, subject_depth=far, object_depth=near) == pytest.approx(front)
    # Monocular disparity has no unit.
    assert ssr(a, b, F, subject_depth=near * scale, object_depth=far * scale) == pytest.approx(front, abs=1e-6)
    assert (front != 0) <= (iou(a, b) > 0)


def test_depth_errors() -> None:
    box = [0, 0, 10, 10]
    with pytest.raises(TracksError, match="FRONT needs the mean disparity"):
        ssr(box, box, F)
    with pytest.raises(TracksError, match="must not be negative"):
        ssr(box, box, B, subject_depth=-1.0, object_depth=1.0)


def test_shape_errors() -> None:
    with pytest.raises(TracksError, match=r"subject_boxes: expected an array \(\.\.\., 4\)"):
        ssr([0, 1, 2], [0, 0, 1, 1], L)
    with pytest.raises(TracksError, match="do not match"):
        ssr(np.zeros((3, 4)), np.zeros((2, 4)), L)
    with pytest.raises(TracksError, match="ends before it begins"):
        ssr([10, 0, 0, 10], [0, 0, 1, 1], L)


def test_iou_by_hand() -> None:
    # Intersection 5 x 10 = 50, union 100 + 100 - 50.
    assert iou([0, 0, 10, 10], [5, 0, 15, 10]) == pytest.approx(1 / 3)
    assert iou([0, 0, 10, 10], [10, 0, 20, 10]) == 0
    assert iou([3, 3, 3, 3], [3, 3, 3, 3]) == 0
    assert np.isnan(iou([np.nan] * 4, [0, 0, 1, 1]))
