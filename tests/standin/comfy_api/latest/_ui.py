"""Results for the user interface. Pictures are written to ``folder_paths``' temporary folder, as the host does."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

from ._nodes import ComfyNode, UIOutput
from ._types import FolderType

__all__ = ["PreviewImage", "PreviewText", "PreviewVideo", "SavedImages", "SavedResult"]


class SavedResult(dict[str, str]):
    """Where a file was saved, as the user interface asks for it."""

    def __init__(self, filename: str, subfolder: str, type: FolderType) -> None:
        super().__init__(filename=filename, subfolder=subfolder, type=type.value)


class SavedImages(UIOutput):
    """Files that a node wrote itself."""

    def __init__(self, results: list[SavedResult], is_animated: bool = False) -> None:
        self.results = results
        self.is_animated = is_animated

    def as_dict(self) -> dict[str, Any]:
        return {"images": self.results} | ({"animated": (True,)} if self.is_animated else {})


class PreviewText(UIOutput):
    """A text under the node."""

    def __init__(self, value: str) -> None:
        self.value = value

    def as_dict(self) -> dict[str, Any]:
        return {"text": (self.value,)}


class PreviewVideo(UIOutput):
    """A video that a node wrote itself."""

    def __init__(self, values: list[SavedResult]) -> None:
        self.values = values

    def as_dict(self) -> dict[str, Any]:
        return {"images": self.values, "animated": (True,)}


class PreviewImage(UIOutput):
    """IMAGE (T, H, W, C), 0..1, written as PNG files."""

    def __init__(self, image: Any, animated: bool = False, cls: type[ComfyNode] | None = None) -> None:
        from PIL import Image

        # The host writes the prompt into the file: it takes it from the class that asks for the preview.
        if cls is not None and not issubclass(cls, ComfyNode):
            raise TypeError(f"cls is the node's class, not {cls!r}")
        folder = Path(sys.modules["folder_paths"].get_temp_directory())
        self.values = []
        for picture in image:
            name = f"{uuid4().hex}.png"
            Image.fromarray((picture.cpu().numpy() * 255).clip(0, 255).astype("uint8")).save(folder / name)
            self.values.append(SavedResult(name, "", FolderType.temp))
        self.animated = animated

    def as_dict(self) -> dict[str, Any]:
        return {"images": self.values, "animated": (self.animated,)}
