"""The ways of a search, on samplers whose answers are known: one that walks straight, and an exact Gaussian flow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch import Tensor

from spatialalign.backbones.flow import euler_step, sampling_sigmas
from spatialalign.errors import ConfigError
from spatialalign.search import Potential, PreviewBy, SearchSettings
from spatialalign.search_drivers import search
from spatialalign.search_work import SearchResult

# --- the ways, on a sampler that walks straight ----------------------------------------------------------------------

STEPS = 10


PRICE = 0.25
"""Of a look at one clip by a reward, in passes."""


class Walk:
    """Every clip goes straight to the constant that its row is given, which is its score; early it looks otherwise.

    A look costs ``price``.
    """

    def __init__(
        self, ends: Sequence[float | None], looks: Sequence[float | None] | None = None, price: float = 0
    ) -> None:
        self.sigmas = sampling_sigmas(STEPS, 3.0).tolist()
        self.evaluations = 0.0
        self.passes: list[tuple[int, int, list[int]]] = []
        self.scored: list[int] = []
        self.begun: dict[int, Tensor] = {}
        self._ends, self._looks, self._price = ends, looks or ends, price

    def advance(self, x: Tensor, first: int, last: int, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        self.passes.append((first, last, list(rows)))
        self.evaluations += 2 * (last - first) * len(rows)
        if first == 0:
            self.begun |= dict(zip(rows, x, strict=True))
        x0 = torch.tensor([self._ends[row] or 0.0 for row in rows]).reshape(-1, 1, 1, 1, 1)
        for sigma, following in pairwise(self.sigmas[first : last + 1]):
            x = euler_step(x, (x - x0) / sigma, sigma, following)
        return x, x0

    def score(self, x0: Tensor, rows: Sequence[int]) -> list[float | None]:
        expected = torch.tensor([self._ends[row] or 0.0 for row in rows])
        torch.testing.assert_close(x0.flatten(), expected)  # the clips are those of the rows, and finished
        self.scored += rows
        return [self._ends[row] for row in rows]

    def preview(self, x: Tensor, x0: Tensor, step: int, rows: Sequence[int]) -> list[float | None]:
        ends = torch.tensor([self._ends[row] or 0.0 for row in rows])
        torch.testing.assert_close(x0.flatten(), ends if step else x.flatten())
        # straight from where it began: x is as far from its end as the level says
        begun = torch.stack([self.begun[row] for row in rows]).flatten()
        torch.testing.assert_close(x.flatten(), ends + self.sigmas[step] * (begun - ends))
        self.evaluations += self._price * len(rows)
        return [self._looks[row] for row in rows]


def walk(
    sampling: Walk, settings: SearchSettings, batch: int = 1, **options: object
) -> tuple[list[SearchResult], list[tuple[int, int]]]:
    count = len(sampling._ends)
    told: list[tuple[int, int]] = []
    results = search(
        sampling,
        torch.randn(count, 1, 1, 1, 1),
        settings,
        list(range(count // settings.candidates)),
        batch,
        progress=lambda done, total: told.append((done, total)),
        **options,  # type: ignore[arg-type]
    )
    return results, told


def best(results: Sequence[SearchResult]) -> list[int]:
    return [result.candidates[result.order[0]] for result in results]


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_best_of_n_takes_the_best_of_each_prompt(batch: int) -> None:
    sampling = Walk([0.1, 0.9, None, 0.3, 0.5, None, 0.2, 0.4])
    results, told = walk(sampling, SearchSettings.parse("best-of-4"), batch)
    assert best(results) == [1, 0]
    for result in results:
        assert (result.evaluations, result.scorings, result.ended) == (4 * 2 * STEPS, 4, "all")
        assert sorted(result.candidates) == [0, 1, 2, 3]
    assert max(len(rows) for *_, rows in sampling.passes) == batch
    assert told[-1] == (8 * STEPS, 8 * STEPS)


def test_good_enough_is_enough() -> None:
    # prompt 0 is content with its second candidate, prompt 1 never, prompt 2 with its last
    sampling = Walk([0.1, 0.8, 0.9, 0.2, None, 0.3, 0.0, 0.1, 0.7])
    results, _ = walk(sampling, SearchSettings("best-of-n", 3, threshold=0.7), batch=3)
    assert [result.ended for result in results] == ["threshold", "all", "all"]
    assert [result.candidates for result in results] == [(0, 1), (0, 1, 2), (0, 1, 2)]
    assert [result.evaluations for result in results] == [40, 60, 60]
    assert best(results) == [1, 2, 2]


@pytest.mark.parametrize("kind", ["none", "best-of-n", "pruned", "particles"])
def test_one_candidate_is_the_plain_clip(kind: str) -> None:
    sampling = Walk([0.4])
    (result,), _ = walk(sampling, SearchSettings(kind, 1))  # type: ignore[arg-type]
    assert sampling.passes == [(0, STEPS, [0])]
    assert (result.candidates, result.ended, result.history) == ((0,), "all", ())
    assert result.latents.item() == pytest.approx(0.4)
    # there is nothing to choose from without a search, so nothing is scored
    assert (result.scores, result.scorings) == (((None,), 0) if kind == "none" else ((0.4,), 1))


@pytest.mark.parametrize("batch", [1, 4, 8])
def test_pruning_takes_the_better_looking_half_on(batch: int) -> None:
    ends = [0.9, 0.1, 0.6, 0.4, 0.2, 0.3, None, 0.8]
    looks = [0.1, 0.5, 0.7, None, None, 0.2, None, 0.3]
    sampling = Walk(ends, looks)
    results, told = walk(sampling, SearchSettings("pruned", 4, preview=0.4), batch)
    first, second = results
    assert (first.candidates, first.scores) == ((2, 1), (0.6, 0.1))
    assert second.candidates == (3, 1)
    (event,) = first.history
    assert (event.step, event.scores, event.kept) == (4, tuple(looks[:4]), (2, 1))
    # four candidates over 4 steps, two over the other 6, two passes a step
    assert (first.evaluations, first.scorings) == (2 * (4 * 4 + 2 * 6), 6)
    assert told[-1] == (56, 56)
    assert sum(len(rows) for begun, _, rows in sampling.passes if begun == 4) == 4


@pytest.mark.parametrize(("by", "price", "scorings"), [("tracker", 0.0, 6), ("reward", PRICE, 2)])
def test_a_look_by_a_reward_is_paid_for_in_passes(by: PreviewBy, price: float, scorings: int) -> None:
    (result,), _ = walk(
        Walk([0.1, 0.2, 0.3, 0.4], price=price), SearchSettings("pruned", 4, preview=0.4, preview_by=by)
    )
    assert (result.evaluations, result.scorings) == (2 * (4 * 4 + 2 * 6) + 4 * price, scorings)
    (swarm,), _ = walk(Walk([0.1] * 4, price=price), SearchSettings("particles", 4, preview=0.9, preview_by=by))
    assert (swarm.evaluations, swarm.scorings) == (2 * 4 * STEPS + 4 * price, scorings + 2)


def test_noise_may_be_pruned_before_the_first_step() -> None:
    ends, looks = [0.9, 0.1, 0.6, 0.4], [0.1, 0.5, 0.7, 0.6]
    sampling = Walk(ends, looks, PRICE)
    noise = torch.randn(4, 1, 1, 1, 1)
    sampling.begun = dict(enumerate(noise))
    (result,) = search(sampling, noise, SearchSettings("pruned", 4, preview_by="reward"), [0], 4)
    assert (result.candidates, result.scores) == ((2, 3), (0.6, 0.4))
    assert (result.evaluations, result.scorings) == (4 * PRICE + 2 * 2 * STEPS, 2)
    assert sampling.passes == [(0, STEPS, [2, 3])]


@pytest.mark.parametrize("batch", [1, 8])
def test_pruning_finishes_survivors_in_their_order_until_one_is_good_enough(batch: int) -> None:
    # the first prompt is content with its second survivor, the other one with none
    sampling = Walk([0.1, 0.9, 0.9, 0.8, 0.4, 0.3, 0.2, 0.1], [0.4, 0.5, 0.2, 0.6, 0.1, 0.2, 0.3, 0.4])
    results, _ = walk(sampling, SearchSettings("pruned", 4, keep=1.0, preview=0.4, threshold=0.85), batch)
    assert [result.candidates for result in results] == [(3, 1), (3, 2, 1, 0)]
    assert [result.ended for result in results] == ["threshold", "all"]
    assert [result.evaluations for result in results] == [2 * (4 * 4 + 2 * 6), 2 * 4 * 10]
    # no pass holds two candidates of a prompt, of which the first might be good enough
    finished = [rows for first, _, rows in sampling.passes if first == 4]
    assert all(len({row // 4 for row in rows}) == len(rows) for rows in finished)


def test_an_interrupted_search_returns_what_is_finished() -> None:
    class Stopped(Walk):
        def advance(self, x: Tensor, first: int, last: int, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
            if 2 in rows:
                raise KeyboardInterrupt
            return super().advance(x, first, last, rows)

    (result,), _ = walk(Stopped([0.1, 0.5, 0.9, 1.0]), SearchSettings.parse("best-of-4"), stop_on=(KeyboardInterrupt,))
    assert (result.candidates, result.ended, best([result])) == ((0, 1), "interrupted", [1])
    with pytest.raises(KeyboardInterrupt):  # nothing is finished yet
        walk(Stopped([0.1, 0.5, 0.9, 1.0]), SearchSettings.parse("pruned-4"), 4, stop_on=(KeyboardInterrupt,))
    with pytest.raises(KeyboardInterrupt):  # nobody asked for it to be caught
        walk(Stopped([0.1, 0.5, 0.9, 1.0]), SearchSettings.parse("best-of-4"))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="noise for 3 clips"):
        search(Walk([0.1] * 3), torch.zeros(3, 1, 1, 1, 1), SearchSettings.parse("best-of-4"), [0])
    with pytest.raises(ConfigError, match="batch"):
        walk(Walk([0.1] * 4), SearchSettings.parse("best-of-4"), batch=0)


# --- particles, on a Gaussian ----------------------------------------------------------------------------------------

MEAN, SPREAD = 0.2, 0.5
Reward = Callable[[Tensor], Tensor]


class Gaussian:
    """The exact flow of clean values ``N(MEAN, SPREAD²)``, one number a clip."""

    def __init__(self, reward: Reward, steps: int = 200) -> None:
        self.sigmas = sampling_sigmas(steps, 2.0).tolist()
        self.evaluations = 0.0
        self._reward = reward

    def advance(self, x: Tensor, first: int, last: int, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        x0 = x
        for sigma, following in pairwise(self.sigmas[first : last + 1]):
            keep = 1 - sigma
            x0 = MEAN + keep * SPREAD**2 / (keep**2 * SPREAD**2 + sigma**2) * (x - keep * MEAN)
            x = euler_step(x, (x - x0) / sigma, sigma, following)
        self.evaluations += (last - first) * len(rows)
        return x, x0

    def score(self, x0: Tensor, rows: Sequence[int]) -> list[float | None]:
        return [float(value) for value in self._reward(x0.flatten())]

    def preview(self, x: Tensor, x0: Tensor, step: int, rows: Sequence[int]) -> list[float | None]:
        return self.score(x0, rows)


def swarm(reward: Reward, settings: SearchSettings, seed: int = 1) -> tuple[Tensor, Tensor, SearchResult]:
    """The particles at the end, their weights, and the whole result."""
    noise = torch.randn(settings.candidates, 1, 1, 1, 1, generator=torch.Generator().manual_seed(seed))
    (result,) = search(Gaussian(reward), noise, settings, [seed], batch=10_000)
    return result.latents.flatten(), torch.tensor(result.history[-1].weights), result


@pytest.mark.parametrize("potential", get_args(Potential))
def test_particles_sample_the_tilted_distribution(potential: Potential) -> None:
    # N(m, s²) exp(x / T) is N(m + s² / T, s²): here N(0.7, 0.5²)
    settings = SearchSettings(
        "particles", 6000, temperature=0.5, potential=potential, eta=1.0, preview=0.3, resample_every=0.35, ess=0.99
    )
    values, weights, result = swarm(lambda x: x, settings)
    mean = float((weights * values).sum())
    spread = float((weights * (values - mean) ** 2).sum().sqrt())
    assert mean == pytest.approx(0.7, abs=0.04)
    assert spread == pytest.approx(0.5, abs=0.04)
    assert any(event.kept != tuple(range(6000)) for event in result.history[:-1])  # by resampling, too
    assert result.evaluations == 200 * 6000
    assert result.scorings == 6000 * len(result.history)


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_particles_without_preference_sample_the_model(eta: float) -> None:
    settings = SearchSettings("particles", 6000, eta=eta, preview=0.3)
    values, weights, result = swarm(torch.zeros_like, settings)
    assert values.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert values.std().item() == pytest.approx(SPREAD, abs=0.03)
    assert weights.tolist() == pytest.approx([1 / 6000] * 6000)
    assert all(event.kept == tuple(range(6000)) for event in result.history)


def test_successors_of_one_particle_part() -> None:
    settings = SearchSettings("particles", 8, temperature=0.01, ess=1.0)
    values, _, result = swarm(lambda x: x, settings)
    assert len(set(result.history[0].kept)) < 8
    assert len(set(values.tolist())) == 8


def test_particles_of_one_prompt_do_not_depend_on_another() -> None:
    settings = SearchSettings("particles", 5, temperature=0.1)
    noise = torch.randn(10, 1, 1, 1, 1)
    both = search(Gaussian(lambda x: x), noise, settings, [3, 4], batch=4)
    for part, seed in ((slice(0, 5), 3), (slice(5, 10), 4)):
        (alone,) = search(Gaussian(lambda x: x), noise[part], settings, [seed], batch=10)
        torch.testing.assert_close(both[seed - 3].latents, alone.latents)
        assert [event.kept for event in both[seed - 3].history] == [event.kept for event in alone.history]
