"""The dpo program: exact resume, kills and signals, exported files, and refusals."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from spatialalign.backbones.wan import WanBackbone
from spatialalign.errors import ConfigError, DataError, StoreError
from spatialalign.lora import adapter_metadata, load_lora, unload_lora
from training.checkpoint import latest_checkpoint
from training.config import TrainSettings
from training.dpo import main, train
from training.pairs import PromptPairs, manifest
from training.reference_cache import weights_digest
from training.store import LatentsHeader, Store

SETTINGS = TrainSettings(
    steps=6,
    batch_pairs=2,
    rank=2,
    alpha=4,
    beta=20.0,
    lr=5e-3,
    warmup_steps=2,
    held_out=0.3,
    held_out_pairs=2,
    held_out_every=3,
    checkpoint_every=2,
    checkpointing="none",
    tensorboard=False,
)


def options(tiny_wan: Path, store: Store, out: Path, settings: TrainSettings = SETTINGS) -> list[str]:
    argv = ["--model", str(tiny_wan), "--store", str(store.root), "--out", str(out), "--device", "cpu"]
    for name, value in settings.to_dict().items():
        if value is not None:
            argv += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return argv


def final(out: Path) -> dict[str, torch.Tensor]:
    checkpoint = latest_checkpoint(out / "checkpoints")
    assert checkpoint is not None
    return load_file(checkpoint.folder / "lora.safetensors") | load_file(checkpoint.folder / "optimizer.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_training_exports_verified_files(backbone: WanBackbone, paired_store: Store, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = train(backbone, paired_store, paired_store.root / "pairs.json", out, SETTINGS)
    assert result.finished
    assert result.step == 6
    assert result.verified is not None
    assert result.verified < 1e-4
    assert result.held_out is not None
    assert result.comfy is not None
    assert result.diffusers is not None
    assert not getattr(backbone.transformer, "peft_config", {})

    # The trained weights times alpha / rank = 2, in the exported names, against the checkpoint.
    trained, comfy = final(out), load_file(result.comfy)
    a, b = (trained[f"blocks.1.attn2.to_v.lora_{part}.spatialalign.weight"] for part in "AB")
    torch.testing.assert_close(comfy["diffusion_model.blocks.1.cross_attn.v.lora_A.weight"], a)
    torch.testing.assert_close(comfy["diffusion_model.blocks.1.cross_attn.v.lora_B.weight"], b * 2)
    assert b.any()
    notes = adapter_metadata(result.comfy)
    assert (notes["preset"], notes["base_digest"]) == ("custom", weights_digest(backbone.transformer))
    # One prompt of three is held out; each of the others has one winner and two losers.
    assert [notes[key] for key in ("step", "targets", "prompts", "pairs")] == [6, "spatialalign", 2, 4]
    assert (
        adapter_metadata(result.diffusers)["pairs_digest"]
        == json.loads((out / "summary.json").read_text())["lora"]["pairs_digest"]
    )

    x, sigma, text = torch.randn(1, 16, 2, 4, 4), torch.tensor([0.5]), backbone.encode_text(["a cat"])
    with torch.no_grad():
        base = backbone.velocity(x, sigma, text)
        load_lora(backbone.transformer, result.comfy)
        adapted = backbone.velocity(x, sigma, text)
        unload_lora(backbone.transformer)
        assert torch.equal(backbone.velocity(x, sigma, text), base)
    assert not torch.allclose(adapted, base)


def test_stopped_and_continued_equals_one_go_to_the_bit(
    backbone: WanBackbone, paired_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = paired_store.root / "pairs.json"
    train(backbone, paired_store, pairs, tmp_path / "straight", SETTINGS)

    from training import trainer

    plain = trainer.Trainer._train_step

    def interrupted(self: trainer.Trainer) -> dict[str, float] | None:
        row = plain(self)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return row

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_train_step", interrupted)
        stopped = train(backbone, paired_store, pairs, tmp_path / "parts", SETTINGS)
    assert (stopped.finished, stopped.step, stopped.comfy) == (False, 3, None)
    assert train(backbone, paired_store, pairs, tmp_path / "parts", SETTINGS).finished
    assert equal(final(tmp_path / "straight"), final(tmp_path / "parts"))

    assert log_without_times(tmp_path / "straight") == log_without_times(tmp_path / "parts")


def test_the_loops_own_state_continues_to_the_bit(
    backbone: WanBackbone, paired_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tuned beta, counters of the warnings, a skipped step and the best checkpoint, stopped after every step."""
    from training import trainer

    settings = replace(
        SETTINGS,
        arm="dpo",
        clip=None,
        steps=8,
        auto_beta=0.3,
        early_stop=7,
        keep_best=True,
        monitor="loss",
        held_out_every=1,
        checkpoint_every=100,
        keep_checkpoints=1,
    )
    plain, pairs = trainer.Trainer._train_step, paired_store.root / "pairs.json"

    def broken_once(self: trainer.Trainer, stops: bool) -> dict[str, float] | None:
        velocity = backbone.velocity
        if self.step == 4:
            backbone.velocity = lambda *inputs: velocity(*inputs) * float("nan")  # type: ignore[method-assign]
        row = plain(self)
        backbone.velocity = velocity  # type: ignore[method-assign]
        if stops:
            os.kill(os.getpid(), signal.SIGTERM)
        return row

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_train_step", lambda self: broken_once(self, False))
        straight = train(backbone, paired_store, pairs, tmp_path / "straight", settings)
        patch.setattr(trainer.Trainer, "_train_step", lambda self: broken_once(self, True))
        for _ in range(settings.steps):
            parts = train(backbone, paired_store, pairs, tmp_path / "parts", settings)
    assert parts.finished
    assert parts.step == straight.step
    assert equal(final(tmp_path / "straight"), final(tmp_path / "parts"))
    states = [
        json.loads((tmp_path / n / "checkpoints/step-000008/state.json").read_text()) for n in ("straight", "parts")
    ]
    assert states[0]["progress"] == states[1]["progress"]
    assert states[0]["progress"]["tuner"]["updates"] == 7
    assert states[0]["progress"]["watch"]["accuracy"] != 0.5
    logs = [log_without_times(tmp_path / name) for name in ("straight", "parts")]
    assert logs[0] == logs[1]
    assert [row["step"] for row in logs[0] if row["event"] == "skipped_step"] == [5]
    betas = [row["beta"] for row in logs[0] if row["event"] == "train"]
    assert betas[:3] == [20.0] * 3  # the warm-up of two steps, and one more update
    assert len(set(betas[3:])) == 4


