"""Tracking and scoring a store, with a tracker that knows the truth."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from spatialalign.dsr import DSR
from spatialalign.errors import DataError, VideoError
from spatialalign.prompts import Prompt
from spatialalign.score import dsr_score
from spatialalign.tracks import Tracks
from spatialalign.video import write_video
from training.score import main, score
from training.store import LatentsHeader, Sample, Store

TEXT = "In a quiet room, a cat is on the left of a box, then the cat walks to the right of the box."
FRAMES = 9


class TrueTracker:
    """Stands for detector and segmenter: the cat walks from left to right over a box; counts its calls."""

    def __init__(self, fail: type[Exception] | None = None) -> None:
        self.calls: list[tuple[str, str]] = []
        self.fail = fail

    def track(self, frames: np.ndarray, subject: str, object: str, fps: float) -> Tracks:
        self.calls.append((subject, object))
        if self.fail is not None:
            raise self.fail("the detector stumbled")
        x = np.linspace(0, 48, len(frames))
        cat = np.stack([x, x * 0 + 40, x + 16, x * 0 + 56], axis=1)
        box = np.tile([24.0, 40, 40, 56], (len(frames), 1))
        boxes = np.stack([cat, box], axis=1)
        return Tracks(boxes, np.ones((len(frames), 2)), (subject, object), (64, 64), fps, source="truth")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store", create=True)
    store.add_prompt(Prompt.parse("0001_LR", TEXT))
    for seed in (0, 1):
        fill(store.sample("0001_LR", seed))
    return store


def fill(sample: Sample) -> None:
    sample.write_latents(torch.zeros(16, 3, 8, 8), LatentsHeader("space", "model", {}, "digest"))
    write_video(sample.video, np.zeros((FRAMES, 64, 64, 3), dtype=np.uint8), 8)


def run(store: Store, tracker: TrueTracker | None, again: bool = False) -> tuple[int, int, list[str]]:
    summary = score(store, tracker, again)  # type: ignore[arg-type]
    return summary.done, summary.skipped, [reason for _, reason in summary.failed]


def test_scores_are_those_of_the_tracks(store: Store) -> None:
    tracker = TrueTracker()
    assert run(store, tracker) == (2, 0, [])
    assert tracker.calls == [("cat", "box")] * 2
    sample = store.sample("0001_LR", 0)
    expected = dsr_score(Tracks.load(sample.tracks), DSR.parse(TEXT))
    assert sample.read_score().score == expected.score
    assert expected.score is not None
    assert expected.score > 0.9  # the cat does walk over
    assert json.loads(sample.score.read_text())["tracker"] == "truth"


def test_nothing_is_done_twice(store: Store) -> None:
    run(store, TrueTracker())
    tracker = TrueTracker()
    assert run(store, tracker) == (0, 2, [])
    assert tracker.calls == []


def test_a_score_without_tracks_is_redone(store: Store) -> None:
    run(store, TrueTracker())
    sample = store.sample("0001_LR", 0)
    sample.tracks.unlink()
    with pytest.raises(DataError, match="no tracks beside it"):
        sample.read_score()
    tracker = TrueTracker()
    assert run(store, tracker) == (1, 1, [])
    assert len(tracker.calls) == 1


@pytest.mark.parametrize("content", ["{", "{}", '{"version": 0}', "[]"])
def test_a_damaged_or_outdated_score_is_made_from_the_tracks(store: Store, content: str) -> None:
    run(store, TrueTracker())
    store.sample("0001_LR", 1).score.write_text(content)
    tracker = TrueTracker()
    assert run(store, tracker) == (1, 1, [])
    assert tracker.calls == []
    assert store.sample("0001_LR", 1).read_score().valid


def test_damaged_tracks_are_made_again(store: Store) -> None:
    run(store, TrueTracker())
    sample = store.sample("0001_LR", 1)
    sample.tracks.write_bytes(b"nonsense")
    sample.score.unlink()
    tracker = TrueTracker()
    assert run(store, tracker) == (1, 1, [])
    assert len(tracker.calls) == 1


def test_scoring_again_needs_no_tracker(store: Store) -> None:
    run(store, TrueTracker())
    store.sample("0001_LR", 0).tracks.unlink()
    done, skipped, failed = run(store, None, again=True)
    assert (done, skipped) == (1, 0)
    assert len(failed) == 1
    assert "no tracks" in failed[0]


def test_one_bad_clip_is_a_reason_and_not_the_end(store: Store) -> None:
    cut, absent, foreign = (store.sample("0001_LR", seed) for seed in (0, 2, 3))
    cut.video.write_bytes(cut.video.read_bytes()[:100])
    absent.folder.mkdir()
    fill(foreign)
    foreign.video.write_bytes(b"not a video at all")
    done, _, failed = run(store, TrueTracker())
    assert done == 1
    assert len(failed) == 3
    assert "video.mp4" in failed[0]
    assert "training.generate" in failed[1]
    assert "video.mp4" in failed[2]


@pytest.mark.parametrize("error", [VideoError, RuntimeError])
def test_when_every_clip_fails_the_run_says_so(store: Store, error: type[Exception]) -> None:
    with pytest.raises(DataError, match="none of 2 clips.*stumbled"):
        run(store, TrueTracker(error))
    assert not store.sample("0001_LR", 0).score.exists()
    assert run(store, TrueTracker()) == (2, 0, [])  # nothing was left claimed or half-written


def test_one_frame_is_scored_as_invalid(tmp_path: Path) -> None:
    store = Store(tmp_path / "short", create=True)
    store.add_prompt(Prompt.parse("0001_LR", TEXT))
    sample = store.sample("0001_LR", 0)
    fill(sample)
    write_video(sample.video, np.zeros((1, 64, 64, 3), dtype=np.uint8), 8)
    assert run(store, TrueTracker()) == (1, 0, [])
    assert not sample.read_score().valid


def test_the_program_scores_again_without_models(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    run(store, TrueTracker())
    main(["--store", str(store.root), "--again", "true"])
    assert "score: 2 done" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["--store", str(store.root / "nowhere")])
    assert stopped.value.code == 2
