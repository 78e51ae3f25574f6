"""A training looked at without running it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from training.config import TrainSettings
from training.cost import WanShape, pair_flops, pair_peak
from training.dpo import main
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
