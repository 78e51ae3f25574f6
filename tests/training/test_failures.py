"""What the trainer does when clips, losses, memory or progress go wrong, on a tiny random Wan."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from spatialalign.backbones.wan import WanBackbone
from spatialalign.errors import ConfigError, DataError
from spatialalign.files import write_json
from spatialalign.lora import unload_lora
from spatialalign.prompts import Prompt
from spatialalign.score import dsr_score
from spatialalign.tracks import Tracks
from training.dpo import train
from training.memory import remedies
from training.monitors import JsonlLog
from training.pairs import PromptPairs, read_pairs
from training.presets import PRESETS
from training.store import Store
from training.trainer import ADAPTER, Trainer
from training.weights import Weighting, read_scores

from .test_trainer import SETTINGS


@pytest.fixture(autouse=True)
def clean(backbone: WanBackbone) -> Iterator[None]:
    yield
    unload_lora(backbone.transformer, ADAPTER)


def trainer(backbone: WanBackbone, store: Store, out: Path, weighting: bool = False, **changes: Any) -> Trainer:
    """On prompts 1 and 2, watching prompt 3."""
    unload_lora(backbone.transformer, ADAPTER)
    settings = replace(SETTINGS, **changes)
    prompts, _ = read_pairs(store.root / "pairs.json")
    train, held = prompts[:2], prompts[2:]
    weights = Weighting(train, held, read_scores(store, prompts, "official"), settings) if weighting else None
    return Trainer(backbone, store, train, held, settings, out, settings.to_dict(), weights)


def rows(out: Path, event: str = "train") -> list[dict[str, Any]]:
    return [row for row in JsonlLog(out / "train.jsonl").rows() if row["event"] == event]


def weights(run: Trainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in run.parameters.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def spoil(store: Store, name: str, seed: int, how: str) -> None:
    """Make a clip unusable."""
    sample = store.sample(name, seed)
    if how == "vanished":
        sample.latents.unlink()
    else:
        value = torch.full((16, 2, 4, 4), float("nan")) if how == "nan" else torch.zeros(16, 3, 4, 4)
        sample.write_latents(value, sample.read_header())


def gradients(run: Trainer) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in run.parameters.items()}


@pytest.mark.parametrize(
    ("how", "reason"), [("nan", "NaN"), ("vanished", "does not exist"), ("shape", r"shape \(16, 3, 4, 4\)")]
)
def test_a_bad_clip_is_named_and_left_out(
    backbone: WanBackbone,
    paired_store: Store,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    reason: str,
) -> None:
    """The gradient of the step is the mean over the pairs that are left, with nothing of the others."""
    run = trainer(backbone, paired_store, tmp_path / "out", batch_pairs=8, warmup_steps=0)
    with torch.no_grad():
        for parameter in run.parameters.values():
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(3))
    pairs = [run._train.pair(index) for index in range(8)]
    bad = (pairs[0].prompt_id, pairs[0].loser)
    name = f"{bad[0]}/{bad[1]}"
    good = [index for index, pair in enumerate(pairs) if (pair.prompt_id, pair.loser) != bad]
    assert 0 < len(good) < 8
    run.pair_model.gradients([pairs[index] for index in good], good, SETTINGS.beta)  # over 8
    expected = {name: 8 / len(good) * grad for name, grad in gradients(run).items() if grad is not None}

    spoil(paired_store, *bad, how)
    found: dict[str, Tensor | None] = {}
    with monkeypatch.context() as patch:
        patch.setattr(run.optimizer, "step", lambda: found.update(gradients(run)))
        row = run._train_step()
    assert row is not None
    assert row["skipped_pairs"] == 8 - len(good)
    for parameter_name, grad in expected.items():
        torch.testing.assert_close(found[parameter_name], grad, atol=1e-6, rtol=1e-4)
    run._train_step()
    assert list(run.clips.bad) == [name]
    messages = [record.getMessage() for record in caplog.records if f"clip {name} " in record.getMessage()]
    assert len(messages) == 1  # named once, however often it is drawn
    assert re.search(reason, messages[0])


def test_too_many_bad_clips_stop_the_run_by_name(backbone: WanBackbone, paired_store: Store, tmp_path: Path) -> None:
    for name in ("0001_LR", "0002_RL"):
        spoil(paired_store, name, 1, "nan")
    with pytest.raises(DataError, match=r"2 clips.*max_bad_clips \(1\).*000._.*latents\.safetensors.*NaN"):
        trainer(backbone, paired_store, tmp_path / "out", max_bad_clips=1).fit()


def test_steps_without_any_usable_pair_stop_the_run(backbone: WanBackbone, paired_store: Store, tmp_path: Path) -> None:
    for name in ("0001_LR", "0002_RL"):
        spoil(paired_store, name, 0, "nan")
    with pytest.raises(DataError, match=r"step 3: none of its pairs can be used.*max_bad_steps \(2\)"):
        trainer(backbone, paired_store, tmp_path / "out", max_bad_steps=2).fit()


def test_one_odd_clip_does_not_set_the_shape(backbone: WanBackbone, paired_store: Store, tmp_path: Path) -> None:
    spoil(paired_store, "0001_LR", 0, "shape")  # the first clip of all
    run = trainer(backbone, paired_store, tmp_path / "out", steps=3)
    assert run.clips.shape == (16, 2, 4, 4)
    assert run.fit()
    assert list(run.clips.bad) == ["0001_LR/0"]
    assert [row["clip"] for row in rows(tmp_path / "out", "bad_clip")] == ["0001_LR/0"]


def test_a_bad_held_out_clip_leaves_the_other_pairs(backbone: WanBackbone, paired_store: Store, tmp_path: Path) -> None:
    run = trainer(backbone, paired_store, tmp_path / "out")
    assert run.held_out() is not None
    spoil(paired_store, "0003_LT", 1, "vanished")
    part = run.held_out()
    assert part is not None
    assert part["loss"] == pytest.approx(math.log(2))
    spoil(paired_store, "0003_LT", 2, "vanished")
    with pytest.raises(DataError, match="held-out"):
        run.held_out()


def with_nan(plain: Any, x: Tensor, sigma: Tensor, text: Any) -> Tensor:
    """A model whose first sample comes out as NaN."""
    factor = torch.ones(len(x))
    factor[0] = float("nan")
    return plain(x, sigma, text) * factor.reshape(-1, 1, 1, 1, 1)


def test_a_loss_that_is_not_finite_skips_the_step_and_leaves_all_else(
    backbone: WanBackbone, paired_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One good step, one that is skipped, one good step, then six in a row of which five are borne."""
    run, plain = trainer(backbone, paired_store, tmp_path / "out", warmup_steps=0, steps=50), backbone.velocity

    def broken(x: Tensor, sigma: Tensor, text: Any) -> Tensor:
        return with_nan(plain, x, sigma, text)

    assert run._train_step() is not None
    before, moments = weights(run), copy.deepcopy(run.optimizer.state_dict()["state"])
    with monkeypatch.context() as patch:
        patch.setattr(backbone, "velocity", broken)
        assert run._train_step() is None
    assert (run.step, run.progress.failed) == (2, 1)
    assert equal(before, weights(run))
    for index, entries in run.optimizer.state_dict()["state"].items():
        assert equal(moments[index], entries)
    assert run._train_step() is not None
    assert run.progress.failed == 0
    monkeypatch.setattr(backbone, "velocity", broken)
    before = weights(run)
    assert [run._train_step() for _ in range(5)] == [None] * 5
    with pytest.raises(DataError, match=r"step 9: the loss of 000.*not finite.*max_bad_steps \(5\)"):
        run._train_step()
    assert equal(before, weights(run))


