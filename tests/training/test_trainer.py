"""The trainer on a tiny random Wan: what it starts from, what it learns, and that its steps depend on nothing else."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spatialalign.backbones.flow import add_noise, training_sigmas
from spatialalign.backbones.wan import WanBackbone
from spatialalign.errors import DataError
from spatialalign.lora import unload_lora
from training.config import TrainSettings
from training.draws import draw, rounded_level
from training.gradients import adapter_off
from training.losses import flow_error
from training.monitors import JsonlLog
from training.pairs import read_pairs
from training.presets import PRESETS
from training.store import Store
from training.trainer import ADAPTER, Trainer

SETTINGS = TrainSettings(
    arm="dpo+zo",
    steps=6,
    batch_pairs=4,
    micro_pairs=2,
    rank=4,
    alpha=4,
    beta=20.0,
    noise="shared",
    shift=3.0,
    lr=5e-3,
    warmup_steps=2,
    checkpointing="none",
    held_out_pairs=4,
    held_out_every=3,
    checkpoint_every=3,
    tensorboard=False,
)


@pytest.fixture(autouse=True)
def clean(backbone: WanBackbone) -> Iterator[None]:
    yield
    unload_lora(backbone.transformer, ADAPTER)
    backbone.transformer.disable_gradient_checkpointing()


def trainer(backbone: WanBackbone, store: Store, out: Path, **changes: Any) -> Trainer:
    unload_lora(backbone.transformer, ADAPTER)
    settings = replace(SETTINGS, **changes)
    prompts, _ = read_pairs(store.root / "pairs.json")
    return Trainer(backbone, store, prompts[:2], prompts[2:], settings, out, settings.to_dict())


def rows(out: Path, event: str = "train") -> list[dict[str, Any]]:
    return [row for row in JsonlLog(out / "train.jsonl").rows() if row["event"] == event]


@pytest.mark.parametrize("arm", ["dpo", "dpo+zo"])
@pytest.mark.parametrize("preset", ["spatialalign", "flow-dpo", "diffusion-dpo", "miniature"])
def test_the_first_loss_is_log_two(
    backbone: WanBackbone, paired_store: Store, tmp_path: Path, arm: str, preset: str
) -> None:
    """B is zero at the start, so model and reference agree and every margin is 0."""
    settings = PRESETS[preset]  # type: ignore[index]
    run = trainer(
        backbone,
        paired_store,
        tmp_path / "out",
        arm=arm,
        beta=settings.beta,
        half_beta=settings.half_beta,
        error_of=settings.error_of,
        noise=settings.noise,
        steps=1,
        warmup_steps=0,
        reduction=settings.reduction,
        held_out_every=1,
    )
    run.fit()
    first = rows(tmp_path / "out")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert (first["accuracy"], first["anchor"], first["norm_ratio"]) == (0.5, 0.0, 1.0)
    before = rows(tmp_path / "out", "held_out")[0]
    assert (before["step"], before["gradient_factor"]) == (0, 0.5)


def test_the_reference_is_the_base_model_to_the_bit(backbone: WanBackbone, paired_store: Store, tmp_path: Path) -> None:
    """Adapter off against a deep copy made before the adapter came."""
    original = copy.deepcopy(backbone.transformer)
    run = trainer(backbone, paired_store, tmp_path / "out")
    for parameter in run.parameters.values():
        torch.nn.init.normal_(parameter)
    x, sigma, text = torch.randn(2, 16, 2, 4, 4), torch.tensor([0.2, 0.8]), backbone.encode_text(["a cat", "a dog"])
    with torch.no_grad():
        adapted = backbone.velocity(x, sigma, text)
        with adapter_off(backbone.transformer):
            reference = backbone.velocity(x, sigma, text)
        trained, backbone.transformer = backbone.transformer, original
        expected = backbone.velocity(x, sigma, text)
        backbone.transformer = trained
    assert torch.equal(reference, expected)
    assert not torch.allclose(adapted, expected)
    assert all(parameter.requires_grad for parameter in run.parameters.values())


def test_only_the_lora_is_trained_in_float32(backbone: WanBackbone, paired_store: Store, tmp_path: Path) -> None:
    """Rank 4 on k and v (12 to 12) of two blocks, on 16 to 12 and on 12 to 12 of the text embedding."""
    run = trainer(backbone, paired_store, tmp_path / "out")
    expected = 4 * (4 * (12 + 12)) + 4 * (16 + 12) + 4 * (12 + 12)
    assert sum(parameter.numel() for parameter in run.parameters.values()) == expected
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in run.parameters.items())


def test_a_preference_is_learnt_on_unseen_prompts(backbone: WanBackbone, paired_store: Store, tmp_path: Path) -> None:
    """Winners differ from losers in their mean: a learner must find it, on the held-out prompt too."""
    run = trainer(backbone, paired_store, tmp_path / "out", steps=30, lr=1e-2, held_out_every=30)
    assert run.fit()
    before, after = rows(tmp_path / "out", "held_out")
    assert before["accuracy"] == 0.5
    assert after["accuracy"] == 1.0
    assert after["dpo"] < before["dpo"] - 0.01
    assert after["margin"] > 0


def test_the_first_step_matches_a_recomputation_by_hand(
    backbone: WanBackbone, paired_store: Store, tmp_path: Path
) -> None:
    """After a change of the weights, s_w and s_l of the batch are recomputed from the definition."""
    run = trainer(backbone, paired_store, tmp_path / "out", batch_pairs=2, micro_pairs=2, max_grad_norm=1e-9)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in run.parameters.values():
            parameter.normal_(std=0.2, generator=generator)
    pairs = [run._train.pair(index) for index in range(2)]
    gains: dict[str, list[float]] = {"winner": [], "loser": []}
    for index, pair in enumerate(pairs):
        chance = draw(run.settings, "train", index, (16, 2, 4, 4))
        for side, seed, noise in (("winner", pair.winner, chance.winner), ("loser", pair.loser, chance.loser)):
            clean = paired_store.sample(pair.prompt_id, seed).read_latents()[None]
            sigma, text = torch.tensor([chance.sigma]), [paired_store.read_text(pair.prompt_id)]
            noisy = (1 - chance.sigma) * clean + chance.sigma * noise
            with torch.no_grad():
                error = flow_error(backbone.velocity(noisy, sigma, text), noise - clean)
                with adapter_off(backbone.transformer):
                    reference = flow_error(backbone.velocity(noisy, sigma, text), noise - clean)
            gains[side].append(float(reference - error))
    row = run._train_step()
    assert row is not None
    assert row["winner_gain"] == pytest.approx(sum(gains["winner"]) / 2, rel=1e-4)
    assert row["loser_gain"] == pytest.approx(sum(gains["loser"]) / 2, rel=1e-4)
    margins = [20.0 * (won - lost) for won, lost in zip(gains["winner"], gains["loser"], strict=True)]
    clipped = [max(-5.0, min(5.0, margin)) for margin in margins]
    assert row["margin"] == pytest.approx(sum(clipped) / 2, rel=1e-4)
    assert row["dpo"] == pytest.approx(sum(math.log(1 + math.exp(-m)) for m in clipped) / 2, rel=1e-4)


def weights(run: Trainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in run.parameters.items()}


def test_micro_batches_and_checkpointing_change_memory_only(
    backbone: WanBackbone, paired_store: Store, tmp_path: Path
) -> None:
    results = []
    for name, changes in (
        ("whole", {"micro_pairs": 4}),
        ("split", {"micro_pairs": 1}),
        ("recomputed", {"micro_pairs": 4, "checkpointing": "full"}),
    ):
        run = trainer(backbone, paired_store, tmp_path / name, steps=2, warmup_steps=0, **changes)
        run.fit()
        results.append(weights(run))
    for other in results[1:]:
        for key, value in results[0].items():
            torch.testing.assert_close(other[key], value, atol=2e-5, rtol=1e-3)


def test_noise_is_a_function_of_seed_stream_and_index() -> None:
    shape, independent = (2, 1, 2, 2), replace(SETTINGS, noise="independent")
    one = draw(independent, "train", 7, shape)
    assert torch.equal(one.winner, draw(independent, "train", 7, shape).winner)
    assert not torch.equal(one.winner, one.loser)
    shared = draw(SETTINGS, "train", 7, shape)
    assert torch.equal(shared.winner, shared.loser)
    assert torch.equal(shared.winner, one.winner)
    assert shared.sigma == one.sigma
    for other in (draw(independent, "train", 8, shape), draw(independent, "held-out", 7, shape)):
        assert not torch.equal(other.winner, one.winner)
    assert not torch.equal(draw(replace(independent, seed=1), "train", 7, shape).winner, one.winner)


def test_noise_levels_are_uniform_over_the_shifted_schedule() -> None:
    """Mean sigma of the paper's schedule is 0.748, deviation about 0.25: 2000 draws stay within 4 standard errors."""
    drawn = torch.tensor([draw(TrainSettings(), "train", index, (1, 1, 1, 1)).sigma for index in range(2000)])
    assert drawn.mean().item() == pytest.approx(0.748, abs=4 * 0.25 / 2000**0.5)
    assert set(drawn.tolist()) <= set(training_sigmas(5.0).float().tolist())


