"""Pictures of scores, as uint8 RGB arrays: the curves of one video, and Correct@tau over many."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .chart import Axes, Canvas, Colour, fitted, font, whole_ticks
from .dsr import DSR
from .explain import verdict
from .metrics import rate_interval, thresholds
from .score import DsrScore
from .summary import clips

Image8 = NDArray[np.uint8]

_PAPER, _INK, _GREY, _GRID = (255, 255, 255), (24, 26, 30), (108, 112, 118), (222, 224, 226)
PASSED, FAILED = (46, 139, 87), (184, 69, 58)
INITIAL, FINAL = (138, 79, 191), (18, 128, 92)
"""Colours of the curves of the initial and the final relation."""
WINDOW, ABSENT = (250, 234, 186), (232, 232, 230)
"""Shades of the frames in either window and of those that do not count."""
_TROUGH, _BAND, _CURVE = (240, 241, 242), (217, 229, 243), (44, 104, 172)


def plot_score(score: DsrScore, dsr: DSR, threshold: float = 0.7, size: tuple[int, int] = (960, 420)) -> Image8:
    """Both SSR curves against the frame number, the windows shaded, and the scores beside them on a scale.

    Frames that do not count are grey. The title says the type, the score and whether it passes ``threshold``, or why
    the video is INVALID. ``size`` is width and height in pixels; returns uint8 (height, width, 3).
    """
    canvas, em = _sheet(size, (960, 420))
    width, height = size
    top, bottom = 4.1 * em, height - 5.3 * em
    _titles(canvas, em, width, f"{score.type_code} · {dsr.subject} / {dsr.object}", _verdicts(score, threshold))
    last = max(score.frames - 1, int(score.frames_used.max(initial=0)), 1)
    box = (4.4 * em, top, width - 12.5 * em, bottom)
    _curves(Axes(canvas, box, (-0.5, last + 0.5), (-1.06, 1.06)), em, score)
    _scale(Axes(canvas, (width - 9.7 * em, top, width - 3.2 * em, bottom), (0, 2), (0, 1)), em, score, threshold)
    names = (
        (f"initial: {dsr.initial.initial_phrase} the {dsr.object}", INITIAL, True),
        (f"final: {dsr.final.final_phrase} the {dsr.object}", FINAL, True),
        ("windows", WINDOW, False),
        ("not valid", ABSENT, False),
    )
    _legend(canvas, em, (box[0], height - 1.4 * em, width - em), names)
    return canvas.finish()


def plot_correct(scores: Sequence[float | None], threshold: float = 0.7, size: tuple[int, int] = (720, 420)) -> Image8:
    """Correct@tau against the threshold tau, with its 95 % bootstrap band over the clips and ``threshold`` marked.

    ``scores`` are in [0, 1], or None for INVALID, which is wrong at every threshold. ``size`` is width and height in
    pixels; returns uint8 (height, width, 3). Raises :class:`~spatialalign.errors.DataError` without scores.
    """
    taus = np.union1d(thresholds(), [threshold])
    rates = [rate_interval(scores, range(len(scores)), float(tau)) for tau in taus]
    shares = [rate.estimate for rate in rates]
    at = int(np.flatnonzero(taus == threshold)[0])
    canvas, em = _sheet(size, (720, 420))
    passed = sum(score is not None and score >= threshold for score in scores)
    invalid = sum(score is None for score in scores)
    # One clip says nothing about how much others would differ.
    spread = f"; 95% interval {rates[at].low:.0%} to {rates[at].high:.0%}" if len(scores) > 1 else ""
    lines = [
        (f"{passed} of {clips(len(scores))} pass{spread}", _INK),
        (f"{invalid} INVALID", FAILED if invalid else _GREY),
    ]
    _titles(canvas, em, size[0], f"Correct@{threshold:g}: {shares[at]:.1%}", lines)
    box = (5.2 * em, 4.1 * em, size[0] - 1.6 * em, size[1] - 3.9 * em)
    axes = Axes(canvas, box, (-0.02, max(0.92, threshold + 0.02)), (0, 1.06))
    ranges = [axes.at(t, r.low) for t, r in zip(taus, rates, strict=True)]
    ranges += [axes.at(t, r.high) for t, r in reversed(list(zip(taus, rates, strict=True)))]
    canvas.area(ranges, _BAND)
    axes.rows([(share, f"{share:.0%}") for share in (0, 0.25, 0.5, 0.75, 1)], _GRID, _GREY, round(em * 0.9), False)
    axes.columns([(tau, f"{tau:g}") for tau in thresholds()], _GREY, round(em * 0.9))
    canvas.dashes(axes.at(threshold, axes.y[0]), axes.at(threshold, axes.y[1]), _INK)
    axes.curve(list(taus), shares, _CURVE, 0.16 * em, 0.26 * em)
    canvas.dot(axes.at(threshold, shares[at]), 0.45 * em, _INK)
    canvas.text(((box[0] + box[2]) / 2, size[1] - 1.1 * em), "threshold", _GREY, round(em), "mm")
    canvas.text((1.2 * em, (box[1] + box[3]) / 2), "share of clips that pass", _GREY, round(em), upright=True)
    return canvas.finish()


def _sheet(size: tuple[int, int], usual: tuple[int, int]) -> tuple[Canvas, float]:
    """An empty canvas and its unit, the height of the text: 14 pixels in a picture of the ``usual`` size."""
    return Canvas(size, _PAPER), max(9.0, 14 * min(size[0] / usual[0], size[1] / usual[1]))


def _titles(canvas: Canvas, em: float, width: int, title: str, lines: Sequence[tuple[str, Colour]]) -> None:
    """A large line, and below it the ``lines`` one after the other in their colours, as far as there is room."""
    canvas.text((1.1 * em, 1.4 * em), fitted(title, width - 2.2 * em, round(1.35 * em)), _INK, round(1.35 * em))
    x = 1.1 * em
    for text, colour in lines:
        x += canvas.text((x, 2.9 * em), fitted(text, width - em - x, round(em)), colour, round(em)) + 1.6 * em


def _verdicts(score: DsrScore, threshold: float) -> list[tuple[str, Colour]]:
    """What the title says of either score, in the colour of its verdict."""
    if score.score is None:
        said = [(f"INVALID, {score.reason}", FAILED)]
    else:
        said = [(f"DSR-Score {verdict(score.score, threshold)}", PASSED if score.score >= threshold else FAILED)]
    robust = score.robust
    if robust is not None and robust.score is not None:
        said.append((f"robust {verdict(robust.score, robust.threshold)}", PASSED if robust.passed else FAILED))
    elif robust is not None and robust.reason != score.reason:
        said.append((f"robust INVALID, {robust.reason}", FAILED))
    return said


def _curves(axes: Axes, em: float, score: DsrScore) -> None:
    used = score.frames_used
    # Official records may name frames beyond their own number.
    frames = max(score.frames, int(used.max(initial=0)) + 1)
    valid, window = np.zeros((2, frames), dtype=bool)
    valid[used] = True
    # The windows are of valid frames, so they may have holes.
    window[used[: score.limits.window]] = window[used[-score.limits.window :]] = True
    for flags, colour in ((~valid, ABSENT), (window, WINDOW)):
        for first, stop in _runs(flags):
            axes.band(first - 0.5, stop - 0.5, colour)
    small = round(em * 0.9)
    axes.rows([(y, f"{y:g}") for y in (-1, -0.5, 0, 0.5, 1)], _GRID, _GREY, small, right=False)
    axes.canvas.line((axes.at(axes.x[0], 0), axes.at(axes.x[1], 0)), _GREY, 1)
    axes.columns([(frame, str(frame)) for frame in whole_ticks(frames - 1)], _GREY, small)
    for values, colour in ((score.initial_ssr, INITIAL), (score.final_ssr, FINAL)):
        # No line is drawn across what was not seen.
        for first, stop in _runs(valid):
            part = (used >= first) & (used < stop)
            dot = 0.24 * em if frames <= 120 else 0.1 * em
            axes.curve(used[part].tolist(), values[part].tolist(), colour, 0.15 * em, dot)
    left, top, right, bottom = axes.box
    if not len(used):
        axes.canvas.text(((left + right) / 2, axes.at(0, 0.25)[1]), "no valid frame", _GREY, round(1.2 * em), "mm")
    axes.canvas.text(((left + right) / 2, bottom + 2.3 * em), "frame", _GREY, round(em), "mm")
    axes.canvas.text((1.2 * em, (top + bottom) / 2), "SSR", _GREY, round(em), upright=True)


def _scale(axes: Axes, em: float, score: DsrScore, threshold: float) -> None:
    axes.rows([(y, f"{y:g}") for y in (0, 0.25, 0.5, 0.75, 1)], _GRID, _GREY, round(em * 0.9), right=True)
    robust = score.robust
    bars = [("paper", score.score, score.score is not None and score.score >= threshold)]
    bars += [] if robust is None else [("robust", robust.score, robust.passed)]
    for place, (name, value, passed) in enumerate(bars):
        colour = PASSED if passed else FAILED
        axes.canvas.area((axes.at(place + 0.15, 1), axes.at(place + 0.85, 0)), _TROUGH)
        axes.canvas.text(_below(axes, place, em), name, _GREY, round(em * 0.9), "mm")
        if value is None:
            axes.canvas.text(axes.at(place + 0.5, 0.3), "INVALID", FAILED, round(em), upright=True)
            continue
        axes.canvas.area((axes.at(place + 0.15, value), axes.at(place + 0.85, 0)), colour)
        # At the foot of the bar, where the line of the threshold hardly ever is.
        low = value < 0.12
        x, y = axes.at(place + 0.5, value if low else 0)
        axes.canvas.text((x, y - 0.9 * em), f"{value:.2f}", _INK if low else _PAPER, round(em), "mm")
    start, end = axes.at(0, threshold), axes.at(2, threshold)
    axes.canvas.dashes(start, end, _INK)
    axes.canvas.text((start[0] - 0.4 * em, start[1]), f"{threshold:g}", _INK, round(em * 0.9), "rm")


def _below(axes: Axes, place: int, em: float) -> tuple[float, float]:
    x, y = axes.at(place + 0.5, 0)
    return x, y + 1.0 * em


def _legend(
    canvas: Canvas, em: float, row: tuple[float, float, float], entries: Sequence[tuple[str, Colour, bool]]
) -> None:
    """Entries (name, colour, drawn as a line) from left to right; the longest names are cut until all have room."""
    left, y, right = row
    names = [name for name, _, _ in entries]
    points, around = round(em * 0.95), 3.4 * em
    room = right - left - around * len(names)
    while sum(font(points).getlength(name) for name in names) > room and max(map(len, names)) > 8:
        longest = max(range(len(names)), key=lambda i: len(names[i]))
        names[longest] = names[longest].removesuffix("...")[:-1].rstrip() + "..."
    x = left
    for name, (_, colour, line) in zip(names, entries, strict=True):
        if line:
            canvas.line(((x, y), (x + 1.6 * em, y)), colour, 0.15 * em)
            canvas.dot((x + 0.8 * em, y), 0.25 * em, colour)
        else:
            canvas.area(((x, y - 0.5 * em), (x + 1.6 * em, y + 0.5 * em)), colour)
        x += 2.1 * em + canvas.text((x + 2.1 * em, y), name, _INK, points) + 1.3 * em


def _runs(flags: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """(first, stop) of every run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]
