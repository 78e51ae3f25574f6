"""A look by latent rewards against the rewards themselves. On real samplers it is tried in tests/host."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from .test_sampling import SPACE, TEXT, error, load, make, model

__all__ = ["error", "load", "make", "model"]


@pytest.fixture
def wan(model: Any) -> SimpleNamespace:
    """A MODEL with a shift of 1, where percent p is noise level 1 - p, that takes 7 bytes for every number."""
    sampling = SimpleNamespace(percent_to_sigma=lambda percent: 1.0 - percent)
    return SimpleNamespace(
        model=SimpleNamespace(memory_required=lambda shape: 7 * math.prod(shape)),
        get_model_object={"model_sampling": sampling}.__getitem__,
    )


@pytest.fixture
def look(module: Callable[[str], ModuleType], wan: SimpleNamespace) -> Callable[..., Any]:
    """``look(reward, conditioning)``; a text of five tokens where none is given."""

    def made(reward: Any, positive: Any = None) -> Any:
        return module("looking").RewardLook(reward, wan, [(text(5, 1), {})] if positive is None else positive)

    return made


def text(tokens: int, seed: int) -> torch.Tensor:
    """An embedding of some tokens, padded to 8."""
    rows = torch.randn(1, 8, TEXT, generator=torch.Generator().manual_seed(seed))
    rows[:, tokens:] = 0
    return rows


def clips() -> torch.Tensor:
    return torch.randn(2, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def values(reward: Any, sigma: float, rows: torch.Tensor) -> torch.Tensor:
    """What the one network of a reward says of :func:`clips`, ``(2, D)``."""
    (part,) = reward.parts
    found: torch.Tensor = part.network(clips(), torch.full((2,), sigma), [rows] * 2).values
    return found


def test_scores_are_the_weighted_sum_at_the_level(
    look: Any, load: Callable[..., Any], run: Any, nodes: dict[str, Any], module: Any, monkeypatch: Any
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(module("host"), "load", lambda *given: asked.append(given) or torch.device("cpu"))
    first, second = load("a.safetensors", further=("quality",))[0], load("b.safetensors")[0]
    weighted = run(nodes["SpatialAlignRewardWeights"], reward=first, weights="quality:-0.5, valid:2").args[0]
    joined = run(nodes["SpatialAlignRewardWeights"], reward=second, weights="dsr:1", also=weighted).args[0]
    found = look(joined)
    scores = found(clips(), 0.6)
    one, other = values(first, 0.6, text(5, 1)[0, :5]), values(second, 0.6, text(5, 1)[0, :5])
    torch.testing.assert_close(torch.tensor(scores), other[:, 0] + 2 * one[:, 1] - 0.5 * one[:, 2])
    assert abs(scores[0] - scores[1]) > 0.01
    assert found.share == 0.5  # each has one of four blocks
    assert asked == [([part.patcher for part in joined.parts], 7 * clips().numel())]


def test_an_unweighted_reward_says_its_dsr_alone_and_nan_is_no_score(look: Any, load: Callable[..., Any]) -> None:
    reward = load()[0]
    scores = look(reward)(clips(), 1.0)
    torch.testing.assert_close(torch.tensor(scores), values(reward, 1.0, text(5, 1)[0, :5])[:, 0])
    broken = clips()
    broken[1] = torch.nan
    assert look(reward)(broken, 1.0) == [pytest.approx(scores[0]), None]


def test_the_text_in_force_is_read(look: Any, load: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    """The first one for the noisy half of the schedule, the second behind it, where a third one is in force, too."""
    reward = load()[0]
    parts = [
        (text(5, 1), {"start_percent": 0.0, "end_percent": 0.5}),
        (text(3, 2), {"start_percent": 0.51, "end_percent": 1.0}),
        (text(4, 3), {"start_percent": 0.7}),
    ]
    found = look(reward, parts)
    for sigma, rows, warnings in (
        (1.0, text(5, 1)[0, :5], 0),
        (0.4, text(3, 2)[0, :3], 0),
        (0.2, text(3, 2)[0, :3], 1),
    ):
        torch.testing.assert_close(torch.tensor(found(clips(), sigma)), values(reward, sigma, rows)[:, 0])
        assert caplog.text.count("2 conditionings are in force at once") == warnings
    found(clips(), 0.1)
    assert caplog.text.count("in force at once") == 1


def test_a_conditioning_without_text_is_an_error(look: Any, load: Callable[..., Any], error: Any) -> None:
    reward = load()[0]
    for positive, words in (
        ([], "no text"),
        ([(None, {})], "no text"),
        ([(text(5, 1), {"end_percent": 0.2})], "no text"),
        ([(torch.zeros(1, 8, TEXT), {})], "all zeros"),
    ):
        with pytest.raises(error, match=words):
            look(reward, positive)(clips(), 0.5)


def test_a_reward_that_cannot_look_is_refused(
    look: Any, load: Callable[..., Any], error: Any, module: Callable[[str], ModuleType]
) -> None:
    with pytest.raises(error, match=f"made with tiny-wan, reads latents of wan-vae:other; this model's are of {SPACE}"):
        look(load(space="wan-vae:other")[0])
    reward = load()[0]
    network = reward.parts[0].network
    network.info = module("spatialalign.rewards.latent").RewardInfo("tiny-wan", SPACE, trained_on="clean")
    with pytest.raises(error, match="tiny.safetensors was trained on clean clips; clips on the way need one"):
        look(reward)


def test_a_stop_is_heard_before_a_look(look: Any, load: Callable[..., Any], fake_host: Any) -> None:
    fake_host.interrupt_at = 0
    with pytest.raises(BaseException) as stop:
        look(load()[0])(clips(), 0.5)
    assert type(stop.value).__name__ == "Interrupted"
    assert not fake_host.loaded
