"""Track and score the clips of a sample store: ``python -m training.score``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from spatialalign.dsr import DSR
from spatialalign.errors import DataError, SpatialAlignError
from spatialalign.score import DsrScore, dsr_score
from spatialalign.tracks import Tracks
from spatialalign.video import read_video
from training.cli import command
from training.stages import StageSummary, stage_log
from training.store import Sample, Store

if TYPE_CHECKING:
    from spatialalign.tracking.tracker import Tracker


@dataclass(frozen=True)
class Score:
    """Track and score every clip that has no score yet; a clip that cannot be scored is listed with its reason."""

    store: Path
    """Sample store."""
    model: str = "miniature"
    """Tracking models: "miniature", a folder with detector/ and segmenter/, or <detector>+<segmenter> hub ids."""
    rule: Literal["robust", "paper"] = "robust"
    """Rules for labels, thresholds and valid frames: token spans and anchors, or the paper's."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    batch: int = 8
    """Frames given to the detector at once."""
    again: bool = False
    """Compute every score again from the tracks there are, without tracking again."""


def score(store: Store, tracker: Tracker | None, again: bool = False) -> StageSummary:
    """Write ``tracks.safetensors`` and ``score.json`` where they are missing.

    Kept: a score with its tracks. From the tracks alone: a missing, damaged or outdated score. From the video: tracks
    that are missing or damaged, even when a score is there.

    Args:
        store: with generated clips.
        tracker: None to score from existing tracks only.
        again: compute scores again although they are there, but for imported ones, which came without tracks.
    """
    from tqdm import tqdm

    log, summary = stage_log(store.root, "score"), StageSummary("score")
    samples = store.samples()
    log.write({"event": "start", "samples": len(samples)})
    relations: dict[str, DSR] = {}
    for sample in tqdm(samples, desc="score", unit="clip", disable=None):
        with sample.claim("score") as held:
            if not held:
                summary.busy += 1
                continue
            if (not again or sample.imported) and _is_scored(sample):
                summary.skipped += 1
                continue
            try:
                if sample.prompt_id not in relations:
                    relations[sample.prompt_id] = store.prompt(sample.prompt_id).dsr
                value = _score_sample(sample, relations[sample.prompt_id], tracker)
            except SpatialAlignError as error:
                summary.fail(sample.name, str(error), log)
            except Exception as error:  # one odd clip must not end a run of thousands
                summary.fail(sample.name, f"{type(error).__name__}: {error}", log)
            else:
                summary.done += 1
                log.write({"event": "sample", "sample": sample.name, "score": value.score, "reason": value.reason})
    log.write({"event": "end", **summary.to_dict()})
    if summary.failed and not summary.done and not summary.skipped:
        raise DataError(f"none of {len(summary.failed)} clips could be scored; the first: {summary.failed[0][1]}")
    return summary


def _is_scored(sample: Sample) -> bool:
    if not sample.scored:
        return False
    try:
        sample.read_score()
    except DataError:
        return False
    return True


def _score_sample(sample: Sample, dsr: DSR, tracker: Tracker | None) -> DsrScore:
    tracks = None
    if sample.tracks.is_file():
        try:
            tracks = Tracks.load(sample.tracks)
        except SpatialAlignError:
            sample.tracks.unlink()  # damaged: made again from the video
    if tracks is None:
        if not sample.generated:
            raise DataError("latents or video are missing: generation was cut short, run training.generate again")
        if tracker is None:
            raise DataError("it has no tracks; run training.score with a tracker")
        video = read_video(sample.video)
        sample.score.unlink(missing_ok=True)
        tracks = tracker.track(video.frames, dsr.subject, dsr.object, video.fps)
        tracks.save(sample.tracks)
    value = dsr_score(tracks, dsr)
    sample.write_score(value, tracks.source)
    return value


def run(args: Score) -> StageSummary:
    """Load the tracker and score."""
    store = Store(args.store)
    tracker = None
    if not args.again:
        from spatialalign.backbones.loading import pick_device
        from spatialalign.tracking.load import load_tracker

        tracker = load_tracker(args.model, pick_device(args.device), args.rule, args.batch)
    summary = score(store, tracker, args.again)
    print(summary.text())
    return summary


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m training.score``."""
    command(Score, run, argv)


if __name__ == "__main__":
    main()
