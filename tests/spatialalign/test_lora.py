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
    fit_lora,
    linear_names,
    load_lora,
    parse_lora,
    read_lora,
    save_lora,
    training_notes,
    unload_lora,
    write_pairs,
)
from spatialalign.wan_modules import diffusers_name, original_name

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


A_B = ("lora_A.weight", "lora_B.weight")
DOWN_UP = ("lora_down.weight", "lora_up.weight")
NAMED = ("lora_A.default.weight", "lora_B.default.weight")
DIALECTS = {
    # prefix, names of the modules, spelling of the two matrices, alpha (of rank 4) or None
    "ours for ComfyUI": ("diffusion_model.", "original", A_B, None),
    "ours for diffusers": ("transformer.", "diffusers", A_B, None),
    "official lora_only": ("", "original", NAMED, None),
    "ComfyUI with alpha": ("diffusion_model.", "original", A_B, 8.0),
    "ComfyUI, down and up": ("diffusion_model.", "original", DOWN_UP, 2.0),
    "ComfyUI, lora.down": ("diffusion_model.", "original", ("lora.down.weight", "lora.up.weight"), None),
    "ComfyUI, adapter named": (
        "diffusion_model.",
        "original",
        ("lora_A.my-lora.weight", "lora_B.my-lora.weight"),
        None,
    ),
    "ComfyUI prefix, diffusers names": ("diffusion_model.", "diffusers", A_B, None),
    "diffusers prefix, original names": ("transformer.", "original", A_B, None),
    "PEFT": ("base_model.model.", "diffusers", A_B, None),
    "PEFT of a whole pipeline": ("base_model.model.transformer.", "diffusers", A_B, None),
    "DiffSynth": ("pipe.dit.", "original", NAMED, None),
    "no prefix, diffusers names": ("", "diffusers", ("lora.down.weight", "lora.up.weight"), None),
    "bare A and B": ("diffusion_model.", "original", ("lora_A", "lora_B"), None),
    "kohya": ("lora_unet_", "underscored", DOWN_UP, 4.0),
    "kohya, diffusers names": ("lora_unet_", "underscored diffusers", DOWN_UP, 1.0),
    "Wan-Fun": ("lora_unet__", "underscored", DOWN_UP, 2.0),
    "LyCORIS": ("lycoris_", "underscored", DOWN_UP, 2.0),
}


def dialect(pairs: dict[str, LoraPair], name: str) -> dict[str, Tensor]:
    """The same update in the spelling of a dialect; an alpha is undone in B, so that leaving it out would show."""
    prefix, names, (down, up), alpha = DIALECTS[name]
    out: dict[str, Tensor] = {}
    for module, pair in pairs.items():
        spelt = module if "diffusers" in names else original_name(module)
        assert spelt is not None
        key = prefix + (spelt.replace(".", "_") if "underscored" in names else spelt)
        scale = 1.0 if alpha is None else alpha / 4
        out |= {f"{key}.{down}": pair.down, f"{key}.{up}": pair.up / scale}
        if alpha is not None:
            out[f"{key}.alpha"] = torch.tensor(alpha)
    return out


@pytest.mark.parametrize("name", DIALECTS)
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

    # the checkpoint that train.py itself leaves: the same beside the state of the whole, which holds the base too
    whole = {"pipe.dit.blocks.0.cross_attn.k.base_layer.weight": torch.zeros(12, 12)}
    torch.save({"state_dict": whole, "epoch": 3, **dialect(pairs, "official lora_only")}, tmp_path / "step=02400.ckpt")
    assert read_lora(tmp_path / "step=02400.ckpt")[0].keys() == dialect(pairs, "official lora_only").keys()

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
    # diffusers 0.36 stops at a file whose metadata has none
    assert config["transformer.rank_pattern"] == config["transformer.alpha_pattern"] == {}


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
    """The message shows a few keys of the file and of the model, in the names that the model has."""
    save_file({"lora_te_text_model.lora_down.weight": torch.zeros(4, 4)}, tmp_path / "other.safetensors")
    with pytest.raises(LoraError, match=r"0 of 1 keys.*lora_te_text_model.*the model has condition_embedder"):
        load_lora(model, tmp_path / "other.safetensors")
    sizes = {"blocks.0.cross_attn.k": (12, 12)}
    with pytest.raises(LoraError, match=r"the model has blocks\.0\.cross_attn\.k\)"):
        fit_lora(tmp_path / "other.safetensors", sizes)
    with pytest.raises(
        LoraError, match=r"none of Wan's layers and none of LTX-Video's \(it has double_blocks\.0\.img_attn\.qkv\)"
    ):
        fit_lora(tmp_path / "other.safetensors", {"double_blocks.0.img_attn.qkv": (4, 4)})


