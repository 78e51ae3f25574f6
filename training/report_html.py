"""The report page: from the numbers of ``metrics.json`` and a few clips to one self-contained HTML document."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import Any

from training.report_charts import Series, correct_chart, curve_chart, finite, interval_row, ssr_chart

Box = tuple[float, float, float, float]

CLIP_LEGEND = (
    '<div class="legend"><span class="initial"><i></i>initial relation</span>'
    '<span class="final"><i></i>final relation</span><span class="subject"><i class="box"></i>subject</span>'
    '<span class="object"><i class="box"></i>object</span>'
    '<label><input type="checkbox" id="boxes" checked> show boxes</label>'
    '<button type="button" id="play" data-on="1">Pause all</button></div>'
)
"""What the colours beside the clips stand for, and the switches of the page's script."""


@dataclass(frozen=True)
class Clip:
    """One clip to show: MP4 bytes, size ``(h, w)`` the boxes refer to, and per frame the boxes and both SSR values."""

    mp4: bytes
    fps: float
    size: tuple[int, int]
    boxes: Sequence[tuple[Box | None, Box | None]]
    initial: Sequence[float | None]
    final: Sequence[float | None]
    score: float | None
    robust: float | None
    reason: str | None


@dataclass(frozen=True)
class Pair:
    """The same prompt and seed by both models; ``why`` says how it came to be on the page."""

    why: str
    prompt: str
    seed: int
    initial_name: str
    final_name: str
    base: Clip
    aligned: Clip


@dataclass(frozen=True)
class Curve:
    """One training chart: a title, the values on training pairs and, where logged, those on held-out pairs."""

    title: str
    steps: Sequence[float]
    values: Sequence[float | None]
    held_steps: Sequence[float] = ()
    held_values: Sequence[float | None] = ()
    reference: float | None = None


def percent(value: float | None, digits: int = 1) -> str:
    """A share as text; a dash when there is none."""
    return f"{100 * value:.{digits}f} %" if value is not None and math.isfinite(value) else "–"


def points(value: float | None) -> str:
    """A difference of shares in percentage points, signed."""
    return f"{100 * value:+.1f}".replace("-", "−") if value is not None and math.isfinite(value) else "–"


def decimal(value: float | None, sign: bool = False) -> str:
    """A score as text; a dash when there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return (f"{value:+.3f}" if sign else f"{value:.3f}").replace("-", "−")


def summary(result: Mapping[str, Any]) -> str:
    """What the numbers say, in sentences: the direction is read off the interval, not assumed."""
    base, aligned, change = result["base"], result["aligned"], result["difference"]["correct_at_0.7"]
    before, after = base["correct_at_0.7"]["value"], aligned["correct_at_0.7"]["value"]
    if change["low"] > 0:
        verdict = "obeys the prompt more often than"
    elif change["high"] < 0:
        verdict = "obeys the prompt less often than"
    else:
        verdict = "is not told apart, on this sample, from"
    ratio = f" ({after / before:.2f} times)" if before > 0 else ""
    return (
        f"On {result['prompts']} prompts that training never saw, {len(result['seeds'])} "
        f"{'seeds' if len(result['seeds']) > 1 else 'seed'} each, the aligned model {verdict} the base model: "
        f"<b>{percent(after)}</b> of its clips reach a DSR-Score of 0.7, against <b>{percent(before)}</b>{ratio}. "
        f"The difference is <b>{points(change['value'])} points</b>, 95 % interval {points(change['low'])} to "
        f"{points(change['high'])}. INVALID clips: {percent(aligned['invalid_rate']['value'])}, "
        f"against {percent(base['invalid_rate']['value'])}."
    )


def tiles(result: Mapping[str, Any]) -> str:
    """The three headline numbers, before and after."""
    rows = [
        ("Correct@0.7", "correct_at_0.7", percent, points, " points"),
        ("INVALID clips", "invalid_rate", percent, points, " points"),
        ("Mean score of the valid clips", "mean_score", decimal, lambda v: decimal(v, True), ""),
    ]
    out = []
    for name, key, show, delta, unit in rows:
        change = result["difference"][key]
        span = f"{delta(change['value'])}{unit}, 95 % interval {delta(change['low'])} to {delta(change['high'])}"
        out.append(
            f'<div class="tile card"><div class="name">{name}</div><div class="value">'
            f'<span class="was">{show(result["base"][key]["value"])}</span><span class="arrow">→</span>'
            f'<span class="now">{show(result["aligned"][key]["value"])}</span></div>'
            f'<div class="change">{span}</div></div>'
        )
    return f'<div class="tiles">{"".join(out)}</div>'


def chip(clip: Clip, tau: float = 0.7) -> str:
    """The clip's verdict: its score, green from ``tau`` on, or INVALID with the reason on hover."""
    if clip.score is None:
        reason = escape(clip.reason or "no reason recorded", quote=True)
        return f'<span class="chip none" tabindex="0" data-tip="{reason}">INVALID</span>'
    good = clip.score >= tau
    tip = f"DSR-Score {clip.score:.3f}, {'at least' if good else 'below'} {tau:g}; robust score {decimal(clip.robust)}"
    return f'<span class="chip {"good" if good else "bad"}" tabindex="0" data-tip="{tip}">{clip.score:.2f}</span>'


