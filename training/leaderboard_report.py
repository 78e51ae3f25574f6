"""A leaderboard as files: CSV tables, a Markdown table and one self-contained HTML page."""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spatialalign.files import atomic_path
from training.leaderboard import NAMES
from training.measure import cell, markdown
from training.metric_values import Row
from training.report_html import decimal, document, percent, points, settings_section

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_STYLE = (
    "<style>.board td.n,.board th.n{font-size:.84rem}.board .pm{display:block;font-size:.72rem}"
    ".board th,.board td{padding-inline:7px;vertical-align:top}.sheet{padding:8px;background:#fff}"
    ".sheet img{display:block;width:100%;height:auto}.matrix td.n{text-align:center;min-width:74px}"
    ".matrix td[style]{color:#1c1f24}</style>"
)


def write_report(out: Path, result: Mapping[str, Any], rows: Sequence[Row], chart: NDArray[np.uint8]) -> None:
    """Write ``clips.csv``, ``leaderboard.csv``, ``agreement.csv``, and ``leaderboard`` as .md, .png and .html."""
    from PIL import Image

    with atomic_path(out / "leaderboard.png") as temporary:
        Image.fromarray(chart).save(temporary, format="PNG", optimize=True)
    texts = {
        "clips.csv": clips_csv(rows),
        "leaderboard.csv": leaderboard_csv(result),
        "agreement.csv": agreement_csv(result),
        "leaderboard.md": table(result) + "\n",
        "leaderboard.html": page(result, (out / "leaderboard.png").read_bytes()),
    }
    for name, text in texts.items():
        with atomic_path(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8", newline="")


def clips_csv(rows: Sequence[Row]) -> str:
    """One line a clip of a model; an empty cell is INVALID or not to be had."""
    keys = list(dict.fromkeys(key for row in rows for key in row.values))
    lines = [["model", "prompt_id", "seed", "type", *keys, "invalid"]]
    for row in rows:
        values = [_plain(row.values.get(key)) for key in keys]
        lines.append([row.model, row.prompt_id, str(row.seed), row.type_code, *values, row.reason or ""])
    return _csv(lines)


def leaderboard_csv(result: Mapping[str, Any]) -> str:
    """One line a model and number, with its interval and its gain over the first model."""
    lines = [["model", "number", "value", "low", "high", "over_first", "over_first_low", "over_first_high"]]
    for model in result["models"]:
        for column in result["columns"]:
            gain = (model["over_first"] or {}).get(column["key"], {})
            cells = [*_ends(model[column["key"]]), *_ends(gain)]
            lines.append([model["name"], column["key"], *cells])
        for row in model["correct_at"]:
            for convention in ("exact", "official"):
                name = f"correct_at_{row['tau']:g}_{convention}"
                lines.append([model["name"], name, _plain(row[convention]), *[""] * 5])
    return _csv(lines)


def agreement_csv(result: Mapping[str, Any]) -> str:
    """One line a pair of values: Spearman's correlation, and for judges of the relation their confusion at 0.7."""
    counts = {row["second"]: row for row in result["confusion_at_0.7"]}
    kinds = ("both", "first_only", "second_only", "neither")
    lines = [["first", "second", "clips", "spearman", "low", "high", *(f"{kind}_reach_0.7" for kind in kinds)]]
    for row in result["agreement"]:
        found = counts.get(row["second"]) if row["first"] == "score" else None
        told = ["" if found is None else str(found[kind]) for kind in kinds]
        lines.append([row["first"], row["second"], str(row["clips"]), *_ends(row), *told])
    return _csv(lines)


def table(result: Mapping[str, Any]) -> str:
    """The leaderboard as a Markdown table, one line a number, one column a model."""
    lines = [["", *(model["name"] for model in result["models"])]]
    for column in result["columns"]:
        unit = ", %" if column["share"] else ""
        cells = [cell(model[column["key"]], column["share"]) for model in result["models"]]
        lines.append([column["title"] + unit, *cells])
    return markdown(lines)


def page(result: Mapping[str, Any], chart: bytes) -> str:
    """The whole document. It asks nothing of any other file or host."""
    source = "data:image/png;base64," + base64.b64encode(chart).decode("ascii")
    body = (
        f'{_STYLE}<p class="kicker">SpatialAlign report</p><h1>Leaderboard</h1><p class="lead">{summary(result)}</p>'
        f'<div class="card sheet"><img src="{source}" alt="Every number of the table below, with intervals"></div>'
        f"{board(result)}{matrix(result)}{confusion_table(result)}{left_out(result)}{settings_section(result)}"
    )
    return document("SpatialAlign leaderboard", body)


def summary(result: Mapping[str, Any]) -> str:
    """Which model comes first by Correct@0.7, and what is told apart from the first one named."""
    models = result["models"]
    best, first = max(models, key=lambda model: float(model["correct_at_0.7"]["value"])), models[0]
    text = (
        f"{len(models)} {'models' if len(models) > 1 else 'model'} on {first['prompts']} prompts. Most clips reach a "
        f"DSR-Score of 0.7 with <b>{escape(best['name'])}</b>: <b>{percent(best['correct_at_0.7']['value'])}</b>."
    )
    gains = {model["name"]: model["over_first"]["correct_at_0.7"] for model in models[1:]}
    above = [escape(name) for name, gain in gains.items() if gain["value"] is not None and gain["low"] > 0]
    below = [escape(name) for name, gain in gains.items() if gain["value"] is not None and gain["high"] < 0]
    parts = [f"{what} {', '.join(names)}" for what, names in (("above it:", above), ("below it:", below)) if names]
    against = f" Against {escape(first['name'])} on the same prompts and seeds, "
    return f"{text}{against}{'; '.join(parts)}." if parts else text


def board(result: Mapping[str, Any]) -> str:
    """One row a number, one column a model, the gain over the first one below each."""

    def number(model: Mapping[str, Any], column: Mapping[str, Any]) -> str:
        value, gain = model[column["key"]], (model["over_first"] or {}).get(column["key"])
        if value["value"] is None:
            return "<td class=n>–</td>"
        show = percent if column["share"] else decimal
        told = f"{show(value['low'])} to {show(value['high'])}".replace(" %", "")
        text = f'{show(value["value"])} <span class="pm">{told}</span>'
        if gain is not None and gain["value"] is not None:
            change = points if column["share"] else (lambda v: decimal(v, True))
            span = f"{change(gain['value'])} ({change(gain['low'])} to {change(gain['high'])})"
            text += f'<span class="pm">{span}</span>'
        return f"<td class=n>{text}</td>"

    head = "".join(f"<th class=n>{escape(model['name'])}</th>" for model in result["models"])
    body = "".join(
        f"<tr><td>{escape(column['title'])}</td>{''.join(number(model, column) for model in result['models'])}</tr>"
        for column in result["columns"]
    )
    clips = "".join(f"<td class=n>{model['videos']}</td>" for model in result["models"])
    return (
        "<h2>Numbers</h2>"
        '<p class="note">With 95 % intervals over prompts; below them the gain over the first model on the same '
        "prompts and seeds. Rates count INVALID clips as wrong, means leave them out. The spatial rules of other "
        "benchmarks are applied to our tracks: the first half of a clip by the initial relation, the second by the "
        "final one.</p>"
        f'<div class="card scroll"><table class="board"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody><tr><td>clips</td>{clips}</tr>{body}</tbody></table></div>"
    )


def matrix(result: Mapping[str, Any]) -> str:
    """Spearman's correlations, redder where negative and greener where positive."""
    known = {(row["first"], row["second"]): row for row in result["agreement"]}
    keys = [key for key in NAMES if any(key in pair for pair in known)]
    if not keys:
        return ""

    def place(row: str, column: str) -> str:
        found = known.get((row, column)) or known.get((column, row))
        if found is None or found["value"] is None:
            return "<td class=n>–</td>"
        rho, hue = found["value"], "13,128,114" if found["value"] > 0 else "166,58,43"
        span = f"{decimal(found['low'])} to {decimal(found['high'])}, {found['clips']} clips"
        return (
            f'<td class=n tabindex="0" data-tip="{span}" style="background:color-mix(in srgb, '
            f'rgb({hue}) {100 * abs(rho) * 0.6:.0f}%, #fff)">{decimal(rho, True)}</td>'
        )

    head = "".join(f"<th class=n>{escape(NAMES[key])}</th>" for key in keys[:-1])
    body = "".join(
        f"<tr><td>{escape(NAMES[row])}</td>"
        + "".join(place(row, column) if at < index else "<td></td>" for at, column in enumerate(keys[:-1]))
        + "</tr>"
        for index, row in enumerate(keys)
        if index
    )
    return (
        "<h2>Do the metrics agree?</h2>"
        '<p class="note">Spearman\'s rank correlation over the clips of all models that have both values; point at one '
        "for its interval. Where models differ, this mixes what happens within a model with what happens between them."
        f'</p><div class="card scroll"><table class="board matrix"><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def confusion_table(result: Mapping[str, Any]) -> str:
    """How often the DSR-Score and each other judge of the relation reach 0.7."""
    rows = "".join(
        f"<tr><td>{escape(NAMES[row['second']])}</td><td class=n>{row['both']}</td><td class=n>{row['first_only']}</td>"
        f"<td class=n>{row['second_only']}</td><td class=n>{row['neither']}</td>"
        f"<td class=n>{percent(row['agreement']['value'])} <span class=pm>{percent(row['agreement']['low'])} to "
        f"{percent(row['agreement']['high'])}</span></td></tr>"
        for row in result["confusion_at_0.7"]
    )
    if not rows:
        return ""
    heads = "".join(f"<th class=n>{text}</th>" for text in ("both", "DSR only", "other only", "neither", "agreement"))
    return (
        '<h2>Who lets a clip pass?</h2><p class="note">Clips at 0.7 or more by the DSR-Score and by another judge of '
        "the relation; INVALID does not pass.</p>"
        f'<div class="card scroll"><table class="board"><thead><tr><th>Judge</th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def left_out(result: Mapping[str, Any]) -> str:
    """What was not computed, and why."""
    items = [f"{name}: {reason}" for name, reason in result["not_computed"].items()]
    items += [f"{metric} of {sample}: {why}" for sample, metric, why in result["failed"][:20]]
    if not items:
        return ""
    listed = "".join(f"<li>{escape(item)}</li>" for item in items)
    more = len(result["failed"]) - 20
    return f"<h2>Not computed</h2><ul class=note>{listed}{f'<li>and {more} more</li>' if more > 0 else ''}</ul>"


def _ends(value: Mapping[str, Any]) -> list[str]:
    return [_plain(value.get(key)) for key in ("value", "low", "high")]


def _plain(value: float | None) -> str:
    """All digits; empty for none."""
    return "" if value is None else repr(float(value))


def _csv(lines: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
