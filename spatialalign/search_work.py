"""What a search asks of a sampler, what it found, and the account of it: its rows, carried out a batch at a time.

A row is one candidate of one prompt. Rows are numbered prompt by prompt: with N candidates, row ``r`` is candidate
``r % N`` of prompt ``r // N``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from .errors import ConfigError
from .search import SearchSettings, best_of

Ended = Literal["all", "threshold", "interrupted"]
StopOn = tuple[type[BaseException], ...]


class Sampling(Protocol):
    """What a search asks of a sampler. Clips are ``(b, c, f, h, w)``, on any device; ``rows`` say which they are."""

    @property
    def sigmas(self) -> Sequence[float]:
        """The noise levels of the steps, from 1 down to 0; one more than there are steps."""

    @property
    def evaluations(self) -> float:
        """Passes of the model so far, each counted once for every clip; a reward asked on the way adds its share."""

    def advance(self, x: Tensor, first: int, last: int, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Take the steps ``first`` to ``last - 1``; the clips after them, and the clean ones last predicted."""

    def score(self, x0: Tensor, rows: Sequence[int]) -> Sequence[float | None]:
        """The scores of finished clips; None for an INVALID one."""

    def preview(self, x: Tensor, x0: Tensor, step: int, rows: Sequence[int]) -> Sequence[float | None]:
        """How good clips will be, ``x`` at ``sigmas[step]``, of which ``x0`` is predicted; None for INVALID.

        Before the first step nothing is predicted, and ``x0`` is ``x``.
        """


@dataclass(frozen=True)
class Event:
    """A scoring on the way.

    Attributes:
        step: how many steps were done.
        scores: of the N candidates.
        kept: pruning: the candidates taken on, best first; particles: which one each of the N continues from here.
        weights: particles: their normalised weights before that; else empty.
    """

    step: int
    scores: tuple[float | None, ...]
    kept: tuple[int, ...]
    weights: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What a search found for one prompt: its n finished candidates.

    Attributes:
        latents: ``(n, c, f, h, w)`` on the CPU.
        candidates: which of the N they are.
        scores: theirs; None for INVALID, and for the only one of a search of the kind "none", which is not scored.
        evaluations: passes of the model that all candidates took, with the share of a reward that was asked.
        scorings: clips that were decoded and scored, previews by the tracker included.
        history: scorings on the way; for particles also the last one, with the weights of the finished ones.
        ended: "all" when there was nothing left to do, "threshold" when a score was good enough before, "interrupted".
    """

    latents: Tensor
    candidates: tuple[int, ...]
    scores: tuple[float | None, ...]
    evaluations: float
    scorings: int
    history: tuple[Event, ...]
    ended: Ended

    @property
    def order(self) -> list[int]:
        """Positions in ``latents``, best first."""
        return best_of(self.scores)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the latents, as plain JSON values."""
        return {
            "candidates": list(self.candidates),
            "scores": list(self.scores),
            "evaluations": self.evaluations,
            "scorings": self.scorings,
            "history": [asdict(event) for event in self.history],
            "ended": self.ended,
        }


@dataclass
class _Finished:
    latents: list[Tensor] = field(default_factory=list)
    candidates: list[int] = field(default_factory=list)
    scores: list[float | None] = field(default_factory=list)


class Work:
    """Carries out the parts of a search, a batch at a time, and keeps account of every row."""

    def __init__(
        self,
        sampling: Sampling,
        settings: SearchSettings,
        rows: int,
        batch: int,
        total: int,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        if batch < 1:
            raise ConfigError(f"the batch must hold at least 1, found {batch}")
        self.sampling, self.settings, self.batch = sampling, settings, batch
        self.steps, self.prompts = len(sampling.sigmas) - 1, rows // settings.candidates
        self.history: list[list[Event]] = [[] for _ in range(self.prompts)]
        self.ended: list[Ended] = ["all"] * self.prompts
        self._evaluations, self._scorings = [0.0] * rows, [0] * rows
        self._finished = [_Finished() for _ in range(self.prompts)]
        self._done, self._total, self._progress = 0, total, progress

    def advance(self, x: Tensor, first: int, last: int, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Some steps of the rows, a batch at a time."""
        clips, clean = [], []
        for start in range(0, len(rows), self.batch):
            part = list(rows[start : start + self.batch])
            before = self.sampling.evaluations
            after, x0 = self.sampling.advance(x[start : start + self.batch], first, last, part)
            for row in part:
                self._evaluations[row] += (self.sampling.evaluations - before) / len(part)
            clips.append(after)
            clean.append(x0)
            self._done += (last - first) * len(part)
            if self._progress is not None:
                self._progress(self._done, self._total)
        return torch.cat(clips), torch.cat(clean)

    def preview(self, x: Tensor, x0: Tensor, step: int, rows: Sequence[int]) -> list[float | None]:
        """Scores of the rows on their way, a batch at a time."""
        scores: list[float | None] = []
        before = self.sampling.evaluations
        for start in range(0, len(rows), self.batch):
            part = slice(start, start + self.batch)
            scores += self.sampling.preview(x[part], x0[part], step, rows[part])
        for row in rows:
            self._evaluations[row] += (self.sampling.evaluations - before) / len(rows)
            self._scorings[row] += self.settings.preview_by == "tracker"
        return scores

    def score(self, x0: Tensor, rows: Sequence[int]) -> list[float | None]:
        """Scores of finished rows, a batch at a time."""
        scores: list[float | None] = []
        for start in range(0, len(rows), self.batch):
            scores += self.sampling.score(x0[start : start + self.batch], rows[start : start + self.batch])
        for row in rows:
            self._scorings[row] += 1
        return scores

    def keep(self, x: Tensor, rows: Sequence[int], scores: Sequence[float | None]) -> None:
        """Record finished candidates."""
        for row, clip, score in zip(rows, x.cpu(), scores, strict=True):
            prompt, candidate = divmod(row, self.settings.candidates)
            mine = self._finished[prompt]
            mine.latents.append(clip)
            mine.candidates.append(candidate)
            mine.scores.append(score)

    @property
    def anything(self) -> bool:
        """Whether a candidate has been finished."""
        return any(mine.latents for mine in self._finished)

    def pick(self, rows: Sequence[int]) -> list[int]:
        """Which of the rows to finish together: the first ones, with a threshold the first one of each prompt."""
        if self.settings.threshold is not None:
            firsts: dict[int, int] = {}
            for row in rows:
                firsts.setdefault(row // self.settings.candidates, row)
            rows = list(firsts.values())
        return list(rows[: self.batch])

    def wanted(self, row: int) -> bool:
        """Whether the row's prompt still lacks a score that reaches the threshold; notes it when it does not."""
        prompt, threshold = row // self.settings.candidates, self.settings.threshold
        if threshold is None or all(score is None or score < threshold for score in self._finished[prompt].scores):
            return True
        self.ended[prompt] = "threshold"
        return False

    def results(self) -> list[SearchResult]:
        """One result for each prompt."""
        count, results = self.settings.candidates, []
        for prompt, mine in enumerate(self._finished):
            part = slice(prompt * count, (prompt + 1) * count)
            results.append(
                SearchResult(
                    torch.stack(mine.latents) if mine.latents else torch.zeros(0),
                    tuple(mine.candidates),
                    tuple(mine.scores),
                    sum(self._evaluations[part]),
                    sum(self._scorings[part]),
                    tuple(self.history[prompt]),
                    self.ended[prompt],
                )
            )
        return results