def test_the_count_of_skipped_steps_survives_a_checkpoint(
    backbone: WanBackbone, paired_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, plain = trainer(backbone, paired_store, tmp_path / "out", max_bad_steps=3), backbone.velocity
    monkeypatch.setattr(backbone, "velocity", lambda x, sigma, text: with_nan(plain, x, sigma, text))
    run._train_step()
    run._train_step()
    run.save()
    again = trainer(backbone, paired_store, tmp_path / "out", max_bad_steps=3)
    again.resume()
    assert (again.step, again.progress.failed) == (2, 2)
    assert again._train_step() is None
    with pytest.raises(DataError, match="max_bad_steps"):
        again._train_step()


def test_a_full_memory_names_three_options(
    backbone: WanBackbone, paired_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.\nmore")

    monkeypatch.setattr(backbone, "velocity", full)
    with pytest.raises(ConfigError, match=r"3\.00 GiB.*--micro_pairs 1.*--checkpointing full.*--passes one-sample"):
        trainer(backbone, paired_store, tmp_path / "out").fit()
    for preset in PRESETS.values():
        assert len(remedies(preset)) >= 3


def test_an_early_stop_ends_the_run_and_the_best_weights_are_kept(
    backbone: WanBackbone, paired_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accuracies before training and after steps 1 to 4: the best is that of step 2, then two without improvement."""
    values, kept = iter([0.5, 0.6, 0.9, 0.8, 0.9]), dict[int, dict[str, Tensor]]()
    deciding: dict[str, Any] = {"held_out_every": 1, "early_stop": 2, "keep_best": True}
    run = trainer(backbone, paired_store, tmp_path / "out", keep_checkpoints=1, checkpoint_every=100, **deciding)

    def evaluate() -> dict[str, float]:
        kept[run.step] = weights(run)
        return {"accuracy": next(values), "loss": 0.5}

    monkeypatch.setattr(run, "held_out", evaluate)
    assert run.fit()
    assert run.step == 4
    assert run.progress.stopped is not None
    assert "accuracy has not improved on 0.9 of step 2 in 2 evaluations" in run.progress.stopped
    assert sorted(folder.name for folder in run.checkpoints.iterdir()) == ["step-000002", "step-000004"]
    assert [row["step"] for row in rows(tmp_path / "out", "early_stop")] == [4]
    again = trainer(backbone, paired_store, tmp_path / "out", keep_checkpoints=1, checkpoint_every=100, **deciding)
    again.resume()
    assert again.fit()  # over is over
    assert again.step == 4
    assert equal(kept[4], weights(again))
    assert again.load_best() == 2
    assert equal(kept[2], weights(again))
    assert not equal(kept[2], kept[4])


def test_without_keep_best_the_last_weights_are_exported(
    backbone: WanBackbone, paired_store: Store, tmp_path: Path
) -> None:
    run = trainer(backbone, paired_store, tmp_path / "out", held_out_every=1)
    run.fit()
    last = weights(run)
    assert run.load_best() == 6
    assert equal(last, weights(run))


@pytest.fixture
def scored(paired_store: Store) -> Store:
    """The store with scores: winners 0.9, losers 0.1 and 0.3."""
    boxes = np.full((9, 2, 4), np.nan)
    prompt = Prompt.parse(
        "x", "In a quiet room, a cat is on the left of a box, then the cat walks to the right of the box."
    )
    invalid = dsr_score(Tracks(boxes, np.zeros((9, 2)), ("cat", "box"), (64, 64), 8.0), prompt.dsr)
    for name in ("0001_LR", "0002_RL", "0003_LT"):
        for seed, value in enumerate((0.9, 0.1, 0.3)):
            sample = paired_store.sample(name, seed)
            sample.tracks.touch()
            write_json(sample.score, replace(invalid, score=value, reason=None).to_dict())
    return paired_store


def test_reward_weighted_regression_trains_and_logs_its_sample_size(
    backbone: WanBackbone, scored: Store, tmp_path: Path
) -> None:
    assert trainer(backbone, scored, tmp_path / "out", weighting=True, arm="rwr").fit()
    assert len(rows(tmp_path / "out")) == 6
    for row in rows(tmp_path / "out"):
        assert 1 < row["effective_sample_size"] <= 8
        assert row["loss"] == pytest.approx(row["sft"])


def test_the_programs_way_to_weights(
    backbone: WanBackbone, scored: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Advantages of (0.9, 0.1, 0.3) at a temperature of 0.05 leave nearly all weight to the winners, a third of all."""
    caplog.set_level("INFO")
    settings = replace(SETTINGS, arm="rwr", rwr_temperature=0.05, rwr_clip=1e9, held_out=0.3)
    assert train(backbone, scored, scored.root / "pairs.json", tmp_path / "out", settings).finished
    assert "effective sample size of 33 %" in caplog.text
    assert "raise rwr_temperature" not in caplog.text
    assert all(row["effective_sample_size"] == pytest.approx(4, abs=0.01) for row in rows(tmp_path / "out"))


def test_weights_of_pairs_reach_the_loss(backbone: WanBackbone, scored: Store, tmp_path: Path) -> None:
    """Score differences 0.8 and 0.6, equally often drawn: the pairs weigh 8/7 and 6/7 of ln 2."""
    run = trainer(backbone, scored, tmp_path / "out", weighting=True, arm="dpo", pair_weight="margin", batch_pairs=16)
    row = run._train_step()
    losers = [run._train.pair(index).loser for index in range(16)]
    assert row is not None
    assert row["loss"] == pytest.approx(
        math.log(2) * (losers.count(1) * 8 / 7 + losers.count(2) * 6 / 7) / 16, rel=1e-5
    )
    assert row["dpo"] == pytest.approx(math.log(2))


def test_a_store_in_which_nothing_can_be_read(paired_store: Store) -> None:
    from training.samples import Clips

    prompts = [PromptPairs("0001_LR", (0,), (1, 2))]
    for seed in (0, 1, 2):
        spoil(paired_store, "0001_LR", seed, "vanished")
    with pytest.raises(DataError, match=r"none of the first clips.*training\.mine"):
        Clips(paired_store, prompts, 5)
