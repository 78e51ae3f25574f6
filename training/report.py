"""``python -m training.report``: one self-contained HTML page from an evaluation folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spatialalign.errors import ConfigError, DataError
from spatialalign.files import atomic_path, read_json
from training.cli import command

if TYPE_CHECKING:
    from training.report_html import Clip, Curve, Pair
    from training.store import Sample


CHARTS = (
    ("accuracy", "Implicit accuracy", 0.5),
    ("loss", "Loss", None),
    ("margin", "Margin", 0.0),
    ("winner_gain", "Winner: error saved", 0.0),
    ("loser_gain", "Loser: error saved", 0.0),
    ("norm_ratio", "Norm of v against the reference", 1.0),
    ("gradient_factor", "Gradient factor", 0.5),
    ("grad_norm", "Gradient norm", None),
    ("lr", "Learning rate", None),
)
"""Monitors of training.dpo that are drawn: name in the log, title, and the level an untrained LoRA has."""


@dataclass(frozen=True)
class Report:
    """Write one HTML page that shows an evaluation: clips side by side, curves, Correct@tau and training."""

    evaluation: Path = Path("evaluation")
    """Folder that training.evaluate filled (metrics.json and the two stores)."""
    out: Path | None = None
    """The page; by default report.html in the evaluation folder."""
    training_log: Path | None = None
    """The JSONL log of training.dpo, for the training charts."""
    seconds: Path | None = None
    """A JSON object of seconds by stage, to be shown."""
    title: str = "The aligned model against its base"
    """Headline of the page."""
    extremes: int = 2
    """How many of the largest gains, and of the largest losses, are shown beside one clip of every type."""

    def __post_init__(self) -> None:
        if self.extremes < 0:
            raise ConfigError(f"extremes must be 0 or more, found {self.extremes}")


def run(args: Report) -> Path:
    """Write the page and return its path.

    Raises:
        DataError: there is no metrics.json, or it is not one that training.evaluate writes.
    """
    from training.report_html import page

    result = read_result(args.evaluation)
    if args.seconds is not None:
        result["seconds"] = read_json(args.seconds)
    pairs = [show(args.evaluation, result, row, why) for row, why in choose(result["samples"], args.extremes)]
    curves = training_curves(read_log(args.training_log)) if args.training_log is not None else []
    out = args.out or args.evaluation / "report.html"
    with atomic_path(out) as temporary:
        temporary.write_text(page(result, pairs, curves, args.title), encoding="utf-8")
    print(f"report: {out} ({out.stat().st_size / 1e6:.1f} MB, {len(pairs)} pairs of clips)")
    return out


def read_result(folder: Path) -> dict[str, Any]:
    """The metrics of an evaluation folder."""
    path = folder / "metrics.json"
    if not path.is_file():
        raise DataError(f"{path} does not exist; write it with python -m training.evaluate --out {folder}")
    result: dict[str, Any] = read_json(path)
    missing = [key for key in ("base", "aligned", "difference", "controls", "samples") if key not in result]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}; write it again with python -m training.evaluate")
    return result


def choose(samples: Sequence[Mapping[str, Any]], extremes: int) -> list[tuple[Mapping[str, Any], str]]:
    """Which clips are shown, with the reason: by position one of every type, then the largest gains and losses.

    An INVALID clip counts as score 0 in a gain. No clip is shown twice.
    """
    rows = sorted(samples, key=lambda row: (row["prompt_id"], row["seed"]))
    chosen: list[tuple[Mapping[str, Any], str]] = []
    for code in dict.fromkeys(sorted(str(row["type"]) for row in rows)):
        chosen.append((next(row for row in rows if row["type"] == code), f"First prompt of type {code}"))

    def gain(row: Mapping[str, Any]) -> float:
        return float(row["aligned"]["score"] or 0.0) - float(row["base"]["score"] or 0.0)

    rest = sorted((row for row in rows if all(row is not other for other, _ in chosen)), key=gain)
    losses = [row for row in rest[:extremes] if gain(row) < 0]
    gains = [row for row in reversed(rest[len(losses) :]) if gain(row) > 0][:extremes]
    chosen += [(row, "Among the largest gains") for row in gains]
    chosen += [(row, "Among the largest losses") for row in losses]
    return chosen


def show(folder: Path, result: Mapping[str, Any], row: Mapping[str, Any], why: str) -> Pair:
    """Gather what the page shows of one prompt and seed."""
    from training.report_html import Pair
    from training.store import Store

    stores = {arm: Store(folder / result["stores"][arm]) for arm in ("base", "aligned")}
    prompt = stores["base"].prompt(row["prompt_id"])
    clips = {arm: read_clip(store.sample(row["prompt_id"], row["seed"])) for arm, store in stores.items()}
    return Pair(
        why=why,
        prompt=prompt.text,
        seed=row["seed"],
        initial_name=f"{prompt.dsr.initial.initial_phrase} the {prompt.dsr.object}",
        final_name=f"{prompt.dsr.final.final_phrase} the {prompt.dsr.object}",
        base=clips["base"],
        aligned=clips["aligned"],
    )


def read_clip(sample: Sample) -> Clip:
    """One clip of the store, its picture enlarged to whole multiples when it is tiny."""
    import numpy as np

    from spatialalign.score import DsrScore
    from spatialalign.tracks import Tracks
    from spatialalign.video import read_video
    from training.report_html import Clip

    video, tracks = read_video(sample.video), Tracks.load(sample.tracks)
    score = DsrScore.from_dict(read_json(sample.score))
    factor = max(1, round(256 / max(video.size)))
    enlarged = video.frames.repeat(factor, axis=1).repeat(factor, axis=2)
    curves = np.full((2, tracks.frames), np.nan)
    curves[0, score.frames_used], curves[1, score.frames_used] = score.initial_ssr, score.final_ssr
    return Clip(
        mp4=encode(enlarged, video.fps),
        fps=video.fps,
        size=tracks.size,
        boxes=[(box(pair[0]), box(pair[1])) for pair in tracks.boxes.tolist()],
        initial=[value if math.isfinite(value) else None for value in curves[0].tolist()],
        final=[value if math.isfinite(value) else None for value in curves[1].tolist()],
        score=score.score,
        robust=None if score.robust is None else score.robust.score,
        reason=score.reason,
    )


def box(values: Sequence[float]) -> tuple[float, float, float, float] | None:
    """A box as plain numbers, None where it is absent."""
    x1, y1, x2, y2 = values
    return (x1, y1, x2, y2) if math.isfinite(x1) else None


def encode(frames: Any, fps: float) -> bytes:
    """Frames as the bytes of a small H.264 MP4 that browsers play."""
    import tempfile

    from spatialalign.video import write_video

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_video(path, frames, fps, crf=20)
        return path.read_bytes()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a training log; :class:`DataError` when there is none."""
    from training.monitors import JsonlLog

    if not path.is_file():
        raise DataError(f"{path} does not exist; training.dpo writes train.jsonl into its output folder")
    return JsonlLog(path).rows()


def training_curves(rows: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """One chart for every monitor that the log holds, training pairs and held-out pairs together."""
    from training.report_html import Curve

    curves = []
    for key, title, reference in CHARTS:
        steps: dict[str, list[float]] = {"train": [], "held_out": []}
        values: dict[str, list[float | None]] = {"train": [], "held_out": []}
        for row in rows:
            if row.get("event") in steps and key in row:
                steps[row["event"]].append(row["step"])
                values[row["event"]].append(row[key])
        if steps["train"]:
            curves.append(
                Curve(title, steps["train"], values["train"], steps["held_out"], values["held_out"], reference)
            )
    return curves


def main(argv: Sequence[str] | None = None) -> None:
    """Command line: see ``python -m training.report --help``."""
    command(Report, run, argv)


if __name__ == "__main__":
    main()
