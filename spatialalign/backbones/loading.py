"""Reading a diffusers pipeline folder or hub id: what it is, whether all of it is there, and its parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, ModelError
from ..files import read_json
from .base import SampleSettings

INDEX = "model_index.json"

SETTINGS_FILE = "spatialalign.json"
"""Optional file in a model folder: ``fps`` and any of the fields of :class:`SampleSettings`."""


def pick_device(device: str) -> str:
    """Resolve ``"auto"`` to CUDA, MPS or CPU, in this order of preference."""
    if device != "auto":
        return device
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def pick_dtype(dtype: str, device: str) -> torch.dtype:
    """Resolve a dtype name; ``"auto"`` is bfloat16 on CUDA and float32 elsewhere."""
    if dtype == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise ConfigError(f"dtype must be auto, {', '.join(known)}; found {dtype!r}")
    return known[dtype]


def read_index(source: str) -> dict[str, Any]:
    """The ``model_index.json`` of a pipeline: its ``_class_name``, and library and class of each part.

    Raises:
        ModelError: there is none, or ``source`` is neither a folder nor of the form of a hub id.
    """
    if Path(source).is_dir():
        index = Path(source) / INDEX
        if not index.is_file():
            raise ModelError(f"{source} has no {INDEX}, so it is not a diffusers pipeline folder")
        return read_json(index)
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise ModelError(
            f"{source} is neither a folder nor a hub id of the form owner/name; "
            "give a diffusers pipeline folder (Wan or LTX-Video), a hub id, or 'miniature'"
        )
    from diffusers import DiffusionPipeline

    return load_part(source, INDEX, lambda: dict(DiffusionPipeline.load_config(source)))


def check_parts(source: str, index: Mapping[str, Any], parts: Mapping[str, str | None]) -> None:
    """See that a pipeline has its parts, of the right classes, and that a folder holds their files.

    ``parts`` are class names by part, None for any. Raises :class:`ModelError` naming what is missing.
    """
    for part, expected in parts.items():
        found = (index.get(part) or [None, None])[1]
        if expected is not None and found != expected:
            raise ModelError(f"{source}/{INDEX} names {found} as {part}, expected {expected}")
        if Path(source).is_dir():
            _check_files(Path(source), part)


def _check_files(folder: Path, part: str) -> None:
    files = list((folder / part).glob("*"))
    if not files:
        raise ModelError(f"{folder} lacks its part {part!r} (no files in {folder / part}); copy it there again")
    if part != "tokenizer":
        if not (folder / part / "config.json").is_file():
            raise ModelError(f"{folder / part} lacks config.json; copy the folder again")
        if not any(file.suffix in (".safetensors", ".bin") for file in files):
            raise ModelError(f"{folder / part} lacks weights (*.safetensors); copy the folder again")


def load_part(source: str, part: str, load: Callable[[], Any]) -> Any:
    """Run ``load``; whatever it raises becomes a :class:`ModelError` that names the part."""
    try:
        return load()
    except ModelError:
        raise
    except Exception as error:  # the libraries raise many kinds, with messages that do not name the part
        raise ModelError(f"the part {part!r} of {source} cannot be loaded: {type(error).__name__}: {error}") from error


def load_model(model: Any, source: str, part: str, dtype: torch.dtype) -> Any:
    """A part of a pipeline, of the diffusers class ``model``."""
    return load_part(source, part, lambda: model.from_pretrained(source, subfolder=part, torch_dtype=dtype))


def load_text(encoder: Any, source: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Tokenizer and text encoder, the latter of the transformers class ``encoder``."""
    from transformers import AutoTokenizer

    tokenizer = load_part(source, "tokenizer", lambda: AutoTokenizer.from_pretrained(source, subfolder="tokenizer"))
    model = load_part(
        source, "text_encoder", lambda: encoder.from_pretrained(source, subfolder="text_encoder", dtype=dtype)
    )
    return tokenizer, model


def read_settings(source: str, default: SampleSettings, fps: float) -> tuple[SampleSettings, float]:
    """Default settings and frames per second of a model: the given ones, with those of its ``spatialalign.json``."""
    path = Path(source) / SETTINGS_FILE
    if not path.is_file():
        return default, fps
    values = read_json(path)
    fps = float(values.pop("fps", fps))
    try:
        return dataclasses.replace(default, **values), fps
    except TypeError as error:
        known = ", ".join(["fps", *SampleSettings.__dataclass_fields__])
        raise ModelError(f"{path} holds an unknown key ({error}); known keys: {known}") from error
