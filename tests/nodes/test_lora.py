"""Load Aligned LoRA: what the file says happens to the model, or an error in words."""

from __future__ import annotations

import logging
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

WIDTH, FFN, TEXT = 12, 24, 16
LINEARS = {
    "text_embedding.0": (WIDTH, TEXT),
    **{
        f"blocks.{b}.{kind}_attn.{part}": (WIDTH, WIDTH)
        for b in (0, 1)
        for kind in ("self", "cross")
        for part in "qkvo"
    },
    **{f"blocks.{b}.ffn.0": (FFN, WIDTH) for b in (0, 1)},
}
GRAPH = {
    "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "wan2.2_t2v_high_noise_14B.safetensors"}},
    "2": {"class_type": "SpatialAlignLoadLora", "inputs": {"model": ["1", 0], "lora": "x.safetensors"}},
}


def network() -> torch.nn.Module:
    """Linears under ComfyUI's names for a Wan model of two blocks."""
    root = torch.nn.Module()
    for name, (out, into) in LINEARS.items():
        place = root
        *path, last = name.split(".")
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, torch.nn.Module())
            place = getattr(place, part)
        place.add_module(last, torch.nn.Linear(into, out))
    return root


@pytest.fixture
def node(module: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The node, with a host that adds the update to a copy of the weights at once."""

    def with_lora(model: Any, pairs: Any, strength: float) -> Any:
        patched = deepcopy(model)
        for name, (down, up) in pairs.items():
            patched.model.diffusion_model.get_submodule(name).weight.data += strength * up @ down
        return patched

    monkeypatch.setattr(module("host"), "with_lora", with_lora)
    return module("lora").LoadAlignedLora


@pytest.fixture
def model() -> Any:
    """A MODEL as far as the node looks at it."""
    torch.manual_seed(0)
    return SimpleNamespace(model=SimpleNamespace(diffusion_model=network()))


@pytest.fixture
def loras(fake_host: Any) -> Path:
    """The folder of LoRA files."""
    return Path(fake_host.models) / "loras"


@pytest.fixture
def error(module: Callable[[str], Any]) -> type[Exception]:
    """The pack's LoraError."""
    found: type[Exception] = module("spatialalign.errors").LoraError
    return found


def pair(out: int, into: int, rank: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rank, into), torch.randn(out, rank)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.model.diffusion_model.state_dict())


def test_exactly_the_named_weights_change(run: Any, node: Any, model: Any, loras: Path) -> None:
    """diffusers' own file, which ComfyUI's loader ignores: k of the second block at strength -0.5, and no other."""
    down, up = pair(WIDTH, WIDTH)
    keys = "transformer.blocks.1.attn2.to_k.lora_{}.weight"
    save_file({keys.format("A"): down, keys.format("B"): up}, loras / "x.safetensors")
    before = {name: value.clone() for name, value in weights(model).items()}
    patched, report = run(node, model=model, lora="x.safetensors", strength=-0.5).args
    after = weights(patched)
    changed = [name for name, value in after.items() if not torch.equal(value, before[name])]
    assert changed == ["blocks.1.cross_attn.k.weight"]
    torch.testing.assert_close(after[changed[0]], before[changed[0]] - 0.5 * up @ down)
    assert all(torch.equal(value, before[name]) for name, value in weights(model).items())
    assert report.splitlines()[:2] == ["x.safetensors", "Matched 1 of 1 pairs, rank 4: cross-attention k in 1 block"]
    assert "Strength -0.5" in report
    assert "WARNING" not in report


@pytest.mark.parametrize("file", ["comfy.safetensors", "diffusers.safetensors"])
def test_our_own_files_tell_their_training(
    run: Any, node: Any, model: Any, loras: Path, module: Callable[[str], Any], file: str
) -> None:
    engine = module("spatialalign.lora")
    names = ("condition_embedder.text_embedder.linear_1", "blocks.0.attn2.to_v", "blocks.1.attn2.to_v")
    pairs = {name: engine.LoraPair(*pair(WIDTH, TEXT if name.startswith("c") else WIDTH)) for name in names}
    notes = {"method": "SpatialAlign dpo+sft", "base_model": "miniature", "step": 200, "beta": 50.0, "pairs": 31}
    engine.write_pairs(pairs, loras / "comfy.safetensors", loras / "diffusers.safetensors", notes)
    patched, report = run(node, model=model, lora=file).args
    expected = weights(model)["text_embedding.0.weight"] + pairs[names[0]].up @ pairs[names[0]].down
    torch.testing.assert_close(weights(patched)["text_embedding.0.weight"], expected)
    assert "Matched 3 of 3 pairs, rank 4: cross-attention v in 2 blocks; text embedding" in report
    assert "For the base model miniature" in report
    assert "Trained with SpatialAlign dpo+sft, 200 steps, 31 pairs, beta 50.0" in report


def test_strength_0_hands_the_model_on(run: Any, node: Any, model: Any, loras: Path) -> None:
    down, up = pair(WIDTH, WIDTH)
    save_file({"blocks.0.self_attn.q.lora_A": down, "blocks.0.self_attn.q.lora_B": up}, loras / "x.safetensors")
    same, report = run(node, model=model, lora="x.safetensors", strength=0.0).args
    assert same is model
    assert "handed on unchanged" in report


