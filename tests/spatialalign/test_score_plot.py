"""Pictures of scores: every state can be drawn, and what is drawn is where the numbers say."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from spatialalign import DSR, Relation, Tracks, dsr_score
from spatialalign.errors import DataError
from spatialalign.score_plot import ABSENT, FAILED, FINAL, INITIAL, PASSED, WINDOW, plot_correct, plot_score

LR = DSR("cat", "box", Relation.LEFT, Relation.RIGHT)
T, H, W = 17, 64, 64


def tracks(gap: bool = False) -> Tracks:
    boxes = np.array([[[2.0 + 3 * i, 10, 12 + 3 * i, 22], [28, 30, 40, 44]] for i in range(T)])
    if gap:
        boxes[6:9, 0] = np.nan
    return Tracks(boxes, np.full((T, 2), 0.9), ("cat", "box"), (H, W), 8)


def like(image: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return np.asarray((np.abs(image.astype(int) - colour) < 6).all(-1))


def columns(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Columns of the curves' part of the picture where ``colour`` covers half the height of the plot or more."""
    return np.flatnonzero(like(picture, colour)[:, :790].sum(axis=0) > 150)


def test_windows_and_gaps_are_shaded_where_they_are() -> None:
    whole, holed = plot_score(dsr_score(tracks(), LR), LR), plot_score(dsr_score(tracks(gap=True), LR), LR)
    assert whole.shape == (420, 960, 3) and whole.dtype == np.uint8
    assert not len(columns(whole, ABSENT))
    window, gap = columns(whole, WINDOW), columns(holed, ABSENT)
    # 17 frames share the plot's width; a window is one of them (3 x 17/81, rounded), at either end.
    frame = (window[-1] + 1 - window[0]) / T
    assert len(window) == pytest.approx(2 * frame, abs=4)
    # Frames 6 to 8 are absent.
    assert gap[0] - window[0] == pytest.approx(6 * frame, abs=2) and len(gap) == pytest.approx(3 * frame, abs=3)


def test_a_window_is_shaded_around_the_frames_it_lacks() -> None:
    boxes = np.repeat(tracks().boxes, 5, axis=0)[:81]
    boxes[1:3, 0] = np.nan  # the three first valid frames are 0, 3 and 4
    score = dsr_score(Tracks(boxes, np.ones((81, 2)), ("cat", "box"), (H, W), 8), LR)
    assert score.frames_used[:3].tolist() == [0, 3, 4]
    picture = plot_score(score, LR)
    window, gap = columns(picture, WINDOW), columns(picture, ABSENT)
    left = window[window < 200]
    frame = (window[-1] + 1 - window[0]) / 81
    assert len(left) == pytest.approx(3 * frame, abs=4) and len(gap) == pytest.approx(2 * frame, abs=3)
    assert left[0] < gap[0] < gap[-1] < left[-1]


def test_curves_run_through_their_values() -> None:
    score = dsr_score(tracks(), LR)
    picture = plot_score(score, LR)
    window = columns(picture, WINDOW)
    # The subject is on the left at first: the initial curve is above the final one there, and below it at the end.
    for frame, above, below in ((0, INITIAL, FINAL), (T - 1, FINAL, INITIAL)):
        centre = round(window[0] + (frame + 0.5) * (window[-1] + 1 - window[0]) / T)
        rows = {colour: np.flatnonzero(like(picture[:, centre], colour)[:350]) for colour in (above, below)}
        assert rows[above].mean() < rows[below].mean()
        ssr = (score.initial_ssr if above == INITIAL else score.final_ssr)[0 if frame == 0 else -1]
        # The axis runs from -1.06 to 1.06 over the height of the shaded window.
        shaded = np.flatnonzero(like(picture[:, centre], WINDOW))
        expected = shaded[0] + (1.06 - ssr) / 2.12 * (shaded[-1] + 1 - shaded[0])
        assert rows[above].mean() == pytest.approx(expected, abs=2)


def test_bars_are_as_high_as_their_scores_and_coloured_by_their_verdict() -> None:
    score = dsr_score(tracks(gap=True), LR)
    assert score.score is not None and score.robust is not None and score.robust.score is not None
    threshold = (score.score + score.robust.score) / 2
    score = replace(score, robust=replace(score.robust, threshold=score.robust.score + 0.01))
    picture = plot_score(score, LR, threshold)
    heights = []
    for colour, value in ((PASSED, score.score), (FAILED, score.robust.score)):
        bars = like(picture[60:350, 790:], colour)
        at = int(np.argmax(bars.sum(axis=0)))
        rows = np.flatnonzero(bars[:, at])
        heights.append((rows[-1] + 1 - rows[0]) / value)
    # One scale for both.
    assert heights[0] == pytest.approx(heights[1], rel=0.02) and 250 < heights[0] < 320


