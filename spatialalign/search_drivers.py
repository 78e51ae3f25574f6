"""The ways of a search, for any sampler: best-of-N, pruned best-of-N, particles; several prompts side by side.

Rows are numbered as in :mod:`.search_work`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .errors import ConfigError
from .search import (
    SearchSettings,
    ancestral_step,
    derived_seed,
    effective_sample_size,
    log_potential,
    normalised,
    resample,
    rewards,
    survivors,
)
from .search_work import Event, Sampling, SearchResult, StopOn, Work


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
    """Take the candidates to the end, ``batch`` at once, until all are done or one reaches the threshold.

    With a threshold a pass holds one candidate of each prompt at most, so that none is made without need.
    """
    work = Work(sampling, settings, len(noise), batch, len(noise) * (len(sampling.sigmas) - 1), progress)
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
    """Take all candidates to the preview, which may be their noise, and the better ones to the end, best first.

    With ``keep`` 1 and a threshold that orders the candidates and drops none before one is good enough.
    """
    steps, count = len(sampling.sigmas) - 1, settings.candidates
    (first,) = settings.events(steps)
    kept = len(survivors([None] * count, settings.keep))
    total = len(noise) * first + len(noise) // count * kept * (steps - first)
    work = Work(sampling, settings, len(noise), batch, total, progress)
    rows = list(range(len(noise)))
    x, x0 = work.advance(noise, 0, first, rows) if first else (noise, noise)
    scores = work.preview(x, x0, first, rows)
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
    work = Work(sampling, settings, len(noise), batch, len(noise) * steps, progress)
    swarms = [_Swarm(settings, seed) for seed in seeds]
    x = noise
    for first, last in _spans(events, steps):
        before = x
        x, x0 = work.advance(before, first, last, rows)
        if last in events:
            scores = work.preview(x, x0, last, rows)
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


def _finish(work: Work, x: Tensor, first: int, rows: list[int], stop_on: StopOn) -> list[SearchResult]:
    """Take rows of ``x`` to the end in their order, as far as they are wanted."""
    while rows := [row for row in rows if work.wanted(row)]:
        part = work.pick(rows)
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
        rows = [row for row in rows if row not in part]
    return work.results()
