"""The pack's functions of the host, on the host."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def host(module: Callable[[str], ModuleType]) -> ModuleType:
    """``nodes.host`` of the loaded pack."""
    return module("nodes.host")


@pytest.fixture
def models(comfy: Path) -> Path:
    """``models`` with a snapshot, single files and things that are no models."""
    folder = comfy / "models" / "grounding-dino"
    for name in (
        "tiny/config.json",
        "tiny/model.safetensors",
        "hub/large/config.json",
        "hub/large/pytorch_model.bin",
        "swint.pth",
        "notes.txt",
        ".cache/part.bin",
    ):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return comfy / "models"


def test_folders(host: ModuleType, comfy: Path) -> None:
    assert host.input_directory() == comfy / "input"
    assert host.output_directory() == comfy / "output"
    assert host.temp_directory() == comfy / "temp"


def test_names_are_files_and_snapshots(host: ModuleType, models: Path) -> None:
    assert host.model_names("grounding-dino") == ["hub/large", "swint.pth", "tiny"]
    assert host.model_names("sam2") == []
    assert host.model_path("grounding-dino", "hub/large") == models / "grounding-dino" / "hub" / "large"


def test_a_users_extra_folder_stays(host: ModuleType, models: Path, tmp_path: Path) -> None:
    import folder_paths

    folder_paths.add_model_folder_path("sams", str(tmp_path), is_default=True)
    (tmp_path / "sam_vit_b.pth").write_bytes(b"")
    assert host.model_names("sams") == ["sam_vit_b.pth"]
    assert host.model_path("sams", "sam_vit_b.pth") == tmp_path / "sam_vit_b.pth"
    assert folder_paths.get_folder_paths("sams") == [str(tmp_path), str(models / "sams")]


@pytest.mark.parametrize("name", ["", ".", "..", "../secret.pth", "tiny/../../secret.pth", "/etc/passwd"])
def test_names_that_leave_the_folder_are_refused(host: ModuleType, models: Path, name: str) -> None:
    (models / "secret.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="is not a name inside models/grounding-dino"):
        host.model_path("grounding-dino", name)


def test_a_missing_model_says_where_to_put_it(host: ModuleType, models: Path) -> None:
    with pytest.raises(ValueError, match=f"large.pt is not in models/sam2; put the file.*{models / 'sam2'}"):
        host.model_path("sam2", "large.pt")


def test_loras(host: ModuleType, models: Path) -> None:
    (models / "loras" / "mine").mkdir(exist_ok=True)
    (models / "loras" / "mine" / "one.safetensors").write_bytes(b"")
    assert "mine/one.safetensors" in host.lora_names()
    assert host.lora_path("mine/one.safetensors") == models / "loras" / "mine" / "one.safetensors"


def test_a_transformers_model_is_loaded_and_released(host: ModuleType, miniature_weights: Path) -> None:
    """Such a model has a ``device`` that cannot be set, which the host's patcher would do to a bare model."""
    import comfy.model_management
    import torch
    from transformers import SamModel

    model = SamModel.from_pretrained(miniature_weights / "segmenter")
    patcher = host.patcher(model)
    assert patcher.model_size() == sum(tensor.nbytes for tensor in model.state_dict().values())
    assert host.load([patcher], memory=1 << 20) == torch.device("cpu")
    assert patcher in comfy.model_management.loaded_models()
    comfy.model_management.unload_all_models()
    assert patcher not in comfy.model_management.loaded_models()


def test_progress_reaches_the_bar_and_stops_on_request(host: ModuleType) -> None:
    import comfy.model_management
    import comfy.utils

    seen = []

    def hook(done: int, total: int, preview: object, node_id: object = None) -> None:
        seen.append((done, total))

    before = comfy.utils.PROGRESS_BAR_HOOK
    comfy.utils.set_progress_bar_global_hook(hook)
    try:
        progress = host.Progress(2)
        progress.update(1)
        comfy.model_management.interrupt_current_processing()
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            progress.update(2)
        host.check_interrupt()  # one request stops one thing
    finally:
        comfy.utils.set_progress_bar_global_hook(before)
    assert seen == [(1, 2)]


def test_intermediate_is_float32(host: ModuleType) -> None:
    import torch

    assert host.intermediate(torch.ones(2, dtype=torch.bfloat16)).dtype == torch.float32
