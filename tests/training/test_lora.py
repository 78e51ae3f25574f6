"""The LoRA program: convert from every family of names, inspect, merge into weights, compare."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import LTXVideoTransformer3DModel, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from spatialalign.errors import ConfigError, LoraError, ModelError
from spatialalign.lora import LoraPair, load_lora, read_lora, training_notes, unload_lora
from spatialalign.module_names import is_ltx, linears
from spatialalign.wan_modules import diffusers_name, original_name, wan_linears
from training.lora import Compare, Convert, Inspect, Merge, compare, convert, dialect_of, inspect, main, merge
from training.lora_updates import inner_product, likeness, stacked, update_norm

OFFICIAL = ("blocks.0.cross_attn.k", "blocks.1.cross_attn.v", "text_embedding.0", "text_embedding.2")


def tiny() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=12, text_dim=16, freq_dim=16, ffn_dim=24, num_layers=2
    ).eval()


def velocity(model: WanTransformer3DModel) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x, text = torch.randn(1, 16, 2, 4, 4, generator=generator), torch.randn(1, 6, 16, generator=generator)
    with torch.no_grad():
        return model(x, torch.tensor([500.0]), text, return_dict=False)[0]


def matrices(seed: int = 1, rank: int = 3) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by original module name, of the sizes of the tiny model."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(rank, 16 if name == "text_embedding.0" else 12, generator=generator),
            torch.randn(12, rank, generator=generator),
        )
        for name in OFFICIAL
    }


def official(path: Path, seed: int = 1) -> Path:
    """The published form: a pickled dict of the DiT's parameter names with PEFT's adapter name, alpha equal to rank."""
    tensors = {}
    for name, (a, b) in matrices(seed).items():
        tensors[f"{name}.lora_A.default.weight"], tensors[f"{name}.lora_B.default.weight"] = a, b
    torch.save(tensors, path)
    return path


def test_the_official_checkpoint_becomes_both_files(tmp_path: Path) -> None:
    comfy, diffusers = convert(Convert(official(tmp_path / "step=02400.lora_only.ckpt"), tmp_path / "out"))
    model = tiny()
    for name, (a, b) in matrices().items():  # by hand: W + B A
        module = model.get_submodule(diffusers_name(name) or "")
        module.weight.data += b @ a
    expected = velocity(model)
    for path in (comfy, diffusers):
        model = tiny()
        load_lora(model, path)
        assert torch.allclose(velocity(model), expected, atol=1e-5)
    model = tiny()
    model.load_lora_adapter(str(tmp_path / "out"), prefix="transformer", weight_name=diffusers.name)
    assert torch.allclose(velocity(model), expected, atol=1e-5), "diffusers' own loader"
    assert set(load_file(comfy)) == {f"diffusion_model.{n}.lora_{m}.weight" for n in OFFICIAL for m in "AB"}
    notes = training_notes(read_lora(comfy)[1])
    assert (notes["step"], notes["rank"], notes["alpha"]) == (2400, 3, 3)
    assert "official" in notes["dialect"]
    with pytest.raises(ConfigError, match="exists"):
        convert(Convert(tmp_path / "step=02400.lora_only.ckpt", tmp_path / "out"))


def test_a_cut_or_unsafe_checkpoint_is_refused(tmp_path: Path) -> None:
    path = official(tmp_path / "a.ckpt")
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(LoraError, match=r"a\.ckpt is not a plain tensor file"):
        inspect(Inspect(path))
    torch.save({"hook": print, "state_dict": {}}, path)
    with pytest.raises(LoraError, match="code in checkpoints is never run"):
        inspect(Inspect(path))


def test_kohya_with_alpha_and_mixed_ranks_loads_in_diffusers(tmp_path: Path) -> None:
    """alpha 1 at rank 2 halves, alpha 4 at rank 4 keeps; diffusers must be told both ranks."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    model = tiny()
    for name, rank, alpha in (("blocks.0.self_attn.q", 2, 1.0), ("blocks.1.cross_attn.o", 4, 4.0)):
        down, up = torch.randn(rank, 12, generator=generator), torch.randn(12, rank, generator=generator)
        key = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": torch.tensor(alpha)}
        model.get_submodule(diffusers_name(name) or "").weight.data += alpha / rank * up @ down
    save_file(tensors, tmp_path / "a.safetensors", metadata={"modelspec.title": "Mine", "ss_network_dim": "2"})
    comfy, diffusers = convert(Convert(tmp_path / "a.safetensors", tmp_path, base_model="Wan-AI/Wan2.1-T2V-1.3B"))
    expected, other = velocity(model), tiny()
    other.load_lora_adapter(str(tmp_path), prefix="transformer", weight_name=diffusers.name)
    assert torch.allclose(velocity(other), expected, atol=1e-5)
    metadata = read_lora(comfy)[1]
    assert metadata["modelspec.title"] == "Mine" and metadata["ss_network_dim"] == "2,4"
    assert metadata["modelspec.license"] == "not stated", "nobody else's LoRA is given a licence"
    assert training_notes(metadata)["base_model"] == "Wan-AI/Wan2.1-T2V-1.3B"


