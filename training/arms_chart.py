"""The cost-quality chart of an arms comparison: what each way of sampling reaches for how many evaluations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spatialalign.chart import Axes, Canvas, Colour, Point, fitted, font
from training.report_charts import nice_ticks

_PAPER, _INK, _GREY, _GRID = (255, 255, 255), (24, 26, 30), (108, 112, 118), (226, 228, 230)
_CURVE, _BAND = (84, 116, 170), (231, 238, 247)
_COLOURS: Mapping[tuple[bool, bool], Colour] = {
    (False, False): (70, 76, 86),
    (True, False): (13, 128, 114),
    (False, True): (196, 96, 12),
    (True, True): (96, 66, 196),
}
"""By whether an arm has a LoRA, and whether it has guidance."""

Rect = tuple[float, float, float, float]


def arms_chart(result: Mapping[str, Any], size: tuple[int, int] = (1200, 680)) -> NDArray[np.uint8]:
    """Correct@0.7 with its 95 % intervals against evaluations per clip in multiples of the base's, on a log scale.

    The line is best-of-n on the base for every n. ``result`` is what :func:`~training.arms.compare_arms` returns;
    ``size`` is width and height in pixels. Returns uint8 (height, width, 3).
    """
    em = max(9.0, 16 * min(size[0] / 1200, size[1] / 680))
    canvas = Canvas(size, _PAPER)
    box = (5.2 * em, 5.9 * em, size[0] - 2.0 * em, size[1] - 4.4 * em)
    arms, curve = result["arms"], (result["best_of"] or {"correct_at_0.7": []})["correct_at_0.7"]
    rates = [arm["correct_at_0.7"] for arm in arms]
    costs = [arm["cost"]["relative"] for arm in arms]
    axes = Axes(canvas, box, _cost_range(costs, len(curve)), _rate_range([*rates, *curve]))
    _frame(axes, em, result, size[0])
    obstacles = _curve(axes, em, curve)
    places = [axes.at(math.log2(cost), rate["value"]) for cost, rate in zip(costs, rates, strict=True)]
    places = list(zip(_dodged([x for x, _ in places], 0.9 * em), [y for _, y in places], strict=True))
    colours = [_COLOURS["lora" in arm["name"].split("+"), "guidance" in arm["name"].split("+")] for arm in arms]
    for (x, y), rate, colour in zip(places, rates, colours, strict=True):
        top, bottom = (axes.at(0, rate[end])[1] for end in ("high", "low"))
        canvas.line(((x, top), (x, bottom)), _pale(colour), 0.14 * em)
        for end in (top, bottom):
            canvas.line(((x - 0.28 * em, end), (x + 0.28 * em, end)), _pale(colour), 0.1 * em)
        obstacles += [(x - 0.2 * em, top, x + 0.2 * em, bottom), (x - em / 2, y - em / 2, x + em / 2, y + em / 2)]
    for (x, y), colour in zip(places, colours, strict=True):
        canvas.dot((x, y), 0.52 * em, _PAPER)
        canvas.dot((x, y), 0.42 * em, colour)
    names = [arm["name"] for arm in arms]
    if len(curve) > 1:
        # Beside the middle of its last piece.
        n, value = len(curve) - 0.5, (curve[-2]["value"] + curve[-1]["value"]) / 2
        names, places, colours = [*names, "best of n"], [*places, axes.at(math.log2(n), value)], [*colours, _CURVE]
    _labels(canvas, em, places, names, colours, obstacles, box)
    return canvas.finish()


def _frame(axes: Axes, em: float, result: Mapping[str, Any], width: int) -> None:
    """Titles, grid and axes."""
    canvas, (left, top, right, bottom) = axes.canvas, axes.box
    title, seeds = round(1.35 * em), len(result["seeds"])
    canvas.text((1.3 * em, 1.7 * em), "Correct@0.7 against what a clip costs", _INK, title)
    told = f"{result['prompts']} prompts, {seeds} {'seed' if seeds == 1 else 'seeds'} each; bars are 95 % intervals"
    if result["best_of"]:
        told += "; the line is best-of-n on the base, expected for every n from one pool"
    canvas.text((1.3 * em, 3.5 * em), fitted(told, width - 2.6 * em, round(em)), _GREY, round(em))
    small = round(0.95 * em)
    axes.rows([(y, f"{y:.0%}") for y in nice_ticks(*axes.y, count=6)], _GRID, _GREY, small, right=False)
    ticks = _cost_ticks(2 ** axes.x[0], 2 ** axes.x[1])
    axes.columns([(math.log2(tick), f"{tick:g}x") for tick in ticks], _GREY, small)
    canvas.line(((left, bottom), (right, bottom)), _GREY, 1)
    canvas.text(
        ((left + right) / 2, bottom + 3 * em), "transformer evaluations per clip, base = 1x", _GREY, round(em), "mm"
    )
    canvas.text((1.4 * em, (top + bottom) / 2), "Correct@0.7", _GREY, round(em), upright=True)


def _curve(axes: Axes, em: float, curve: Sequence[Mapping[str, float]]) -> list[Rect]:
    """Best-of-n with its band; returns where a label would hide it."""
    if not curve:
        return []
    costs = [math.log2(n) for n in range(1, len(curve) + 1)]
    outline = [axes.at(x, row["high"]) for x, row in zip(costs, curve, strict=True)]
    outline += [axes.at(x, row["low"]) for x, row in reversed(list(zip(costs, curve, strict=True)))]
    if len(curve) > 1:
        axes.canvas.area(outline, _BAND)
    # Linear in the cost, as the comparison is, hence a little bent on this axis.
    fine = [1 + k / 32 for k in range(32 * (len(curve) - 1) + 1)]
    values = np.interp(fine, range(1, len(curve) + 1), [row["value"] for row in curve])
    path = [axes.at(math.log2(n), float(value)) for n, value in zip(fine, values, strict=True)]
    axes.canvas.line(path, _CURVE, 0.16 * em)
    for x, row in zip(costs, curve, strict=True):
        axes.canvas.dot(axes.at(x, row["value"]), 0.26 * em, _CURVE)
    return [(x - 0.3 * em, y - 0.3 * em, x + 0.3 * em, y + 0.3 * em) for x, y in path]


def _labels(
    canvas: Canvas,
    em: float,
    places: Sequence[Point],
    names: Sequence[str],
    colours: Sequence[Colour],
    obstacles: Sequence[Rect],
    box: Rect,
) -> None:
    """Each name beside its point, where it covers least of what is drawn and of the names set before it."""
    points, taken = round(1.02 * em), list(obstacles)
    for (x, y), name, colour in zip(places, names, colours, strict=True):
        length = font(points).getlength(name)
        spots = []
        for up in (0.0, -1.0, 1.0, -1.9, 1.9, -2.8, 2.8):
            for start in (x + 0.85 * em, x - 0.85 * em - length):
                middle = y + up * em
                spots.append((start, middle - 0.62 * em, start + length, middle + 0.62 * em))
        # Among spots that are equally free the first is the nearest.
        spot = min(spots, key=lambda spot: sum(_shared(spot, other) for other in taken) + 50 * _outside(spot, box))
        taken.append(spot)
        canvas.text((spot[0], (spot[1] + spot[3]) / 2), name, colour, points, "lm")


def _shared(one: Rect, two: Rect) -> float:
    """Area that two rectangles have in common."""
    wide, tall = min(one[2], two[2]) - max(one[0], two[0]), min(one[3], two[3]) - max(one[1], two[1])
    return max(wide, 0.0) * max(tall, 0.0)


def _outside(spot: Rect, box: Rect) -> float:
    """By how many pixels a rectangle leaves another."""
    return sum(max(0.0, gap) for gap in (box[0] - spot[0], box[1] - spot[1], spot[2] - box[2], spot[3] - box[3]))


def _dodged(xs: Sequence[float], gap: float) -> list[float]:
    """Places moved sideways so that bars of the same cost stand beside each other, in the order given."""
    out = list(xs)
    order = sorted(range(len(xs)), key=lambda k: xs[k])
    groups: list[list[int]] = []
    for k in order:
        if groups and xs[k] - xs[groups[-1][-1]] < gap:
            groups[-1].append(k)
        else:
            groups.append([k])
    for group in groups:
        centre = sum(xs[k] for k in group) / len(group)
        for position, k in enumerate(group):
            out[k] = centre + (position - (len(group) - 1) / 2) * gap if len(group) > 1 else xs[k]
    return out


def _cost_range(costs: Sequence[float], last: int) -> tuple[float, float]:
    """The range of log2 of the costs, with room for the names at its right end."""
    low, high = math.log2(min(costs)), math.log2(max(*costs, last, 2))
    wide = high - low
    return low - 0.1 * wide, high + 0.2 * wide


def _cost_ticks(low: float, high: float) -> list[float]:
    """Powers of two in the range, with the steps between them when there are few."""
    powers = range(math.ceil(math.log2(low) - 1e-9), math.floor(math.log2(high) + 1e-9) + 1)
    between = (1.0, 1.25, 1.5, 1.75) if len(powers) < 3 else (1.0, 1.5) if len(powers) < 6 else (1.0,)
    ticks = [2.0**power * part for power in range(powers.start - 1, powers.stop) for part in between]
    return [tick for tick in ticks if low <= tick <= high]


def _rate_range(rates: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """The range of the intervals with some room, within 0 to 1."""
    low, high = min(rate["low"] for rate in rates), max(rate["high"] for rate in rates)
    room = max(0.06 * (high - low), 0.02)
    return max(0.0, low - room), min(1.0, high + room)


def _pale(colour: Colour) -> Colour:
    """Half way to the paper."""
    red, green, blue = ((part + 255) // 2 for part in colour)
    return red, green, blue
