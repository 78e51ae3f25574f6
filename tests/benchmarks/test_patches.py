"""The benchmark of local defects: its damage, its counting, its measures, and a run on a tiny case."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from spatialalign.rewards.latent import LatentReward, RewardInfo, save_reward
from spatialalign.rewards.wan_trunk import WanTrunk
from training.patch_scores import PatchScores
from training.store import Store


@pytest.fixture(scope="module")
def patches(repo_root: Path) -> ModuleType:
    """The module; benchmarks/ is no installed package."""
    spec = importlib.util.spec_from_file_location("patches_under_test", repo_root / "benchmarks" / "patches.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("damage", ["black", "mixed", "corners"])
def test_the_truth_is_what_was_painted(patches: ModuleType, damage: str) -> None:
    """Counted again on the clip: the share of every block that is as before; the clip that was given stays."""
    frames = np.full((13, 64, 64, 3), 200, np.uint8)
    painted, clean = patches.paint(frames, 4, damage, np.random.default_rng(0))
    assert frames.min() == 200
    halves = painted[:5], painted[5:]  # latent frames 0 and 1, 2 and 3
    for f, r, c in np.ndindex(2, 4, 4):
        block = halves[f][:, 16 * r : 16 * r + 16, 16 * c : 16 * c + 16]
        assert clean[f, r, c] == pytest.approx((np.abs(block.astype(int) - 200).max(-1) <= 32).mean())
    assert (damage == "mixed") == bool(((painted > 0) & (painted < 200)).any())
    if damage == "corners":
        assert set(np.unique(clean)) == {0, 1} and (clean[:, 1:3] == 1).all() and (clean[:, :, 1:3] == 1).all()
    else:
        assert len(np.unique(clean)) > 5


def test_measures_by_hand(patches: ModuleType) -> None:
    """Two clean blocks and two damaged ones; of the 4 pairs of a damaged and a clean block, 3 are ordered rightly."""
    grid = patches.BlockGrid(1, 2, 2)
    true, value = (np.array(v, np.float32).reshape(1, 2, 2) for v in ([1, 1, 0.5, 0.2], [0.9, 0.3, 0.4, 0.1]))
    truth, scores = (PatchScores(grid, "x", {("a", 0): array}) for array in (true, value))
    assert patches.agreement(np.ones(3), np.arange(3.0)) is None
    found = patches.found_by(scores, truth, [("a", 0)])
    assert (found["blocks"], found["damaged"], found["auc"]) == (4, 2, 0.75)
    assert found["rank_correlation_of_damaged"] == pytest.approx(1)
    # ranks of the truth 3.5, 3.5, 2, 1: centred 1, 1, -0.5, -1.5, against 4, 2, 3, 1: (1.5 - 0.5 - 0.25 + 2.25) = 3
    assert found["rank_correlation"] == pytest.approx(3 / (4.5 * 5) ** 0.5, abs=1e-4)
    assert found["ceiling"] == pytest.approx((4.5 / 5) ** 0.5, abs=1e-4)
    assert patches.interval(np.array([[1.0, 3.0], [2.0, 2.0]]))[0] == 2.0


def test_a_tiny_run(patches: ModuleType, miniature_weights: Path, tmp_path: Path) -> None:
    """Every stage with a few steps."""
    from spatialalign.backbones import load_backbone
    from spatialalign.miniature import world
    from training.generate import generate

    backbone = load_backbone("miniature", "cpu")
    store = Store(tmp_path / "clips", create=True)
    generate(backbone, store, world.prompts("train")[:2], [0, 1], backbone.default_settings(), 4)
    torch.manual_seed(0)
    info = RewardInfo(backbone.model_id, backbone.latent_space)
    reward = LatentReward(WanTrunk.from_transformer(backbone.transformer, 1), info, head_width=16)
    torch.nn.init.normal_(reward.head.to_values.weight)
    save_reward(tmp_path / "reward.safetensors", reward)
    sizes = {"prompts": 2, "seeds": 2, "own_seeds": 2, "eval_prompts": 1, "eval_seeds": 1, "arms": "dpo@50,gran-dpo@50"}
    steps = {"reward_steps": 2, "defect_steps": 2, "dpo_steps": 2, "batch_pairs": 2}
    args = patches.Patches(store.root, tmp_path / "reward.safetensors", tmp_path / "out", **sizes, **steps)
    assert {"reward", "own clips", "before", "dpo@50", "gran-dpo@50"} == patches.run(args).keys()
    assert "| gran-dpo@50 | 2 |" in (tmp_path / "out" / "patches.md").read_text()
    assert (tmp_path / "out" / "heat_map.png").is_file()


def test_fusing_keeps_what_the_lora_did(patches: ModuleType, miniature_weights: Path, tmp_path: Path) -> None:
    from spatialalign.backbones import load_backbone
    from spatialalign.lora import load_lora, save_lora, unload_lora
    from training.config import TrainSettings
    from training.trainer import ADAPTER, add_adapter

    backbone = load_backbone("miniature", "cpu")
    for parameter in add_adapter(backbone, TrainSettings(rank=2)).values():
        torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path / "lora.safetensors"
    save_lora(backbone.transformer, path, tmp_path / "other.safetensors", {"rank": 2}, adapter=ADAPTER)
    unload_lora(backbone.transformer, ADAPTER)
    inputs = torch.randn(1, 16, 4, 8, 8), torch.tensor([0.5]), backbone.encode_text(["a cat"])
    with torch.no_grad():
        base = backbone.velocity(*inputs)
        load_lora(backbone.transformer, path)
        adapted = backbone.velocity(*inputs)
        unload_lora(backbone.transformer)
        patches.fuse(backbone, path)
        fused = backbone.velocity(*inputs)
    torch.testing.assert_close(fused, adapted, rtol=1e-4, atol=1e-4)
    assert (fused - base).abs().max() > 1e-2