def test_the_verdict_follows_the_threshold() -> None:
    score = dsr_score(tracks(), LR)
    assert score.score is not None and score.robust is not None
    score = replace(score, robust=None)
    passed, failed = plot_score(score, LR, score.score), plot_score(score, LR, np.nextafter(score.score, 1))
    assert like(passed, PASSED).sum() > 3000 > 10 > like(passed, FAILED).sum()
    assert like(failed, FAILED).sum() > 3000 > 10 > like(failed, PASSED).sum()


def test_every_state_of_a_score_can_be_drawn() -> None:
    good = dsr_score(tracks(gap=True), LR)
    refused = dsr_score(replace(tracks(), invalid="two cats in 17 frames"), LR)
    empty = dsr_score(replace(tracks(), boxes=np.full((T, 2, 4), np.nan)), LR)
    still = dsr_score(Tracks(tracks().boxes[:1], np.ones((1, 2)), ("cat", "box"), (H, W), 8), LR)
    named = DSR(
        "very large and hungry polar bear", "wooden treasure box with golden hinges", Relation.TOP, Relation.UNDER
    )
    pictures = [plot_score(score, LR, size=(600, 300)) for score in (good, refused, empty, still)]
    pictures += [plot_score(good, named, size=size) for size in ((320, 200), (1600, 700))]
    assert [picture.shape[:2] for picture in pictures] == [(300, 600)] * 4 + [(200, 320), (700, 1600)]
    # Red letters say INVALID; nothing of a good one is red.
    red = [((p[..., 0] > p[..., 1] + 60.0) & (p[..., 0] > p[..., 2] + 60.0)).sum() for p in pictures[:3]]
    assert red[0] == 0 and min(red[1:]) > 100
    assert len(columns(plot_score(empty, LR), ABSENT)) > 600
    assert not refused.valid and not empty.valid and not still.valid


def test_correct_at_tau_is_drawn_to_scale() -> None:
    # Half of the clips pass every threshold up to 0.9, a quarter is INVALID, a quarter scores 0.
    scores = [1.0] * 8 + [None] * 4 + [0.0] * 4
    picture = plot_correct(scores)
    assert picture.shape == (420, 720, 3)
    curve, grid = like(picture, (44, 104, 172)), like(picture, (222, 224, 226))
    lines = np.flatnonzero(grid.sum(axis=1) > 150)
    top, bottom = lines.min(), lines.max()  # 100 % and 0 %
    rows = [np.flatnonzero(curve[:, x]).mean() for x in np.flatnonzero(curve.any(axis=0))]
    # From tau = 0.1 on it stays at 50 %; at tau = 0 the zeros pass too: 75 %.
    assert np.median(rows) == pytest.approx((top + bottom) / 2, abs=1.5)
    assert rows[0] == pytest.approx(bottom - 0.75 * (bottom - top), abs=2)


def test_the_threshold_of_correct_is_marked_where_it_is() -> None:
    ink = (24, 26, 30)
    places = []
    for threshold in (0.3, 0.65):
        picture = plot_correct([0.2, 0.5, 0.9, None], threshold)
        places.append(int(np.argmax(like(picture[60:360], ink).sum(axis=0))))
    # 0.92 + 0.02 of tau over about 620 pixels.
    assert (places[1] - places[0]) / 0.35 == pytest.approx(650, abs=25)


def test_correct_needs_a_score_and_takes_a_single_one() -> None:
    with pytest.raises(DataError, match="no scores"):
        plot_correct([])
    assert plot_correct([None], size=(400, 240)).shape == (240, 400, 3)


def test_plots_need_pillow_and_numpy_alone() -> None:
    """As in ComfyUI's environment, where there is no matplotlib."""
    program = (
        "import sys\n"
        "for name in ('matplotlib', 'scipy', 'diffusers', 'torch'): sys.modules[name] = None\n"
        "import numpy as np\n"
        "from spatialalign import DSR, Relation, Tracks, dsr_score\n"
        "from spatialalign.score_plot import plot_correct, plot_score\n"
        "boxes = np.array([[[i, 0, i + 4, 4], [8, 0, 12, 4]] for i in range(17)], dtype=float)\n"
        "tracks = Tracks(boxes, np.ones((17, 2)), ('cat', 'box'), (16, 32), 8)\n"
        "dsr = DSR('cat', 'box', Relation.LEFT, Relation.RIGHT)\n"
        "plot_score(dsr_score(tracks, dsr), dsr)\n"
        "plot_correct([0.4, None])\n"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