def log_without_times(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_the_best_weights_are_exported_and_named(backbone: WanBackbone, paired_store: Store, tmp_path: Path) -> None:
    """The learning rate makes the held-out loss worse at first or at last; whatever is best is in the files."""
    pairs, out = paired_store.root / "pairs.json", tmp_path / "out"
    settings = replace(SETTINGS, lr=0.3, steps=6, held_out_every=1, monitor="loss", keep_best=True, keep_checkpoints=1)
    result = train(backbone, paired_store, pairs, out, settings)
    losses = {row["step"]: row["loss"] for row in log_without_times(out) if row["event"] == "held_out" and row["step"]}
    best = min(losses, key=lambda step: losses[step])
    assert result.step == best < 6
    assert result.held_out is not None
    assert result.held_out["loss"] == pytest.approx(losses[best])
    assert result.comfy is not None
    assert adapter_metadata(result.comfy)["step"] == best
    assert json.loads((out / "summary.json").read_text())["steps_done"] == 6
    kept = load_file(out / f"checkpoints/step-{best:06d}/lora.safetensors")
    exported = load_file(result.comfy)["diffusion_model.blocks.1.cross_attn.v.lora_A.weight"]
    torch.testing.assert_close(exported, kept["blocks.1.attn2.to_v.lora_A.spatialalign.weight"])


def test_a_killed_process_continues_exactly(tiny_wan: Path, paired_store: Store, tmp_path: Path) -> None:
    """SIGKILL at some moment after the first checkpoint, then the same command again; a lock is left behind."""
    long = replace(SETTINGS, steps=40, checkpoint_every=3)
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "training.dpo", *options(tiny_wan, paired_store, killed, long)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while latest_checkpoint(killed / "checkpoints") is None and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    assert (killed / ".lock").exists()
    before = latest_checkpoint(killed / "checkpoints")
    assert before is not None
    assert before.step < 40

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        main(options(tiny_wan, paired_store, killed, long))
        main(options(tiny_wan, paired_store, straight, long))
    finally:
        torch.set_num_threads(threads)
    assert equal(final(killed), final(straight))
    assert (killed / "lora_comfyui.safetensors").is_file()


def test_a_finished_run_only_exports_again(backbone: WanBackbone, paired_store: Store, tmp_path: Path) -> None:
    pairs, out = paired_store.root / "pairs.json", tmp_path / "out"
    train(backbone, paired_store, pairs, out, SETTINGS)
    before = final(out)
    (out / "lora_comfyui.safetensors").unlink()
    assert train(backbone, paired_store, pairs, out, SETTINGS).comfy == out / "lora_comfyui.safetensors"
    assert equal(final(out), before)


def test_changed_settings_or_pairs_are_named(backbone: WanBackbone, paired_store: Store, tmp_path: Path) -> None:
    pairs, out = paired_store.root / "pairs.json", tmp_path / "out"
    train(backbone, paired_store, pairs, out, SETTINGS)
    longer = replace(SETTINGS, steps=8, lr=1e-3)
    with pytest.raises(ConfigError, match="lr: 0.005 -> 0.001; steps: 6 -> 8"):
        train(backbone, paired_store, pairs, out, longer)
    assert train(backbone, paired_store, pairs, out, longer, allow_changes=True).step == 8

    other = tmp_path / "fewer.json"
    other.write_text(json.dumps(manifest([PromptPairs(p, (0,), (1,)) for p in ("0001_LR", "0002_RL")], {})))
    with pytest.raises(ConfigError, match="pairs_digest"):
        train(backbone, paired_store, other, out, longer)
    assert not getattr(backbone.transformer, "peft_config", {})


def test_two_runs_in_one_folder(backbone: WanBackbone, paired_store: Store, tmp_path: Path) -> None:
    from spatialalign.claims import exclusive

    out = tmp_path / "out"
    with exclusive(out / ".lock", "x"), pytest.raises(StoreError, match=f"in use by process {os.getpid()}"):
        train(backbone, paired_store, paired_store.root / "pairs.json", out, SETTINGS)


def test_samples_are_checked_before_the_first_step(backbone: WanBackbone, paired_store: Store, tmp_path: Path) -> None:
    pairs, sample = paired_store.root / "pairs.json", paired_store.sample("0003_LT", 1)
    header, latents = sample.read_header(), sample.read_latents()
    sample.write_latents(latents, LatentsHeader("other space", header.model, header.settings, header.digest))
    with pytest.raises(DataError, match="latent space other space"):
        train(backbone, paired_store, pairs, tmp_path / "out", SETTINGS)
    shutil.rmtree(sample.folder)
    with pytest.raises(DataError, match=r"0003_LT/1/latents\.safetensors does not exist"):
        train(backbone, paired_store, pairs, tmp_path / "out", SETTINGS)
    assert not (tmp_path / "out").exists()


def test_without_pairs_the_program_says_what_to_run(
    tiny_wan: Path, paired_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (paired_store.root / "pairs.json").unlink()
    with pytest.raises(SystemExit) as stopped:
        main(options(tiny_wan, paired_store, tmp_path / "out"))
    assert stopped.value.code == 2
    assert "pairs.json does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("arm", ["dpo", "dpo+sft", "sft"])
def test_the_other_arms_train(backbone: WanBackbone, paired_store: Store, tmp_path: Path, arm: str) -> None:
    settings = replace(SETTINGS, arm=arm, steps=3, targets="all-linear", max_grad_norm=1.0)  # type: ignore[arg-type]
    result = train(backbone, paired_store, paired_store.root / "pairs.json", tmp_path / "out", settings)
    assert result.finished


def test_a_bfloat16_base_trains_a_float32_lora(tiny_wan: Path, paired_store: Store, tmp_path: Path) -> None:
    """As on a GPU: weights in bfloat16; the LoRA, its file and the errors in float32; norms as diffusers keeps them.

    Reference and model run the same kernels, so even in bfloat16 the first margin is exactly 0.
    """
    from spatialalign.backbones import load_backbone

    half = load_backbone(str(tiny_wan), device="cpu", dtype="bfloat16")
    assert half.transformer.condition_embedder.time_embedder.linear_1.weight.dtype == torch.float32
    settings = replace(SETTINGS, checkpointing="full")
    result = train(half, paired_store, paired_store.root / "pairs.json", tmp_path / "out", settings)
    assert result.comfy is not None
    assert {tensor.dtype for tensor in load_file(result.comfy).values()} == {torch.float32}
    first = json.loads((tmp_path / "out/train.jsonl").read_text().splitlines()[1])
    assert first["step"] == 1
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert not half.transformer.gradient_checkpointing
