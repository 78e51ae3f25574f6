"""Scores in a LoRA file: written into both formats, seen in neither's tensors nor in its identity."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spatialalign.lora import LoraPair, adapter_metadata, read_lora, write_pairs
from spatialalign.lora_record import record_scores, tensors_digest

K = "blocks.0.attn2.to_k"
SCORES = {"prompts": 2, "seeds": [7], "strength": 1.0, "base": {"mean_score": None}, "aligned": {"mean_score": 0.5}}


def write(folder: Path, notes: dict[str, object], stem: str = "lora") -> tuple[Path, Path]:
    generator = torch.Generator().manual_seed(0)
    pair = LoraPair(torch.randn(4, 12, generator=generator), torch.randn(12, 4, generator=generator))
    comfy, diffusers = (folder / f"{stem}_{name}.safetensors" for name in ("comfyui", "diffusers"))
    write_pairs({K: pair}, comfy, diffusers, notes)
    return comfy, diffusers


@pytest.mark.parametrize("first", [0, 1], ids=["comfyui", "diffusers"])
def test_both_formats_get_the_scores_and_keep_the_rest(tmp_path: Path, first: int) -> None:
    files = write(tmp_path, {"base_model": "tiny", "step": 7})
    before = {file: (load_file(file), read_lora(file)[1], tensors_digest(file)) for file in files}
    assert record_scores(files[first], {"prompts": 1}) == [files[first], files[1 - first]]
    assert set(record_scores(files[first], SCORES)) == set(files), "a later evaluation replaces the former"
    for file in files:
        tensors, metadata, digest = before[file]
        assert adapter_metadata(file) == {"base_model": "tiny", "step": 7, "scores": SCORES}
        assert {**read_lora(file)[1], "spatialalign": ""} == {**metadata, "spatialalign": ""}
        found = load_file(file)
        assert found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in tensors)
        assert tensors_digest(file) == digest
    times = [file.stat().st_mtime_ns for file in files]
    record_scores(files[0], json.loads(json.dumps(SCORES)))
    assert [file.stat().st_mtime_ns for file in files] == times, "what is there is not written again"


def test_files_of_others_and_links_are_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign_comfyui.safetensors"
    save_file({f"{K}.lora_A.weight": torch.zeros(1, 2)}, foreign, metadata={"modelspec.title": "Mine"})
    torch.save({f"{K}.lora_A.weight": torch.zeros(1, 2)}, tmp_path / "a.ckpt")
    comfy, diffusers = write(tmp_path, {"step": 7})
    link = tmp_path / "link.safetensors"
    link.symlink_to(comfy)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for path in (foreign, tmp_path / "a.ckpt", link):
        assert record_scores(path, SCORES) == []
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

    write(tmp_path / "other", {"step": 8})
    (tmp_path / "other" / diffusers.name).replace(diffusers)
    assert record_scores(comfy, SCORES) == [comfy]
    assert "scores" not in adapter_metadata(diffusers), "another training's file under the twin's name"


def test_the_digest_is_of_names_types_shapes_and_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6, dtype=torch.float32), "a": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"x": "1"})
    digest = tensors_digest(tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "a.ckpt")
    assert tensors_digest(tmp_path / "a.ckpt") == digest, "the same tensors in another container"
    others = (
        {"b": tensors["b"], "c": tensors["a"]},
        {**tensors, "b": tensors["b"].view(torch.int32)},
        {**tensors, "b": tensors["b"].reshape(2, 3)},
        {**tensors, "b": tensors["b"] + 1},
    )
    found = {digest}
    for number, other in enumerate(others):
        save_file(other, tmp_path / f"{number}.safetensors")
        found.add(tensors_digest(tmp_path / f"{number}.safetensors"))
    assert len(found) == 5