def test_rounded_timesteps_by_hand() -> None:
    """bfloat16 has 8 significant bits: steps of 4 from 512 to 1024, of 2 from 256 to 512.

    Shift 5, u = 0.999: t = 1000 * 4.995 / 4.996 = 999.800, told 1000, whose entry is u = 1. At u = 0.5, t = 833.33,
    told 832; 1000 * 5u / (1 + 4u) = 832 at u = 0.49761, nearest entry u = 0.498: sigma = 2.49 / 2.992.
    """
    sigmas = training_sigmas(5.0)
    assert rounded_level(float(sigmas[1]), sigmas) == (1.0, 1.0)
    sigma, told = rounded_level(float(sigmas[500]), sigmas)
    assert told == pytest.approx(0.832)
    assert sigma == pytest.approx(2.49 / 2.992)
    exact, rounded = (draw(replace(SETTINGS, bf16_timesteps=on), "train", 3, (1, 1, 1, 1)) for on in (False, True))
    assert exact.sigma == exact.told
    assert torch.equal(exact.winner, rounded.winner)
    assert 1000 * rounded.told == float(torch.tensor(1000 * exact.sigma).bfloat16())
    assert abs(rounded.sigma - exact.sigma) <= 0.003


def test_the_model_is_told_the_rounded_timestep(
    backbone: WanBackbone, paired_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Tensor] = []
    plain = backbone.velocity

    def listen(x: Tensor, sigma: Tensor, text: Any) -> Tensor:
        told.append(sigma)
        return plain(x, sigma, text)

    monkeypatch.setattr(backbone, "velocity", listen)
    run = trainer(backbone, paired_store, tmp_path / "out", bf16_timesteps=True, batch_pairs=2)
    run._train_step()
    expected = [draw(run.settings, "train", index, (16, 2, 4, 4)).told for index in (0, 1)]
    assert told
    for given in told:
        torch.testing.assert_close(given, torch.tensor((expected * 2)[: len(given)]))


