"""A fixed number of draws for each clip, so that predictions of the reference can be used again and again.

Draw ``k`` of K has its noise level in the k-th part of the schedule, so that the K levels of a prompt cover it evenly;
within the part it differs from prompt to prompt. Noise belongs to prompt, clip and k, or, where a pair shares it, to
prompt and k. Which k a pair gets depends on its index alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from spatialalign.errors import ConfigError
from training.config import TrainSettings
from training.draws import ALL_LEVELS, Draw, model_levels, rounded_level
from training.pairs import PreferencePair


def fixed_draw_number(settings: TrainSettings, index: int) -> int:
    """Which of its K draws pair ``index`` of the training stream gets, uniform in 0..K-1."""
    return _number(settings, "which", index) % settings.reference_draws


def fixed_draw(
    settings: TrainSettings,
    pair: PreferencePair,
    number: int,
    shape: Sequence[int],
    sigma_range: tuple[float, float] = ALL_LEVELS,
) -> Draw:
    """Draw ``number`` of K for a pair with clips of ``shape (c, f, h, w)``; see :func:`training.draws.draw`."""
    sigmas = model_levels(settings, sigma_range)
    if len(sigmas) < settings.reference_draws:
        raise ConfigError(
            f"reference_draws ({settings.reference_draws}) must be at most {len(sigmas)}, the noise levels of this "
            "expert"
        )
    first, following = (len(sigmas) * edge // settings.reference_draws for edge in (number, number + 1))
    level = first + _number(settings, "level", pair.prompt_id, number) % (following - first)
    sigma = told = float(sigmas[level])
    if settings.bf16_timesteps:
        sigma, told = rounded_level(sigma, sigmas)
    winner, loser = (
        _noise(settings, pair.prompt_id, None if settings.noise == "shared" else seed, number, shape)
        for seed in (pair.winner, pair.loser)
    )
    return Draw(sigma, told, winner, loser)


def _noise(settings: TrainSettings, prompt_id: str, seed: int | None, number: int, shape: Sequence[int]) -> Tensor:
    generator = torch.Generator().manual_seed(_number(settings, "noise", prompt_id, seed, number))
    return torch.randn(tuple(shape), generator=generator)


def _number(settings: TrainSettings, *key: object) -> int:
    """56 bits that depend on the seed and the key alone."""
    text = "/".join(str(part) for part in (settings.seed, "fixed", *key))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
