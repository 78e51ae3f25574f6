"""Whatever scores clips, made alike for the benchmark: chance, the DSR-Score, a learned reward, a judge."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from spatialalign.dsr import DSR
from spatialalign.errors import ConfigError, DataError, SpatialAlignError
from spatialalign.score import DsrScore, dsr_score
from spatialalign.video import read_video
from training.bench_pairs import Clip
from training.monitors import JsonlLog
from training.stages import StageSummary, batches
from training.store import Store

if TYPE_CHECKING:
    from spatialalign.rewards.base import VideoReward
    from spatialalign.rewards.vlm_judge import VlmJudge
    from spatialalign.tracking.tracker import Tracker


@dataclass(frozen=True)
class ClipScore:
    """The columns of a clip, None where there is no score, for the ``reason`` given."""

    values: tuple[float | None, ...]
    reason: str = ""


class ClipScorer(Protocol):
    """Scores up to ``batch`` clips at once from their files; ``name`` and the names of its columns are recorded."""

    @property
    def name(self) -> str: ...

    @property
    def dimensions(self) -> tuple[str, ...]: ...

    @property
    def batch(self) -> int: ...

    def score(self, files: Sequence[Path], prompts: Sequence[str]) -> list[ClipScore]:
        """A score for each file and its prompt; raises :class:`SpatialAlignError` if one cannot be tried at all."""
        ...


@dataclass(frozen=True)
class RandomScorer:
    """A normal number for every clip, which follows from the end of its path, its prompt and ``seed``."""

    seed: int = 0
    name: str = "random"
    dimensions: tuple[str, ...] = ("score",)
    batch: int = 1

    def score(self, files: Sequence[Path], prompts: Sequence[str]) -> list[ClipScore]:
        """See :meth:`ClipScorer.score`; no file is opened."""
        names = ("/".join((*file.parts[-3:], prompt)) for file, prompt in zip(files, prompts, strict=True))
        keys = [zlib.crc32(name.encode()) for name in names]
        return [ClipScore((float(np.random.default_rng([self.seed, key]).standard_normal()),)) for key in keys]


class DsrScorer:
    """The DSR-Score. A clip of a sample store keeps the score it has there; others are tracked."""

    dimensions: tuple[str, ...] = ("score",)
    batch = 1

    def __init__(self, tracker: str, load: Callable[[], Tracker]) -> None:
        """``load`` gives the tracker of that name, once it is needed."""
        self.name, self._load = f"DSR-Score ({tracker})", load

    @cached_property
    def _tracker(self) -> Tracker:
        return self._load()

    def score(self, files: Sequence[Path], prompts: Sequence[str]) -> list[ClipScore]:
        """See :meth:`ClipScorer.score`; an INVALID clip has no score."""
        found = [self._one(file, prompt) for file, prompt in zip(files, prompts, strict=True)]
        return [ClipScore((one.score,), "" if one.valid else f"INVALID: {one.reason}") for one in found]

    def _one(self, file: Path, prompt: str) -> DsrScore:
        dsr = DSR.parse(prompt)
        stored = stored_score(file, dsr)
        if stored is not None:
            return stored
        video = read_video(file)
        return dsr_score(self._tracker.track(video.frames, dsr.subject, dsr.object, video.fps), dsr)


def stored_score(file: Path, dsr: DSR) -> DsrScore | None:
    """The score beside a clip of a sample store, if the clip was made for this relationship."""
    folder = file.parent
    if not ((folder / "score.json").is_file() and (folder.parent / "prompt.json").is_file() and folder.name.isdigit()):
        return None
    store = Store(folder.parent.parent)
    if store.prompt(folder.parent.name).dsr != dsr:
        return None
    return store.sample(folder.parent.name, int(folder.name)).read_score()


class RewardScorer:
    """Any :class:`~spatialalign.rewards.base.VideoReward`."""

    def __init__(self, reward: VideoReward, batch: int = 8) -> None:
        self.name, self.dimensions, self.batch, self._reward = reward.name, tuple(reward.dimensions), batch, reward

    def score(self, files: Sequence[Path], prompts: Sequence[str]) -> list[ClipScore]:
        """See :meth:`ClipScorer.score`."""
        rows = self._reward.score([read_video(file) for file in files], prompts)
        return [_clip_score(row, "the reward gave no number") for row in rows]


class JudgeScorer:
    """A judge: 1 for yes and 0 for no, for each end of the clip; what it left unclear is quoted."""

    batch = 1

    def __init__(self, judge: VlmJudge) -> None:
        self.name, self.dimensions, self.judge = judge.name, judge.dimensions, judge

    def score(self, files: Sequence[Path], prompts: Sequence[str]) -> list[ClipScore]:
        """See :meth:`ClipScorer.score`."""
        from spatialalign.rewards.vlm_judge import values

        parsed = [DSR.parse(prompt) for prompt in prompts]
        verdicts = [self.judge.judge(read_video(file), dsr) for file, dsr in zip(files, parsed, strict=True)]
        return [_clip_score(values(verdict), verdict.unclear) for verdict in verdicts]


def _clip_score(row: Sequence[float] | np.ndarray, reason: str) -> ClipScore:
    columns = tuple(float(value) if math.isfinite(value) else None for value in row)
    return ClipScore(columns, reason if None in columns else "")


def load_scorer(spec: str, device: str, dtype: str, seed: int, batch: int) -> ClipScorer:
    """A scorer by name: ``random``, ``dsr``, ``dsr:<tracker>``, ``reward:<folder>`` or ``judge:<folder or hub id>``.

    Raises:
        ConfigError: no such scorer.
        ModelError: its model lacks a part.
    """
    kind, colon, model = spec.partition(":")
    if spec == "random":
        return RandomScorer(seed)
    if kind == "dsr" and bool(colon) == bool(model):
        from spatialalign.tracking.load import load_tracker

        tracker = model or "miniature"
        return DsrScorer(tracker, lambda: load_tracker(tracker, device, batch=batch))
    if kind not in ("reward", "judge") or not model:
        raise ConfigError(
            f"scorer {spec!r}: expected random, dsr, dsr:<tracker>, reward:<folder> or judge:<folder or hub id>"
        )
    import torch

    kinds = {"bfloat16": torch.bfloat16, "float32": torch.float32}
    if kind == "judge":
        from spatialalign.rewards.vlm_judge import VlmJudge

        return JudgeScorer(VlmJudge.from_pretrained(model, device, kinds[dtype]))
    from spatialalign.rewards.video_reward import load_video_reward

    return RewardScorer(load_video_reward(model, device=device, dtype=kinds[dtype], batch=batch), batch)


def slug(spec: str) -> str:
    """``spec`` as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", spec).strip("-")


