"""The patch reward: one head for clips and blocks, its start from a video reward, its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spatialalign.blocks import BlockGrid
from spatialalign.errors import ConfigError, ModelError
from spatialalign.rewards.latent import LatentReward, RewardInfo
from spatialalign.rewards.patch import PatchInfo, PatchReward, check_fits, load_patch_reward, save_patch_reward
from spatialalign.rewards.wan_trunk import TrunkConfig, WanTrunk

CONFIG = TrunkConfig(blocks=1, depth=8, heads=2, head_dim=12, in_channels=4, text_dim=6, freq_dim=8, ffn_dim=24)
TEXT = [torch.linspace(-1, 1, 12).view(2, 6), torch.linspace(2, -1, 30).view(5, 6)]
GRID = BlockGrid(2, 2, 3)


def video_reward() -> LatentReward:
    torch.manual_seed(0)
    info = RewardInfo("some/model", "wan-vae:0123", further=("quality",))
    reward = LatentReward(WanTrunk(CONFIG), info, head_width=16, queries=3)
    torch.nn.init.normal_(reward.head.to_values.weight)
    reward.standardise("quality", 0.3, 1.7)
    return reward.eval()


def clips() -> torch.Tensor:
    return torch.randn(2, 4, 4, 4, 6, generator=torch.Generator().manual_seed(3))  # tokens 4 x 2 x 3


@pytest.mark.parametrize("dimension", ["dsr", "quality"])
def test_it_begins_as_the_video_reward(dimension: str) -> None:
    """Whole clips are judged as before, and so is the one block of a grid of one."""
    video = video_reward()
    patch = PatchReward.from_video(video, BlockGrid(1, 1, 1), dimension)
    with torch.no_grad():
        found = patch(clips(), TEXT)
        expected = video(clips(), torch.zeros(2), TEXT).values[:, video.dimensions.index(dimension)]
    torch.testing.assert_close(found.video, expected)
    torch.testing.assert_close(found.blocks.flatten(), expected)
    assert all(parameter.requires_grad for parameter in patch.parameters())
    with pytest.raises(ModelError, match=r"'motion'; it has dsr, valid, quality"):
        PatchReward.from_video(video, GRID, "motion")


def test_training_it_leaves_the_video_reward_alone() -> None:
    video = video_reward()
    before = video.head.to_key.weight.clone()
    patch = PatchReward.from_video(video, GRID)
    with torch.no_grad():
        patch.head.to_key.weight.add_(1)
    assert torch.equal(video.head.to_key.weight, before)


def test_a_block_is_read_from_its_own_tokens() -> None:
    """With nothing but the patch embedding before the head, a change at one place changes that block's value alone."""
    patch = PatchReward.from_video(video_reward(), GRID)
    patch.trunk.blocks = torch.nn.ModuleList()
    x = clips()
    x[1, :, 2, 2:4, 0:2] += 3.0  # frame 2 of 4, token row 1, token column 0: block (1, 1, 0)
    with torch.no_grad():
        changed = (patch(x, TEXT).blocks - patch(clips(), TEXT).blocks).abs() > 1e-5
    assert changed.nonzero().tolist() == [[1, 1, 1, 0]]


def test_blocks_of_tokens_must_be_equal() -> None:
    with pytest.raises(ConfigError, match="tokens of 4 x 2 x 3"):
        PatchReward.from_video(video_reward(), BlockGrid(3, 1, 1))(clips(), TEXT)


def test_it_can_learn_which_block_is_bad() -> None:
    """A bright block somewhere; learned on some clips, it is found in others."""
    torch.manual_seed(1)
    patch = PatchReward.from_video(video_reward(), GRID)
    generator = torch.Generator().manual_seed(5)
    x = 0.3 * torch.randn(24, 4, 4, 4, 6, generator=generator)
    places = torch.randint(12, (24,), generator=generator)
    labels = torch.ones(24, 12)
    labels[torch.arange(24), places] = 0.0
    for clip, place in zip(x, places.tolist(), strict=True):
        f, r, c = place // 6, place // 3 % 2, place % 3
        clip[:, 2 * f : 2 * f + 2, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2] += 1.5
    optimiser = torch.optim.Adam(patch.parameters(), 3e-3)
    for _ in range(100):
        loss = (patch(x[:16], TEXT[:1] * 16).blocks.flatten(1) - labels[:16]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        found = patch(x[16:], TEXT[:1] * 8).blocks.flatten(1).argmin(1)
    assert (found == places[16:]).float().mean() >= 7 / 8


def test_a_file_brings_all_of_it_back(tmp_path: Path) -> None:
    patch = PatchReward.from_video(video_reward(), GRID)
    patch.info = PatchInfo("some/model", "wan-vae:0123", "a teacher", {"steps": 3})
    save_patch_reward(tmp_path / "patch.safetensors", patch, torch.float32)
    found = load_patch_reward(tmp_path / "patch.safetensors")
    assert (found.info, found.grid, found.trunk.config) == (patch.info, GRID, CONFIG)
    assert not any(parameter.requires_grad for parameter in found.parameters()) and not found.training
    with torch.no_grad():
        torch.testing.assert_close(found(clips(), TEXT).blocks, patch(clips(), TEXT).blocks)
    check_fits(found, "wan-vae:0123")
    with pytest.raises(ModelError, match="wan-vae:9"):
        check_fits(found, "wan-vae:9")


def test_files_that_are_no_patch_rewards(tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    save_patch_reward(good, PatchReward.from_video(video_reward(), GRID))
    tensors, content = load_file(good), {"kind": "patch-reward", "version": 1}
    (tmp_path / "text.safetensors").write_text("hello")
    save_file(tensors, tmp_path / "lora.safetensors", metadata={"spatialalign": json.dumps({"step": 3})})
    save_file(tensors, tmp_path / "later.safetensors", metadata={"spatialalign": json.dumps(content | {"version": 2})})
    save_file(tensors, tmp_path / "less.safetensors", metadata={"spatialalign": json.dumps(content)})
    cases = {"absent": "does not exist", "text": "no safetensors", "lora": "no patch reward", "later": "version 2"}
    for name, words in (cases | {"less": "damaged"}).items():
        with pytest.raises(ModelError, match=words):
            load_patch_reward(tmp_path / f"{name}.safetensors")
