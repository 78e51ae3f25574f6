"""The candidates of a search on a backbone: stepped together, and scored as ``training.score`` scores a stored clip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spatialalign.backbones.base import Backbone
from spatialalign.backbones.sampling import Flow
from spatialalign.errors import SpatialAlignError
from spatialalign.prompts import Prompt
from spatialalign.rewards.latent import LatentReward
from spatialalign.score import DsrScore, dsr_score
from spatialalign.search import preview_rows
from spatialalign.tracking.tracker import Tracker
from spatialalign.tracks import Tracks
from spatialalign.video import read_video, write_video
from training.monitors import JsonlLog
from training.store import Sample


class Candidates:
    """A ``Sampling`` of :mod:`spatialalign.search_work`: one row for each candidate of each clip."""

    def __init__(
        self,
        backbone: Backbone,
        flow: Flow,
        text: Sequence[Tensor],
        prompts: Sequence[Prompt],
        tracker: Tracker | None,
        folder: Path,
        preview_frames: int | None,
        log: JsonlLog,
        reward: LatentReward | None = None,
    ) -> None:
        """Prepare for one search.

        Args:
            backbone: decodes.
            flow: steps; its texts are those of the rows.
            text: embeddings of the prompts.
            prompts: one per row.
            tracker: finds subject and object; needed as soon as something is scored.
            folder: where videos and tracks of finished candidates wait, on the store's disk.
            preview_frames: how many frames of a predicted clip are tracked; None for all.
            log: of clips that could not be scored.
            reward: scores clips on the way by its dimension ``dsr``; None for the tracker.
        """
        self._backbone, self._flow, self._text, self._prompts = backbone, flow, text, prompts
        self._tracker, self._folder, self._preview_frames, self._log = tracker, folder, preview_frames, log
        self._reward, self._asked = reward, 0
        self._scores: dict[int, tuple[DsrScore, str]] = {}

    @property
    def sigmas(self) -> Sequence[float]:
        """The noise levels of the steps."""
        return self._flow.sigmas

    @property
    def evaluations(self) -> float:
        """Passes of the transformer so far, counted for every clip; the reward's are its share of one."""
        return self._flow.evaluations + (0.0 if self._reward is None else self._asked * self._reward.blocks_share)

    def advance(self, x: Tensor, first: int, last: int, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Some steps; both results on the CPU."""
        x0 = x
        for index in range(first, last):
            x, x0 = self._flow.step(x, index, rows)
        return x.cpu(), x0.cpu()

    def score(self, x0: Tensor, rows: Sequence[int]) -> list[float | None]:
        """DSR-Scores of finished clips, each tracked in its video as that is stored, compression and all."""
        return [self._attempt(clip, row, finished=True) for clip, row in zip(x0, rows, strict=True)]

    def preview(self, x: Tensor, x0: Tensor, step: int, rows: Sequence[int]) -> list[float | None]:
        """DSR-Scores that the reward expects of noisy clips, or those of predicted clips, tracked in some frames."""
        if self._reward is None:
            return [self._attempt(clip, row, finished=False) for clip, row in zip(x0, rows, strict=True)]
        self._asked += len(rows)
        levels = torch.full((len(x),), self.sigmas[step], device=self._backbone.device)
        text = [self._text[row].to(levels.device) for row in rows]
        with torch.no_grad():
            values = self._reward(x.to(levels.device), levels, text).values
        expected = values[:, self._reward.dimensions.index("dsr")].tolist()
        return [value if math.isfinite(value) else None for value in expected]

    def deliver(self, row: int, latents: Tensor, sample: Sample) -> None:
        """Give a sample, whose latents are written, the video of a finished row, and tracks and score if it has any."""
        if row not in self._scores:
            write_video(sample.video, self._decode(latents, row), self._backbone.fps)
            return
        score, source = self._scores[row]
        self._video(row).replace(sample.video)
        self._tracks(row).replace(sample.tracks)
        sample.write_score(score, source)

    def _attempt(self, latents: Tensor, row: int, finished: bool) -> float | None:
        try:
            frames = self._decode(latents, row)
            return self._finished(frames, row) if finished else self._predicted(frames, row)
        except Exception as error:  # one odd candidate must not end a run of thousands; it counts as INVALID
            reason = str(error) if isinstance(error, SpatialAlignError) else f"{type(error).__name__}: {error}"
            self._log.write({"event": "unscored", "prompt": self._prompts[row].prompt_id, "reason": reason})
            return None

    def _finished(self, frames: np.ndarray, row: int) -> float | None:
        write_video(self._video(row), frames, self._backbone.fps)
        video = read_video(self._video(row))
        tracks = self._track(video.frames, row, video.fps)
        tracks.save(self._tracks(row))
        value = dsr_score(tracks, self._prompts[row].dsr)
        self._scores[row] = value, tracks.source
        return value.score

    def _predicted(self, frames: np.ndarray, row: int) -> float | None:
        looked_at = frames[preview_rows(len(frames), self._preview_frames)]
        fps = self._backbone.fps * len(looked_at) / len(frames)
        return dsr_score(self._track(looked_at, row, fps), self._prompts[row].dsr).score

    def _track(self, frames: np.ndarray, row: int, fps: float) -> Tracks:
        assert self._tracker is not None, "a search without a tracker is refused before it begins"
        dsr = self._prompts[row].dsr
        return self._tracker.track(frames, dsr.subject, dsr.object, fps)

    def _decode(self, latents: Tensor, row: int) -> np.ndarray:
        frames: np.ndarray = self._backbone.decode(latents[None], [self._prompts[row].prompt_id])[0]
        return frames

    def _video(self, row: int) -> Path:
        return self._folder / f"{row}.mp4"

    def _tracks(self, row: int) -> Path:
        return self._folder / f"{row}.safetensors"
