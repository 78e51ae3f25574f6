"""Search: the maths against closed forms, and the ways of it on samplers whose answers are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spatialalign.backbones.flow import euler_step, sampling_sigmas
from spatialalign.errors import ConfigError
from spatialalign.search import (
    Potential,
    SearchSettings,
    ancestral_step,
    best_of,
    candidate_seed,
    effective_sample_size,
    log_potential,
    lower_level,
    normalised,
    preview_rows,
    renoise,
    resample,
    rewards,
    survivors,
)
from spatialalign.search_drivers import SearchResult, search

# --- settings and the maths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["none", "best-of-4", "pruned-8", "particles-12", "best-of-1"])
def test_the_text_form_comes_back(text: str) -> None:
    settings = SearchSettings.parse(text)
    assert settings.text == settings.name == text
    assert settings.candidates == (1 if text == "none" else int(text.rsplit("-", 1)[1]))


@pytest.mark.parametrize("text", ["", "best", "best-of-0", "best-of-n-4", "pruned", "particles-x", "4"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="best-of-<N>"):
        SearchSettings.parse(text)


def test_a_name_tells_what_changes_the_clip_and_nothing_else() -> None:
    assert SearchSettings("pruned", 4, keep=0.25, eta=1.0).name == "pruned-4(keep=0.25)"
    assert SearchSettings("particles", 4, keep=0.25, eta=1.0).name == "particles-4(eta=1.0)"
    assert SearchSettings("best-of-n", 2, threshold=0.8).to_dict() == {
        "kind": "best-of-n",
        "candidates": 2,
        "threshold": 0.8,
    }


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"kind": "beam"}, "kind"),
        ({"kind": "none", "candidates": 2}, "candidates"),
        ({"kind": "best-of-n", "candidates": 0}, "candidates"),
        ({"kind": "pruned", "keep": 0.0}, "keep"),
        ({"kind": "pruned", "preview": 1.0}, "preview"),
        ({"kind": "pruned", "preview_frames": 1}, "preview_frames"),
        ({"kind": "particles", "eta": 0.0}, "eta"),
        ({"kind": "particles", "temperature": 0.0}, "temperature"),
        ({"kind": "particles", "temperature": math.nan}, "temperature"),
        ({"kind": "particles", "ess": 1.5}, "ess"),
        ({"kind": "particles", "potential": "mean"}, "potential"),
        ({"kind": "particles", "threshold": 0.7}, "threshold"),
        ({"kind": "best-of-n", "threshold": math.inf}, "threshold"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        SearchSettings(**{"candidates": 1, **values})  # type: ignore[arg-type]


def test_when_predicted_clips_are_scored() -> None:
    assert SearchSettings("pruned", 4, preview=0.4).events(50) == (20,)
    assert SearchSettings("pruned", 4, preview=0.01).events(16) == (1,)
    assert SearchSettings("pruned", 4, preview=0.99).events(2) == (1,)
    assert SearchSettings("particles", 4, preview=0.4, resample_every=0.2).events(10) == (4, 6, 8)
    assert SearchSettings("best-of-n", 4).events(1) == ()
    with pytest.raises(ConfigError, match="at least 2 sampling steps"):
        SearchSettings("pruned", 4).events(1)


def test_seeds_of_candidates() -> None:
    seeds = [candidate_seed(seed, index) for seed in range(20) for index in range(8)]
    assert len(set(seeds)) == len(seeds)
    assert candidate_seed(7, 0) == 7
    # pinned: a store filled by one version is continued by the next
    assert candidate_seed(7, 1) == 3562842120407139
    assert max(seeds) < 2**53


def test_the_best_come_first_and_invalid_ones_last() -> None:
    assert best_of([0.2, None, 0.9, 0.2, 0.0]) == [2, 0, 3, 4, 1]
    assert survivors([0.2, None, 0.9, 0.3], 0.5) == [2, 3]
    assert survivors([0.2, None, 0.9], 0.5) == [2, 0]
    assert survivors([None, None], 0.1) == [0]
    assert survivors([0.1] * 10, 0.3) == [0, 1, 2]  # 0.3 * 10 is a hair above 3 in binary


def test_frames_of_a_preview() -> None:
    assert preview_rows(13, 5) == [0, 3, 6, 9, 12]
    assert preview_rows(13, None) == preview_rows(13, 20) == list(range(13))
    assert preview_rows(81, 2) == [0, 80]


def test_potentials() -> None:
    history = np.array([[0.2, 0.5], [0.6, 0.4]])
    for potential, expected in (("max", [1.2, 1.0]), ("sum", [1.6, 1.8]), ("difference", [0.8, -0.2])):
        np.testing.assert_allclose(log_potential(potential, history, 0.5), expected)  # type: ignore[arg-type]
    np.testing.assert_allclose(log_potential("difference", history[:1], 0.5), [0.4, 1.0])
    np.testing.assert_array_equal(rewards([None, 0.25]), [0.0, 0.25])


def test_effective_sample_size() -> None:
    assert effective_sample_size(np.full(7, -900.0)) == pytest.approx(7)
    assert effective_sample_size(np.array([0.0, 2000.0, 0.0])) == pytest.approx(1)
    # weights 1/2, 1/4, 1/4: 1 / (1/4 + 1/16 + 1/16)
    assert effective_sample_size(np.log([2.0, 1.0, 1.0])) == pytest.approx(8 / 3)


@given(st.integers(1, 300), st.floats(-1000, 1000), st.integers(0, 2**32))
def test_equal_weights_change_nothing(count: int, level: float, seed: int) -> None:
    assert resample(np.full(count, level), np.random.default_rng(seed)) == list(range(count))


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=40), st.integers(0, 2**32))
def test_each_particle_has_its_share_of_successors(log_weights: list[float], seed: int) -> None:
    weights = np.array(log_weights)
    counts = np.bincount(resample(weights, np.random.default_rng(seed)), minlength=len(weights))
    assert counts.sum() == len(weights)
    assert (np.abs(counts - len(weights) * normalised(weights)) < 1 + 1e-6).all()


def test_noise_is_added_by_the_forward_process() -> None:
    # x at 0.2 of x0 = 3 is 2.4 + 0.2 eps; at 0.6 it must be 1.2 + 0.6 eps in distribution
    torch.manual_seed(0)
    x = 0.8 * 3 + 0.2 * torch.randn(200_000)
    later = renoise(x, 0.2, 0.6, torch.randn(200_000))
    assert later.mean() == pytest.approx(1.2, abs=0.01)
    assert later.std() == pytest.approx(0.6, abs=0.01)
    assert renoise(x, 0.3, 0.3, x) is x
    noise = torch.randn(4)
    torch.testing.assert_close(renoise(x[:4], 0.3, 1.0, noise), noise)
    with pytest.raises(ConfigError, match="lower level to a higher"):
        renoise(x, 0.6, 0.2, x)


@pytest.mark.parametrize(("sigma", "following"), [(1.0, 0.9), (0.9, 0.7), (0.5, 0.1), (0.3, 0.29)])
def test_with_eta_one_a_step_is_the_exact_reverse_transition(sigma: float, following: float) -> None:
    # Bayes: x_s | x0 ~ N((1 - s) x0, s²), x_t | x_s ~ N(a x_s, t² - a² s²)
    x, x0 = torch.tensor(0.7, dtype=torch.float64), torch.tensor(-1.3, dtype=torch.float64)
    share = (1 - sigma) / (1 - following)
    added = sigma**2 - (share * following) ** 2
    variance = 1 / (1 / following**2 + share**2 / added)
    mean = variance * ((1 - following) * x0 / following**2 + share * x / added)
    still = ancestral_step(x, x0, sigma, following, 1.0, torch.zeros(()))
    moved = ancestral_step(x, x0, sigma, following, 1.0, torch.ones(()))
    assert still.item() == pytest.approx(mean.item())
    assert (moved - still).item() == pytest.approx(math.sqrt(variance))
    half = ancestral_step(x, x0, sigma, following, 0.5, torch.ones(()))
    half -= ancestral_step(x, x0, sigma, following, 0.5, torch.zeros(()))
    assert half.item() == pytest.approx(math.sqrt(variance) / 2)
    assert lower_level(sigma, following, 0.0) == pytest.approx(following)


# --- the ways, on a sampler that walks straight ----------------------------------------------------------------------

STEPS = 10


class Walk:
    """Every clip goes straight to the constant that its row is given, which is its score; early it looks otherwise."""

    def __init__(self, ends: Sequence[float | None], looks: Sequence[float | None] | None = None) -> None:
        self.sigmas = sampling_sigmas(STEPS, 3.0).tolist()
        self.evaluations = 0.0
        self.passes: list[tuple[int, int, list[int]]] = []
        self.scored: list[int] = []
        self._ends, self._looks = ends, looks or ends

    def advance(self, x: Tensor, first: int, last: int, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        self.passes.append((first, last, list(rows)))
        self.evaluations += 2 * (last - first) * len(rows)
        x0 = torch.tensor([self._ends[row] or 0.0 for row in rows]).reshape(-1, 1, 1, 1, 1)
        for sigma, following in pairwise(self.sigmas[first : last + 1]):
            x = euler_step(x, (x - x0) / sigma, sigma, following)
        return x, x0

    def score(self, x0: Tensor, rows: Sequence[int]) -> list[float | None]:
        expected = torch.tensor([self._ends[row] or 0.0 for row in rows])
        torch.testing.assert_close(x0.flatten(), expected)  # the clips are those of the rows, and finished
        self.scored += rows
        return [self._ends[row] for row in rows]

    def preview(self, x0: Tensor, rows: Sequence[int]) -> list[float | None]:
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


def test_pruning_stops_at_the_first_survivor_that_is_good_enough() -> None:
    sampling = Walk([0.9, 0.8, 0.1, 0.2])
    (result,), _ = walk(sampling, SearchSettings("pruned", 4, threshold=0.7))
    assert (result.candidates, result.ended, sampling.scored) == ((0,), "threshold", [0])


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

    preview = score


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
