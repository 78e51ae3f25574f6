"""The part of ComfyUI's declarative node interface that the pack uses."""

from __future__ import annotations

from abc import ABC, abstractmethod

from . import _io as io
from . import _ui as ui

__all__ = ["ComfyExtension", "io", "ui"]


class ComfyExtension(ABC):
    """What a pack's ``comfy_entrypoint`` returns."""

    @abstractmethod
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The nodes of the pack."""
