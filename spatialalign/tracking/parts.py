"""What a model folder must hold, said in file names when it does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from ..errors import ModelError

T = TypeVar("T")

Progress = Callable[[int, int], None]
"""``progress(done, total)``, called as frames are finished. What it raises ends the work and reaches the caller."""

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
PROCESSOR = ("processor_config.json", "preprocessor_config.json")
TOKENIZER = ("tokenizer.json", "vocab.txt")


def require(folder: Path, parts: Sequence[str | Sequence[str]]) -> None:
    """Raise :class:`ModelError` naming the first part that ``folder`` lacks; a tuple means one of these names."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such model folder; check the path, or build or download the model")
    for part in parts:
        names = (part,) if isinstance(part, str) else tuple(part)
        if not any((folder / name).is_file() for name in names):
            raise ModelError(f"{folder}: the model folder lacks {' or '.join(names)}; restore the file or the folder")


def guarded(name: str, build: Callable[[], T]) -> T:
    """Run a library's loader; what it raises for missing or unfit files becomes a :class:`ModelError` with ``name``."""
    from safetensors import SafetensorError

    try:
        return build()
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{name}: the model cannot be loaded ({type(error).__name__}: {error})") from error


def require_local(name: str | Path, parts: Sequence[str | Sequence[str]]) -> None:
    """:func:`require` when ``name`` is a folder here; a hub id is left to the library's download."""
    if Path(name).is_dir():
        require(Path(name), parts)
