"""Settings: presets, ranges, contradictions, the schedule, and what may change between a run and its continuation."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from typing import Any

import pytest
from docstring_parser import parse_from_object

from spatialalign.errors import ConfigError
from training.config import TrainSettings, describe_changes
from training.presets import PRESETS, preset_of


def test_learning_rate_warms_up_falls_and_never_rises_again() -> None:
    """Warm-up of 300 to 1e-4; half way down the cosine, at 1650 of 300..3000, half of it; 0 from 3000 on."""
    settings = TrainSettings()
    assert settings.learning_rate(0) == pytest.approx(1e-4 / 300)
    assert settings.learning_rate(299) == pytest.approx(1e-4)
    assert settings.learning_rate(300) == pytest.approx(1e-4)
    assert settings.learning_rate(1650) == pytest.approx(5e-5)
    rates = [settings.learning_rate(step) for step in range(300, 7000, 10)]
    assert rates == sorted(rates, reverse=True)
    assert settings.learning_rate(3000) == settings.learning_rate(6900) == 0
    flat = TrainSettings(lr_schedule="constant")
    assert flat.learning_rate(299) == flat.learning_rate(2999) == 1e-4


def test_the_spatialalign_preset_holds_the_papers_constants() -> None:
    paper = PRESETS["spatialalign"]
    assert paper == PRESETS["paper"] == TrainSettings()
    assert (paper.rank, paper.alpha, paper.targets) == (16, 16, "spatialalign")
    assert (paper.arm, paper.beta, paper.clip, paper.anchor_weight, paper.reduction) == ("dpo+zo", 1, 5, 0.5, "mean")
    assert (paper.lr, paper.weight_decay, paper.warmup_steps, paper.steps) == (1e-4, 0.01, 300, 3000)
    assert (paper.batch_pairs, paper.micro_pairs, paper.shift, paper.noise) == (48, 1, 5, "independent")
    assert (paper.max_grad_norm, paper.half_beta, paper.error_of, paper.form) == (None, False, "velocity", "sigmoid")
    replace(paper, bf16_timesteps=True)


def test_settings_know_their_preset_by_its_current_name() -> None:
    named = {name: preset_of(replace(preset, seed=7)) for name, preset in PRESETS.items()}
    assert named.pop("paper") == "spatialalign"
    assert all(name == found for name, found in named.items())
    assert preset_of(replace(PRESETS["sft"], lr=1e-3)) == "custom"


def test_the_presets_of_the_other_methods() -> None:
    """Flow-DPO's table 10; Diffusion-DPO's beta on errors of the noise; the same LoRA for all four."""
    flow = PRESETS["flow-dpo"]
    assert (flow.arm, flow.beta, flow.half_beta, flow.error_of, flow.clip) == ("dpo", 500, True, "velocity", None)
    assert (flow.rank, flow.alpha, flow.targets, flow.lr, flow.weight_decay) == (64, 128, "attention", 5e-6, 0)
    assert (flow.batch_pairs, flow.noise, flow.shift) == (64, "shared", 1)
    assert replace(flow, beta=5000.0, error_of="noise") == PRESETS["diffusion-dpo"]
    assert (PRESETS["flow-rwr"].arm, PRESETS["sft"].arm) == ("rwr", "sft")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lr": float("inf")}, "lr must be above 0 and finite"),
        ({"beta": float("nan")}, "beta must be"),
        ({"batch_pairs": 5, "micro_pairs": 2}, "batch_pairs.*multiple of micro_pairs"),
        ({"warmup_steps": 9, "steps": 9}, "warmup_steps.*steps"),
        ({"held_out": 1.0}, "held_out"),
        ({"clip": -1.0}, "clip"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"auto_beta": 0.5}, "auto_beta"),
        ({"max_bad_steps": 0}, "max_bad_steps"),
    ],
)
def test_settings_check_themselves(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(TrainSettings(), **changes)


@pytest.mark.parametrize(
    ("one", "other", "changes"),
    [
        ("arm", "form", {"arm": "sft", "form": "hinge"}),
        ("arm", "label_smoothing", {"arm": "rwr", "label_smoothing": 0.1}),
        ("arm", "pair_weight", {"arm": "rwr", "pair_weight": "margin"}),
        ("arm", "auto_beta", {"arm": "sft", "auto_beta": 0.3}),
        ("arm", "anchor_weight", {"arm": "dpo+zo", "anchor_weight": 0.0}),
        ("arm", "sft_weight", {"arm": "dpo+sft", "sft_weight": 0.0}),
        ("arm", "sft_weight", {"arm": "sft", "sft_weight": 0.0}),
        ("form", "label_smoothing", {"form": "ipo", "clip": None, "label_smoothing": 0.1}),
        ("form", "auto_beta", {"form": "hinge", "auto_beta": 0.3}),
        ("form", "clip", {"form": "ipo", "clip": 5.0}),
        ("form", "clip", {"form": "hinge", "clip": 0.5}),
        ("auto_beta", "clip", {"auto_beta": 0.1, "clip": 2.0}),  # sigmoid(-2) = 0.119 is as low as it goes
        ("early_stop", "held_out", {"early_stop": 3, "held_out": 0.0}),
        ("keep_best", "held_out", {"keep_best": True, "held_out": 0.0}),
        ("monitor", "sample_every", {"keep_best": True, "monitor": "score"}),
    ],
)
def test_contradictions_are_refused_by_both_names(one: str, other: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"{one} \(.*\) together with {other} \("):
        replace(TrainSettings(), **changes)


def test_what_does_not_contradict_is_allowed() -> None:
    replace(TrainSettings(), form="hinge", clip=1.0)
    replace(TrainSettings(), form="ipo", clip=None)
    replace(TrainSettings(), auto_beta=0.1, clip=None)
    replace(TrainSettings(), arm="dpo", anchor_weight=0.0)
    replace(TrainSettings(), early_stop=3, monitor="score", sample_every=100, held_out=0.0)


def test_every_setting_has_a_line_of_help() -> None:
    help_of = {param.arg_name: param.description for param in parse_from_object(TrainSettings).params}
    for field in dataclasses.fields(TrainSettings):
        assert help_of.get(field.name), field.name
        assert "\n" not in (help_of[field.name] or "")


def test_the_objective_takes_the_settings_and_a_tuned_beta() -> None:
    settings = TrainSettings(arm="dpo", form="ipo", clip=None, half_beta=True, reduction="sum", beta=7.0)
    objective = settings.objective()
    for field in dataclasses.fields(objective):
        assert getattr(objective, field.name) == getattr(settings, field.name)
    assert replace(objective, beta=9.0) == settings.objective(9.0)


def test_changes_are_described_and_harmless_ones_are_not() -> None:
    before, now = {"lr": 1e-4, "checkpoint_every": 5}, {"lr": 2e-4, "checkpoint_every": 9}
    assert describe_changes(before, now) == ["lr: 0.0001 -> 0.0002"]


def test_how_often_is_watched_matters_once_it_decides() -> None:
    before, now = {"held_out_every": 5, "early_stop": 0}, {"held_out_every": 9, "early_stop": 0}
    assert describe_changes(before, now) == []
    assert describe_changes(before | {"early_stop": 2}, now | {"early_stop": 2}) == ["held_out_every: 5 -> 9"]


def test_a_checkpoint_from_before_a_setting_existed_counts_as_its_default() -> None:
    now = TrainSettings().to_dict()
    before = {name: value for name, value in now.items() if name not in ("form", "auto_beta")}
    assert describe_changes(before, now) == []
    assert describe_changes(before, now | {"form": "hinge"}) == ["form: 'sigmoid' -> 'hinge'"]
