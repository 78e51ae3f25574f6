"""The two transformers of Wan 2.2 A14B, one for high noise levels and one for low; one is on the device at a time.

The high-noise expert predicts where ``1000 sigma >= 1000 boundary``, as in diffusers' ``WanPipeline``; one of the two,
the chosen one, can be trained, and only at its own levels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError, ModelError
from .base import ExpertName
from .flow import LEVEL_TOLERANCE

_ROUNDED_TIMESTEP = 0.0021
"""How far a timestep rounded to bfloat16 may be from its level: multiples of 4 above 512, in thousandths."""


class Experts:
    """Which expert is the chosen one, and the way to the other.

    Attributes:
        name: the chosen one.
        boundary: lowest noise level, in (0, 1), of the high-noise expert.
    """

    def __init__(self, name: ExpertName, boundary: float, load_other: Callable[[], Any]) -> None:
        """``load_other`` returns the transformer that is not chosen, on the CPU, when it is first needed.

        Raises:
            ConfigError: no such expert.
            ModelError: the boundary is not between 0 and 1.
        """
        if name not in ("high", "low"):
            raise ConfigError(f"expert must be 'high' or 'low', found {name!r}")
        if not 0 < boundary < 1:
            raise ModelError(f"boundary_ratio must be between 0 and 1, found {boundary}; copy model_index.json again")
        self.name, self.boundary, self._load_other = name, boundary, load_other

    @cached_property
    def other(self) -> torch.nn.Module:
        """The expert that is not chosen, loaded on first use, frozen, in evaluation mode."""
        module: torch.nn.Module = self._load_other().eval().requires_grad_(False)
        return module

    @property
    def sigma_range(self) -> tuple[float, float]:
        """Noise levels of the chosen expert: the lowest, and the one they are below (1 itself is the high one's)."""
        return (self.boundary, 1.0) if self.name == "high" else (0.0, self.boundary)

    def at(self, sigma: float) -> ExpertName:
        """Whose level ``sigma`` is."""
        return "high" if sigma >= self.boundary - LEVEL_TOLERANCE else "low"

    def check(self, sigma: Tensor) -> None:
        """Raise :class:`ConfigError` for levels ``(b,)`` that are not the chosen expert's, bfloat16 rounding aside."""
        lowest, highest = self.sigma_range
        outside = sigma[(sigma < lowest - _ROUNDED_TIMESTEP) | (sigma > highest + _ROUNDED_TIMESTEP)]
        if len(outside):
            found = ", ".join(f"{level:.4g}" for level in outside.tolist())
            raise ConfigError(
                f"the {self.name}-noise expert predicts at noise levels from {lowest:g} to {highest:g}, found {found}; "
                "load the model with the other expert for these"
            )

    @contextmanager
    def switching(self, chosen: torch.nn.Module) -> Iterator[Callable[[float], Any]]:
        """Inside the ``with`` block, a function from level to transformer; only the last asked for is on the device.

        The chosen expert comes back to its device at the end, with its parameters the same objects as before.
        """
        device = next(chosen.parameters()).device

        def pick(sigma: float) -> torch.nn.Module:
            wanted, unused = chosen, self.__dict__.get("other")
            if self.at(sigma) != self.name:
                wanted, unused = self.other, chosen
            if unused is not None:
                unused.to("cpu")
            return wanted.to(device)

        try:
            yield pick
        finally:
            if "other" in self.__dict__:
                self.other.to("cpu")
            chosen.to(device)
