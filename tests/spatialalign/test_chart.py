"""The canvas of the charts: data fall where arithmetic says, lines are smooth, and text fits."""

from __future__ import annotations

import numpy as np
import pytest

from spatialalign.chart import Axes, Canvas, fitted, font, whole_ticks

WHITE, RED, BLACK = (255, 255, 255), (200, 0, 0), (0, 0, 0)


def canvas() -> Canvas:
    return Canvas((100, 60), WHITE)


def test_areas_cover_exactly_their_pixels() -> None:
    sheet = canvas()
    sheet.area(((10, 20), (30, 25)), RED)
    picture = sheet.finish()
    assert picture.shape == (60, 100, 3) and picture.dtype == np.uint8
    expected = np.zeros((60, 100), dtype=bool)
    expected[20:25, 10:30] = True
    np.testing.assert_array_equal((picture == RED).all(-1), expected)
    assert (picture[~expected] == 255).all()


def test_a_polygon_is_filled() -> None:
    sheet = canvas()
    # A right triangle of 40 by 40 pixels: 800 of them, half of those on its slope.
    sheet.area(((10, 10), (50, 10), (10, 50)), RED)
    covered = (255 - sheet.finish()[..., 1]).sum() / 255
    assert covered == pytest.approx(800, rel=0.03)


def test_slanted_lines_have_soft_edges_and_their_width() -> None:
    sheet = canvas()
    sheet.line(((10, 10), (90, 50)), BLACK, 2)
    dark = 255 - sheet.finish()[..., 0].astype(float)
    assert ((dark > 20) & (dark < 235)).sum() > 50, "steps instead of a line"
    # Length times width, with a half circle at either end.
    assert dark.sum() / 255 == pytest.approx(np.hypot(80, 40) * 2 + np.pi, rel=0.15)


def test_dashes_end_where_they_should() -> None:
    sheet = canvas()
    sheet.dashes((10, 30), (90, 30), BLACK, width=1, dash=10)
    dark = sheet.finish()[..., 0].min(axis=0) < 128
    # Dashes of 10 from 10, 27, 44, 61 and 78 on.
    assert [x for x in range(1, 100) if dark[x] and not dark[x - 1]] == pytest.approx([10, 27, 44, 61, 78], abs=1)
    assert dark.sum() == pytest.approx(50, abs=5)


def test_text_has_its_anchor_and_may_stand_upright() -> None:
    flat, upright = canvas(), canvas()
    length = flat.text((50, 30), "SSR SSR", BLACK, 12, "mm")
    upright.text((50, 30), "SSR SSR", BLACK, 12, upright=True)
    assert length == font(12).getlength("SSR SSR")
    for sheet, across in ((flat, True), (upright, False)):
        rows, columns = np.nonzero(sheet.finish()[..., 0] < 128)
        tall, wide = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert wide > 3 * tall if across else tall > 3 * wide
        assert (rows.min() + rows.max()) / 2 == pytest.approx(30, abs=2)
        assert (columns.min() + columns.max()) / 2 == pytest.approx(50, abs=2)


def test_text_lies_above_what_is_drawn_later() -> None:
    sheet = canvas()
    sheet.text((50, 30), "III", BLACK, 20, "mm")
    sheet.area(((0, 0), (100, 60)), RED)
    picture = sheet.finish()
    assert (picture.sum(-1) == 0).any() and (picture[0, 0] == RED).all()


def test_long_text_is_cut_to_its_room() -> None:
    words = "to the right of the wooden treasure box"
    room = font(14).getlength(words)
    assert fitted(words, room, 14) == words
    cut = fitted(words, room - 1, 14)
    assert cut.endswith("...") and words.startswith(cut[:-3]) and len(cut) > 30
    assert font(14).getlength(cut) <= room - 1
    assert fitted("two\nlines", 200, 14) == "two lines"


def test_axes_turn_data_into_places() -> None:
    axes = Axes(canvas(), (20, 10, 80, 50), (0, 6), (-1, 1))
    assert axes.at(0, 1) == (20, 10) and axes.at(6, -1) == (80, 50) and axes.at(1.5, 0) == (35, 30)
    axes.band(1, 3, RED)
    shaded = (axes.canvas.finish() == RED).all(-1)
    assert np.flatnonzero(shaded.any(0)).tolist() == list(range(30, 50))
    assert np.flatnonzero(shaded.any(1)).tolist() == list(range(10, 50))


def test_grid_lines_are_one_pixel_wide_wherever_they_fall() -> None:
    axes = Axes(canvas(), (20, 10.3, 80, 49.6), (0, 6), (-1, 1))
    axes.rows([(0.37, "")], BLACK, BLACK, 9, right=False)
    black = (axes.canvas.finish() == 0).all(-1)
    # 49.6 - 1.37 / 2 x 39.3 = 22.7: the pixels of row 22.
    assert np.flatnonzero(black.any(axis=1)).tolist() == [22] and black[22].sum() == pytest.approx(60, abs=1)


def test_a_curve_of_one_value_is_a_dot() -> None:
    axes = Axes(canvas(), (20, 10, 80, 50), (0, 6), (-1, 1))
    axes.curve([3], [0], RED, 2, 3)
    covered = (255 - axes.canvas.finish()[..., 1]).sum() / 255
    assert covered == pytest.approx(np.pi * 9, rel=0.15)


@pytest.mark.parametrize(
    ("last", "step"), [(0, 1), (1, 1), (9, 1), (10, 2), (16, 2), (18, 2), (19, 5), (80, 10), (999, 200)]
)
def test_ticks_are_round_and_few(last: int, step: int) -> None:
    ticks = whole_ticks(last)
    assert ticks[0] == 0 and ticks[-1] <= last < ticks[-1] + step and len(ticks) <= 10
    assert all(b - a == step for a, b in zip(ticks, ticks[1:], strict=False))