def score_clips(
    scorer: ClipScorer, files: Mapping[Clip, Path], path: Path
) -> tuple[dict[Clip, ClipScore], StageSummary]:
    """Score every clip once, and keep the scores in the JSONL file ``path``; what it holds is not scored again.

    A clip that cannot be tried, such as a damaged file or a prompt outside the grammar, has no score and its reason; it
    is not kept, hence tried again by the next run.

    Raises:
        DataError: the file holds the scores of another scorer.
    """
    from tqdm import tqdm

    log, summary = JsonlLog(path), StageSummary(scorer.name)
    scores = _kept(log, scorer)
    scores = {clip: scores[clip] for clip in files if clip in scores}
    summary.skipped = len(scores)
    missing = [clip for clip in files if clip not in scores]
    for some in tqdm(batches(missing, scorer.batch), desc=scorer.name, unit="batch", disable=None):
        for clip, score, keep in _tried(scorer, some, files):
            scores[clip] = score
            if keep:
                summary.done += 1
                log.write({"path": clip.path, "prompt": clip.prompt, "values": score.values, "reason": score.reason})
            else:
                summary.failed.append((clip.path, score.reason))
    return scores, summary


def _tried(scorer: ClipScorer, clips: Sequence[Clip], files: Mapping[Clip, Path]) -> list[tuple[Clip, ClipScore, bool]]:
    """Scores of some clips, and whether each is to be kept; one bad clip does not spoil the others."""
    try:
        found = scorer.score([files[clip] for clip in clips], [clip.prompt for clip in clips])
    except SpatialAlignError as error:
        if len(clips) == 1:
            return [(clips[0], ClipScore((None,) * len(scorer.dimensions), str(error)), False)]
        return [row for clip in clips for row in _tried(scorer, [clip], files)]
    return [(clip, score, True) for clip, score in zip(clips, found, strict=True)]


def _kept(log: JsonlLog, scorer: ClipScorer) -> dict[Clip, ClipScore]:
    own = {"scorer": scorer.name, "dimensions": list(scorer.dimensions)}
    rows = log.rows()
    if not rows:
        log.write(own)
        return {}
    if rows[0] != own:
        raise DataError(
            f"{log.path} holds the scores of {rows[0].get('scorer')}, not of {scorer.name}; use another --out"
        )
    return {Clip(r["path"], r["prompt"]): ClipScore(tuple(r["values"]), r["reason"]) for r in rows[1:]}