def rectangle(role: str, box: Box | None) -> str:
    """The overlay of one box in the first frame; the page's script moves it on."""
    if box is None:
        return f'<rect class="{role}" style="display:none"/>'
    x, y, right, bottom = box
    return f'<rect class="{role}" x="{x:.1f}" y="{y:.1f}" width="{right - x:.1f}" height="{bottom - y:.1f}"/>'


def figure(role: str, name: str, clip: Clip, pair: Pair) -> str:
    """One clip with its boxes, its verdict and its curves."""
    height, width = clip.size
    first = clip.boxes[0] if clip.boxes else (None, None)
    boxes = json.dumps([[[round(v, 1) for v in box] if box else None for box in frame] for frame in clip.boxes])
    source = "data:video/mp4;base64," + base64.b64encode(clip.mp4).decode("ascii")
    return (
        f"<figure data-fps=\"{clip.fps:g}\" data-boxes='{boxes}'>"
        f'<figcaption><span class="arm {role}">{name}</span>{chip(clip)}</figcaption>'
        f'<div class="screen"><video muted autoplay loop playsinline controlslist="nodownload" src="{source}" '
        f'aria-label="{escape(name, quote=True)}: {escape(pair.prompt, quote=True)}"></video>'
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" aria-hidden="true">'
        f"{rectangle('object', first[1])}{rectangle('subject', first[0])}</svg></div>"
        f"{ssr_chart(clip.initial, clip.final, (pair.initial_name, pair.final_name))}"
        f"{f'<p class=under>{escape(clip.reason)}</p>' if clip.score is None and clip.reason else ''}"
        "</figure>"
    )


def gallery(pairs: Sequence[Pair]) -> str:
    """Base against aligned, the same prompt and seed side by side."""
    if not pairs:
        return ""
    cards = "".join(
        f'<article class="pair card"><header><div class="why">{escape(pair.why)} · seed {pair.seed}</div>'
        f'<p class="prompt">{escape(pair.prompt)}</p></header><div class="two">'
        f"{figure('base', 'Base', pair.base, pair)}{figure('aligned', 'Aligned', pair.aligned, pair)}</div></article>"
        for pair in pairs
    )
    return (
        "<h2>The same prompt, the same noise</h2>"
        '<p class="note">One prompt of every type is taken by position, not by result; the others are the largest '
        "gains and the largest losses of the paper's score. Under each clip are its relation scores (SSR, −1 to +1) "
        "over the frames: a clip that obeys starts high in the first and ends high in the second.</p>"
        f'{CLIP_LEGEND}<div class="clips">{cards}</div>'
    )


