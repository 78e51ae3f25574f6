"""What is written into a LoRA file after its training: its tensors stay, and with them its identity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import atomic_path
from .lora import adapter_metadata, read_lora, training_notes


def tensors_digest(path: str | Path) -> str:
    """SHA-256, hexadecimal, of a LoRA file's tensors: names, types, shapes and bytes, nothing of its metadata."""
    import torch

    tensors, _ = read_lora(path)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\n{tensor.dtype}\n{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def record_scores(path: str | Path, scores: Mapping[str, Any]) -> list[Path]:
    """Write ``scores`` into the notes of a LoRA file of this project, and of its twin in the other format beside it.

    The twin is ``..._diffusers.safetensors`` for ``..._comfyui.safetensors`` and the reverse; it is left alone
    when its notes are another LoRA's. Each file is whole at any time, and its tensors keep their bytes.

    Returns:
        The files that hold the scores now; none where ``path`` has no notes of this project, or is a link.
    """
    path = Path(path)
    notes = {} if path.is_symlink() else _without_scores(path)  # what a link leads to may be in other hands
    if not notes:
        return []
    files = [path]
    twin = _other_format(path)
    if twin is not None and twin.is_file() and not twin.is_symlink() and _without_scores(twin) == notes:
        files.append(twin)
    for file in files:
        _write_note(file, "scores", dict(scores))
    return files


def _without_scores(path: Path) -> dict[str, Any]:
    return {key: value for key, value in adapter_metadata(path).items() if key != "scores"}


def _other_format(path: Path) -> Path | None:
    for one, other in (("comfyui", "diffusers"), ("diffusers", "comfyui")):
        if path.stem.endswith(one):
            return path.with_name(f"{path.stem.removesuffix(one)}{other}{path.suffix}")
    return None


def _write_note(path: Path, key: str, value: Any) -> None:
    from safetensors.torch import save_file

    tensors, metadata = read_lora(path)
    notes = training_notes(metadata)
    if notes.get(key) == value:
        return
    with atomic_path(path) as temporary:
        note = json.dumps({**notes, key: value}, sort_keys=True, allow_nan=False)
        save_file(tensors, temporary, metadata={**metadata, "spatialalign": note})
