"""What a training loop remembers besides weights and optimiser; all of it belongs to a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from training.config import TrainSettings
from training.monitors import RegimeWatch

DECAY = 0.99
"""Of the moving average that auto_beta follows: it looks back over about 100 steps."""

BETA_RANGE = 100.0
"""A tuned beta stays within this factor of the setting, either way."""


@dataclass
class BetaTuner:
    """Chooses beta so that a pair of typical difference has a given gradient factor ``g = sigmoid(-beta |d|)``.

    ``d`` is the difference that beta multiplies. With the moving average D of its size, ``beta = ln(1/g - 1) / D``.
    Until the learning rate has warmed up, beta is the setting: the differences start at 0 and say nothing yet.

    Attributes:
        average: exponential moving average of the mean |d| of a step, from 0.
        updates: steps that went into it.
    """

    average: float = 0.0
    updates: int = 0

    def update(self, magnitude: float) -> None:
        """Take the mean |d| over the pairs of a step."""
        self.average = DECAY * self.average + (1 - DECAY) * magnitude
        self.updates += 1

    def beta(self, settings: TrainSettings) -> float:
        """The beta of the next step."""
        if settings.auto_beta is None or self.updates <= settings.warmup_steps or self.average == 0:
            return settings.beta
        typical = self.average / (1 - DECAY**self.updates)  # the average started from 0
        tuned = math.log(1 / settings.auto_beta - 1) / typical
        return min(max(tuned, settings.beta / BETA_RANGE), settings.beta * BETA_RANGE)


@dataclass
class Best:
    """The best value of the monitor so far, and for how many evaluations there was none better.

    Attributes:
        value: the best value; None before the first evaluation.
        step: the step of that evaluation.
        stale: evaluations since.
    """

    value: float | None = None
    step: int = 0
    stale: int = 0

    def update(self, settings: TrainSettings, step: int, values: Mapping[str, float]) -> bool:
        """Take the values of an evaluation after ``step``; True when the monitor is the best so far."""
        now = values[settings.monitor]
        gain = math.inf if self.value is None else now - self.value if settings.monitor != "loss" else self.value - now
        if math.isfinite(now) and gain > settings.min_improvement:
            self.value, self.step, self.stale = now, step, 0
            return True
        self.stale += 1
        return False


@dataclass
class Progress:
    """The state of the loop.

    Attributes:
        failed: steps in a row that were skipped because loss or gradient was not finite.
        stopped: why the training ended before its last step, or None.
        tuner: of beta.
        best: of the monitor.
        watch: of the warnings.
        processes: how many take part.
    """

    failed: int = 0
    stopped: str | None = None
    tuner: BetaTuner = field(default_factory=BetaTuner)
    best: Best = field(default_factory=Best)
    watch: RegimeWatch = field(default_factory=RegimeWatch)
    processes: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; floats survive them to the bit."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Progress:
        """From :meth:`to_dict`; what a checkpoint of an older version lacks starts afresh."""
        return cls(
            failed=value.get("failed", 0),
            stopped=value.get("stopped"),
            tuner=BetaTuner(**value.get("tuner", {})),
            best=Best(**value.get("best", {})),
            watch=RegimeWatch(**value.get("watch", {})),
            processes=value.get("processes", 1),
        )