def test_keys_that_fit_nothing_are_refused_unless_asked_for(tmp_path: Path) -> None:
    official(tmp_path / "a.ckpt")
    tensors = torch.load(tmp_path / "a.ckpt", weights_only=True) | {"blocks.0.norm3.diff_b": torch.zeros(12)}
    torch.save(tensors, tmp_path / "a.ckpt")
    with pytest.raises(LoraError, match=r"1 keys .*norm3.*partial"):
        convert(Convert(tmp_path / "a.ckpt", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    convert(Convert(tmp_path / "a.ckpt", tmp_path / "out", partial=True))
    save_file({"unet.down.0.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "other.safetensors")
    with pytest.raises(LoraError, match=r"none of the 1 keys.*unet\.down"):
        convert(Convert(tmp_path / "other.safetensors", tmp_path / "out"))


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("diffusion_model.blocks.0.cross_attn.k.lora_A.weight", "ComfyUI, original module names, lora_A/lora_B"),
        ("transformer.blocks.0.attn2.to_k.lora_B.weight", "diffusers, diffusers module names, lora_A/lora_B"),
        ("blocks.0.cross_attn.k.lora_A.default.weight", "the official lora_only form"),
        ("lora_unet_blocks_0_cross_attn_k.lora_down.weight", "kohya, original module names, lora_down/lora_up"),
        ("lora_unet__blocks_0_cross_attn_k.lora_down.weight", "Wan-Fun"),
        ("lycoris_blocks_0_cross_attn_k.lora_down.weight", "LyCORIS"),
        ("base_model.model.blocks.0.attn2.to_k.lora_A.weight", "PEFT, diffusers"),
        ("blocks.0.ffn.0.lora_up.weight", "no prefix, original"),
    ],
)
def test_dialects_by_name(key: str, words: str) -> None:
    assert words in dialect_of([key])


def test_inspect_counts_and_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = inspect(Inspect(official(tmp_path / "a.ckpt")))
    full = torch.cat([(b @ a).flatten() for a, b in matrices().values()])
    assert facts["norm"] == pytest.approx(float(full.norm()), rel=1e-5)
    assert (facts["modules"], facts["ranks"], facts["zero"]) == (4, [3], 0)
    assert facts["parameters"] == 3 * (12 + 12) * 3 + 3 * (16 + 12)
    assert facts["base_guess"] is None, "no Wan model is 12 wide"
    text = capsys.readouterr().out
    assert "cross-attention k, v in 2 blocks; text embedding" in text and "official" in text
    save_file(
        {
            "blocks.0.cross_attn.k.lora_A.weight": torch.full((1, 1536), float("nan")),
            "blocks.0.cross_attn.k.lora_B.weight": torch.zeros(1536, 1),
        },
        tmp_path / "nan.safetensors",
        metadata={"spatialalign": json.dumps({"step": 7})},
    )
    facts = inspect(Inspect(tmp_path / "nan.safetensors"))
    assert facts["not_finite"] == ["blocks.0.attn2.to_k"] and facts["base_guess"] == "Wan 1.3B"
    assert "NaN" in (text := capsys.readouterr().out) and "step = 7" in text


@pytest.mark.parametrize("shard", ["10GB", "4KB"])
def test_merged_weights_give_the_adapters_velocity(tmp_path: Path, shard: str) -> None:
    model, lora = tiny(), official(tmp_path / "a.ckpt")
    model.save_pretrained(tmp_path / "base", max_shard_size=shard)
    assert (len(list((tmp_path / "base").glob("*.safetensors"))) > 1) is (shard == "4KB")
    load_lora(model, lora, scale=0.5)
    expected = velocity(model)
    unload_lora(model)
    changed = merge(Merge(tmp_path / "base", lora, tmp_path / "merged", scale=0.5))
    assert {original_name(name) for name in changed} == set(OFFICIAL)
    merged = WanTransformer3DModel.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(velocity(merged), expected, atol=1e-5)
    with pytest.raises(ModelError, match="exists"):
        merge(Merge(tmp_path / "base", lora, tmp_path / "merged"))


def test_a_merge_that_fails_leaves_nothing(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "base")
    lora = official(tmp_path / "a.ckpt")
    with pytest.raises(ModelError, match="pipeline"):
        (tmp_path / "pipe" / "transformer").mkdir(parents=True)
        merge(Merge(tmp_path / "pipe", lora, tmp_path / "merged"))
    weights = tmp_path / "base" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    key = "blocks.1.attn2.to_v.weight"
    save_file(tensors | {key: tensors[key].to(torch.float8_e4m3fn)}, weights)
    with pytest.raises(ModelError, match="float8"):
        merge(Merge(tmp_path / "base", lora, tmp_path / "merged"))
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match="cannot be read"):
        merge(Merge(tmp_path / "base", lora, tmp_path / "merged"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", "base", "pipe"]


def test_the_algebra_of_updates_is_that_of_full_matrices() -> None:
    generator = torch.Generator().manual_seed(3)

    def pair(rank: int) -> LoraPair:
        return LoraPair(torch.randn(rank, 7, generator=generator), torch.randn(5, rank, generator=generator))

    a, b = pair(2), pair(9)  # also a rank above both sides
    full_a, full_b = ((p.up.double() @ p.down.double()) for p in (a, b))
    assert update_norm(b) == pytest.approx(float(full_b.norm()), rel=1e-12)
    assert inner_product(a, b) == pytest.approx(float((full_a * full_b).sum()), rel=1e-12)
    both = stacked(a, b, -2.0)
    assert torch.allclose(both.up @ both.down, (full_a - 2 * full_b).float(), atol=1e-5)
    same = likeness(a, LoraPair(2 * a.down, a.up / 2))
    assert same.cosine == pytest.approx(1.0) and same.distance < 1e-12 * same.norm_a, "other factors, one update"
    assert likeness(a, None).relative_difference == 1 and likeness(None, a).cosine is None


def test_compare_by_module_and_overall(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """b is a with one module turned round and one left out: |b-a|^2 = 4 |turned|^2 + |left out|^2."""
    official(tmp_path / "a.ckpt")
    tensors = torch.load(tmp_path / "a.ckpt", weights_only=True)
    tensors["blocks.0.cross_attn.k.lora_B.default.weight"] *= -1
    tensors = {key: tensor for key, tensor in tensors.items() if "text_embedding.2" not in key}
    save_file({f"diffusion_model.{key}": tensor for key, tensor in tensors.items()}, tmp_path / "b.safetensors")
    result = compare(Compare(tmp_path / "a.ckpt", tmp_path / "b.safetensors", shown=2))
    norm = {name: float((b @ a).norm()) for name, (a, b) in matrices().items()}
    total = sum(value**2 for value in norm.values())
    away = 4 * norm[OFFICIAL[0]] ** 2 + norm["text_embedding.2"] ** 2
    assert result["overall"]["relative_difference"] == pytest.approx((away / total) ** 0.5, rel=1e-5)
    assert result["modules"]["blocks.0.attn2.to_k"]["cosine"] == pytest.approx(-1)
    assert result["modules"]["blocks.1.attn2.to_v"]["cosine"] == pytest.approx(1)
    assert result["only_in_a"] == ["condition_embedder.text_embedder.linear_2"] and not result["only_in_b"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("all ") and len(lines) == 5 and lines[-1].startswith("only in a: 1 modules")
    save_file(
        {
            "blocks.0.cross_attn.k.lora_A.weight": torch.ones(1, 3),
            "blocks.0.cross_attn.k.lora_B.weight": torch.ones(3, 1),
        },
        tmp_path / "c.safetensors",
    )
    with pytest.raises(LoraError, match=r"12x12 in .*3x3"):
        compare(Compare(tmp_path / "a.ckpt", tmp_path / "c.safetensors"))


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", "--lora", str(official(tmp_path / "a.ckpt"))])
    assert "rank 3" in capsys.readouterr().out
    for argv, status, words in (
        (["--help"], 0, "merge: Add a LoRA"),
        (["inspekt"], 2, "the nearest is 'inspect'"),
        ([], 2, "required"),
        (["merge", "--help"], 0, "python -m training.lora merge"),
        (["inspect", "--lora", str(tmp_path / "none.ckpt")], 2, "python -m training.lora inspect: error:"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(argv)
        said = capsys.readouterr()
        assert stopped.value.code == status and words in said.out + said.err, argv


def test_the_names_of_linears_are_those_of_the_model() -> None:
    import torch.nn as nn

    found = {name for name, module in tiny().named_modules() if isinstance(module, nn.Linear)}
    assert found <= set(wan_linears(2))


LTX = (
    "caption_projection.linear_1",
    "transformer_blocks.0.attn1.to_out.0",
    "transformer_blocks.1.attn2.to_k",
    "transformer_blocks.1.ff.net.0.proj",
)


def tiny_ltx() -> LTXVideoTransformer3DModel:
    torch.manual_seed(0)
    return LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=2,
        caption_channels=16,
    ).eval()


def ltx_velocity(model: LTXVideoTransformer3DModel) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    x, text = torch.randn(1, 8, 8, generator=generator), torch.randn(1, 6, 16, generator=generator)
    with torch.no_grad():
        return model(x, text, torch.tensor([500.0]), None, num_frames=2, height=2, width=2, return_dict=False)[0]


@pytest.mark.parametrize("kohya", [False, True], ids=["ComfyUI", "kohya"])
def test_ltx_is_converted_inspected_merged_and_compared(
    tmp_path: Path, kohya: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """W + B A by hand; ComfyUI's names of LTX-Video's layers are diffusers'."""
    generator, model, base, tensors = torch.Generator().manual_seed(0), tiny_ltx(), tiny_ltx(), {}
    for name in LTX:
        weight = model.get_submodule(name).weight.data
        a, b = (
            torch.randn(3, weight.shape[1], generator=generator),
            torch.randn(weight.shape[0], 3, generator=generator),
        )
        weight += b @ a
        key = f"lora_unet_{name.replace('.', '_')}" if kohya else f"diffusion_model.{name}"
        one, other = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
        tensors |= {f"{key}.{one}.weight": a, f"{key}.{other}.weight": b}
    save_file(tensors, tmp_path / "a.safetensors")
    expected = ltx_velocity(model)

    comfy, diffusers = convert(Convert(tmp_path / "a.safetensors", tmp_path / "out"))
    assert set(load_file(comfy)) == {f"diffusion_model.{name}.lora_{part}.weight" for name in LTX for part in "AB"}
    assert read_lora(comfy)[1]["modelspec.architecture"] == "lightricks-ltx-video/lora"
    other = tiny_ltx()
    other.load_lora_adapter(str(tmp_path / "out"), prefix="transformer", weight_name=diffusers.name)
    assert torch.allclose(ltx_velocity(other), expected, atol=1e-4), "diffusers' own loader"

    facts = inspect(Inspect(tmp_path / "a.safetensors"))
    assert (facts["modules"], facts["ranks"], facts["unmatched"]) == (4, [3], [])
    assert facts["layers"] == (
        "self-attention out in 1 block; cross-attention k in 1 block; feed-forward in 1 block; text embedding"
    )
    assert facts["dialect"].startswith(f"{'kohya' if kohya else 'ComfyUI'}, LTX-Video module names")

    base.save_pretrained(tmp_path / "base")
    assert set(merge(Merge(tmp_path / "base", tmp_path / "a.safetensors", tmp_path / "merged"))) == set(LTX)
    merged = LTXVideoTransformer3DModel.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(ltx_velocity(merged), expected, atol=1e-4)

    same = compare(Compare(tmp_path / "a.safetensors", diffusers))
    assert same["overall"]["cosine"] == pytest.approx(1) and same["overall"]["relative_difference"] < 1e-6
    assert set(same["modules"]) == set(LTX) and not same["only_in_a"] and not same["only_in_b"]


def test_a_part_of_a_lora_does_not_keep_the_scores_of_the_whole(tmp_path: Path) -> None:
    notes = {"spatialalign": json.dumps({"step": 7, "scores": {"prompts": 1}})}
    whole = {
        f"diffusion_model.{name}.lora_{part}.weight": pair[part == "B"]
        for name, pair in matrices().items()
        for part in "AB"
    }
    save_file(whole, tmp_path / "whole.safetensors", metadata=notes)
    save_file(whole | {"blocks.0.norm3.diff_b": torch.zeros(12)}, tmp_path / "more.safetensors", metadata=notes)
    for name, kept in (("whole", True), ("more", False)):
        comfy, _ = convert(Convert(tmp_path / f"{name}.safetensors", tmp_path / "out", partial=True))
        found = training_notes(read_lora(comfy)[1])
        assert found["step"] == 7 and ("scores" in found) is kept


def test_the_names_of_ltx_linears_are_those_of_the_model() -> None:
    """All linears of blocks and text embedding."""
    found = {
        name
        for name, module in tiny_ltx().named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(("transformer_blocks.", "caption_projection."))
    }
    assert found == {name for name in linears(2) if is_ltx(name)}
