"""The ways of a search, for any sampler: best-of-N, pruned best-of-N, particles; several prompts side by side.

A row is one candidate of one prompt. Rows are numbered prompt by prompt: with N candidates, row ``r`` is candidate
``r % N`` of prompt ``r // N``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from .errors import ConfigError
from .search import (
    SearchSettings,
    ancestral_step,
    best_of,
    derived_seed,
    effective_sample_size,
    log_potential,
    normalised,
    resample,
    rewards,
    survivors,
)

Ended = Literal["all", "threshold", "interrupted"]
StopOn = tuple[type[BaseException], ...]


class Sampling(Protocol):
    """What a search asks of a sampler. Clips are ``(b, c, f, h, w)``, on any device; ``rows`` say which they are."""

    @property
    def sigmas(self) -> Sequence[float]:
        """The noise levels of the steps, from 1 down to 0; one more than there are steps."""

    @property
    def evaluations(self) -> float:
        """Passes of the model so far, each counted once for every clip."""

    def advance(self, x: Tensor, first: int, last: int, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Take the steps ``first`` to ``last - 1``; the clips after them, and the clean ones last predicted."""

    def score(self, x0: Tensor, rows: Sequence[int]) -> Sequence[float | None]:
        """The scores of finished clips; None for an INVALID one."""

    def preview(self, x0: Tensor, rows: Sequence[int]) -> Sequence[float | None]:
        """The scores of clips predicted on the way, which may be had with less effort; None for an INVALID one."""


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
        evaluations: passes of the model that all candidates took.
        scorings: clips that were decoded and scored, previews included.
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


def search(
    sampling: Sampling,
    noise: Tensor,
    settings: SearchSettings,
    seeds: Sequence[int],
    batch: int = 1,
    stop_on: StopOn = (),
    progress: Callable[[int, int], None] | None = None,
) -> list[SearchResult]:
    """Search as the settings say, for one or more prompts; a single candidate is simply sampled.

    Args:
        sampling: the sampler.
        noise: what every row starts from, ``(prompts * N, c, f, h, w)``.
        settings: how to search.
        seeds: one per prompt, for the noise and the resampling of particles.
        batch: clips in one pass of the model at most.
        stop_on: exceptions that interrupt the search; the candidates finished so far are returned. Raised on when there
            are none.
        progress: called with (steps done, steps in all), each counted once for every clip.

    Raises:
        ConfigError: the rows of noise are not N for each seed, or too few steps for a preview.
    """
    if len(noise) != len(seeds) * settings.candidates:
        raise ConfigError(f"{len(seeds)} prompts of {settings.candidates} candidates, but noise for {len(noise)} clips")
    if settings.candidates > 1 and settings.kind == "pruned":
        return pruned_best_of_n(sampling, noise, settings, batch, stop_on, progress)
    if settings.candidates > 1 and settings.kind == "particles":
        return particles(sampling, noise, settings, seeds, batch, progress)
    return best_of_n(sampling, noise, settings, batch, stop_on, progress)


def best_of_n(
    sampling: Sampling,
    noise: Tensor,
    settings: SearchSettings,
    batch: int = 1,
    stop_on: StopOn = (),
    progress: Callable[[int, int], None] | None = None,
) -> list[SearchResult]:
    """Take the candidates to the end, ``batch`` at once, until all are done or one reaches the threshold."""
    work = _Work(sampling, settings, len(noise), batch, len(noise) * (len(sampling.sigmas) - 1), progress)
    rows = sorted(range(len(noise)), key=lambda row: row % settings.candidates)
    return _finish(work, noise, 0, rows, stop_on)


def pruned_best_of_n(
    sampling: Sampling,
    noise: Tensor,
    settings: SearchSettings,
    batch: int = 1,
    stop_on: StopOn = (),
    progress: Callable[[int, int], None] | None = None,
) -> list[SearchResult]:
    """Take all candidates to the preview and the better ones to the end, best first."""
    steps, count = len(sampling.sigmas) - 1, settings.candidates
    (first,) = settings.events(steps)
    kept = len(survivors([None] * count, settings.keep))
    total = len(noise) * first + len(noise) // count * kept * (steps - first)
    work = _Work(sampling, settings, len(noise), batch, total, progress)
    rows = list(range(len(noise)))
    x, x0 = work.advance(noise, 0, first, rows)
    scores = work.score(x0, rows, preview=True)
    ranked: list[tuple[int, int]] = []
    for prompt in range(work.prompts):
        mine = tuple(scores[prompt * count : (prompt + 1) * count])
        order = survivors(mine, settings.keep)
        work.history[prompt].append(Event(first, mine, tuple(order)))
        ranked += [(place, prompt * count + candidate) for place, candidate in enumerate(order)]
    return _finish(work, x, first, [row for _, row in sorted(ranked)], stop_on)


