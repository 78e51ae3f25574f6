"""The sampler that all backbones share: noise from seeds, and Euler steps on the shifted flow schedule."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import ConfigError
from .base import SampleSettings
from .flow import euler_step, guided, sampling_sigmas

Predict = Callable[[Tensor, float, Sequence[Tensor]], Tensor]
"""Velocities of ``x (b, c, f, h, w)`` at one noise level with one text per clip."""


def seeded_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """The Gaussian noise each seed starts from, ``(b, c, f, h, w)`` float32 on the CPU, the same for every device."""
    rows = [torch.randn(tuple(shape), generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


def euler_sample(
    predict: Predict,
    guidance: Callable[[float], float],
    noise: Tensor,
    text: Sequence[Tensor],
    negative: Tensor,
    settings: SampleSettings,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Follow the flow from noise to clean latents.

    Args:
        predict: the model.
        guidance: the guidance scale at a noise level; 1 for none.
        noise: ``(b, c, f, h, w)``, on the device to compute on.
        text: one embedding per clip.
        negative: embedding of the negative prompt, ``(n, d)``.
        settings: steps and shift.
        progress: called after each step with (steps done, steps in all).

    Returns:
        Latents ``(b, c, f, h, w)``, float32 on the CPU.

    Raises:
        ConfigError: not one text per clip.
    """
    if len(text) != len(noise):
        raise ConfigError(f"one text per seed is needed, found {len(text)} texts and {len(noise)} seeds")
    x = noise
    sigmas = sampling_sigmas(settings.steps, settings.shift).tolist()
    for step, (sigma, following) in enumerate(zip(sigmas[:-1], sigmas[1:], strict=True)):
        velocity, scale = predict(x, sigma, text), guidance(sigma)
        if scale > 1:
            velocity = guided(velocity, predict(x, sigma, [negative] * len(noise)), scale)
        x = euler_step(x, velocity, sigma, following)
        if progress is not None:
            progress(step + 1, settings.steps)
    return x.cpu()
