"""Models that a scoring node loads by itself, kept from one clip to the next.

What a loader node hands out is kept by ComfyUI; a node without a loader must keep it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import host

NONE = "none"
"""The choice of no model."""


@dataclass(frozen=True)
class _Held:
    """What was loaded from which files, and the host's patcher about its model."""

    files: str
    measure: Any
    patcher: Any


class Kept:
    """The last model of each kind. The host takes it off the device when it needs the room, as any model.

    For an attribute of a node's class: ComfyUI runs the node on copies of the class, which share it. It never holds two
    models of a kind.
    """

    def __init__(self) -> None:
        self._held: dict[str, _Held] = {}

    def ready(self, folder: str, name: str, load: Callable[[Path], Any]) -> Any:
        """What ``load`` makes of ``models/<folder>/<name>``, its ``model`` on the device; loaded anew if files changed.

        Raises:
            ModelError: it is not there, or ``load`` cannot read it.
        """
        path = host.model_path(folder, name)
        files = f"{path} {file_times(path)}"
        if folder not in self._held or self._held[folder].files != files:
            self.drop(folder)  # before the next one needs the room
            measure = load(path)
            self._held[folder] = _Held(files, measure, host.patcher(measure.model))
        host.check_interrupt()
        host.load([self._held[folder].patcher])
        return self._held[folder].measure

    def drop(self, folder: str) -> None:
        """Let go of the model of a kind, if there is one."""
        self._held.pop(folder, None)


def model_folders(folder: str) -> list[str]:
    """Models in ``models/<folder>`` that are folders."""
    return [name for name in host.model_names(folder) if host.model_path(folder, name).is_dir()]


def file_times(folder: Path) -> str:
    """The files of a model's folder and when they were written, in a text to compare."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return " ".join(f"{path.relative_to(folder)}-{path.stat().st_mtime_ns}" for path in files)
