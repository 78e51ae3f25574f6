"""The table and the page of an arms comparison: from the numbers of ``arms.json`` and a few clips to text."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spatialalign.files import atomic_path
from training.measure import cell, markdown, nothing
from training.report_html import CLIP_LEGEND, decimal, document, figure, percent, points, settings_section

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from training.report_html import Pair

_TITLE = "Ways of sampling, and what they cost"
_STYLE = (
    "<style>.arms td.n{font-size:.86rem}.arms .pm{display:block;font-size:.74rem}"
    ".arms th,.arms td{padding-inline:6px}.arms td b{white-space:nowrap}"
    ".clips.arms{display:block}.clips.arms .pair{margin-bottom:16px}.clips.arms header{min-height:0}"
    ".clips.arms .row{display:grid;gap:14px 12px;grid-template-columns:repeat(auto-fill,minmax(225px,1fr))}"
    ".sheet{padding:8px;background:#fff}.sheet img{display:block;width:100%;height:auto}</style>"
)


def table(result: Mapping[str, Any]) -> str:
    """The comparison as a Markdown table, one row an arm."""
    head = [
        "arm",
        "Correct@0.7, %",
        "over base",
        "robust Correct@0.7, %",
        "INVALID, %",
        "mean score",
        "evaluations",
        "cost",
        "tracked",
        "seconds",
        "best-of-n at this cost, %",
        "over it",
    ]
    rows = [head]
    for arm in result["arms"]:
        gain, cost, equal = arm["difference"], arm["cost"], arm["equal_compute"]
        rows.append(
            [
                arm["name"],
                cell(arm["correct_at_0.7"], True),
                cell(gain["correct_at_0.7"], True, True) if gain else "",
                cell(arm["robust_correct_at_0.7"], True),
                cell(arm["invalid_rate"], True),
                cell(arm["mean_score"], False),
                f"{cost['evaluations']:.1f}",
                f"{cost['relative']:.2f}x",
                f"{cost['scorings']:.1f}",
                f"{cost['seconds']:.2f}",
                cell(equal["best_of_n"] if equal else nothing(), True),
                cell(equal["difference"] if equal else nothing(), True, True),
            ]
        )
    return markdown(rows)


def write_page(out: Path, result: Mapping[str, Any], chart: NDArray[np.uint8], examples: int) -> None:
    """Write ``arms.png`` and ``arms.html`` into the folder of the stores; ``examples`` prompts are shown."""
    from PIL import Image

    with atomic_path(out / "arms.png") as temporary:
        Image.fromarray(chart).save(temporary, format="PNG", optimize=True)
    rows = [show_all(out, result, row) for row in choose(out, result, examples)]
    with atomic_path(out / "arms.html") as temporary:
        temporary.write_text(page(result, (out / "arms.png").read_bytes(), rows), encoding="utf-8")


def choose(out: Path, result: Mapping[str, Any], count: int) -> list[Mapping[str, Any]]:
    """Up to ``count`` prompts and seeds by position, of as many types: of those that every arm has a video of."""
    from training.store import Store

    stores = [Store(out / name) for name in result["stores"].values()]

    def is_there(row: Mapping[str, Any]) -> bool:
        samples = [store.sample(row["prompt_id"], row["seed"]) for store in stores]
        return all(sample.video.is_file() and sample.scored for sample in samples)

    by_type: dict[str, Mapping[str, Any]] = {}
    for row in result["samples"]:
        if row["type"] not in by_type and is_there(row):
            by_type[row["type"]] = row
    return list(by_type.values())[:count]


def show_all(out: Path, result: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Pair]:
    """One prompt and seed by every arm: by arm, the base's clip and the arm's."""
    from training.report import show

    stores = result["stores"]
    pair_of = {arm: {"stores": {"base": stores["base"], "aligned": store}} for arm, store in stores.items()}
    return {arm: show(out, pair, row, f"First prompt of type {row['type']}") for arm, pair in pair_of.items()}


def page(result: Mapping[str, Any], chart: bytes, examples: Sequence[Mapping[str, Pair]]) -> str:
    """The whole document. It asks nothing of any other file or host."""
    source = "data:image/png;base64," + base64.b64encode(chart).decode("ascii")
    body = (
        f'{_STYLE}<p class="kicker">SpatialAlign report</p><h1>{_TITLE}</h1><p class="lead">{summary(result)}</p>'
        f'<div class="card sheet"><img src="{source}" alt="Correct at 0.7 against evaluations per clip, as in the '
        f'table"></div>{arms_table(result)}{gallery(examples)}{settings_section(result)}'
    )
    return document(_TITLE, body)


def summary(result: Mapping[str, Any]) -> str:
    """What the numbers say, in sentences: a direction is read off an interval, not assumed."""
    arms = result["arms"]
    base, best = arms[0], max(arms, key=lambda arm: float(arm["correct_at_0.7"]["value"]))
    seeds = len(result["seeds"])
    text = (
        f"On {result['prompts']} prompts, {seeds} {'seeds' if seeds > 1 else 'seed'} each and the same ones for every "
        f"arm, <b>{percent(base['correct_at_0.7']['value'])}</b> of the base's clips reach a DSR-Score of 0.7."
    )
    if best is not base:
        text += (
            f" Most do with {escape(best['name'])}: <b>{percent(best['correct_at_0.7']['value'])}</b> for "
            f"{best['cost']['relative']:.2f} times the evaluations."
        )
    if result["best_of"] is None:
        return text
    compared = [arm for arm in arms[1:] if arm["equal_compute"]]
    above = [arm["name"] for arm in compared if arm["equal_compute"]["difference"]["low"] > 0]
    below = [arm["name"] for arm in compared if arm["equal_compute"]["difference"]["high"] < 0]
    open_ = [arm["name"] for arm in compared if arm["name"] not in (*above, *below)]
    parts = [
        f"{words} {', '.join(map(escape, names))}"
        for names, words in ((above, "better:"), (below, "worse:"), (open_, "not told apart on this sample:"))
        if names
    ]
    return f"{text} Against best-of-n on the base for the same evaluations, {'; '.join(parts)}." if parts else text


def arms_table(result: Mapping[str, Any]) -> str:
    """One row an arm: quality, cost, and the gain over best-of-n for the same evaluations."""

    def number(value: Mapping[str, Any] | None, show: Any) -> str:
        if value is None or value["value"] is None:
            return "<td class=n>–</td>"
        span = f"{show(value['low'])} to {show(value['high'])}".replace(" %", "")
        return f'<td class=n>{show(value["value"])} <span class="pm">{span}</span></td>'

    rows = []
    for arm in result["arms"]:
        cost, equal = arm["cost"], arm["equal_compute"] or {}
        rows.append(
            f"<tr><td><b>{escape(arm['name'])}</b></td>{number(arm['correct_at_0.7'], percent)}"
            f"{number((arm['difference'] or {}).get('correct_at_0.7'), points)}"
            f"{number(arm['robust_correct_at_0.7'], percent)}{number(arm['invalid_rate'], percent)}"
            f"{number(arm['mean_score'], decimal)}<td class=n>{cost['relative']:.2f}×"
            f'<span class="pm">{cost["evaluations"]:.0f}</span></td>'
            f"<td class=n>{cost['scorings']:.1f}</td><td class=n>{cost['seconds']:.2f}</td>"
            f"{number(equal.get('difference'), points)}</tr>"
        )
    heads = ["Correct<br>@0.7", "over<br>base", "robust<br>@0.7", "INVALID", "mean<br>score", "evaluations"]
    heads += ["clips<br>tracked", "seconds", "over<br>best-of-n"]
    head = "<th>Arm</th>" + "".join(f"<th class=n>{text}</th>" for text in heads)
    return (
        "<h2>Quality and cost</h2>"
        '<p class="note">Per delivered clip. Evaluations are passes of the transformer, with those of candidates that '
        "were dropped and the share of guidance; what is tracked for the choice comes on top, and the "
        "seconds hold everything. Gains are in percentage points. A search chooses by the score that it is measured "
        "with; the robust score took no part in the choice.</p>"
        '<div class="card scroll"><table class="arms"><thead><tr>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def gallery(examples: Sequence[Mapping[str, Pair]]) -> str:
    """The same prompt and seed by every arm."""
    if not examples:
        return ""
    cards = []
    for arms in examples:
        first = next(iter(arms.values()))
        clips = "".join(
            figure("base" if name == "base" else "aligned", name, pair.aligned, pair) for name, pair in arms.items()
        )
        cards.append(
            f'<article class="pair card"><header><div class="why">{escape(first.why)} · seed {first.seed}</div>'
            f'<p class="prompt">{escape(first.prompt)}</p></header><div class="row">{clips}</div></article>'
        )
    return (
        "<h2>The same prompt, the same noise</h2>"
        '<p class="note">Chosen by position, not by result. A search starts from this noise too and adds '
        f'candidates of its own.</p>{CLIP_LEGEND}<div class="clips arms">{"".join(cards)}</div>'
    )
