"""The picture of a leaderboard: one small panel a number, one row a model, a dot with its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spatialalign.chart import Axes, Canvas, Colour, fitted, font
from training.report_charts import nice_ticks

_PAPER, _INK, _GREY, _GRID = (255, 255, 255), (24, 26, 30), (108, 112, 118), (232, 234, 236)
_FIRST, _OTHERS = (112, 118, 128), (13, 128, 114)
_MOST_ACROSS = 4


def leaderboard_chart(result: Mapping[str, Any], width: int = 1200) -> NDArray[np.uint8]:
    """Every column of a leaderboard but the official threshold as a panel, the first model's value marked through all.

    ``result`` is what :func:`~training.metrics.measure_models` returns; models are in its order from the top. Returns
    uint8 (height, width, 3); the height follows from how many models and columns there are.
    """
    columns = [column for column in result["columns"] if column["key"] != "official_correct_at_0.7"]
    models = result["models"]
    em = 15 * width / 1200
    across = min(_MOST_ACROSS, len(columns))
    names = min(max(font(round(em)).getlength(model["name"]) for model in models) + 2.2 * em, 0.25 * width)
    wide, gap = (width - names - 1.5 * em) / across, 1.6 * em
    tall = 4.6 * em + 2.0 * em * len(models)
    lines = math.ceil(len(columns) / across)
    canvas = Canvas((width, round(4.8 * em + lines * tall + 1.2 * em)), _PAPER)
    canvas.text((1.2 * em, 1.6 * em), "Leaderboard", _INK, round(1.35 * em))
    told = f"dots with 95 % intervals over prompts; dashes mark {models[0]['name']}"
    canvas.text((1.2 * em, 3.3 * em), fitted(told, width - 2.4 * em, round(em)), _GREY, round(em))
    for index, column in enumerate(columns):
        line, place = divmod(index, across)
        top, left = 4.8 * em + line * tall, names + place * wide
        box = (left, top + 1.9 * em, left + wide - gap, top + tall - 2.5 * em)
        if place == 0:
            for row, model in enumerate(models):
                y = _row(box, row, len(models))
                text = fitted(model["name"], names - 2 * em, round(em))
                canvas.text((names - 0.9 * em, y), text, _colour(row), round(em), "rm")
        _panel(canvas, box, em, column, models)
    return canvas.finish()


def _panel(
    canvas: Canvas,
    box: tuple[float, float, float, float],
    em: float,
    column: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
) -> None:
    """One number of every model on an axis of its own."""
    left, top, right, bottom = box
    scale = 100 if column["share"] else 1
    unit = ", %" if column["share"] else ""
    direction = {True: " (lower is better)", False: "", None: " (neither way)"}[column["lower"]]
    title = fitted(column["title"] + unit + direction, right - left + 0.6 * em, round(0.95 * em))
    canvas.text((left, top - 1.1 * em), title, _INK, round(0.95 * em))
    values = [model[column["key"]] for model in models]
    known = [value for value in values if value["value"] is not None]
    if not known:
        canvas.text((left, (top + bottom) / 2), "no clip has a value", _GREY, round(em))
        return
    span = _span([scale * value[end] for value in known for end in ("low", "high")])
    axes = Axes(canvas, box, span, (0, 1))
    for tick in nice_ticks(*span, count=4):
        x = axes.at(tick, 0)[0]
        canvas.line(((x, top), (x, bottom)), _GRID, 1)
        canvas.text((x, bottom + 0.5 * em), f"{tick:g}", _GREY, round(0.85 * em), "ma")
    canvas.line(((left, bottom), (right, bottom)), _GREY, 1)
    if values[0]["value"] is not None and len(models) > 1:
        x = axes.at(scale * values[0]["value"], 0)[0]
        canvas.dashes((x, top), (x, bottom), _FIRST, 1, 0.25 * em)
    for row, value in enumerate(values):
        if value["value"] is None:
            continue
        y, colour = _row(box, row, len(models)), _colour(row)
        low, middle, high = (axes.at(scale * value[key], 0)[0] for key in ("low", "value", "high"))
        canvas.line(((low, y), (high, y)), _pale(colour), 0.22 * em)
        canvas.dot((middle, y), 0.36 * em, colour)


def _row(box: tuple[float, float, float, float], row: int, rows: int) -> float:
    """The height of a model's row in a panel."""
    return box[1] + (row + 0.5) * (box[3] - box[1]) / rows


def _span(ends: Sequence[float]) -> tuple[float, float]:
    """The range of an axis, with a little room; values that are all alike get some around them."""
    low, high = min(ends), max(ends)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 0.05
    return low - room, high + room


def _colour(row: int) -> Colour:
    return _FIRST if row == 0 else _OTHERS


def _pale(colour: Colour) -> Colour:
    """Half way to the paper."""
    red, green, blue = ((part + 255) // 2 for part in colour)
    return red, green, blue
