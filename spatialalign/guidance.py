"""Guidance of a flow model by the gradient of rewards, after classifier-free guidance.

Two forms. Flow-NRG (methods: 2.5, equations 11 and 22) takes the gradient at the noisy clip, for which the reward must
know noise: ``v - w sigma / (1 - sigma) grad r(x, sigma)``. With ``r = log E[exp(w R(x0)) | x] / w`` that is exactly the
velocity towards ``p(x0) exp(w R(x0))``. The other form asks at the predicted clean clip and shifts that prediction by
``w Cov[x0 | x] grad R``, with the covariance that latents of unit variance have, ``sigma^2 / ((1 - sigma)^2 +
sigma^2)``; it is finite at all levels and exact for a linear reward of Gaussian latents.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from .backbones.flow import predicted_x0
from .errors import ConfigError
from .rewards.values import LatentRewardLike, RewardValues, weighted_total

logger = logging.getLogger("spatialalign")

GRADIENT_PASSES = 3.0
"""What a gradient is counted as, in forward passes of the reward: one forward, and a backward of two."""


@dataclass(frozen=True)
class GuidanceSettings:
    """How rewards guide. The defaults are what served the miniature best, where the cap decides more than the strength.

    Attributes:
        form: ``"nrg"`` asks at the noisy clip, ``"x0"`` at the predicted clean one.
        strength: w, how much one unit of the weighted reward tilts the model's distribution; 0 switches guidance off,
            below 0 rewards are avoided.
        start, end: part of the schedule that is guided, shares of its steps in [0, 1].
        skip_first: steps at the beginning that are never guided.
        every: guide every so manieth step of that part.
        factor_cap: largest ``sigma / (1 - sigma)`` of the form ``"nrg"``.
        step_cap: largest change of a clip's velocity, RMS over RMS.
        weights: of the rewards' dimensions.
    """

    form: Literal["nrg", "x0"] = "x0"
    strength: float = 1000.0
    start: float = 0.0
    end: float = 0.6
    skip_first: int = 1
    every: int = 1
    factor_cap: float = 5.0
    step_cap: float = 0.5
    weights: Mapping[str, float] = field(default_factory=lambda: {"dsr": 1.0})

    def __post_init__(self) -> None:
        if self.form not in ("nrg", "x0"):
            raise ConfigError(f"form must be 'nrg' or 'x0', found {self.form!r}")
        if not math.isfinite(self.strength):
            raise ConfigError(f"strength must be a finite number, found {self.strength}")
        if not 0 <= self.start <= self.end <= 1:
            raise ConfigError(f"expected 0 <= start <= end <= 1, found start {self.start} and end {self.end}")
        if self.skip_first < 0 or self.every < 1:
            raise ConfigError(f"expected skip_first >= 0 and every >= 1, found {self.skip_first} and {self.every}")
        if not (0 < self.factor_cap < math.inf and 0 < self.step_cap < math.inf):
            raise ConfigError(f"factor_cap and step_cap must be positive: {self.factor_cap}, {self.step_cap}")
        if not any(self.weights.values()) or not all(map(math.isfinite, self.weights.values())):
            raise ConfigError(f"weights must be finite and one of them not 0, found {dict(self.weights)}")

    def guided_steps(self, steps: int) -> tuple[int, ...]:
        """Indices of the guided ones of so many steps."""
        inside = [index for index in range(self.skip_first, steps) if self.start <= index / steps < self.end]
        return tuple(inside[:: self.every])


def nrg_velocity(velocity: Tensor, gradient: Tensor, sigma: float, strength: float, factor_cap: float) -> Tensor:
    """``v - w min(sigma / (1 - sigma), cap) g``; at ``sigma = 1``, where a clip is noise alone, ``v``.

    ``gradient`` is that of the reward at the noisy clip. All tensors ``(b, c, f, h, w)``.
    """
    if sigma >= 1:
        return velocity
    return velocity - strength * min(sigma / (1 - sigma), factor_cap) * gradient


def x0_shift(gradient: Tensor, sigma: float, strength: float) -> Tensor:
    """What to add to the predicted clean clip, ``w sigma^2 / ((1 - sigma)^2 + sigma^2) g``; g is the gradient there."""
    return strength * sigma**2 / ((1 - sigma) ** 2 + sigma**2) * gradient


def limited(change: Tensor, reference: Tensor, cap: float) -> Tensor:
    """``change (b, ...)``, clip by clip shortened where its RMS is above ``cap`` times that of ``reference``."""
    dims = tuple(range(1, change.ndim))
    size, most = (x.float().square().mean(dims, keepdim=True).sqrt() for x in (change, reference))
    return change * (cap * most / size.clamp_min(torch.finfo(torch.float32).tiny)).clamp_max(1).to(change.dtype)


def reward_gradient(
    reward: LatentRewardLike, x: Tensor, sigma: float, text: Any, weights: Mapping[str, float]
) -> tuple[Tensor, RewardValues]:
    """Gradient of the weighted sum of a reward's dimensions with respect to the clips.

    It works under ``torch.no_grad`` and ``torch.inference_mode``, where ``x`` and ``text`` may be inference tensors, as
    long as the reward's weights are none; :func:`.rewards.latent.load_reward` makes such.

    Args:
        reward: what is asked.
        x: clips ``(b, c, f, h, w)``.
        sigma: their noise level.
        text: one trimmed embedding per clip, or what the reward's ``prepare`` returned.
        weights: by dimension of this reward.

    Returns:
        The gradient, float32 of the shape of ``x``, and the reward's values.
    """
    with torch.inference_mode(False):
        with torch.no_grad():
            prepared = reward.prepare(text)
        with torch.enable_grad():
            point = x.detach().clone().float().requires_grad_(True)
            found = reward(point, torch.full((len(x),), sigma, device=x.device), prepared)
            total = weighted_total(found.values, reward.dimensions, weights)
            (gradient,) = torch.autograd.grad(total.sum(), point)
    return gradient, RewardValues(found.values.detach(), found.curves.detach())


@dataclass(frozen=True)
class GuidedStep:
    """What one guided step saw: the noise level, and the weighted reward of each clip before the step."""

    sigma: float
    totals: tuple[float, ...]


class RewardGuidance:
    """Turns velocities towards higher reward: an ``Adjust`` of :mod:`.backbones.sampling`, for one run.

    The step is found by its noise level, so levels may be visited again, and by samplers that ask twice in a step.

    Attributes:
        cost: price of the last call for each clip, in passes of the generator's transformer.
        skipped: gradients left out because they were not finite, counted by clip.
        trace: the guided calls so far.
    """

    def __init__(
        self,
        rewards: Sequence[LatentRewardLike],
        settings: GuidanceSettings,
        sigmas: Sequence[float],
        weights: Sequence[Mapping[str, float]] | None = None,
    ) -> None:
        """Prepare for one run.

        Args:
            rewards: what is followed, their weighted sum.
            settings: form, strength, steps and weights.
            sigmas: the noise levels of the run, the last one, 0, included.
            weights: for each reward its own; None for those of the settings, as far as it has the dimensions.

        Raises:
            ConfigError: a weight for a dimension that is not there, or the form ``"nrg"`` with a reward of clean clips.
        """
        if settings.form == "nrg" and not all(reward.knows_noise for reward in rewards):
            raise ConfigError("the form 'nrg' asks noisy clips of a reward that was trained on clean ones; use 'x0'")
        if weights is None:
            _check_names(settings.weights, [name for reward in rewards for name in reward.dimensions])
            weights = [{k: v for k, v in settings.weights.items() if k in reward.dimensions} for reward in rewards]
        self._parts = list(zip(rewards, weights, strict=True))
        for reward, own in self._parts:
            _check_names(own, reward.dimensions)
        self._settings, self._sigmas = settings, tuple(sigmas[:-1])
        self._guided = frozenset(settings.guided_steps(len(self._sigmas)))
        self._texts: list[Tensor] = []
        self._prepared: list[Any] = []
        self.cost, self.skipped = 0.0, 0
        self.trace: list[GuidedStep] = []

    def __call__(self, x: Tensor, sigma: float, velocity: Tensor, text: Sequence[Tensor]) -> Tensor:
        """The velocity to take instead; ``velocity`` itself where nothing is to be done."""
        self.cost = 0.0
        if not self._acts(sigma):
            return velocity
        self.cost = GRADIENT_PASSES * sum(reward.blocks_share for reward, _ in self._parts)
        settings = self._settings
        if settings.form == "nrg":
            gradient = self._gradient(x, sigma, sigma, text)
            change = nrg_velocity(torch.zeros_like(velocity), gradient, sigma, settings.strength, settings.factor_cap)
        else:
            x0 = predicted_x0(x, velocity, torch.full((len(x),), sigma, device=x.device))
            gradient = self._gradient(x0, 0.0, sigma, text)
            change = -x0_shift(gradient, sigma, settings.strength) / sigma  # v = (x - x0) / sigma
        return velocity + limited(change, velocity, settings.step_cap)

    def _acts(self, sigma: float) -> bool:
        if self._settings.strength == 0 or not 0 < sigma <= 1 or (self._settings.form == "nrg" and sigma == 1):
            return False
        return min(range(len(self._sigmas)), key=lambda index: abs(self._sigmas[index] - sigma)) in self._guided

    def _gradient(self, point: Tensor, asked: float, sigma: float, text: Sequence[Tensor]) -> Tensor:
        """The gradient of all rewards at ``point``, asked at one level during the step of another; 0 where not finite.

        Like ``point`` in dtype.
        """
        gradient, totals = torch.zeros_like(point, dtype=torch.float32), point.new_zeros(len(point))
        for (reward, weights), prepared in zip(self._parts, self._prepare(text), strict=True):
            part, found = reward_gradient(reward, point, asked, prepared, weights)
            gradient = gradient + part
            totals = totals + weighted_total(found.values, reward.dimensions, weights).to(totals)
        self.trace.append(GuidedStep(sigma, tuple(totals.tolist())))
        finite = gradient.flatten(1).isfinite().all(1)
        missing = len(point) - int(finite.sum())
        if missing and not self.skipped:
            logger.warning(
                "the reward's gradient of %d clip(s) is not finite at noise level %g: their step is not guided; "
                "further ones are counted without a word",
                missing,
                sigma,
            )
        self.skipped += missing
        return torch.where(finite.view(-1, *[1] * (point.ndim - 1)), gradient, 0.0).to(point.dtype)

    def _prepare(self, text: Sequence[Tensor]) -> list[Any]:
        """The texts prepared for each reward; once for as long as the texts are the same ones."""
        if len(text) != len(self._texts) or any(new is not old for new, old in zip(text, self._texts, strict=True)):
            with torch.inference_mode(False), torch.no_grad():
                self._prepared = [reward.prepare(text) for reward, _ in self._parts]
            self._texts = list(text)
        return self._prepared


def _check_names(weights: Mapping[str, float], dimensions: Sequence[str]) -> None:
    if unknown := sorted(set(weights) - set(dimensions)):
        raise ConfigError(f"no reward has the dimension {unknown[0]!r}; there are {', '.join(dimensions) or 'none'}")
