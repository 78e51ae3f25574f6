"""Reward guidance on Gaussians, for which everything is known in closed form, and on a real small reward."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from spatialalign.backbones.base import SampleSettings
from spatialalign.backbones.sampling import Flow
from spatialalign.errors import ConfigError
from spatialalign.guidance import (
    GuidanceSettings,
    GuidedStep,
    RewardGuidance,
    limited,
    nrg_velocity,
    reward_gradient,
    x0_shift,
)
from spatialalign.rewards.latent import LatentReward, RewardInfo
from spatialalign.rewards.values import RewardValues
from spatialalign.rewards.wan_trunk import TrunkConfig, WanTrunk

FREE: dict[str, Any] = {"factor_cap": 1e6, "step_cap": 1e6}
"""Caps that are never reached."""


def guided_by(form: Any = "nrg", strength: float = 100.0, **changes: Any) -> GuidanceSettings:
    """Settings that do not follow the defaults: the whole schedule by the gradient at the noisy clip."""
    return GuidanceSettings(form, strength, **{"end": 1.0, "step_cap": 0.3, **changes})


@dataclass(frozen=True)
class Gaussian:
    """Clean values ``N(mean, std^2)``, each element for itself."""

    mean: float
    std: float

    def posterior(self, x: Tensor, sigma: float) -> tuple[Tensor, float]:
        """Mean and variance of the clean value of ``x = (1 - sigma) x0 + sigma noise``."""
        total = (1 - sigma) ** 2 * self.std**2 + sigma**2
        gain = (1 - sigma) * self.std**2 / total
        return self.mean + gain * (x - (1 - sigma) * self.mean), self.std**2 * sigma**2 / total

    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        """The mean of ``noise - x0``, which is ``(x - x0) / sigma`` with the posterior's mean."""
        return (x - self.posterior(x, sigma)[0]) / sigma

    def tilted(self, reward: Quadratic, weight: float) -> Gaussian:
        """``p(x0) exp(weight R(x0))``: precisions and precision-weighted means add up."""
        precision = 1 / self.std**2 + weight * reward.curvature
        return Gaussian((self.mean / self.std**2 + weight * reward.slope) / precision, precision**-0.5)


@dataclass(frozen=True)
class Quadratic:
    """``R(x0) = slope x0 - curvature x0^2 / 2``, summed over the elements, as it looks from a noisy clip.

    With a ``prior``, ``log E[exp(weight R(x0)) | x] / weight``, which for the posterior ``N(m, s^2)`` is, up to a
    constant, ``(b^2 / P - m^2 / s^2) / 2 weight``, ``P = 1 / s^2 + weight curvature``, ``b = m / s^2 + weight slope``.
    Without one, R itself.
    """

    slope: float = 0.0
    curvature: float = 0.0
    prior: Gaussian | None = None
    weight: float = 1.0
    name: str = "dsr"
    blocks_share: float = 0.25
    knows_noise: bool = True

    @property
    def dimensions(self) -> tuple[str, ...]:
        return (self.name,)

    def prepare(self, text: Any) -> Any:
        return text

    def __call__(self, x: Tensor, sigma: Tensor, text: Any) -> RewardValues:
        values = self.slope * x - self.curvature * x**2 / 2
        if self.prior is not None:
            mean, variance = self.prior.posterior(x, float(sigma[0]))
            precision = 1 / variance + self.weight * self.curvature
            linear = mean / variance + self.weight * self.slope
            values = (linear**2 / precision - mean**2 / variance) / (2 * self.weight)
        return RewardValues(values.flatten(1).sum(1, keepdim=True), x.new_zeros(len(x), x.shape[2], 2))


def clips(*values: float) -> Tensor:
    """One clip of a single element for each value."""
    return torch.tensor(values).view(-1, 1, 1, 1, 1)


def texts(count: int) -> list[Tensor]:
    return [torch.zeros(1, 1) for _ in range(count)]


