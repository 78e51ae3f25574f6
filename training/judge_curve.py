"""What a judge says of single frames against their relation score: the paper's Figure 4, for any judge and store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spatialalign.agreement import spearman
from spatialalign.chart import Axes, Canvas, fitted
from spatialalign.errors import DataError, SpatialAlignError
from spatialalign.score import relation_curves
from spatialalign.score_plot import FINAL, INITIAL
from spatialalign.tracks import Tracks
from spatialalign.video import read_video
from training.monitors import JsonlLog
from training.stages import StageSummary
from training.store import Sample, Store

if TYPE_CHECKING:
    from spatialalign.dsr import DSR
    from spatialalign.rewards.vlm_judge import Answer, VlmJudge

ENDS = ("initial", "final")
_PAPER, _INK, _GREY, _GRID, _BAR = (255, 255, 255), (24, 26, 30), (108, 112, 118), (226, 228, 230), (206, 212, 222)


@dataclass(frozen=True)
class FrameAnswer:
    """A frame of a clip, which relation was asked about, its SSR there, and what the judge said."""

    sample: str
    frame: int
    relation: str
    ssr: float
    answer: Answer
    text: str


def ask_frames(store: Store, judge: VlmJudge, frames: int, path: Path) -> tuple[list[FrameAnswer], StageSummary]:
    """Ask about both relations on ``frames`` valid frames of every tracked clip, spread evenly from first to last.

    Answers are kept in the JSONL file ``path`` and not asked for again. Raises :class:`DataError` if it holds those of
    another judge, or if no clip of the store can be asked about.
    """
    from tqdm import tqdm

    log, summary, rows = JsonlLog(path), StageSummary(f"{judge.name} on frames"), []
    kept = _kept(log, judge.name)
    relations: dict[str, DSR] = {}
    for sample in tqdm(store.samples(), desc=judge.name, unit="clip", disable=None):
        try:
            if sample.prompt_id not in relations:
                relations[sample.prompt_id] = store.prompt(sample.prompt_id).dsr
            rows += _ask_clip(sample, relations[sample.prompt_id], judge, frames, kept, log, summary)
        except SpatialAlignError as error:
            summary.failed.append((sample.name, str(error)))
    if not rows:
        reason = summary.failed[0][1] if summary.failed else "it has no samples"
        raise DataError(f"{store.root}: no frame to ask about; {reason}")
    return rows, summary


def _ask_clip(
    sample: Sample,
    dsr: DSR,
    judge: VlmJudge,
    count: int,
    kept: dict[tuple[str, int, str], FrameAnswer],
    log: JsonlLog,
    summary: StageSummary,
) -> list[FrameAnswer]:
    from spatialalign.rewards.vlm_judge import question

    if not sample.tracks.is_file():
        raise DataError("it has no tracks; run training.score")
    curves = relation_curves(Tracks.load(sample.tracks).oriented(dsr.subject, dsr.object), dsr)
    valid = np.flatnonzero(np.isfinite(curves[0]))
    if not len(valid):
        raise DataError("no frame shows both things")
    chosen = valid[np.unique(np.linspace(0, len(valid) - 1, count).round().astype(int))]
    pictures, rows = None, []
    for frame in (int(k) for k in chosen):
        for end, relation, curve in zip(ENDS, (dsr.initial, dsr.final), curves, strict=True):
            known = kept.get((sample.name, frame, end))
            if known is None:
                pictures = read_video(sample.video).frames if pictures is None else pictures
                reply = judge.ask(pictures[frame : frame + 1], question(dsr, relation, 1))
                known = FrameAnswer(sample.name, frame, end, float(curve[frame]), reply.answer, reply.text)
                log.write(asdict(known))
                summary.done += 1
            else:
                summary.skipped += 1
            rows.append(replace(known, ssr=float(curve[frame])))
    return rows


def _kept(log: JsonlLog, name: str) -> dict[tuple[str, int, str], FrameAnswer]:
    rows = log.rows()
    if not rows:
        log.write({"judge": name})
        return {}
    if rows[0] != {"judge": name}:
        raise DataError(f"{log.path} holds the answers of {rows[0].get('judge')}, not of {name}; use another --out")
    answers = [FrameAnswer(**row) for row in rows[1:]]
    return {(row.sample, row.frame, row.relation): row for row in answers}


def summarise(rows: Sequence[FrameAnswer], bins: int = 10) -> dict[str, Any]:
    """Counts of answers by SSR in equal bins from -1 to +1, and how the answers go with it.

    ``yes_share`` is over the clear answers; unclear ones are counted beside them. ``yes_where_below_zero`` is what a
    judge that looks would keep low: YES although the subject is on the other side.
    """
    edges = np.linspace(-1, 1, bins + 1)
    ssr = np.array([row.ssr for row in rows])
    # A score of exactly +1 belongs to the last bin.
    place = np.clip(np.digitize(ssr, edges) - 1, 0, bins - 1)
    table = []
    for number in range(bins):
        inside = [row for row, at in zip(rows, place, strict=True) if at == number]
        ends = {end: _counts([row for row in inside if row.relation == end]) for end in ENDS}
        table.append({"low": float(edges[number]), "high": float(edges[number + 1]), **_counts(inside), **ends})
    clear = [row for row in rows if row.answer != "unclear"]
    unclear = [row.text for row in rows if row.answer == "unclear"]
    return {
        "clips": len({row.sample for row in rows}),
        **_counts(rows),
        "unclear_replies": sorted(set(unclear))[:20],
        "spearman": spearman([row.ssr for row in clear], [row.answer == "yes" for row in clear]),
        "yes_where_below_zero": _counts([row for row in rows if row.ssr < 0])["yes_share"],
        "yes_where_above_zero": _counts([row for row in rows if row.ssr > 0])["yes_share"],
        "bins": table,
    }


def _counts(rows: Sequence[FrameAnswer]) -> dict[str, Any]:
    counts = {answer: sum(row.answer == answer for row in rows) for answer in ("yes", "no", "unclear")}
    clear = counts["yes"] + counts["no"]
    return {**counts, "yes_share": counts["yes"] / clear if clear else None}


def curve_chart(summary: dict[str, Any], name: str, size: tuple[int, int] = (900, 560)) -> NDArray[np.uint8]:
    """The share of YES against SSR for either relation, above the number of questions in each bin.

    ``summary`` is that of :func:`summarise`; ``size`` is width and height in pixels. Returns uint8 (height, width, 3).
    """
    em = max(8.0, 16 * min(size[0] / 900, size[1] / 560))
    canvas, small = Canvas(size, _PAPER), round(0.95 * em)
    left, right, middle = 5.4 * em, size[0] - 1.6 * em, size[1] - 9.6 * em
    canvas.text((1.3 * em, 1.7 * em), "What the judge says against where things are", _INK, round(1.35 * em))
    told = f"{name}: {summary['yes']} yes, {summary['no']} no, {summary['unclear']} unclear on {summary['clips']} clips"
    canvas.text((1.3 * em, 3.5 * em), fitted(told, size[0] - 2.6 * em, round(em)), _GREY, round(em))
    shares = Axes(canvas, (left, 5.6 * em, right, middle), (-1, 1), (0, 1))
    shares.rows([(y, f"{y:.0%}") for y in (0, 0.25, 0.5, 0.75, 1)], _GRID, _GREY, small, right=False)
    canvas.dashes(shares.at(0, 0), shares.at(0, 1), _GREY)
    for end, colour in zip(ENDS, (INITIAL, FINAL), strict=True):
        seen = [(b["low"] / 2 + b["high"] / 2, b[end]["yes_share"]) for b in summary["bins"] if _asked(b[end])]
        if seen:
            shares.curve([x for x, _ in seen], [y for _, y in seen], colour, 0.16 * em, 0.34 * em)
    _legend(canvas, em, left)
    asked = [b["yes"] + b["no"] + b["unclear"] for b in summary["bins"]]
    counts = Axes(canvas, (left, middle + 1.2 * em, right, size[1] - 4.4 * em), (-1, 1), (0, max(asked)))
    for b, number in zip(summary["bins"], asked, strict=True):
        gap = (b["high"] - b["low"]) * 0.06
        canvas.area((counts.at(b["low"] + gap, number), counts.at(b["high"] - gap, 0)), _BAR)
    counts.rows([(0, "0"), (max(asked), str(max(asked)))], _GRID, _GREY, small, right=False)
    counts.columns([(x, f"{x:+g}" if x else "0") for x in (-1, -0.5, 0, 0.5, 1)], _GREY, small)
    canvas.text(((left + right) / 2, size[1] - 1.3 * em), "SSR of the frame", _GREY, round(em), "mm")
    canvas.text((1.3 * em, (5.6 * em + middle) / 2), "share of YES", _GREY, round(em), upright=True)
    canvas.text((1.3 * em, middle + 3.0 * em), "asked", _GREY, round(em), upright=True)
    return canvas.finish()


def _asked(counts: dict[str, Any]) -> bool:
    return counts["yes_share"] is not None


def _legend(canvas: Canvas, em: float, left: float) -> None:
    x, y = left + 0.8 * em, 6.6 * em
    for end, colour in zip(ENDS, (INITIAL, FINAL), strict=True):
        canvas.line(((x, y), (x + 1.6 * em, y)), colour, 0.16 * em)
        x += 2.1 * em + canvas.text((x + 2.1 * em, y), f"{end} relation", _INK, round(0.95 * em)) + 1.4 * em
