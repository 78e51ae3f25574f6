"""Checkpoints of a LoRA training: whole or absent, and exact.

A checkpoint is a folder ``step-000100`` with ``lora.safetensors`` (float32 master weights, PEFT parameter names),
``optimizer.safetensors``, ``state.json`` (counters, the run's identity, versions) and ``complete``, written last. The
folder is filled under a temporary name, flushed and renamed. Pairs, noise and learning rate are functions of the step,
so no generator state belongs to it. No pickle.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spatialalign.errors import ConfigError, DataError
from spatialalign.files import read_json, write_json
from training.config import describe_changes, fingerprint

_FOLDER = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    step: int
    identity: dict[str, Any]
    progress: dict[str, Any] = field(default_factory=dict)

    def check_identity(self, identity: Mapping[str, Any], allow_changes: bool) -> list[str]:
        """Compare with the identity of the run that wants to continue.

        Returns the differences when ``allow_changes`` is set; otherwise any is a :class:`ConfigError` that lists them.
        """
        changes = describe_changes(self.identity, dict(identity))
        if changes and not allow_changes:
            raise ConfigError(
                f"{self.folder} belongs to another training: {'; '.join(changes)}. Restore these, "
                "choose another output folder, or allow the change with --allow_changes true"
            )
        return changes


def save_checkpoint(
    root: Path,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, Any],
    keep: int = 0,
    progress: Mapping[str, Any] | None = None,
    best: int | None = None,
) -> Path:
    """Write the checkpoint of ``step`` finished steps below ``root``.

    The ``keep`` newest stay (0: all), and that of step ``best`` whatever its age. ``progress`` is the loop's own state,
    as plain JSON values.

    Raises:
        DataError: it cannot be written, for want of space say; the others are unharmed.
    """
    target = checkpoint_folder(root, step)
    with _saving(target):
        _write(target, step, parameters, optimizer, identity, progress)
    if keep:
        for old in _folders(root)[:-keep]:
            if best is None or old != checkpoint_folder(root, best):
                shutil.rmtree(old)
    return target


@contextmanager
def _saving(target: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"the checkpoint {target} cannot be written ({error}); the one before it is unharmed: make room on its "
            "disk, or let this user write there, and run the same command again to continue"
        ) from error


def _write(
    target: Path,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, Any],
    progress: Mapping[str, Any] | None,
) -> None:
    root = target.parent
    root.mkdir(parents=True, exist_ok=True)
    temporary = root / f".tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}-{target.name}"
    temporary.mkdir()
    try:
        weights = {name: parameter.detach().cpu().contiguous() for name, parameter in parameters.items()}
        save_file(weights, temporary / "lora.safetensors")
        tensors, groups = _flatten(optimizer, list(parameters))
        save_file(tensors, temporary / "optimizer.safetensors")
        state = {
            "format": "1",
            "step": step,
            "identity": dict(identity),
            "identity_digest": fingerprint(dict(identity)),
            "progress": dict(progress or {}),
            "optimizer_groups": groups,
            "versions": _versions(),
            "not_stored": "generator states: pairs, noise and learning rate depend on seed and step alone",
        }
        write_json(temporary / "state.json", state)
        (temporary / "complete").write_text("complete\n", encoding="utf-8")
        for file in temporary.iterdir():
            _flush(file)
        _flush(temporary)
        if target.exists():  # written before by this run or cut short by an older one: never both gone at once
            os.replace(target, temporary.with_name(temporary.name + "-old"))
        os.replace(temporary, target)
        _flush(root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(temporary.with_name(temporary.name + "-old"), ignore_errors=True)


def checkpoint_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return root / f"step-{step:06d}"


def latest_checkpoint(root: Path) -> Checkpoint | None:
    """The newest complete checkpoint below ``root``; folders cut short are passed over."""
    for folder in reversed(_folders(root)):
        if (folder / "complete").is_file():
            state = read_json(folder / "state.json")
            return Checkpoint(folder, int(state["step"]), dict(state["identity"]), dict(state.get("progress", {})))
    return None


def load_weights(folder: Path, parameters: Mapping[str, nn.Parameter]) -> None:
    """Restore the weights of a checkpoint in place; raises :class:`DataError` when the names or shapes differ."""
    weights = load_file(folder / "lora.safetensors")
    if weights.keys() != parameters.keys():
        odd = sorted(weights.keys() ^ parameters.keys())
        raise DataError(f"{folder} holds another set of LoRA weights than this run, e.g. {odd[0]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if weights[name].shape != parameter.shape:
                raise DataError(f"{folder}: {name} is {tuple(weights[name].shape)}, expected {tuple(parameter.shape)}")
            parameter.copy_(weights[name])


def load_checkpoint(
    checkpoint: Checkpoint, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Restore weights and optimiser in place; raises :class:`DataError` when the names or shapes differ."""
    load_weights(checkpoint.folder, parameters)
    groups = read_json(checkpoint.folder / "state.json")["optimizer_groups"]
    state: dict[int, dict[str, Tensor]] = {}
    names = list(parameters)
    for key, tensor in load_file(checkpoint.folder / "optimizer.safetensors").items():
        name, _, entry = key.rpartition("|")
        state.setdefault(names.index(name), {})[entry] = tensor
    current = optimizer.state_dict()["param_groups"]
    for group, saved in zip(current, groups, strict=True):
        group.update({key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()})
    optimizer.load_state_dict({"state": state, "param_groups": current})


def _flatten(optimizer: torch.optim.Optimizer, names: list[str]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Optimiser state as named tensors (``<parameter>|<entry>``) and its groups as JSON values."""
    value = optimizer.state_dict()
    tensors = {
        f"{names[index]}|{entry}": tensor.detach().cpu().contiguous()
        for index, entries in value["state"].items()
        for entry, tensor in entries.items()
    }
    groups = [
        {key: setting for key, setting in group.items() if key != "params" and not isinstance(setting, Tensor)}
        for group in value["param_groups"]
    ]
    return tensors, groups


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "diffusers", "peft", "safetensors")}


def _flush(path: Path) -> None:
    """Bring a file or folder to the disk; folders cannot be opened for this on Windows."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