def correct_section(result: Mapping[str, Any]) -> str:
    """Correct@tau with its intervals and the controls."""
    series = []
    for key, name in (("base", "Base"), ("aligned", "Aligned")):
        rows = result[key]["correct_at"]
        columns = {part: [row[part] for row in rows] for part in ("tau", "value", "low", "high")}
        series.append(Series(name, key, columns["tau"], columns["value"], columns["low"], columns["high"], dots=True))
    chance = result["controls"]["chance"]["aligned"]
    head = "".join(f'<th class="n">{row["tau"]:.1f}</th>' for row in result["base"]["correct_at"])
    body = "".join(
        f"<tr><td>{name}</td>" + "".join(f'<td class="n">{percent(row["value"])}</td>' for row in rows) + "</tr>"
        for name, rows in (
            ("Base", result["base"]["correct_at"]),
            ("Aligned", result["aligned"]["correct_at"]),
            ("Base, robust score", result["base"]["robust_correct_at"]),
            ("Aligned, robust score", result["aligned"]["robust_correct_at"]),
        )
    )
    return (
        "<h2>Correct@τ</h2>"
        '<p class="note">Bands are 95 % bootstrap intervals that resample prompts, since seeds of one prompt are not '
        f"independent. {controls_text(result)}</p>"
        f'<div class="card chart">{correct_chart(series, chance["value"])}</div>'
        f'<details class="card"><summary>All thresholds as a table</summary><div class="scroll"><table><thead><tr>'
        f"<th>τ</th>{head}</tr></thead><tbody>{body}</tbody></table></div></details>"
    )


def controls_text(result: Mapping[str, Any]) -> str:
    """Chance and, when it was run, the swapped captions, in words."""
    chance = result["controls"]["chance"]
    text = (
        "Chance is what the very same clips reach when each is scored for the types it was not asked for: "
        f"{percent(chance['base']['value'])} (base) and {percent(chance['aligned']['value'])} (aligned) at 0.7."
    )
    swapped = result["controls"].get("swapped")
    if swapped:
        text += (
            " With initial and final relation exchanged in the caption and the original one scored, the base model "
            f"reaches {percent(swapped['swapped']['value'])} on {swapped['prompts']} prompts where it reaches "
            f"{percent(swapped['plain']['value'])} with the true caption."
        )
    return text


