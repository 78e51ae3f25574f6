"""A training looked at without running it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spatialalign.errors import ModelError
from training.config import TrainSettings
from training.cost import WanShape, pair_flops, pair_peak
from training.dpo import main
from training.dry_run import read_model
from training.pairs import read_pairs
from training.presets import PRESETS
from training.store import LatentsHeader, Store

FULL = WanShape(blocks=30, width=1536, hidden=8960, text_width=4096, patch=64, tokens=32760)
"""Wan2.1-T2V-1.3B with 81 frames of 832 x 480."""

CACHED = {"reference_cache": "bfloat16", "reference_draws": 8}


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def look(model: Path, store: Store, out: Path, *more: str) -> None:
    argv = ["--model", str(model), "--store", str(store.root), "--out", str(out), "--dry_run", "true"]
    main([*argv, "--device", "cpu", "--steps", "10", "--batch_pairs", "4", "--warmup_steps", "1", *more])


def test_it_counts_and_writes_nothing(
    tiny_wan: Path, paired_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Clips of 16 x 2 x 4 x 4 are 2 x 2 x 2 tokens; three prompts of one winner and two losers."""
    before = snapshot(tmp_path), snapshot(tiny_wan)
    look(tiny_wan, paired_store, tmp_path / "out", "--tflops", "0.001")
    assert (snapshot(tmp_path), snapshot(tiny_wan)) == before
    said = capsys.readouterr().out
    assert "3 prompts, 9 clips, 6 pairs" in said
    assert "10 steps of 4 pairs: 40 pairs" in said
    assert "8 tokens a clip" in said
    tiny = WanShape(blocks=2, width=12, hidden=24, text_width=16, patch=64, tokens=8)
    flops = 4 * pair_flops(tiny, TrainSettings())
    assert f"{flops / 1e12:,.4g} TFLOP a step" in said
    assert f"{flops / 1e9:.4g} s a step" in said


