"""The loop's own state: the choice of beta, the best checkpoint, the warnings, and that they survive a checkpoint."""

from __future__ import annotations

import json
import math

import pytest

from training.config import TrainSettings
from training.monitors import RegimeWatch
from training.progress import BETA_RANGE, Best, BetaTuner, Progress

AUTO = TrainSettings(auto_beta=0.25, beta=2.0, warmup_steps=3, steps=10)


def test_beta_gives_a_typical_pair_the_gradient_factor_that_was_asked_for() -> None:
    """sigmoid(-beta d) = 1/4 means beta d = ln 3; the magnitudes are constant, so the average is theirs at once."""
    tuner = BetaTuner()
    for step in range(4):
        assert tuner.beta(AUTO) == 2.0, step  # until the warm-up of 3 steps is over
        tuner.update(0.5)
    assert tuner.beta(AUTO) == pytest.approx(math.log(3) / 0.5)
    assert 1 / (1 + math.exp(tuner.beta(AUTO) * 0.5)) == pytest.approx(0.25)


def test_beta_follows_a_moving_average_by_hand() -> None:
    """After 1 and 3: (0.01 * 0.99 * 1 + 0.01 * 3) / (1 - 0.99^2) = 0.0399 / 0.0199."""
    tuner, settings = BetaTuner(), TrainSettings(auto_beta=0.25, beta=2.0, warmup_steps=0)
    tuner.update(1.0)
    tuner.update(3.0)
    assert tuner.beta(settings) == pytest.approx(math.log(3) / (0.0399 / 0.0199))


def test_beta_stays_in_range_and_is_left_alone_unless_asked() -> None:
    settings = TrainSettings(auto_beta=0.25, beta=2.0, warmup_steps=0)
    assert BetaTuner(1e-9, 50).beta(settings) == 2.0 * BETA_RANGE
    assert BetaTuner(1e9, 50).beta(settings) == 2.0 / BETA_RANGE
    assert BetaTuner(0.0, 50).beta(settings) == 2.0
    assert BetaTuner(0.5, 50).beta(TrainSettings(beta=2.0)) == 2.0


def test_the_best_value_rises_for_accuracy_and_falls_for_the_loss() -> None:
    best, settings = Best(), TrainSettings(min_improvement=0.05)
    seen = [best.update(settings, step, {"accuracy": value}) for step, value in ((10, 0.5), (20, 0.54), (30, 0.6))]
    assert seen == [True, False, True]
    assert (best.value, best.step, best.stale) == (0.6, 30, 0)
    best, settings = Best(), TrainSettings(monitor="loss")
    values = (0.7, 0.6, 0.65, math.nan)
    assert [best.update(settings, step, {"loss": v}) for step, v in enumerate(values)] == [True, True, False, False]
    assert (best.value, best.step, best.stale) == (0.6, 1, 2)


def test_progress_survives_json_to_the_bit() -> None:
    progress = Progress(failed=2, stopped="why", tuner=BetaTuner(0.1 + 0.2, 7), best=Best(1 / 3, 4, 5))
    progress.watch.update(1, row(0.5, accuracy=0.123456789))
    again = Progress.from_dict(json.loads(json.dumps(progress.to_dict())))
    assert again == progress
    assert Progress.from_dict({}) == Progress()


def row(factor: float, norm: float = 1.0, accuracy: float = 0.5) -> dict[str, float]:
    return {"gradient_factor": factor, "norm_ratio": norm, "accuracy": accuracy}


def said(watch: RegimeWatch, *rows: dict[str, float]) -> list[int]:
    return [len(watch.update(step, values)) for step, values in enumerate(rows, 1)]


def test_a_linear_and_a_saturated_loss_are_said_once_each() -> None:
    watch = RegimeWatch(patience=3)
    assert said(watch, *[row(0.501)] * 5, row(0.4)) == [0, 0, 1, 0, 0, 0]
    assert said(watch, *[row(0.001)] * 3, *[row(0.501)] * 3) == [0, 0, 1, 0, 0, 0]
    assert "larger beta" in "".join(RegimeWatch(patience=1).update(1, row(0.5)))
    assert "smaller beta" in "".join(RegimeWatch(patience=1).update(1, row(0.01)))


def test_an_interrupted_stretch_does_not_count() -> None:
    assert said(RegimeWatch(patience=3), row(0.5), row(0.5), row(0.4), row(0.5), row(0.5)) == [0] * 5


def test_longer_velocities_are_said_once() -> None:
    watch = RegimeWatch(patience=2)
    assert said(watch, *[row(0.4, 1.06)] * 4) == [0, 1, 0, 0]
    assert "5%" in RegimeWatch(patience=1).update(1, row(0.4, 1.06))[0]
    assert said(RegimeWatch(patience=2), *[row(0.4, 1.04)] * 4) == [0] * 4


def test_preferring_the_losers_is_said() -> None:
    """The average starts at 1/2 and moves a half of the way each step: 0.25 is below 0.4."""
    assert "prefers the loser" in RegimeWatch(patience=2).update(1, row(0.45, accuracy=0.0))[0]
    assert said(RegimeWatch(patience=10), *[row(0.45, accuracy=1.0), row(0.45, accuracy=0.0)] * 10) == [0] * 20


def test_lost_accuracy_on_held_out_pairs_takes_two_evaluations() -> None:
    """With 100 pairs two standard errors are 0.1: 0.9 to 0.79 counts, 0.9 to 0.81 does not."""
    watch = RegimeWatch()
    assert [bool(watch.update_held_out(k, a, 100)) for k, a in enumerate((0.5, 0.9, 0.79, 0.81, 0.79))] == [False] * 5
    assert "0.90 to 0.78" in watch.update_held_out(6, 0.78, 100)[0]
    assert watch.update_held_out(7, 0.5, 100) == []
    few = RegimeWatch()
    assert not any(few.update_held_out(k, a, 4) for k, a in enumerate((1.0, 0.6, 0.6)))  # 4 pairs say little


def test_objectives_without_preference_or_bend_are_spared() -> None:
    watch = RegimeWatch(patience=1)
    assert watch.update(1, row(0.5, accuracy=0.0), preference=False) == []
    assert watch.update(2, row(0.5), bends=False) == []
    assert len(watch.update(3, row(0.5, 1.2), preference=False)) == 1
