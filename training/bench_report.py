"""The tables, the chart and the page of a reward benchmark: from the numbers of ``bench.json`` to text and pictures."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spatialalign.chart import Axes, Canvas, fitted
from training.measure import markdown
from training.report_html import decimal, document, percent

_PAPER, _INK, _GREY, _GRID = (255, 255, 255), (24, 26, 30), (108, 112, 118), (226, 228, 230)
_WITHOUT, _WITH = (44, 104, 172), (196, 96, 12)

Cells = list[list[str]]


def accuracy_cells(result: Mapping[str, Any]) -> Cells:
    """One row for each scorer and dimension, the first row the head."""
    rows = [
        [
            "scorer",
            "label",
            "pairs",
            "scored",
            "without ties",
            "with ties",
            "tie up to",
            "official with ties",
            "chance with ties",
            "of all, without",
            "of all, with",
        ]
    ]
    for scorer in result["scorers"]:
        for label, found in scorer["dimensions"].items():
            rows.append(
                [
                    scorer["name"],
                    label,
                    str(found["pairs"]),
                    str(found["scored"]),
                    percent(found["without_ties"]),
                    percent(found["with_ties"]),
                    "–" if found["threshold"] is None else f"{found['threshold']:.3g}",
                    percent(found["with_ties_official"]),
                    percent(found["chance_with_ties"]),
                    percent(found["of_all"]["without_ties"]),
                    percent(found["of_all"]["with_ties"]),
                ]
            )
    return rows


def generator_cells(scorer: Mapping[str, Any]) -> Cells:
    """One row for each generator."""
    rows = [["generator", "pairs", "people prefer it", "scorer prefers it", "without ties", "mean score"]]
    for row in scorer["generators"]["rows"]:
        wins = [percent(row[key]) for key in ("human_wins", "scorer_wins", "without_ties")]
        rows.append([row["model"], str(row["pairs"]), *wins, decimal(row["mean_score"])])
    return rows


def told(result: Mapping[str, Any]) -> list[str]:
    """What was compared and what was left out, a sentence each."""
    bench = result["benchmark"]
    lines = [
        f"{bench['pairs']} pairs of {bench['clips']} clips and {bench['prompts']} prompts in the form of "
        f"{bench['form']}."
    ]
    if bench["absent"]:
        lines.append(
            f"{len(bench['absent'])} clips have no file, so {bench['pairs_without_video']} pairs are left out; the "
            f"first: {bench['absent'][0]}."
        )
    for scorer in result["scorers"]:
        if scorer["unscored"]:
            first = scorer["unscored"][0]
            lines.append(
                f"{scorer['name']}: {len(scorer['unscored'])} clips have no score; the first: {first['path']}, "
                f"{first['reason']}."
            )
    return lines


def frame_lines(frames: Mapping[str, Any]) -> list[str]:
    """The single frames in words."""
    clear = frames["yes"] + frames["no"]
    return [
        f"{frames['judge']} on {frames['clips']} clips: {frames['yes']} yes, {frames['no']} no, {frames['unclear']} "
        "unclear" + (f", such as {frames['unclear_replies'][0]!r}." if frames["unclear"] else "."),
        f"YES in {percent(frames['yes_where_above_zero'])} of the clear answers where SSR is above 0, and in "
        f"{percent(frames['yes_where_below_zero'])} where it is below."
        + (f" Spearman of SSR and YES: {decimal(frames['spearman'], True)}." if clear else ""),
    ]


def text(result: Mapping[str, Any]) -> str:
    """The whole result as Markdown."""
    parts = ["# Reward benchmark"]
    if result["benchmark"]:
        parts += ["\n\n".join(told(result)), markdown(accuracy_cells(result))]
        for scorer in result["scorers"]:
            if scorer["generators"]["rows"]:
                parts += [f"## {scorer['name']}, by generator", ranks(scorer), markdown(generator_cells(scorer))]
    if result["frames"]:
        parts += [
            "## Single frames",
            "\n\n".join(frame_lines(result["frames"])),
            markdown(frame_cells(result["frames"])),
        ]
    return "\n\n".join(parts) + "\n"


def ranks(scorer: Mapping[str, Any]) -> str:
    """How the order of the generators agrees, in a sentence."""
    table = scorer["generators"]
    return (
        f"By the label {table['label']}; a tie is half a win. Spearman of both columns: "
        f"{decimal(table['spearman_of_wins'], True)}."
    )


def frame_cells(frames: Mapping[str, Any]) -> Cells:
    """One row for each bin of SSR."""
    rows = [["SSR", "yes", "no", "unclear", "YES", "YES, initial", "YES, final"]]
    for row in frames["bins"]:
        counts = [str(row[answer]) for answer in ("yes", "no", "unclear")]
        shares = [percent(part["yes_share"]) for part in (row, row["initial"], row["final"])]
        rows.append([f"{row['low']:+.1f} to {row['high']:+.1f}", *counts, *shares])
    return rows


def page(result: Mapping[str, Any], charts: Sequence[bytes]) -> str:
    """The whole result as one HTML document with its charts, PNG files, in it."""
    parts = ['<p class="kicker">SpatialAlign report</p><h1>Reward benchmark</h1>']
    pictures = list(charts)
    if result["benchmark"]:
        parts += [f"<p>{escape(line)}</p>" for line in told(result)]
        parts += [_picture(pictures.pop(0)), _table(accuracy_cells(result), 2)]
        for scorer in result["scorers"]:
            if scorer["generators"]["rows"]:
                parts.append(f"<h2>{escape(scorer['name'])}, by generator</h2><p>{escape(ranks(scorer))}</p>")
                parts.append(_table(generator_cells(scorer), 1))
    if result["frames"]:
        parts.append("<h2>Single frames</h2>" + "".join(f"<p>{escape(n)}</p>" for n in frame_lines(result["frames"])))
        parts += [_picture(pictures.pop(0)), _table(frame_cells(result["frames"]), 1)]
    return document("Reward benchmark", "".join(parts))


def _picture(png: bytes) -> str:
    source = "data:image/png;base64," + base64.b64encode(png).decode("ascii")
    return f'<div class="card" style="padding:8px;background:#fff"><img style="width:100%" alt="" src="{source}"></div>'


def _table(rows: Cells, words: int) -> str:
    """A table whose first ``words`` columns are text."""

    def line(row: Sequence[str], tag: str) -> str:
        cells = (f"<{tag}{' class=n' if k >= words else ''}>{escape(cell)}</{tag}>" for k, cell in enumerate(row))
        return f"<tr>{''.join(cells)}</tr>"

    body = "".join(line(row, "td") for row in rows[1:])
    return f'<div class="card scroll"><table><thead>{line(rows[0], "th")}</thead><tbody>{body}</tbody></table></div>'


def accuracy_chart(result: Mapping[str, Any], width: int = 1000) -> NDArray[np.uint8]:
    """Accuracy with and without ties of every scorer, a block for each label; marks show what chance reaches.

    Returns uint8 (height, width, 3); the height follows from the number of rows.
    """
    em = width / 62
    labels = list(result["scorers"][0]["dimensions"])
    row, head = 1.9 * em, 1.7 * em
    block = head + row * len(result["scorers"]) + 0.6 * em
    top = 6.2 * em
    canvas = Canvas((width, round(top + block * len(labels) + 3.6 * em)), _PAPER)
    left, right, bottom = 17 * em, width - 2 * em, top + block * len(labels)
    bench, small = result["benchmark"], round(0.95 * em)
    canvas.text((1.3 * em, 1.7 * em), "Agreement with people", _INK, round(1.35 * em))
    said = f"{bench['form']}: {bench['pairs']} pairs, {bench['clips']} clips; of the scored pairs"
    canvas.text((1.3 * em, 3.5 * em), fitted(said, width - 2.6 * em, round(em)), _GREY, round(em))
    x = 1.6 * em
    for name, colour in (("without ties", _WITHOUT), ("with ties", _WITH)):
        canvas.dot((x, 5.2 * em), 0.4 * em, colour)
        x += 2.6 * em + canvas.text((x + 0.9 * em, 5.2 * em), name, _INK, small)
    canvas.text((x, 5.2 * em), "dashes: what chance reaches", _GREY, small)
    axes = Axes(canvas, (left, top, right, bottom), (0, 1), (0, 1))
    for share in (0, 0.25, 0.5, 0.75, 1):
        canvas.line((axes.at(share, 0), axes.at(share, 1)), _GRID, 1)
    axes.columns([(share, f"{share:.0%}") for share in (0, 0.25, 0.5, 0.75, 1)], _GREY, small)
    for number, label in enumerate(labels):
        start = top + number * block
        canvas.text((1.3 * em, start + 0.8 * em), label, _INK, round(1.05 * em))
        chance = result["scorers"][0]["dimensions"][label]["chance_with_ties"]
        for level, colour in ((0.5, _WITHOUT), (chance, _WITH)):
            if level is not None:
                place = axes.at(level, 0)[0]
                canvas.dashes((place, start + head - 0.6 * em), (place, start + block - 0.8 * em), colour, 1.2)
        for line, scorer in enumerate(result["scorers"]):
            y = start + head + (line + 0.5) * row - 0.3 * em
            canvas.text((left - em, y), fitted(scorer["name"], left - 3 * em, small), _INK, small, "rm")
            _dots(axes, y, scorer["dimensions"][label], em)
    return canvas.finish()


def _dots(axes: Axes, y: float, found: Mapping[str, Any], em: float) -> None:
    if found["with_ties"] is None:
        axes.canvas.text((axes.at(0, 0)[0] + 0.6 * em, y), "no pair was scored", _GREY, round(0.95 * em), "lm")
    for key, colour in (("without_ties", _WITHOUT), ("with_ties", _WITH)):
        if found[key] is not None:
            axes.canvas.dot((axes.at(found[key], 0)[0], y), 0.4 * em, colour)
