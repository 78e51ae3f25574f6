"""A real ComfyUI. These tests run when ``SPATIALALIGN_COMFYUI`` names a source tree of it and are skipped otherwise.

The interpreter must have ComfyUI's own requirements, and diffusers and peft beside them for the comparisons.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

COMFYUI = os.environ.get("SPATIALALIGN_COMFYUI")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is in this folder, where there is no ComfyUI."""
    if not COMFYUI:
        skip = pytest.mark.skip(reason="SPATIALALIGN_COMFYUI does not name a ComfyUI source tree to try the nodes in")
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The root of ComfyUI's source tree."""
    assert COMFYUI
    root = Path(COMFYUI).resolve()
    if not (root / "comfy_api" / "latest").is_dir():
        pytest.fail(f"SPATIALALIGN_COMFYUI={COMFYUI} is not a source tree of ComfyUI: it has no comfy_api/latest")
    return root


@pytest.fixture(scope="session")
def comfy(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """ComfyUI imported into this process, on the processor, its models and outputs below the folder returned."""
    base = tmp_path_factory.mktemp("comfyui")
    with pytest.MonkeyPatch.context() as patch:
        # Before this repository, whose folder "nodes" has the name of a module of ComfyUI.
        patch.syspath_prepend(comfyui)
        _start(comfyui, base)
        yield base


def _start(comfyui: Path, base: Path) -> None:
    from comfy.cli_args import args

    args.cpu, args.base_directory = True, str(base)
    import folder_paths

    import nodes

    assert Path(str(nodes.__file__)).parent == comfyui
    for name, folder in (("input", "input"), ("output", "output"), ("temp", "temp")):
        (base / folder).mkdir(exist_ok=True)
        getattr(folder_paths, f"set_{name}_directory")(str(base / folder))
    folder_paths.models_dir = str(base / "models")
    (base / "models" / "loras").mkdir(parents=True)
    folder_paths.add_model_folder_path("loras", str(base / "models" / "loras"), is_default=True)


@pytest.fixture(scope="session")
def load_pack(comfy: Path) -> Callable[[Path], ModuleType]:
    """Load a custom node's folder with ComfyUI's own loader; fails when ComfyUI would only log the failure."""

    def load(folder: Path) -> ModuleType:
        import nodes

        assert asyncio.run(nodes.load_custom_node(str(folder))), f"ComfyUI did not load {folder}"
        return sys.modules[str(folder).replace(".", "_x_")]

    return load


@pytest.fixture(scope="session")
def pack(load_pack: Callable[[Path], ModuleType], comfy: Path, repo_root: Path) -> ModuleType:
    """The pack, loaded from a folder whose name is no Python name."""
    folder = comfy / "custom_nodes" / "spatial-align v1.2"
    folder.parent.mkdir()
    folder.symlink_to(repo_root, target_is_directory=True)
    return load_pack(folder)


@pytest.fixture(scope="session")
def module(pack: ModuleType) -> Callable[[str], ModuleType]:
    """``module("nodes.host")`` is that module of the loaded pack."""
    return lambda name: importlib.import_module(f"{pack.__name__}.{name}")


@pytest.fixture(scope="session")
def execute(comfy: Path) -> Callable[..., tuple[Any, ...]]:
    """``execute(node, **inputs)``: a node's outputs, of a copy of its class and in inference mode, as in the host."""
    import torch

    @torch.inference_mode()
    def run(node: Any, **inputs: Any) -> tuple[Any, ...]:
        return tuple(node.PREPARE_CLASS_CLONE({"hidden_inputs": {}}).EXECUTE_NORMALIZED(**inputs).result)

    return run


@pytest.fixture(scope="session")
def miniature(
    module: Callable[[str], ModuleType], execute: Callable[..., tuple[Any, ...]], miniature_weights: Path
) -> SimpleNamespace:
    """What Load Miniature hands out: ``model``, ``clip``, ``vae`` and ``grounded_sam``."""
    outputs = execute(module("nodes.miniature").LoadMiniature)
    return SimpleNamespace(**dict(zip(("model", "clip", "vae", "grounded_sam"), outputs, strict=True)))


@pytest.fixture(scope="session")
def backbone(miniature_weights: Path) -> Any:
    """The same weights through diffusers and transformers."""
    from spatialalign.backbones.wan import WanBackbone

    return WanBackbone.from_pretrained(miniature_weights / "wan", device="cpu")


@pytest.fixture(scope="session")
def prompt() -> str:
    """A sentence about things that the miniature has seen."""
    return "In a sunny meadow, a cat is on the left of a barrel, then the cat walks to the right of the barrel."


@pytest.fixture(scope="session")
def conditioning(miniature: SimpleNamespace, prompt: str) -> Any:
    """The prompt as ComfyUI's CLIPTextEncode makes it."""
    import torch

    import nodes

    with torch.inference_mode():
        return nodes.CLIPTextEncode().encode(miniature.clip, prompt)[0]