def test_a_diverging_run_stops_and_keeps_its_weights(
    backbone: WanBackbone, paired_store: Store, tmp_path: Path
) -> None:
    run = trainer(backbone, paired_store, tmp_path / "out")
    next(iter(run.parameters.values())).data.fill_(float("nan"))
    with pytest.raises(DataError, match="not finite"):
        run.fit()
    assert not list((tmp_path / "out").glob("checkpoints/step-*"))


def test_monitors_are_logged_every_step(backbone: WanBackbone, paired_store: Store, tmp_path: Path) -> None:
    trainer(backbone, paired_store, tmp_path / "out").fit()
    train, held = rows(tmp_path / "out"), rows(tmp_path / "out", "held_out")
    assert [row["step"] for row in train] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in held] == [0, 3, 6]
    assert {
        "loss",
        "dpo",
        "anchor",
        "accuracy",
        "margin",
        "winner_gain",
        "loser_gain",
        "norm_ratio",
        "gradient_factor",
        "grad_norm",
        "lr",
    } <= train[0].keys()
    for row in train:
        assert row["loss"] == pytest.approx(row["dpo"] + 0.5 * row["anchor"], abs=1e-6)


def test_log_survives_a_cut_line_and_a_resume(tmp_path: Path) -> None:
    log = JsonlLog(tmp_path / "log.jsonl")
    for step in (1, 2, 3):
        log.write({"step": step, "value": float("nan") if step == 2 else 1.0})
    with log.path.open("a") as handle:
        handle.write('{"step": 4, "va')
    again = JsonlLog(log.path)
    again.write({"step": 4})
    assert [row["step"] for row in again.rows()] == [1, 2, 3, 4]
    assert again.rows()[1]["value"] is None
    again.keep_until(2)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2]


def test_add_noise_is_the_schedule_the_trainer_uses() -> None:
    """The trainer and the sampler share one convention: at sigma 1 the input is pure noise."""
    noise = torch.randn(1, 2, 1, 2, 2)
    assert torch.equal(add_noise(torch.ones_like(noise), noise, torch.ones(1)), noise)
