"""LoRA dialects: every one must change a model by the same known amount, or be refused in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from spatialalign.errors import LoraError
from spatialalign.lora import (
    LoraPair,
    adapter_metadata,
    diffusers_name,
    load_lora,
    original_name,
    parse_lora,
    read_lora,
    save_lora,
    unload_lora,
    write_pairs,
)

K = "blocks.0.attn2.to_k"
TEXT = "condition_embedder.text_embedder.linear_1"


def tiny(text_dim: int = 16) -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=12, text_dim=text_dim, freq_dim=16, ffn_dim=24, num_layers=2
    ).eval()


@pytest.fixture
def model() -> WanTransformer3DModel:
    return tiny()


@pytest.fixture
def pairs() -> dict[str, LoraPair]:
    generator = torch.Generator().manual_seed(1)
    return {
        K: LoraPair(torch.randn(4, 12, generator=generator), torch.randn(12, 4, generator=generator)),
        TEXT: LoraPair(torch.randn(4, 16, generator=generator), torch.randn(12, 4, generator=generator)),
    }


def velocity(model: WanTransformer3DModel) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x, text = torch.randn(1, 16, 2, 4, 4, generator=generator), torch.randn(1, 6, 16, generator=generator)
    with torch.no_grad():
        return model(x, torch.tensor([500.0]), text, return_dict=False)[0]


def merged(pairs: dict[str, LoraPair]) -> Tensor:
    """The independent truth: the update added to the weights of a fresh model by hand."""
    model = tiny()
    with torch.no_grad():
        for name, pair in pairs.items():
            model.get_submodule(name).weight += pair.up @ pair.down
    return velocity(model)


def dialect(pairs: dict[str, LoraPair], name: str) -> dict[str, Tensor]:
    """The same update in the spelling of a dialect; alphas are set so that undoing them matters."""
    out: dict[str, Tensor] = {}
    for module, pair in pairs.items():
        original = original_name(module)
        assert original is not None
        if name == "official lora_only":
            out |= {f"{original}.lora_A.default.weight": pair.down, f"{original}.lora_B.default.weight": pair.up}
        elif name == "comfy with alpha":
            key = f"diffusion_model.{original}"
            out |= {f"{key}.lora_down.weight": pair.down, f"{key}.lora_up.weight": pair.up * 2}
            out[f"{key}.alpha"] = torch.tensor(2.0)  # rank 4: scale 1/2
        elif name == "peft":
            out |= {f"base_model.model.{module}.lora_A.weight": pair.down}
            out |= {f"base_model.model.{module}.lora_B.weight": pair.up}
        elif name == "kohya":
            key = "lora_unet_" + original.replace(".", "_")
            out |= {f"{key}.lora_down.weight": pair.down, f"{key}.lora_up.weight": pair.up}
            out[f"{key}.alpha"] = torch.tensor(4.0)
        elif name == "no prefix, diffusers names":
            out |= {f"{module}.lora.down.weight": pair.down, f"{module}.lora.up.weight": pair.up}
    return out


@pytest.mark.parametrize(
    "name", ["official lora_only", "comfy with alpha", "peft", "kohya", "no prefix, diffusers names"]
)
def test_every_dialect_loads_to_the_same_update(
    model: WanTransformer3DModel, pairs: dict[str, LoraPair], tmp_path: Path, name: str
) -> None:
    save_file(dialect(pairs, name), tmp_path / "lora.safetensors")
    loaded = load_lora(model, tmp_path / "lora.safetensors")
    assert set(loaded.modules) == set(pairs)
    assert loaded.unmatched == ()
    torch.testing.assert_close(velocity(model), merged(pairs), atol=1e-5, rtol=1e-5)


def test_the_official_checkpoint_file_loads_without_running_code(
    model: WanTransformer3DModel, pairs: dict[str, LoraPair], tmp_path: Path
) -> None:
    torch.save(dialect(pairs, "official lora_only"), tmp_path / "step=02400.lora_only.ckpt")
    load_lora(model, tmp_path / "step=02400.lora_only.ckpt")
    torch.testing.assert_close(velocity(model), merged(pairs), atol=1e-5, rtol=1e-5)

    torch.save({"x": Path("/")}, tmp_path / "code.ckpt")
    with pytest.raises(LoraError, match="never run"):
        read_lora(tmp_path / "code.ckpt")


def test_written_files_hold_the_trained_adapter(model: WanTransformer3DModel, tmp_path: Path) -> None:
    """An adapter with alpha 8 at rank 4 (scale 2): both files reproduce it, by our loader and by diffusers' own."""
    from peft import LoraConfig

    model.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=[K, TEXT]), adapter_name="trained")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    expected = velocity(model)
    comfy, diffusers = tmp_path / "comfy.safetensors", tmp_path / "diffusers.safetensors"
    save_lora(model, comfy, diffusers, {"base_model": "tiny", "step": 7}, adapter="trained")

    assert set(load_file(comfy)) == {
        f"diffusion_model.{name}.lora_{part}.weight"
        for name in ("blocks.0.cross_attn.k", "text_embedding.0")
        for part in "AB"
    }
    for path in (comfy, diffusers):
        fresh = tiny()
        load_lora(fresh, path)
        torch.testing.assert_close(velocity(fresh), expected, atol=1e-5, rtol=1e-5)
        assert adapter_metadata(path) == {"base_model": "tiny", "step": 7}
    fresh = tiny()
    fresh.load_lora_adapter(str(tmp_path), prefix="transformer", weight_name=diffusers.name)
    torch.testing.assert_close(velocity(fresh), expected, atol=1e-5, rtol=1e-5)
    with safe_open(diffusers, "pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    assert (config["transformer.r"], config["transformer.lora_alpha"]) == (4, 4)


def test_diffusers_pipeline_reads_the_comfy_file(tmp_path: Path, pairs: dict[str, LoraPair]) -> None:
    from diffusers import WanPipeline

    # diffusers' converter wants every cross-attention k and v beside the text embedding, as a trained LoRA has them
    full = dict(pairs)
    cross = [f"blocks.{number}.attn2.to_{part}" for number in (0, 1) for part in "kv"]
    for module in ("condition_embedder.text_embedder.linear_2", *cross):
        full[module] = LoraPair(torch.randn(4, 12), torch.randn(12, 4))
    write_pairs(full, tmp_path / "comfy.safetensors", tmp_path / "diffusers.safetensors", {})
    model = tiny()
    state = WanPipeline.lora_state_dict(str(tmp_path), weight_name="comfy.safetensors")
    model.load_lora_adapter(state, prefix="transformer")
    torch.testing.assert_close(velocity(model), merged(full), atol=1e-4, rtol=1e-4)


def test_scale_and_unloading(model: WanTransformer3DModel, pairs: dict[str, LoraPair], tmp_path: Path) -> None:
    base = velocity(model)
    write_pairs(pairs, tmp_path / "c.safetensors", tmp_path / "d.safetensors", {})
    load_lora(model, tmp_path / "c.safetensors", scale=0.5)
    halved = {name: LoraPair(pair.down, pair.up * 0.5) for name, pair in pairs.items()}
    torch.testing.assert_close(velocity(model), merged(halved), atol=1e-5, rtol=1e-5)
    with pytest.raises(LoraError, match="already has"):
        load_lora(model, tmp_path / "c.safetensors")
    unload_lora(model)
    assert torch.equal(velocity(model), base)
    load_lora(model, tmp_path / "d.safetensors")
    torch.testing.assert_close(velocity(model), merged(pairs), atol=1e-5, rtol=1e-5)


def test_names_are_a_bijection(model: WanTransformer3DModel) -> None:
    linears = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    originals = [original_name(name) for name in linears]
    assert None not in originals
    assert len(set(originals)) == len(linears)
    for name, original in zip(linears, originals, strict=True):
        assert diffusers_name(original or "") == name
        assert diffusers_name(name) == name
    assert original_name("blocks.3.attn2.to_v") == "blocks.3.cross_attn.v"
    assert original_name("blocks.0.unknown") is None
    assert diffusers_name("head.unknown") is None


def test_a_file_that_fits_nothing_is_refused(model: WanTransformer3DModel, tmp_path: Path) -> None:
    save_file({"lora_te_text_model.lora_down.weight": torch.zeros(4, 4)}, tmp_path / "other.safetensors")
    with pytest.raises(LoraError, match="0 of 1 keys"):
        load_lora(model, tmp_path / "other.safetensors")


def test_a_partly_fitting_file_reports_the_rest(
    model: WanTransformer3DModel, pairs: dict[str, LoraPair], tmp_path: Path
) -> None:
    tensors = dialect(pairs, "official lora_only") | {"blocks.9.cross_attn.k.lora_A.weight": torch.zeros(4, 12)}
    save_file(tensors, tmp_path / "more.safetensors")
    assert load_lora(model, tmp_path / "more.safetensors").unmatched == ("blocks.9.cross_attn.k.lora_A.weight",)


def test_another_models_lora_is_named_by_its_sizes(pairs: dict[str, LoraPair], tmp_path: Path) -> None:
    write_pairs(pairs, tmp_path / "c.safetensors", tmp_path / "d.safetensors", {})
    with pytest.raises(LoraError, match="another model size.*12x20 here and 12x16"):
        load_lora(tiny(text_dim=20), tmp_path / "c.safetensors")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{K}.lora_A.weight": torch.zeros(4, 12)}, "A and B are needed"),
        ({f"{K}.lora_A.weight": torch.zeros(4, 12), f"{K}.lora_B.weight": torch.zeros(12, 3)}, "do not multiply"),
        ({f"{K}.lora_magnitude_vector": torch.zeros(12)}, "DoRA"),
    ],
)
def test_damaged_or_foreign_adapters_are_refused(tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(LoraError, match=message):
        parse_lora(tensors, [K])


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    with pytest.raises(LoraError, match="not a readable"):
        read_lora(tmp_path / "x.safetensors")
    with pytest.raises(LoraError, match="does not exist"):
        read_lora(tmp_path / "absent.safetensors")
