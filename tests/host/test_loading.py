"""The pack through ComfyUI's own loader of custom nodes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


def _ids(pack: ModuleType) -> list[str]:
    extension = importlib.import_module(f"{pack.__name__}.nodes.extension")
    return [node.GET_SCHEMA().node_id for node in extension.NODES]


@pytest.mark.parametrize("name", ["SpatialAlign", "spatial-align", "Spatial Align 0.1.0", "räumlich"])
def test_it_loads_from_a_folder_of_any_name(
    load_pack: Callable[[Path], ModuleType], tmp_path: Path, repo_root: Path, name: str
) -> None:
    import nodes

    (tmp_path / name).symlink_to(repo_root, target_is_directory=True)
    pack = load_pack(tmp_path / name)
    registered = [
        key
        for key, node in nodes.NODE_CLASS_MAPPINGS.items()
        if getattr(node, "RELATIVE_PYTHON_MODULE", "") == f"custom_nodes.{name}"
    ]
    assert sorted(registered) == sorted(_ids(pack))
    assert nodes.NODE_DISPLAY_NAME_MAPPINGS["SpatialAlignLoadMiniature"] == "Load Miniature"


def test_help_pages_are_served(pack: ModuleType) -> None:
    import nodes

    served = Path(nodes.EXTENSION_WEB_DIRS["spatial-align v1.2"])
    assert sorted(path.stem for path in (served / "docs").glob("SpatialAlign*.md")) == sorted(_ids(pack))


def test_the_pack_takes_no_name_of_the_host(pack: ModuleType, comfyui: Path) -> None:
    import nodes

    assert Path(str(nodes.__file__)).parent == comfyui
    assert nodes.NODE_CLASS_MAPPINGS["KSampler"].__module__ == "nodes"
