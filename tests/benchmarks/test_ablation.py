"""The ablation's own measurements; its training and evaluation are those of the demo."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from spatialalign.errors import ConfigError
from spatialalign.miniature import FRAMES
from spatialalign.miniature.world import prompts, render
from spatialalign.video import write_video
from training.store import Store


@pytest.fixture(scope="module")
def ablation(repo_root: Path) -> ModuleType:
    """The module; benchmarks/ is no installed package."""
    spec = importlib.util.spec_from_file_location("ablation_under_test", repo_root / "benchmarks" / "ablation.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_true_render_has_the_true_background(ablation: ModuleType) -> None:
    clip = render(prompts("eval")[0].dsr, 0)
    # Rounding to 8 bits is an error of 1 / (255 sqrt(12)) = 1.1e-3 at most in the mean: 59 dB.
    assert ablation.background_psnr(clip.frames, clip.tracks, clip.dsr.scene) > 55


def test_noise_of_known_size_gives_the_psnr_of_its_size(ablation: ModuleType) -> None:
    clip = render(prompts("eval")[1].dsr, 1)
    noise = np.random.default_rng(0).choice([-10, 10], clip.frames.shape)
    noisy = np.clip(clip.frames.astype(int) + noise, 0, 255).astype(np.uint8)
    expected = 20 * np.log10(255 / 10)
    assert ablation.background_psnr(noisy, clip.tracks, clip.dsr.scene) == pytest.approx(expected, abs=0.5)


def test_what_lies_in_the_boxes_does_not_count(ablation: ModuleType) -> None:
    clip = render(prompts("eval")[2].dsr, 2)
    frames = clip.frames.copy()
    for frame, pair in zip(frames, clip.tracks.boxes.astype(int), strict=True):
        for x1, y1, x2, y2 in pair:
            frame[y1:y2, x1:x2] = 255
    assert ablation.background_psnr(frames, clip.tracks, clip.dsr.scene) > 55
    everywhere = replace(clip.tracks, boxes=np.broadcast_to([0.0, 0.0, 64.0, 64.0], (FRAMES, 2, 4)), masks=None)
    assert np.isnan(ablation.background_psnr(frames, everywhere, clip.dsr.scene))


def test_over_saturated_clips_are_seen(ablation: ModuleType, tmp_path: Path) -> None:
    chosen, looks = prompts("eval")[:2], []
    for name, gain in (("plain", 1.0), ("loud", 1.6)):
        store = Store(tmp_path / name, create=True)
        for prompt in chosen:
            store.add_prompt(prompt)
            sample, clip = store.sample(prompt.prompt_id, 0), render(prompt.dsr, 0)
            grey = clip.frames.mean(-1, keepdims=True)
            loud = np.clip(grey + gain * (clip.frames - grey), 0, 255).astype(np.uint8)
            sample.folder.mkdir(parents=True)
            write_video(sample.video, loud, 8.0)
            sample.latents.touch()
            clip.tracks.save(sample.tracks)
        looks.append(ablation.picture(store, chosen, [0]))
    plain, loud_look = looks
    assert loud_look["saturation"] > 1.2 * plain["saturation"]
    assert loud_look["background_psnr"] < plain["background_psnr"] - 5
    assert plain["confidence"] == 1.0


def test_the_plan_is_checked(ablation: ModuleType) -> None:
    assert ablation.Ablation(arms="dpo,sft", steps="5,10").plan() == [("dpo", 5), ("dpo", 10), ("sft", 5), ("sft", 10)]
    for wrong in ({"arms": "dpo,ppo"}, {"steps": "ten"}, {"steps": "0"}):
        with pytest.raises(ConfigError, match="arms must be among"):
            ablation.Ablation(**wrong).plan()
