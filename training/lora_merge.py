"""A LoRA added to the weights of a transformer folder: a new folder, whole or absent."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spatialalign.errors import LoraError, ModelError
from spatialalign.lora import LoraPair, fit_lora

MERGEABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def merge_lora(base: Path, lora: Path, out: Path, scale: float = 1.0) -> list[str]:
    """Write the diffusers transformer folder ``base`` with ``scale`` times the LoRA's updates added to ``out``.

    One weight file is in memory at a time. Sums are formed in float32 and stored in the base's own precision.

    Returns:
        The modules that were changed.

    Raises:
        ModelError: ``base`` is no transformer folder, its weights cannot be read or are quantised, or ``out`` exists.
        LoraError: the LoRA does not fit, or a part of it fits nothing.
    """
    if out.exists():
        raise ModelError(f"{out} exists; name a new folder, the merged model is never written over another")
    files = _weight_files(base)
    fitted = fit_lora(lora, _sizes(files))
    if fitted.unmatched:
        raise LoraError(
            f"{len(fitted.unmatched)} keys of {lora} fit no module of {base} (e.g. {fitted.unmatched[0]}); merging a "
            "part of a LoRA gives another model than the one it was trained for"
        )
    note = json.dumps({"lora": lora.name, "scale": scale, "base": base.name}, sort_keys=True)
    with _whole_folder(out) as folder:
        for path in sorted(base.iterdir()):
            if path.is_file() and path not in files:
                shutil.copyfile(path, folder / path.name)
        for path in files:
            _merge_file(path, folder / path.name, fitted.pairs, scale, note)
    return list(fitted.pairs)


def _weight_files(base: Path) -> list[Path]:
    files = sorted(base.glob("*.safetensors")) if (base / "config.json").is_file() else []
    if not files:
        inside = " (that is a pipeline; its transformer folder is meant)" if (base / "transformer").is_dir() else ""
        raise ModelError(f"{base} is no diffusers transformer folder with config.json and *.safetensors{inside}")
    return files


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ModelError(f"{path} cannot be read ({error}); download the base model again") from error


def _sizes(files: list[Path]) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear, from the files' headers; raises :class:`ModelError` for quantised weights."""
    sizes = {}
    for path in files:
        with _opened(path) as file:
            for key in file.keys():
                shape = tuple(file.get_slice(key).get_shape())
                if key.endswith(".weight") and len(shape) == 2:
                    sizes[key.removesuffix(".weight")] = (int(shape[0]), int(shape[1]))
    return sizes


def _merge_file(path: Path, target: Path, pairs: Mapping[str, LoraPair], scale: float, note: str) -> None:
    with _opened(path) as file:
        metadata = dict(file.metadata() or {"format": "pt"})
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    for key, tensor in tensors.items():
        pair = pairs.get(key.removesuffix(".weight")) if key.endswith(".weight") else None
        if pair is not None:
            tensors[key] = _sum(path, key, tensor, pair, scale)
    save_file(tensors, target, metadata={**metadata, "spatialalign_merged": note})


def _sum(path: Path, key: str, weight: Tensor, pair: LoraPair, scale: float) -> Tensor:
    if weight.dtype not in MERGEABLE:
        raise ModelError(
            f"{path}: {key} is stored as {weight.dtype}; a LoRA cannot be added to quantised weights: merge into the "
            "model in bfloat16, float16 or float32"
        )
    total = weight.float() + scale * (pair.up @ pair.down)
    if not torch.isfinite(total).all():
        raise LoraError(f"{key} would hold NaN or infinite values with the LoRA at strength {scale:g}; lower it")
    return total.to(weight.dtype).contiguous()


@contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``out`` that takes its name when the body has succeeded, and is removed if not."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}-{out.name}")
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.iterdir():
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