def sampled(model: Gaussian, reward: Any, settings: GuidanceSettings, steps: int) -> tuple[Gaussian, Flow]:
    """The distribution that guided sampling ends in: the way is affine in the noise, so two noises tell all of it."""
    run = SampleSettings(steps=steps, shift=1.0)
    guidance = RewardGuidance([reward], settings, [1 - step / steps for step in range(steps + 1)])
    flow = Flow(
        lambda x, sigma, _: model.velocity(x, sigma), lambda _: 1, texts(2), torch.zeros(1, 1), run,
        torch.device("cpu"), guidance,
    )  # fmt: skip
    one, two = flow.run(clips(1.0, 2.0)).flatten().tolist()
    return Gaussian(2 * one - two, two - one), flow


# --- the formulas ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", [Quadratic(slope=0.7), Quadratic(slope=-0.4, curvature=1.5)])
@pytest.mark.parametrize("sigma", [0.05, 0.5, 0.95])
def test_nrg_is_the_velocity_to_the_tilted_gaussian(reward: Quadratic, sigma: float) -> None:
    model, x, weight = Gaussian(0.5, 1.3), clips(-1.0, 0.2, 2.0), 2.0
    noisy = Quadratic(reward.slope, reward.curvature, model, weight)
    gradient, _ = reward_gradient(noisy, x, sigma, texts(3), {"dsr": 1.0})
    found = nrg_velocity(model.velocity(x, sigma), gradient, sigma, weight, 1e6)
    torch.testing.assert_close(found, model.tilted(reward, weight).velocity(x, sigma), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sigma", [0.05, 0.5, 1.0])
def test_x0_shift_is_exact_for_unit_variance_and_a_linear_reward(sigma: float) -> None:
    """Tilting N(0, 1) by exp(w a x0) gives N(w a, 1), whose posterior mean is the old one plus the shift."""
    model, reward, x = Gaussian(0.0, 1.0), Quadratic(slope=0.7), clips(-1.0, 0.4)
    expected = model.tilted(reward, 3.0).posterior(x, sigma)[0] - model.posterior(x, sigma)[0]
    torch.testing.assert_close(x0_shift(torch.full_like(x, 0.7), sigma, 3.0), expected)


def test_x0_shift_is_right_to_first_order_for_a_curved_reward() -> None:
    """The tilted mean less the shifted one falls with the square of the strength: a hundredth at a tenth."""
    model, reward, x, sigma = Gaussian(0.0, 1.0), Quadratic(slope=0.5, curvature=2.0), clips(0.8), 0.6
    x0 = model.posterior(x, sigma)[0]
    errors = []
    for strength in (1e-1, 1e-2):
        gradient, _ = reward_gradient(reward, x0, 0.0, texts(1), {"dsr": 1.0})
        right = model.tilted(reward, strength).posterior(x, sigma)[0]
        errors.append(float((x0 + x0_shift(gradient, sigma, strength) - right).abs()))
    assert errors[0] > 1e-4
    assert errors[1] == pytest.approx(errors[0] / 100, rel=0.2)


def test_nrg_by_numbers() -> None:
    """At 0.8 the factor is 4: 1 - 0.5 * 4 * 3 = -5; capped at 2: 1 - 0.5 * 2 * 3 = -2; at 1 there is no guidance."""
    velocity, gradient = clips(1.0), clips(3.0)
    assert nrg_velocity(velocity, gradient, 0.8, 0.5, 1e6).item() == pytest.approx(-5)
    assert nrg_velocity(velocity, gradient, 0.8, 0.5, 2.0).item() == pytest.approx(-2)
    assert nrg_velocity(velocity, gradient, 1.0, 0.5, 2.0) is velocity


def test_the_limit_is_relative_and_for_each_clip() -> None:
    """RMS of (3, 4) is sqrt(12.5), of (1, 7) is 5: a cap of 0.5 lets 2.5 pass and shortens the longer ones to it."""
    change = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0], [3.0, 4.0]]).view(4, 1, 1, 1, 2)
    reference = torch.tensor([[1.0, 7.0], [1.0, 7.0], [1.0, 7.0], [0.0, 0.0]]).view(4, 1, 1, 1, 2)
    found = limited(change, reference, 0.5).view(4, 2)
    assert found[0].tolist() == pytest.approx([3 * 2.5 / math.sqrt(12.5), 4 * 2.5 / math.sqrt(12.5)])
    assert torch.equal(found[1], torch.tensor([0.3, 0.4]))
    assert found[2:].tolist() == [[0, 0], [0, 0]]


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", [Quadratic(slope=0.4), Quadratic(slope=-0.2, curvature=0.8)])
def test_nrg_sampling_ends_in_the_tilted_gaussian(reward: Quadratic) -> None:
    model, weight = Gaussian(0.5, 0.8), 2.0
    noisy = Quadratic(reward.slope, reward.curvature, model, weight)
    found, _ = sampled(model, noisy, guided_by(strength=weight, **FREE), 400)
    expected = model.tilted(reward, weight)
    assert (found.mean, found.std) == (pytest.approx(expected.mean, abs=0.01), pytest.approx(expected.std, abs=0.01))
    assert abs(found.mean - model.mean) > 0.2