def particles(
    sampling: Sampling,
    noise: Tensor,
    settings: SearchSettings,
    seeds: Sequence[int],
    batch: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> list[SearchResult]:
    """Feynman-Kac steering: N clips side by side, resampled on the way by the scores of what they are becoming.

    Before the first scoring the steps are the plain ones; from there on each goes lower and adds fresh noise
    (:func:`~spatialalign.search.ancestral_step`), so that the successors of one particle part. Weights accumulate until
    a resampling. A search that is interrupted has finished nothing and returns nothing.
    """
    sigmas, count = sampling.sigmas, settings.candidates
    steps = len(sigmas) - 1
    events, rows = settings.events(steps), list(range(len(noise)))
    work = _Work(sampling, settings, len(noise), batch, len(noise) * steps, progress)
    swarms = [_Swarm(settings, seed) for seed in seeds]
    x = noise
    for first, last in _spans(events, steps):
        before = x
        x, x0 = work.advance(before, first, last, rows)
        if last in events:
            scores = work.score(x0, rows, preview=True)
            ancestors = []
            for prompt, swarm in enumerate(swarms):
                event = swarm.weigh(last, scores[prompt * count : (prompt + 1) * count])
                work.history[prompt].append(event)
                ancestors += [prompt * count + particle for particle in event.kept]
            x, x0, before = x[ancestors], x0[ancestors], before[ancestors]
        if last >= events[0] and last < steps:
            fresh = torch.cat([swarm.noise(noise.shape[1:]) for swarm in swarms]).to(x)
            x = ancestral_step(before.to(x), x0.to(x), sigmas[first], sigmas[last], settings.eta, fresh)
    scores = work.score(x, rows)
    for prompt, swarm in enumerate(swarms):
        part = slice(prompt * count, (prompt + 1) * count)
        work.history[prompt].append(swarm.weigh(steps, scores[part], last=True))
    work.keep(x, rows, scores)
    return work.results()


def _spans(events: Sequence[int], steps: int) -> list[tuple[int, int]]:
    """The way to the step before the first scoring in one go, then step by step: noise is added after each."""
    start = events[0] - 1
    return ([(0, start)] if start else []) + [(step, step + 1) for step in range(start, steps)]


class _Swarm:
    """The weights of one prompt's particles, and where its noise comes from."""

    def __init__(self, settings: SearchSettings, seed: int) -> None:
        self._settings = settings
        self._generator = torch.Generator("cpu").manual_seed(derived_seed(seed, "particles: noise"))
        self._rng = np.random.default_rng(derived_seed(seed, "particles: resampling"))
        count = settings.candidates
        self._rewards = np.zeros((0, count))
        self._weights, self._paid = np.zeros(count), np.zeros(count)

    def noise(self, shape: Sequence[int]) -> Tensor:
        """Fresh noise for every particle."""
        return torch.randn((self._settings.candidates, *shape), generator=self._generator)

    def weigh(self, step: int, scores: Sequence[float | None], last: bool = False) -> Event:
        """Weigh by new scores, and resample where that is due; the last ones are only weighed."""
        settings, count = self._settings, self._settings.candidates
        self._rewards = np.concatenate([self._rewards, rewards(scores)[None]])
        if last:
            gain = self._rewards[-1] / settings.temperature - self._paid
        else:
            gain = log_potential(settings.potential, self._rewards, settings.temperature)
        self._weights, self._paid = self._weights + gain, self._paid + gain
        shares = tuple(float(share) for share in normalised(self._weights))
        ancestors = list(range(count))
        if not last and effective_sample_size(self._weights) < settings.ess * count:
            ancestors = resample(self._weights, self._rng)
            self._weights = np.zeros(count)
        self._rewards, self._paid = self._rewards[:, ancestors], self._paid[ancestors]
        return Event(step, tuple(scores), tuple(ancestors), shares)


@dataclass
class _Finished:
    latents: list[Tensor] = field(default_factory=list)
    candidates: list[int] = field(default_factory=list)
    scores: list[float | None] = field(default_factory=list)


class _Work:
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

    def score(self, x0: Tensor, rows: Sequence[int], preview: bool = False) -> list[float | None]:
        """Scores of the rows, a batch at a time."""
        ask = self.sampling.preview if preview else self.sampling.score
        scores: list[float | None] = []
        for start in range(0, len(rows), self.batch):
            scores += ask(x0[start : start + self.batch], rows[start : start + self.batch])
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


def _finish(work: _Work, x: Tensor, first: int, rows: list[int], stop_on: StopOn) -> list[SearchResult]:
    """Take rows of ``x`` to the end in their order, as far as they are wanted."""
    while rows := [row for row in rows if work.wanted(row)]:
        part, left = rows[: work.batch], rows[work.batch :]
        try:
            clips, _ = work.advance(x[part], first, work.steps, part)
            scored = work.settings.kind != "none"  # where nothing is chosen, nothing is asked
            work.keep(clips, part, work.score(clips, part) if scored else [None] * len(part))
        except stop_on:
            if not work.anything:
                raise
            for row in rows:
                work.ended[row // work.settings.candidates] = "interrupted"
            break
        rows = left
    return work.results()