def test_nothing_matched_is_an_error_with_names(run: Any, node: Any, model: Any, loras: Path, error: Any) -> None:
    save_file({"lora_unet_double_blocks_0_qkv.lora_down.weight": torch.zeros(4, 4)}, loras / "x.safetensors")
    with pytest.raises(error, match=r"0 of 1 keys.*double_blocks_0_qkv.*the model has text_embedding\.0, blocks\.0"):
        run(node, model=model, lora="x.safetensors")
    flux = SimpleNamespace(model=SimpleNamespace(diffusion_model=torch.nn.Sequential(torch.nn.Linear(4, 4))))
    with pytest.raises(error, match="none of Wan's layers.*connect a native Wan model"):
        run(node, model=flux, lora="x.safetensors")


def test_another_model_size_is_an_error_with_both_sizes(
    run: Any, node: Any, model: Any, loras: Path, error: Any
) -> None:
    down, up = pair(5120, 5120, rank=1)
    keys = "diffusion_model.blocks.0.cross_attn.k.lora_{}.weight"
    save_file({keys.format("A"): down, keys.format("B"): up}, loras / "x.safetensors")
    with pytest.raises(error, match=r"12x12 here and 5120x5120 \(Wan 14B\) in the file; load it on the model"):
        run(node, model=model, lora="x.safetensors")


def test_a_part_that_does_not_fit_is_warned_of(
    run: Any, node: Any, model: Any, loras: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A LoRA of three blocks on a model of two: applied as far as it goes, and said in the report and in the log."""
    tensors = {}
    for block in range(3):
        down, up = pair(WIDTH, WIDTH)
        key = f"lora_unet__blocks_{block}_cross_attn_k"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
    save_file(tensors, loras / "x.safetensors")
    with caplog.at_level(logging.WARNING, logger="spatialalign"):
        patched, report = run(node, model=model, lora="x.safetensors").args
    assert not torch.equal(
        weights(patched)["blocks.1.cross_attn.k.weight"], weights(model)["blocks.1.cross_attn.k.weight"]
    )
    assert "Matched 2 of 3 pairs" in report
    assert "WARNING: 1 of 3 pairs fit no layer" in report
    assert any(
        "1 of 3 pairs fit no layer" in record.message for record in caplog.records if record.name == "spatialalign"
    )


def test_a_base_of_another_name_is_warned_of(run: Any, node: Any, model: Any, loras: Path, module: Any) -> None:
    engine = module("spatialalign.lora")
    pairs = {"blocks.0.attn2.to_v": engine.LoraPair(*pair(WIDTH, WIDTH))}
    notes = {"base_model": "Wan-AI/Wan2.1-T2V-14B-Diffusers"}
    engine.write_pairs(pairs, loras / "x.safetensors", loras / "y.safetensors", notes)
    hidden = {"prompt": GRAPH, "unique_id": "2"}
    report = run(node, hidden=hidden, model=model, lora="x.safetensors").args[1]
    assert "WARNING: it was trained on Wan-AI/Wan2.1-T2V-14B-Diffusers" in report
    assert "the model here is wan2.2_t2v_high_noise_14B.safetensors: another version" in report


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blocks.0.self_attn.q.lora_magnitude_vector": torch.zeros(WIDTH)}, "DoRA"),
        ({"blocks.0.self_attn.q.lora_A.weight": torch.zeros(4, WIDTH)}, "A and B are needed"),
    ],
)
def test_other_adapters_and_halves_are_refused(
    run: Any, node: Any, model: Any, loras: Path, error: Any, tensors: dict[str, torch.Tensor], message: str
) -> None:
    save_file(tensors, loras / "x.safetensors")
    with pytest.raises(error, match=message):
        run(node, model=model, lora="x.safetensors")


def test_files_that_cannot_be_read(run: Any, node: Any, model: Any, loras: Path, error: Any, module: Any) -> None:
    save_file({"blocks.0.self_attn.q.lora_A": torch.zeros(4, WIDTH)}, loras / "x.safetensors")
    (loras / "x.safetensors").write_bytes((loras / "x.safetensors").read_bytes()[:-8])
    with pytest.raises(error, match=r"x\.safetensors is not a readable.*cut short"):
        run(node, model=model, lora="x.safetensors")
    for name in ("../x.safetensors", str(loras / "x.safetensors"), "absent.safetensors"):
        with pytest.raises(module("spatialalign.errors").SpatialAlignError, match="models/loras"):
            run(node, model=model, lora=name)


def test_a_file_that_was_trained_anew_is_loaded_anew(node: Any, loras: Path) -> None:
    file = loras / "x.safetensors"
    save_file({"a": torch.zeros(4)}, file)
    before = node.fingerprint_inputs(model=None, lora="x.safetensors", strength=1.0)
    assert node.fingerprint_inputs(model=None, lora="x.safetensors", strength=1.0) == before
    save_file({"a": torch.zeros(5)}, file)
    assert node.fingerprint_inputs(model=None, lora="x.safetensors", strength=1.0) != before
