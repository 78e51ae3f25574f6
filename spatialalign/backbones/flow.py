"""Flow matching with a shifted schedule: the few formulas, on tensors.

Convention (methods: official train.py): ``x_sigma = (1 - sigma) x0 + sigma eps``, and the model predicts
``v = eps - x0``. ``sigma`` runs from 1 (noise) to 0 (data).
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVEL_TOLERANCE = 1e-6
"""Two noise levels closer than this are the same one, rounded differently."""


def shift_sigma(u: Tensor, shift: float) -> Tensor:
    """``shift u / (1 + (shift - 1) u)``: moves uniform levels ``u`` in [0, 1] towards noise when ``shift`` > 1."""
    return shift * u / (1 + (shift - 1) * u)


def training_sigmas(shift: float = 5.0, levels: int = 1000) -> Tensor:
    """The noise levels to draw from: ``u = 1, 1 - 1/levels, ... 1/levels``, shifted; ``(levels,)`` float64."""
    return shift_sigma(torch.arange(levels, 0, -1, dtype=torch.float64) / levels, shift)


def levels_between(sigmas: Tensor, lowest: float, highest: float) -> Tensor:
    """Those of the noise levels from ``lowest`` on that are below ``highest``; a ``highest`` of 1 is included."""
    below = (sigmas < highest - LEVEL_TOLERANCE) | (highest >= 1)
    return sigmas[(sigmas >= lowest - LEVEL_TOLERANCE) & below]


def sampling_sigmas(steps: int, shift: float = 5.0) -> Tensor:
    """The levels visited while sampling, ``u = 1, 1 - 1/steps, ... 1/steps`` shifted, then 0; ``(steps + 1,)`` float64.

    This spacing is DiffSynth's, with which the paper sampled, and ComfyUI's "simple"; diffusers' scheduler takes the
    same when it is given ``sigmas=linspace(1, 1/steps, steps)``, and by default ends on a lower level than ``1/steps``.
    """
    return torch.cat([training_sigmas(shift, steps), torch.zeros(1, dtype=torch.float64)])


def _like(sigma: Tensor, x: Tensor) -> Tensor:
    """``sigma (b,)`` shaped to broadcast over ``x (b, ...)``, in the dtype and on the device of ``x``."""
    return sigma.to(x).reshape(-1, *[1] * (x.ndim - 1))


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """``(1 - sigma) x0 + sigma noise`` for ``x0 (b, ...)`` and ``sigma (b,)``."""
    level = _like(sigma, x0)
    return (1 - level) * x0 + level * noise


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """What the model should predict: ``noise - x0``."""
    return noise - x0


def predicted_x0(x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The clean latents implied by a prediction: ``x - sigma v``, for ``sigma (b,)``."""
    return x - _like(sigma, x) * velocity


def euler_step(x: Tensor, velocity: Tensor, sigma: float, following: float) -> Tensor:
    """One step of the ODE from level ``sigma`` to ``following``."""
    return x + (following - sigma) * velocity


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: ``unconditional + scale (conditional - unconditional)``."""
    return unconditional + scale * (conditional - unconditional)