def type_table(result: Mapping[str, Any]) -> str:
    """One row a type: Correct@0.7 of both models with intervals, INVALID rates and mean scores."""
    rows = []
    for code, base in result["base"]["per_type"].items():
        aligned = result["aligned"]["per_type"][code]
        rates = [arm["correct_at_0.7"] for arm in (base, aligned)]
        triples = [(rate["value"], rate["low"], rate["high"]) for rate in rates]
        plot = interval_row(triples[0], triples[1], code)
        numbers = [str(base["videos"]), *(percent(rate["value"]) for rate in rates)]
        beside = [percent(arm["invalid_rate"]["value"]) for arm in (base, aligned)]
        beside += [decimal(arm["mean_score"]["value"]) for arm in (base, aligned)]
        cells = [f"<td><b>{escape(code)}</b></td>", *(f"<td class=n>{text}</td>" for text in numbers)]
        cells += [f'<td class="plot">{plot}</td>', *(f"<td class=n>{text}</td>" for text in beside)]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    heads = ["Base<br>Correct@0.7", "Aligned<br>Correct@0.7"]
    after = ["Base<br>INVALID", "Aligned<br>INVALID", "Base<br>mean", "Aligned<br>mean"]
    head = "<th>Type</th>" + "".join(f"<th class=n>{text}</th>" for text in ["Clips", *heads])
    head += '<th class="plot">0 – 50 – 100 %</th>' + "".join(f"<th class=n>{text}</th>" for text in after)
    return (
        "<h2>By type</h2>"
        '<p class="note">First letter: where the subject starts, second: where it ends (L left, R right, T top). Types '
        "that turn a corner cannot exceed 0.895 by the paper's rule, so one threshold is stricter for them; the "
        "normalised score takes that out.</p>"
        '<div class="legend"><span class="base"><i></i>base</span><span class="aligned"><i></i>aligned</span></div>'
        f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def measures_table(result: Mapping[str, Any]) -> str:
    """The paper's score and the two beside it."""
    rows = [
        ("Correct@0.7, the paper's score", "correct_at_0.7", percent),
        ("Correct@0.7, normalised", "normalised_correct_at_0.7", percent),
        ("Correct@0.7, robust score", "robust_correct_at_0.7", percent),
        ("INVALID, the paper's rule", "invalid_rate", percent),
        ("Mean score of the valid clips", "mean_score", decimal),
        ("Mean, normalised", "mean_normalised", decimal),
        ("Mean, robust score", "mean_robust", decimal),
    ]

    def cell(entry: Mapping[str, Any], show: Any) -> str:
        span = f"{show(entry['low'])} – {show(entry['high'])}" if finite(entry["low"]) else ""
        return f'<td class=n>{show(entry["value"])} <span class="pm">{span}</span></td>'

    body = "".join(
        f"<tr><td>{name}</td>{cell(result['base'][key], show)}{cell(result['aligned'][key], show)}</tr>"
        for name, key, show in rows
    )
    return (
        "<h2>Beside the paper's score</h2>"
        '<p class="note">The normalised score puts all types on one scale. The robust score looks at the whole clip '
        "(coverage, jumps, the object keeping still), so a subject that vanishes and reappears on the other side does "
        'not pass.</p><div class="card scroll"><table><thead><tr><th>Measure</th><th class=n>Base</th>'
        f"<th class=n>Aligned</th></tr></thead><tbody>{body}</tbody></table></div>"
    )


def smooth(values: Sequence[float | None]) -> list[float | None]:
    """Centred running mean over a twentieth of the points; missing points stay missing."""
    half = len(values) // 40
    out: list[float | None] = []
    for k, value in enumerate(values):
        near = [v for v in values[max(0, k - half) : k + half + 1] if v is not None and math.isfinite(v)]
        out.append(sum(near) / len(near) if value is not None and near else None)
    return out


def curves_section(curves: Sequence[Curve]) -> str:
    """Training charts, one a logged quantity."""
    cards = []
    for curve in curves:
        lines = [Series("training pairs", "aligned faint", curve.steps, curve.values)]
        lines.append(Series("training pairs, smoothed", "aligned", curve.steps, smooth(curve.values)))
        if curve.held_steps:
            lines.append(Series("held-out pairs", "initial", curve.held_steps, curve.held_values, dots=True))
        chart = curve_chart(curve.title, lines, curve.reference)
        if chart:
            key = ' <span class="key"><span class="aligned">training</span>'
            key += ' · <span class="initial">held-out</span></span>' if curve.held_steps else "</span>"
            cards.append(f'<div class="card"><h3>{escape(curve.title)}{key}</h3>{chart}</div>')
    if not cards:
        return ""
    return (
        "<h2>Training</h2>"
        '<p class="note">Implicit accuracy is the share of pairs whose winner the model has come to prefer, relative '
        "to its reference: the one to watch, on held-out pairs. Errors saved are the reference's error minus the "
        f"model's, for winner and loser apart.</p><div class='curves'>{''.join(cards)}</div>"
    )


def settings_section(result: Mapping[str, Any]) -> str:
    """What was run, with which versions, and how long it took."""
    parts = []
    if result.get("seconds"):
        total = sum(result["seconds"].values())
        cells = [(escape(name), f"{value:.1f} s") for name, value in result["seconds"].items()]
        rows = "".join(f"<tr><td>{name}</td><td class=n>{value}</td></tr>" for name, value in cells)
        table = f"<table><tbody>{rows}</tbody></table>"
        parts.append(f'<details class="card"><summary>Time: {total / 60:.1f} minutes</summary>{table}</details>')
    for title, key in (("Settings", "settings"), ("Versions", "versions")):
        text = escape(json.dumps(result[key], indent=2, ensure_ascii=False))
        parts.append(f'<details class="card"><summary>{title}</summary><pre>{text}</pre></details>')
    return "<h2>How it was made</h2>" + "".join(parts)


def page(result: Mapping[str, Any], pairs: Sequence[Pair], curves: Sequence[Curve], title: str) -> str:
    """The whole document. It asks nothing of any other file or host."""
    body = (
        f'<p class="kicker">SpatialAlign report</p><h1>{escape(title)}</h1><p class="lead">{summary(result)}</p>'
        f"{tiles(result)}{gallery(pairs)}{correct_section(result)}{type_table(result)}{measures_table(result)}"
        f"{curves_section(curves)}{settings_section(result)}"
    )
    return document(title, body)


def document(title: str, body: str) -> str:
    """A page around ``body``, with the style sheet and the script in it."""
    here = resources.files("training")
    style = here.joinpath("report.css").read_text(encoding="utf-8")
    script = here.joinpath("report.js").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style></head>\n"
        f'<body><main>{body}</main><div id="tip" role="tooltip"></div>\n<script>\n{script}</script></body></html>\n'
    )
