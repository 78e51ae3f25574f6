"""The randomness of a pair: its noise level and its noise, as a function of seed, stream and index."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spatialalign.backbones.flow import levels_between, training_sigmas
from spatialalign.errors import ConfigError
from training.config import TrainSettings


@dataclass(frozen=True)
class Draw:
    """The randomness of one pair.

    Attributes:
        sigma: noise level of both clips.
        told: noise level that the model is told; another one only where timesteps are rounded.
        winner: noise of the winner, ``(c, f, h, w)``.
        loser: noise of the loser.
    """

    sigma: float
    told: float
    winner: Tensor
    loser: Tensor


ALL_LEVELS = (0.0, 1.0)


def draw(
    settings: TrainSettings,
    stream: str,
    index: int,
    shape: Sequence[int],
    level: int | None = None,
    sigma_range: tuple[float, float] = ALL_LEVELS,
) -> Draw:
    """Noise level and noise of pair ``index`` of a stream: a function of (seed, stream, index), on the CPU.

    Args:
        settings: seed, shift, shared or independent noise, rounding of timesteps.
        stream: such as "train".
        index: of the pair.
        shape: ``(c, f, h, w)``.
        level: fixes the noise level, instead of drawing it, to the one so many thousandths down the levels.
        sigma_range: ``Backbone.sigma_range``.
    """
    key = hashlib.sha256(f"{settings.seed}/{stream}/{index}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
    sigmas = model_levels(settings, sigma_range)
    drawn = int(torch.randint(len(sigmas), (1,), generator=generator))
    winner = torch.randn(tuple(shape), generator=generator)
    loser = winner if settings.noise == "shared" else torch.randn(tuple(shape), generator=generator)
    sigma = told = float(sigmas[drawn if level is None else level * len(sigmas) // 1000])
    if settings.bf16_timesteps:
        sigma, told = rounded_level(sigma, sigmas)
    return Draw(sigma, told, winner, loser)


def model_levels(settings: TrainSettings, sigma_range: tuple[float, float]) -> Tensor:
    """The noise levels of the 1000-step schedule that the trained transformer is for, ``(n,)``, the highest first."""
    levels = levels_between(training_sigmas(settings.shift), *sigma_range)
    if not len(levels):
        raise ConfigError(
            f"no noise level of the schedule with shift {settings.shift:g} lies from {sigma_range[0]:g} to "
            f"{sigma_range[1]:g}, which is what this expert is for; change shift"
        )
    return levels


def rounded_level(sigma: float, sigmas: Tensor) -> tuple[float, float]:
    """The levels that noise and model get when the timestep ``1000 sigma`` is rounded to bfloat16 (official train.py).

    The model is told the rounded timestep; the noise is that of the schedule's entry nearest to it. From 512 on the
    rounding is to multiples of 4.
    """
    timestep = torch.tensor(1000 * sigma, dtype=torch.float32).bfloat16().double()
    nearest = int((1000 * sigmas - timestep).abs().argmin())
    return float(sigmas[nearest]), float(timestep / 1000)
