"""The settings of memory and speed in a training, and their refusals."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

from spatialalign.backbones.attention import Attention
from spatialalign.backbones.checkpointing import Checkpointing, checkpoint_function, is_compiled
from spatialalign.backbones.storage import BaseDtype, Fp8Linear
from spatialalign.backbones.wan import WanBackbone
from spatialalign.errors import ConfigError
from training import samples
from training.config import TrainSettings, describe_changes
from training.dpo import train
from training.gradients import Passes
from training.memory import passes_on, set_up, take_down
from training.pairs import read_pairs
from training.presets import PRESETS
from training.reference_cache import Precision
from training.store import Sample, Store
from training.trainer import Trainer

SETTINGS = TrainSettings(
    steps=2,
    batch_pairs=4,
    rank=2,
    beta=20.0,
    lr=5e-3,
    warmup_steps=0,
    held_out=0.3,
    held_out_pairs=2,
    held_out_every=2,
    checkpoint_every=2,
    tensorboard=False,
)


@pytest.fixture(autouse=True)
def clean(backbone: WanBackbone) -> Iterator[None]:
    """A copy of the transformer for each test: 8-bit storage rounds its weights for good."""
    shared, backbone.transformer = backbone.transformer, copy.deepcopy(backbone.transformer)
    yield
    backbone.transformer = shared


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offload_inputs": True, "checkpointing": "none"}, r"offload_inputs \(True\).*checkpointing \(none\)"),
        (
            {"offload_inputs": True, "compile": True, "checkpointing": "selective"},
            r"offload_inputs \(True\).*compile \(True\).*checkpointing full",
        ),
        ({"reference_draws": 4}, r"reference_draws \(4\).*reference_cache \(off\)"),
        ({"reference_draws": 1001, "reference_cache": "bfloat16"}, "reference_draws must be at most 1000"),
        ({"reference_draws": -1, "reference_cache": "bfloat16"}, "reference_draws must be 0 or more"),
    ],
)
def test_contradictions_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainSettings(**changes)


def test_choices_are_those_of_the_code() -> None:
    """config.py spells them out, because it loads for --help and must not load torch."""
    hints = get_type_hints(TrainSettings)
    assert get_args(hints["checkpointing"]) == get_args(Checkpointing)
    assert get_args(hints["attention"]) == get_args(Attention)
    assert get_args(hints["base_dtype"]) == get_args(BaseDtype)
    assert get_args(hints["passes"]) == ("auto", *get_args(Passes))
    assert get_args(hints["reference_cache"]) == ("off", *get_args(Precision))


def test_the_former_name_of_checkpointing() -> None:
    """Refused as an option, understood in a checkpoint made before."""
    with pytest.raises(TypeError, match="gradient_checkpointing"):
        TrainSettings(gradient_checkpointing=True)  # type: ignore[call-arg]
    now = PRESETS["miniature"].to_dict()
    new = {"checkpointing", "passes"}
    before = {name: value for name, value in now.items() if name not in new} | {"gradient_checkpointing": False}
    assert describe_changes(before, now) == ["passes: 'auto' -> 'batched'"]
    assert describe_changes(before | {"gradient_checkpointing": True}, now)[0] == "checkpointing: 'full' -> 'none'"


def test_the_former_name_suggests_the_new_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from training.dpo import main

    with pytest.raises(SystemExit) as stopped:
        main("--model m --store s --out o --gradient_checkpointing true".split())
    assert stopped.value.code == 2
    assert "no option 'gradient_checkpointing'; the nearest is 'checkpointing'" in capsys.readouterr().err


def test_passes_are_batched_on_a_cpu_and_where_asked() -> None:
    assert passes_on(SETTINGS, torch.device("cpu")) == "batched"
    assert passes_on(SETTINGS, torch.device("cuda")) == passes_on(SETTINGS, torch.device("meta")) == "separate"
    assert passes_on(PRESETS["miniature"], torch.device("cuda")) == "batched"
    assert passes_on(replace(SETTINGS, passes="one-sample"), torch.device("cpu")) == "one-sample"


@pytest.mark.parametrize(
    "changes",
    [
        {"checkpointing": "selective", "passes": "one-sample", "offload_inputs": True},
        {"checkpointing": "full", "passes": "separate", "reference_cache": "bfloat16", "reference_draws": 2},
        {"base_dtype": "fp8"},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()),
)
def test_trainings_run_export_and_verify(
    backbone: WanBackbone, paired_store: Store, tmp_path: Path, changes: dict[str, Any]
) -> None:
    settings = replace(SETTINGS, **changes)
    result = train(backbone, paired_store, paired_store.root / "pairs.json", tmp_path / "out", settings)
    assert result.finished
    assert result.verified is not None and result.verified < 1e-4
    assert not backbone.transformer.gradient_checkpointing
    assert not any(isinstance(module, Fp8Linear) for module in backbone.transformer.modules())


def test_an_8_bit_base_is_the_reference_too(backbone: WanBackbone, paired_store: Store, tmp_path: Path) -> None:
    """At its start a LoRA changes nothing, so the first margin is 0 whatever the base is stored in."""
    prompts, _ = read_pairs(paired_store.root / "pairs.json")
    settings = replace(SETTINGS, base_dtype="fp8")
    run = Trainer(backbone, paired_store, prompts[:2], prompts[2:], settings, tmp_path / "out", {})
    assert sum(isinstance(module, Fp8Linear) for module in backbone.transformer.modules()) == 2 * 10
    values = run.held_out()
    assert values is not None
    assert (values["margin"], values["norm_ratio"]) == (0, 1)


def test_setting_up_and_taking_down(backbone: WanBackbone) -> None:
    """Compiling is only announced here: the blocks are compiled when they first run."""
    settings = replace(SETTINGS, checkpointing="selective", compile=True)
    set_up(backbone, settings, (16, 2, 4, 4))
    assert backbone.transformer.gradient_checkpointing and is_compiled(backbone.transformer)
    take_down(backbone)
    assert not backbone.transformer.gradient_checkpointing and not is_compiled(backbone.transformer)
    with pytest.raises(ConfigError, match="attention 'cudnn' needs a CUDA device, found cpu"):
        set_up(backbone, replace(SETTINGS, attention="cudnn"), (16, 2, 4, 4))


def test_latents_and_text_are_read_a_micro_batch_at_a_time(
    backbone: WanBackbone, paired_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step of four pairs reads eight clips, and no more than the two of one pair are in memory at once."""
    prompts, _ = read_pairs(paired_store.root / "pairs.json")
    run = Trainer(backbone, paired_store, prompts[:2], prompts[2:], SETTINGS, tmp_path / "out", {})
    reads: list[str] = []
    plain = Sample.read_latents

    def read(self: Sample) -> torch.Tensor:
        reads.append(self.name)
        assert len(run.clips._latents) < 2
        return plain(self)

    monkeypatch.setattr(Sample, "read_latents", read)
    monkeypatch.setattr(samples, "_TEXTS_KEPT", 1)
    run._train_step()
    assert len(reads) == 2 * SETTINGS.batch_pairs
    assert len(run.clips._texts) == 1


def test_every_setting_has_its_help() -> None:
    from docstring_parser import parse_from_object

    helped = {parameter.arg_name for parameter in parse_from_object(TrainSettings).params if parameter.description}
    assert {field.name for field in fields(TrainSettings)} == helped


def test_checkpointed_functions_take_a_block_and_its_inputs() -> None:
    block = torch.nn.Linear(3, 3)
    x = torch.randn(2, 3, requires_grad=True)
    for kind in ("full", "selective"):
        assert torch.equal(checkpoint_function(kind)(block, x), block(x))  # type: ignore[arg-type]
