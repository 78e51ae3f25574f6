"""The search benchmark's arithmetic: what it says of a pool is what the search itself would have done."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

from spatialalign.errors import ConfigError
from spatialalign.search import SearchSettings
from spatialalign.search_drivers import search

STEPS, N, PROMPTS, PRICE = 8, 6, 40, 0.25


@pytest.fixture(scope="module")
def parts(repo_root: Path) -> dict[str, ModuleType]:
    """The modules; benchmarks/ is no installed package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repo_root))
        return {name: importlib.import_module(f"benchmarks.{name}") for name in ("search", "search_pool")}


class Known:
    """A sampler whose clips have known scores, at the end and on the way."""

    def __init__(self, scores: np.ndarray, looks: np.ndarray) -> None:
        self.sigmas = np.linspace(1, 0, STEPS + 1).tolist()
        self.evaluations = 0.0
        self._scores, self._looks = scores.ravel(), looks.ravel()

    def advance(self, x: Tensor, first: int, last: int, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        self.evaluations += (last - first) * len(rows)
        return x, x

    def score(self, x0: Tensor, rows: Sequence[int]) -> list[float | None]:
        return [None if np.isnan(self._scores[row]) else float(self._scores[row]) for row in rows]

    def preview(self, x: Tensor, x0: Tensor, step: int, rows: Sequence[int]) -> list[float | None]:
        self.evaluations += PRICE * len(rows)
        return [float(self._looks[row]) for row in rows]


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("kept", [1, 3, N])
@pytest.mark.parametrize("stop", [False, True])
def test_pruning_a_pool_is_what_the_search_does(parts: dict[str, ModuleType], step: int, kept: int, stop: bool) -> None:
    rng = np.random.default_rng(0)
    scores, looks = rng.random((PROMPTS, N)), rng.random((PROMPTS, N))
    scores[rng.random((PROMPTS, N)) < 0.2] = np.nan
    found, cost = parts["search_pool"].prune(
        parts["search_pool"].Pool(scores, {step: looks}, STEPS, PRICE), [(step, kept)], stop
    )
    settings = SearchSettings(
        "pruned", N, keep=kept / N, preview=step / STEPS, preview_by="reward", threshold=0.7 if stop else None
    )
    noise = torch.zeros(PROMPTS * N, 1, 1, 1, 1)
    results = search(Known(scores, looks), noise, settings, range(PROMPTS), batch=PROMPTS * N)
    correct = [any(score is not None and score >= 0.7 for score in result.scores) for result in results]
    assert found.tolist() == correct
    np.testing.assert_allclose(cost, [result.evaluations / (N * STEPS) for result in results])
    assert 0 < sum(correct) < PROMPTS


def test_two_looks(parts: dict[str, ModuleType]) -> None:
    """The first takes three of four on, the second, at which another one leads, one of those."""
    pool = parts["search_pool"].Pool(
        np.array([[0.9, 0.1, 0.8, 0.2]]),
        {2: np.array([[0.1, 0.4, 0.3, 0.2]]), 4: np.array([[0.9, 0.5, 0.6, 0.1]])},
        STEPS,
        PRICE,
    )
    found, cost = parts["search_pool"].prune(pool, [(2, 3), (4, 1)])
    assert found.tolist() == [1]
    assert cost.tolist() == [(4 * (2 + PRICE) + 3 * (2 + PRICE) + 4) / (4 * STEPS)]


def test_best_of_n_of_a_pool(parts: dict[str, ModuleType]) -> None:
    # two correct ones of eight: any n miss both with C(6, n) / C(8, n); the first comes third on average, 9 / 3
    pool = parts["search_pool"].Pool(np.array([[0.1, 0.9, np.nan, 0.7, 0.2, 0.3, 0.1, 0.0]]), {}, STEPS, PRICE)
    chances = parts["search"].chances_of(pool)[0]
    assert chances[[0, 1, 6, 7]] == pytest.approx([2 / 8, 1 - 15 / 28, 1, 1])
    assert parts["search"].until_correct(pool) == [3]


def test_an_unknown_part_is_refused(parts: dict[str, ModuleType]) -> None:
    with pytest.raises(ConfigError, match="'look'"):
        parts["search"].Search(parts="look").chosen()
