"""Checkpoints: whole or absent, exact, and honest about what changed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from spatialalign.errors import ConfigError, DataError
from training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint

IDENTITY = {"lr": 1e-3, "pairs_digest": "abc"}


def problem() -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    torch.manual_seed(0)
    parameters = {"b": nn.Parameter(torch.randn(3, 2)), "a": nn.Parameter(torch.randn(4))}
    return parameters, torch.optim.AdamW(parameters.values(), lr=1e-3)


def advance(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss = sum((p * (step + 1.0) - 1).square().sum() for p in parameters.values())
        assert isinstance(loss, Tensor)
        loss.backward()
        optimizer.step()


def test_an_interrupted_optimisation_ends_with_the_same_bits(tmp_path: Path) -> None:
    """Five steps in one go against two, a checkpoint, and three more by another optimiser."""
    straight, optimizer = problem()
    advance(straight, optimizer, 5)
    first, optimizer = problem()
    advance(first, optimizer, 2)
    save_checkpoint(tmp_path, 2, first, optimizer, IDENTITY)

    second, optimizer = problem()
    with torch.no_grad():
        for parameter in second.values():
            parameter.zero_()
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 2
    load_checkpoint(checkpoint, second, optimizer)
    advance(second, optimizer, 3, first=2)
    for name, expected in straight.items():
        assert torch.equal(second[name], expected)


def test_files_are_plain(tmp_path: Path) -> None:
    parameters, optimizer = problem()
    advance(parameters, optimizer, 1)
    folder = save_checkpoint(tmp_path, 1, parameters, optimizer, IDENTITY)
    assert sorted(path.name for path in folder.iterdir()) == [
        "complete",
        "lora.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    state = json.loads((folder / "state.json").read_text())
    assert (state["step"], state["identity"]) == (1, IDENTITY)
    assert state["versions"]["torch"] == torch.__version__.split("+")[0] or "torch" in state["versions"]


def test_an_incomplete_checkpoint_is_passed_over(tmp_path: Path) -> None:
    parameters, optimizer = problem()
    advance(parameters, optimizer, 1)
    for step in (1, 2):
        save_checkpoint(tmp_path, step, parameters, optimizer, IDENTITY)
    (tmp_path / "step-000002/complete").unlink()
    shutil.copytree(tmp_path / "step-000001", tmp_path / ".tmp-77-abc-step-000003")
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert latest_checkpoint(tmp_path / "absent") is None


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_dying_while_saving_keeps_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    parameters, optimizer = problem()
    advance(parameters, optimizer, 1)
    save_checkpoint(tmp_path, 1, parameters, optimizer, IDENTITY)

    def die(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, moment, die)
        with pytest.raises(DataError, match="step-000002 cannot be written .disk full.*make room"):
            save_checkpoint(tmp_path, 2, parameters, optimizer, IDENTITY, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert latest_checkpoint(tmp_path) is not None


def test_a_file_that_cannot_grow_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    """What safetensors says is an error of its own kind."""
    resource = pytest.importorskip("resource")
    parameters, optimizer = problem()
    advance(parameters, optimizer, 1)
    save_checkpoint(tmp_path, 1, parameters, optimizer, IDENTITY)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(DataError, match="step-000002 cannot be written .*make room"):
            save_checkpoint(tmp_path, 2, parameters, optimizer, IDENTITY, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    parameters, optimizer = problem()
    advance(parameters, optimizer, 1)
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, parameters, optimizer, IDENTITY, keep=2)
    save_checkpoint(tmp_path, 3, parameters, optimizer, IDENTITY, keep=2)  # again, as after a resume at the last step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]


def test_changes_are_refused_by_name_or_allowed(tmp_path: Path) -> None:
    parameters, optimizer = problem()
    advance(parameters, optimizer, 1)
    save_checkpoint(tmp_path, 1, parameters, optimizer, IDENTITY)
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    assert checkpoint.check_identity({**IDENTITY, "checkpoint_every": 7}, allow_changes=False) == []
    changed = {"lr": 2e-3, "pairs_digest": "xyz"}
    with pytest.raises(ConfigError, match="lr: 0.001 -> 0.002; pairs_digest: 'abc' -> 'xyz'.*allow_changes"):
        checkpoint.check_identity(changed, allow_changes=False)
    assert len(checkpoint.check_identity(changed, allow_changes=True)) == 2


def test_another_adapter_does_not_fit(tmp_path: Path) -> None:
    parameters, optimizer = problem()
    advance(parameters, optimizer, 1)
    save_checkpoint(tmp_path, 1, parameters, optimizer, IDENTITY)
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint is not None
    with pytest.raises(DataError, match="another set"):
        load_checkpoint(checkpoint, {"a": parameters["a"]}, optimizer)
    with pytest.raises(DataError, match="expected"):
        load_checkpoint(checkpoint, {"a": parameters["a"], "b": nn.Parameter(torch.zeros(2))}, optimizer)
