"""Clips sampled in the middle of a training, with a detector whose answer is known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from spatialalign.backbones.wan import WanBackbone
from spatialalign.errors import ConfigError
from spatialalign.lora import unload_lora
from spatialalign.tracking.detect import Detections
from spatialalign.tracking.tracker import Tracker
from training.config import TrainSettings
from training.dpo import train
from training.pairs import read_pairs
from training.store import Store
from training.trainer import ADAPTER, Trainer
from training.trial import trial_of

SETTINGS = TrainSettings(
    steps=4,
    batch_pairs=2,
    rank=2,
    alpha=2,
    beta=20.0,
    lr=5e-3,
    warmup_steps=1,
    held_out=0.3,
    held_out_pairs=2,
    checkpointing="none",
    tensorboard=False,
    sample_every=2,
    sample_prompts=3,
    sample_seeds=2,
)


class LeftToRight:
    """Sees the subject pass from left to right; type LR scores 0.92, LT 0.64 and RL less (see test_evaluate)."""

    def detect(self, frames: NDArray[np.uint8], phrases: Sequence[str]) -> list[Detections]:
        out = []
        for step in np.linspace(0.0, 24.0, len(frames)):
            boxes = np.array([[step, 20.0, step + 8.0, 28.0], [12.0, 12.0, 20.0, 20.0]])
            out.append(Detections(boxes, np.array([0.9, 0.9]), np.array([0, 1]), tuple(phrases)))
        return out


def test_scores_of_the_adapter_are_logged_and_followed(
    backbone: WanBackbone, paired_store: Store, tmp_path: Path
) -> None:
    """The detector sees the same in every clip, so the first score stays the best and the second ends the run."""
    out, pairs = tmp_path / "out", paired_store.root / "pairs.json"
    settings = replace(SETTINGS, monitor="score", early_stop=1, keep_best=True, sample_every=1)
    result = train(backbone, paired_store, pairs, out, settings, tracker=Tracker(LeftToRight()))
    rows = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    samples = [row for row in rows if row["event"] == "samples"]
    assert [row["step"] for row in samples] == [1, 2]
    assert result.step == 1
    assert samples[0]["score"] == samples[1]["score"]
    assert samples[0]["invalid_rate"] == 0
    assert len(list((out / "samples").iterdir())) == 2
    assert not getattr(backbone.transformer, "peft_config", {})


def test_the_current_adapter_is_sampled_with_the_same_noise(
    backbone: WanBackbone, paired_store: Store, tmp_path: Path
) -> None:
    """Clips of two visits differ by the adapter alone; the same adapter gives the same clips, in the same folder."""
    prompts, _ = read_pairs(paired_store.root / "pairs.json")
    trial = trial_of(backbone, Tracker(LeftToRight()), paired_store, prompts, 1, 1)
    run = Trainer(backbone, paired_store, prompts[:2], [], replace(SETTINGS, sample_every=0), tmp_path / "out", {})
    try:
        trial.measure(tmp_path / "a", 1, run.parameters)
        trial.measure(tmp_path / "b", 1, run.parameters)
        with torch.no_grad():
            for parameter in run.parameters.values():
                parameter.add_(0.5)
        trial.measure(tmp_path / "c", 1, run.parameters)
    finally:
        unload_lora(backbone.transformer, ADAPTER)
    folders = [next((tmp_path / name).iterdir()) for name in "abc"]
    latents = [Store(folder).samples()[0].read_latents() for folder in folders]
    assert folders[0].name == folders[1].name != folders[2].name
    assert torch.equal(latents[0], latents[1])
    assert not torch.allclose(latents[0], latents[2])
    assert latents[0].shape == (16, 2, 4, 4)


def test_a_tracker_is_needed(backbone: WanBackbone, paired_store: Store, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sample_every \(2\) needs a tracker"):
        train(backbone, paired_store, paired_store.root / "pairs.json", tmp_path / "out", SETTINGS)