def test_x0_sampling_ends_in_the_tilted_gaussian() -> None:
    """The unit Gaussian and a slope of 0.4 at strength 2 and -2: N(0.8, 1) and N(-0.8, 1)."""
    for strength in (2.0, -2.0):
        settings = guided_by("x0", strength, skip_first=0, **FREE)
        found, flow = sampled(Gaussian(0.0, 1.0), Quadratic(slope=0.4), settings, 201)
        assert found.mean == pytest.approx(0.4 * strength, abs=0.01)
        assert found.std == pytest.approx(1, abs=0.01)
        # every step: one pass of the model, and three of a quarter of it; two clips
        assert flow.evaluations == 2 * 201 * (1 + 3 * 0.25)


@pytest.mark.parametrize("form", ["nrg", "x0"])
def test_a_run_of_few_capped_steps_still_raises_the_reward(form: Any) -> None:
    """Caps as they are by default: the mean moves up, and in no step by more than 0.3 of what it is a part of."""
    model = Gaussian(0.5, 1.0)
    plain, _ = sampled(model, Quadratic(slope=1.0), guided_by(form, 0.0), 10)
    guided, flow = sampled(model, Quadratic(slope=1.0), guided_by(form, 1000.0), 10)
    assert plain.mean < guided.mean < 3
    assert flow.evaluations == 2 * (10 + 9 * 0.75)


# --- when it acts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"skip_first": 0}, range(10)),
        ({}, range(1, 10)),
        ({"start": 0.2, "end": 0.7}, range(2, 7)),
        ({"start": 0.3, "end": 0.7, "every": 3}, (3, 6)),
        ({"skip_first": 4, "end": 0.55}, (4, 5)),
        ({"start": 0.5, "end": 0.5}, ()),
    ],
)
def test_guided_steps_of_ten(changed: dict[str, Any], expected: Sequence[int]) -> None:
    assert guided_by(**changed).guided_steps(10) == tuple(expected)


SIGMAS = (1.0, 0.9, 0.6, 0.3, 0.0)


def test_a_step_is_known_by_its_level() -> None:
    """Of four steps the two in the middle; levels rounded, asked for twice or in between are the nearest's."""
    guidance = RewardGuidance([Quadratic(1.0)], guided_by(start=0.25, end=0.75), SIGMAS)
    for sigma, acts in (
        (1.0, False),
        (0.9, True),
        (0.8999, True),
        (0.9, True),
        (0.7, True),
        (0.3, False),
        (0.4, False),
    ):
        velocity = clips(1.0)
        assert (guidance(clips(0.5), sigma, velocity, texts(1)) is not velocity) == acts, sigma
        assert guidance.cost == (0.75 if acts else 0.0)
    assert [step.sigma for step in guidance.trace] == [0.9, 0.8999, 0.9, 0.7]
    assert guidance.trace[0] == GuidedStep(0.9, (0.5,))


