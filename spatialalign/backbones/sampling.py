"""The sampler that all backbones share: noise from seeds, and Euler steps on the shifted flow schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ConfigError
from .base import SampleSettings
from .flow import euler_step, guided, predicted_x0, sampling_sigmas

Predict = Callable[[Tensor, float, Sequence[Tensor]], Tensor]
"""Velocities of ``x (b, c, f, h, w)`` at one noise level with one text per clip."""


class Adjust(Protocol):
    """What is done to the velocity after classifier-free guidance, such as reward guidance."""

    cost: float
    """Price of the last call, for each clip, in passes of the transformer."""

    def __call__(self, x: Tensor, sigma: float, velocity: Tensor, text: Sequence[Tensor]) -> Tensor:
        """The velocity to take instead; ``x`` and ``velocity`` are ``(b, c, f, h, w)``, ``text`` has one per clip."""


def seeded_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The Gaussian noise each seed starts from, ``(b, c, f, h, w)`` float32 on the CPU, the same for every device."""
    rows = [torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


class Flow:
    """Clips on their way from noise to data, one Euler step at a time.

    Attributes:
        sigmas: the noise levels of the steps, from 1 down to 0; one more than there are steps.
        evaluations: passes of the transformer so far, each counted once for every clip.
    """

    def __init__(
        self,
        predict: Predict,
        guidance: Callable[[float], float],
        text: Sequence[Tensor],
        negative: Tensor,
        settings: SampleSettings,
        device: torch.device,
        adjust: Adjust | None = None,
    ) -> None:
        """Backbones make it, see ``Backbone.flow``.

        Args:
            predict: the model.
            guidance: the guidance scale at a noise level; 1 for none.
            text: one embedding for each clip.
            negative: embedding of the negative prompt, ``(n, d)``.
            settings: steps and shift.
            device: where the model computes.
            adjust: what is done to every velocity after that.
        """
        self._predict, self._guidance, self._adjust = predict, guidance, adjust
        self._text, self._negative, self._device = list(text), negative, device
        self.sigmas: tuple[float, ...] = tuple(sampling_sigmas(settings.steps, settings.shift).tolist())
        self.evaluations = 0.0

    @property
    def steps(self) -> int:
        """Number of steps from noise to data."""
        return len(self.sigmas) - 1

    @torch.no_grad()
    def velocity(self, x: Tensor, sigma: float, rows: Sequence[int] | None = None) -> Tensor:
        """The velocity of ``x (b, c, f, h, w)`` at one level, guided and adjusted; ``rows`` are the clips' texts.

        Without ``rows`` the clips take the texts in order.

        Raises:
            ConfigError: not one text per clip.
        """
        text = self._text if rows is None else [self._text[row] for row in rows]
        if len(text) != len(x):
            raise ConfigError(f"one text per clip is needed, found {len(text)} texts and {len(x)} clips")
        x = x.to(self._device)
        velocity, scale = self._predict(x, sigma, text), self._guidance(sigma)
        self.evaluations += len(x)
        if scale > 1:
            velocity = guided(velocity, self._predict(x, sigma, [self._negative] * len(x)), scale)
            self.evaluations += len(x)
        if self._adjust is not None:
            velocity = self._adjust(x, sigma, velocity, text)
            self.evaluations += len(x) * self._adjust.cost
        return velocity

    def step(self, x: Tensor, index: int, rows: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """One Euler step from ``sigmas[index]``; the clips at the next level, and the clean ones that it predicts."""
        sigma, following = self.sigmas[index], self.sigmas[index + 1]
        x = x.to(self._device)
        velocity = self.velocity(x, sigma, rows)
        levels = torch.full((len(x),), sigma, device=x.device)
        return euler_step(x, velocity, sigma, following), predicted_x0(x, velocity, levels)

    def run(
        self,
        x: Tensor,
        first: int = 0,
        last: int | None = None,
        rows: Sequence[int] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Take the steps from ``first`` up to, not including, ``last``.

        Args:
            x: clips at level ``sigmas[first]``, ``(b, c, f, h, w)``.
            first: index of the first step.
            last: index behind the last; None for all the way to clean latents.
            rows: the clips' texts; None for all in order.
            progress: called after each step with (steps done, steps in all).

        Returns:
            Clips at level ``sigmas[last]``, float32 on the CPU.
        """
        for index in range(first, self.steps if last is None else last):
            x, _ = self.step(x, index, rows)
            if progress is not None:
                progress(index + 1, self.steps)
        return x.cpu()