def test_every_bad_file_is_named(
    tiny_wan: Path, paired_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = [paired_store.sample("0001_LR", seed) for seed in (0, 1, 2)]
    clips += [paired_store.sample("0002_RL", seed) for seed in (0, 1)]
    header, latents = clips[0].read_header(), clips[0].read_latents()
    shutil.rmtree(clips[0].folder)
    clips[1].write_latents(latents * float("nan"), header)
    clips[2].write_latents(latents[:, :1], header)
    clips[3].write_latents(latents, LatentsHeader("elsewhere", header.model, header.settings, header.digest))
    save_file(
        {"latents": load_file(clips[4].latents)["latents"].int()}, clips[4].latents, metadata=header.to_metadata()
    )
    narrow, broken = (paired_store.prompt_folder(name) for name in ("0002_RL", "0003_LT"))
    paired_store.write_text("0002_RL", paired_store.read_text("0002_RL")[:, :3], "x")
    (broken / "prompt.safetensors").write_bytes(b"no tensors")
    (broken / "prompt.json").unlink()
    before = snapshot(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        look(tiny_wan, paired_store, tmp_path / "out")
    assert stopped.value.code == 2
    assert snapshot(tmp_path) == before
    said = capsys.readouterr().err
    assert "8 files cannot be used" in said
    for reason in (
        f"{clips[0].latents} does not exist",
        f"{clips[1].latents} holds NaN",
        f"{clips[2].latents} has shape (16, 1, 4, 4), the other clips (16, 2, 4, 4)",
        f"{clips[3].latents} is in the latent space elsewhere",
        f"{clips[4].latents} holds I32",
        f"{narrow}/prompt.safetensors is 3 wide, the model takes 16",
        f"{broken}/prompt.safetensors cannot be read",
        f"{broken}/prompt.json",
    ):
        assert reason in said, said


@pytest.mark.parametrize(
    ("changes", "tflop", "peak"),
    [
        ({}, 2637.9, 12.94),
        ({"checkpointing": "selective"}, 2236.0, 25.00),
        ({"checkpointing": "selective", **CACHED}, 1670.0, 25.00),
        (CACHED, 2071.9, 12.94),
        ({"passes": "one-sample"}, 2920.9, 9.70),
        ({"passes": "one-sample", "checkpointing": "selective"}, 2519.1, 15.63),
        ({"passes": "one-sample", "offload_inputs": True}, 2920.9, 6.71),
        ({"passes": "one-sample", "offload_inputs": True, "base_dtype": "fp8"}, 2920.9, 5.35),
        ({"checkpointing": "none"}, 2071.9, 146.60),
    ],
)
def test_the_formulas_give_what_was_counted(changes: dict[str, Any], tflop: float, peak: float) -> None:
    """Against the table of docs/training_cost.md, which benchmarks.dpo_cost counts operator by operator."""
    settings = replace(PRESETS["spatialalign"], **changes)
    assert pair_flops(FULL, settings) / 1e12 == pytest.approx(tflop, abs=0.15)
    assert pair_peak(FULL, settings, batched=False, bytes_each=2) / 1e9 == pytest.approx(peak, rel=0.03)
    assert FULL.parameters == pytest.approx(1.419e9, rel=3e-3)


@pytest.mark.parametrize(
    ("changes", "alone", "each"),
    [({}, 69, 46), ({"passes": "one-sample"}, 55, 33), ({"passes": "one-sample", "offload_inputs": True}, 42, 20)],
)
def test_a_base_in_parts_takes_its_part_of_the_memory(changes: dict[str, Any], alone: float, each: float) -> None:
    """The table of docs/scale.md: of 28.6 GB an eighth stays, and 0.47 GB and three blocks of 0.70 GB come together."""
    shape = WanShape(blocks=40, width=5120, hidden=13824, text_width=4096, patch=64, tokens=32760)
    settings = replace(PRESETS["spatialalign"], **changes)
    whole = pair_peak(shape, settings, batched=False, bytes_each=2, processes=8)
    parts = pair_peak(shape, replace(settings, shard=True), batched=False, bytes_each=2, processes=8)
    assert (whole / 1e9, parts / 1e9) == (pytest.approx(alone, abs=0.5), pytest.approx(each, abs=0.5))
    assert (whole - parts) / 1e9 == pytest.approx(28.57 * 7 / 8 - 0.47 - 3 * 0.703, abs=0.01)


def test_sharding_counts_the_processes_that_were_started_or_named(
    tiny_wan: Path,
    paired_store: Store,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    look(tiny_wan, paired_store, tmp_path / "out", "--shard", "true", "--processes", "4")
    assert "GB at the peak of each of 4 processes" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        look(tiny_wan, paired_store, tmp_path / "out", "--shard", "true")
    assert "found 1; start them with torchrun, say how many with --processes" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    look(tiny_wan, paired_store, tmp_path / "out", "--shard", "true")
    assert "GB at the peak of each of 2 processes" in capsys.readouterr().out


def test_ltx_video_is_checked_and_counted(
    tiny_ltx: Path, tiny_wan: Path, paired_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Clips of 8 x 2 x 2 x 2 are 8 tokens; the space and the text width are those of the backbone itself."""
    from spatialalign.backbones import load_backbone

    backbone = load_backbone(str(tiny_ltx), "cpu")
    model = read_model(str(tiny_ltx), None)
    assert (model.space, model.text_width) == (backbone.latent_space, 16)

    store = Store(tmp_path / "ltx", create=True)
    settings = backbone.default_settings()
    header = LatentsHeader(backbone.latent_space, backbone.model_id, settings.to_dict(), settings.digest)
    for prompt in read_pairs(paired_store.root / "pairs.json")[0]:
        store.add_prompt(paired_store.prompt(prompt.prompt_id))
        store.write_text(prompt.prompt_id, torch.randn(5, 16), backbone.model_id)
        for seed in (*prompt.winners, *prompt.losers):
            latents = torch.randn(backbone.latent_shape(settings))
            store.sample(prompt.prompt_id, seed).write_latents(latents, header)
    shutil.copy(paired_store.root / "pairs.json", store.root)
    look(tiny_ltx, store, tmp_path / "out")
    said = capsys.readouterr().out
    assert "8 tokens a clip, latents (8, 2, 2, 2)" in said and "GB at the peak" in said
    with pytest.raises(SystemExit):
        look(tiny_wan, store, tmp_path / "out")
    assert f"is in the latent space {backbone.latent_space}, the model has" in capsys.readouterr().err


def test_the_formula_of_ltx_video_counts_its_products() -> None:
    """Against torch's own count of a forward pass with as many text tokens as the formula has."""
    from diffusers import LTXVideoTransformer3DModel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model = LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=12,
            cross_attention_dim=24,
            num_layers=3,
            caption_channels=16,
        )
        shape = WanShape.of(model.config, (8, 3, 4, 5))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(
                torch.randn(1, 60, 8),
                torch.randn(1, 128, 16),
                torch.tensor([500.0]),
                None,
                num_frames=3,
                height=4,
                width=5,
            )
    levels = 2 * 24 * (256 + 7 * 24)  # of the noise level's embedding, which the formula leaves out
    assert (shape.tokens, shape.text_tokens) == (60, 128)
    assert counter.get_total_flops() == shape.forward + levels


def test_an_unknown_pipeline_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ModelError, match="is a FluxPipeline"):
        read_model(str(tmp_path), None)