def test_without_strength_the_reward_is_never_asked() -> None:
    class Silent(Quadratic):
        def prepare(self, text: Any) -> Any:
            raise AssertionError

    guidance = RewardGuidance([Silent(1.0)], guided_by(strength=0.0, skip_first=0), SIGMAS)
    velocity = clips(1.0)
    assert all(guidance(clips(0.5), sigma, velocity, texts(1)) is velocity for sigma in SIGMAS)


def test_at_the_first_level_there_is_nothing_to_ask_nrg() -> None:
    guidance = RewardGuidance([Quadratic(1.0)], guided_by(skip_first=0), SIGMAS)
    velocity = clips(1.0)
    assert guidance(clips(0.5), 1.0, velocity, texts(1)) is velocity


@pytest.mark.parametrize(("form", "expected"), [("nrg", (0.6, 0.5)), ("x0", (0.0, 0.5 - 0.6 * 2))])
def test_what_is_asked(form: Any, expected: tuple[float, float]) -> None:
    """The noisy clip at its level, or the predicted clean one, ``x - sigma v``, at level 0."""
    asked = []

    class Asked(Quadratic):
        def __call__(self, x: Tensor, sigma: Tensor, text: Any) -> RewardValues:
            asked.append((sigma.item(), x.item()))
            return super().__call__(x, sigma, text)

    RewardGuidance([Asked(1.0)], guided_by(form), SIGMAS)(clips(0.5), 0.6, clips(2.0), texts(1))
    assert asked == [pytest.approx(expected)]


def test_texts_are_prepared_once() -> None:
    prepared = []

    class Counting(Quadratic):
        def prepare(self, text: Any) -> Any:
            if isinstance(text, list):
                prepared.append(len(text))
            return tuple(text)

    rows = texts(3)
    guidance = RewardGuidance([Counting(1.0)], guided_by(), SIGMAS)
    for some in (rows, list(rows), rows[:2], rows[:2], rows):
        guidance(torch.zeros(len(some), 1, 1, 1, 1), 0.6, torch.ones(len(some), 1, 1, 1, 1), some)
    assert prepared == [3, 2, 3]


# --- several rewards, and what goes wrong ----------------------------------------------------------------------------


def test_rewards_and_weights_add_up() -> None:
    """Slopes 1 and 2 with weights 3 and -1 pull with 1: -0.1 * 1.5 at the factor 0.6 / 0.4."""
    rewards = [Quadratic(1.0), Quadratic(2.0, name="quality")]
    settings = guided_by(strength=0.1, weights={"dsr": 3.0, "quality": -1.0})
    own = guided_by(strength=0.1)
    for guidance in (
        RewardGuidance(rewards, settings, SIGMAS),
        RewardGuidance(rewards, own, SIGMAS, [{"dsr": 3.0}, {"quality": -1.0}]),
    ):
        assert guidance(clips(0.5), 0.6, clips(1.0), texts(1)).item() == pytest.approx(1 - 0.15)
        assert guidance.cost == 1.5
        assert guidance.trace[0].totals == (pytest.approx(0.5),)
    with pytest.raises(ConfigError, match=r"'quality'; there are dsr"):
        RewardGuidance(rewards[:1], settings, SIGMAS)
    with pytest.raises(ConfigError, match=r"'motion'; there are quality"):
        RewardGuidance(rewards, own, SIGMAS, [{"dsr": 3.0}, {"motion": 1.0}])


def test_a_reward_of_clean_clips_is_asked_for_clean_ones_only() -> None:
    clean = Quadratic(1.0, knows_noise=False)
    with pytest.raises(ConfigError, match="use 'x0'"):
        RewardGuidance([clean], guided_by(), SIGMAS)
    velocity = clips(1.0)
    assert RewardGuidance([clean], guided_by("x0"), SIGMAS)(clips(0.5), 0.6, velocity, texts(1)) < velocity


