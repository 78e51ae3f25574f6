"""Search: settings, and the maths against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spatialalign.errors import ConfigError
from spatialalign.search import (
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
    assert SearchSettings("pruned", 4, keep=0.25, eta=0.5).name == "pruned-4(keep=0.25)"
    assert SearchSettings("particles", 4, keep=0.25, eta=0.5).name == "particles-4(eta=0.5)"
    assert SearchSettings("pruned", 4, preview_by="reward").name == "pruned-4(preview_by=reward)"
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
        ({"kind": "pruned", "preview": 0.0}, "preview"),
        ({"kind": "particles", "preview": 0.0, "preview_by": "reward"}, "preview"),
        ({"kind": "pruned", "preview": -0.1, "preview_by": "reward"}, "preview"),
        ({"kind": "pruned", "preview_frames": 1}, "preview_frames"),
        ({"kind": "pruned", "preview_frames": 4, "preview_by": "reward"}, "preview_frames.*tracks none"),
        ({"kind": "pruned", "preview_by": "eye"}, "preview_by"),
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
    assert SearchSettings("pruned", 4, preview=0.0, preview_by="reward").events(10) == (0,)
    # where nothing is said: at the noise, which only a reward can judge and only pruning can use
    assert SearchSettings("pruned", 4, preview_by="reward").events(16) == (0,)
    assert SearchSettings.parse("pruned-4").events(16) == (4,)
    assert SearchSettings("particles", 4, preview_by="reward").events(16) == (2, 6, 10, 14)
    assert SearchSettings("pruned", 4, preview_by="reward").to_dict()["preview"] == 0
    assert SearchSettings.parse("pruned-4").to_dict()["preview"] == 0.25
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