def test_a_partly_fitting_file_reports_the_rest(
    model: WanTransformer3DModel, pairs: dict[str, LoraPair], tmp_path: Path
) -> None:
    beyond = "blocks.9.cross_attn.k.lora_{}.weight"
    more = {beyond.format("A"): torch.zeros(4, 12), beyond.format("B"): torch.zeros(12, 4)}
    more["blocks.0.norm3.diff_b"] = torch.zeros(12)
    save_file(dialect(pairs, "official lora_only") | more, tmp_path / "more.safetensors")
    assert set(load_lora(model, tmp_path / "more.safetensors").unmatched) == set(more)
    fitted = fit_lora(tmp_path / "more.safetensors", linear_names(tiny()))
    assert (set(fitted.pairs), fitted.unmatched_pairs) == (set(pairs), 1)


def test_another_models_lora_is_named_by_its_sizes(pairs: dict[str, LoraPair], tmp_path: Path) -> None:
    write_pairs(pairs, tmp_path / "c.safetensors", tmp_path / "d.safetensors", {})
    with pytest.raises(LoraError, match="another model size.*12x20 here and 12x16"):
        load_lora(tiny(text_dim=20), tmp_path / "c.safetensors")


def test_known_models_are_named_by_their_width(tmp_path: Path) -> None:
    file, other = tmp_path / "c.safetensors", tmp_path / "d.safetensors"
    write_pairs({K: LoraPair(torch.zeros(4, 5120), torch.zeros(5120, 4))}, file, other, {})
    with pytest.raises(LoraError, match=r"1536x1536 \(Wan 1\.3B\) here and 5120x5120 \(Wan 14B\) in the file; load it"):
        fit_lora(file, {"blocks.0.cross_attn.k": (1536, 1536)})
    write_pairs({K: LoraPair(torch.zeros(4, 4096), torch.zeros(128, 4))}, file, other, {})
    with pytest.raises(LoraError, match=r"1536x4096 \(Wan 1\.3B\) here and 128x4096 \(the miniature\) in the file"):
        fit_lora(file, {K: (1536, 4096)})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{K}.lora_A.weight": torch.zeros(4, 12)}, "A and B are needed"),
        ({f"{K}.lora_A.weight": torch.zeros(4, 12), f"{K}.lora_B.weight": torch.zeros(12, 3)}, "do not multiply"),
        ({f"{K}.lora_magnitude_vector": torch.zeros(12)}, "DoRA.*export it as a plain LoRA"),
        ({f"diffusion_model.{K}.dora_scale": torch.zeros(12)}, "DoRA"),
        ({f"lycoris_{K.replace('.', '_')}.hada_w1_a": torch.zeros(4, 12)}, "LoHa"),
        ({f"{K}.lora_mid.weight": torch.zeros(4, 4)}, "more than an A and a B"),
        (
            {f"{prefix}{K}.lora_A.weight": torch.zeros(4, 12) for prefix in ("transformer.", "diffusion_model.")},
            "second LoRA",
        ),
    ],
)
def test_damaged_or_foreign_adapters_are_refused(tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(LoraError, match=message):
        parse_lora(tensors, [K])


def test_unreadable_files(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    with pytest.raises(LoraError, match="not a readable"):
        read_lora(tmp_path / "x.safetensors")
    save_file({"x": torch.zeros(100)}, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:-50])
    for read in (read_lora, adapter_metadata):
        with pytest.raises(LoraError, match=r"cut\.safetensors is not a readable.*cut short"):
            read(tmp_path / "cut.safetensors")
    with pytest.raises(LoraError, match="does not exist"):
        read_lora(tmp_path / "absent.safetensors")


def test_notes_of_others_and_damaged_ones_are_empty(tmp_path: Path) -> None:
    assert training_notes({"modelspec.title": "x"}) == {}
    assert training_notes({"spatialalign": '{"step": 3'}) == {}
    assert training_notes({"spatialalign": "[3]"}) == {}
    assert training_notes({"spatialalign": '{"step": 3}'}) == {"step": 3}
    torch.save({"x": torch.zeros(1)}, tmp_path / "x.ckpt")
    assert adapter_metadata(tmp_path / "x.ckpt") == {}