def test_a_gradient_that_is_not_finite_stops_its_clip_alone(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Quadratic):
        def __call__(self, x: Tensor, sigma: Tensor, text: Any) -> RewardValues:
            found = super().__call__(x, sigma, text)
            return RewardValues(found.values * torch.tensor([[1.0], [math.nan], [1.0]]), found.curves)

    guidance = RewardGuidance([Broken(1.0)], guided_by(strength=0.1), SIGMAS)
    with caplog.at_level(logging.WARNING, "spatialalign"):
        for _ in range(2):
            found = guidance(clips(0.5, 0.5, 0.5), 0.6, clips(1.0, 1.0, 1.0), texts(3)).flatten().tolist()
            assert found == [pytest.approx(0.85), 1.0, pytest.approx(0.85)]
    assert guidance.skipped == 2
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "1 clip(s) is not finite at noise level 0.6" in caplog.text


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"form": "x1"}, "'x1'"),
        ({"strength": math.inf}, "inf"),
        ({"start": 0.6, "end": 0.5}, "start 0.6"),
        ({"end": 1.5}, "end 1.5"),
        ({"skip_first": -1}, "-1"),
        ({"every": 0}, "every"),
        ({"factor_cap": 0.0}, "factor_cap"),
        ({"step_cap": math.inf}, "step_cap"),
        ({"weights": {"dsr": 0.0}}, "weights"),
        ({"weights": {"dsr": math.nan}}, "weights"),
    ],
)
def test_settings_that_make_no_sense(changed: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        guided_by(**changed)


# --- a real reward ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward() -> LatentReward:
    torch.manual_seed(0)
    trunk = WanTrunk(TrunkConfig(2, 4, heads=2, head_dim=12, in_channels=4, text_dim=6, freq_dim=8, ffn_dim=24))
    made = LatentReward(trunk, RewardInfo("some/model", "wan-vae:0123"), head_width=16, queries=3).eval()
    torch.nn.init.normal_(made.head.to_values.weight)
    return made.requires_grad_(False)


def inputs() -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(2, 4, 3, 4, 4, generator=generator), [torch.randn(n, 6, generator=generator) for n in (2, 5)]


def test_the_gradient_agrees_with_differences(reward: LatentReward) -> None:
    x, text = inputs()
    weights = {"dsr": 2.0, "valid": -1.0}
    gradient, found = reward_gradient(reward, x, 0.4, text, weights)
    way, step = torch.randn(x.shape, generator=torch.Generator().manual_seed(6)), 1e-2
    with torch.no_grad():
        ends = [
            reward.total(reward(x + sign * step * way, torch.full((2,), 0.4), text).values, weights) for sign in (1, -1)
        ]
    torch.testing.assert_close((gradient * way).sum((1, 2, 3, 4)), (ends[0] - ends[1]) / (2 * step), atol=0, rtol=2e-2)
    assert not found.values.requires_grad and not gradient.requires_grad


@pytest.mark.parametrize("form", ["nrg", "x0"])
def test_it_is_the_same_in_inference_mode(reward: LatentReward, form: Any) -> None:
    """As in a ComfyUI sampler, where clips, velocities and texts are inference tensors."""
    (x, text), settings = inputs(), guided_by(form, 1.0)
    expected = RewardGuidance([reward], settings, SIGMAS)(x, 0.6, 0.5 * x, text)
    with torch.inference_mode():
        x, text = x.clone(), [row.clone() for row in text]
        assert x.is_inference() and text[0].is_inference()
        found = RewardGuidance([reward], settings, SIGMAS)(x, 0.6, 0.5 * x, text)
    torch.testing.assert_close(found.clone(), expected)
    assert (found - 0.5 * x).abs().max() > 1e-3
    assert found.dtype == x.dtype and not found.requires_grad
