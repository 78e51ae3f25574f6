"""The latent reward: what it answers, its file, and what it fits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from spatialalign.errors import ConfigError, ModelError
from spatialalign.rewards.latent import LatentReward, RewardInfo, check_fits, load_reward, save_reward
from spatialalign.rewards.values import weighted_total
from spatialalign.rewards.wan_trunk import TrunkConfig, WanTrunk

CONFIG = TrunkConfig(blocks=2, depth=8, heads=2, head_dim=12, in_channels=4, text_dim=6, freq_dim=8, ffn_dim=24)
INFO = RewardInfo("some/model", "wan-vae:0123", further=("quality",), statistics={"quality": {"pairs": 12}})
TEXT = [torch.linspace(-1, 1, 12).view(2, 6), torch.linspace(2, -1, 30).view(5, 6)]
SIGMA = torch.tensor([0.3, 0.8])


def make(info: RewardInfo = INFO) -> LatentReward:
    """A reward whose values are not 0."""
    torch.manual_seed(0)
    reward = LatentReward(WanTrunk(CONFIG), info, head_width=16, queries=3)
    torch.nn.init.normal_(reward.head.to_values.weight)
    return reward.eval()


def clips(frames: int = 3) -> torch.Tensor:
    return torch.randn(2, 4, frames, 4, 6, generator=torch.Generator().manual_seed(3))


def test_a_new_reward_knows_nothing() -> None:
    found = LatentReward(WanTrunk(CONFIG), INFO)(clips(), SIGMA, TEXT)
    assert found.values.tolist() == [[0.5, 0, 0]] * 2
    assert found.values.dtype == torch.float32


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_curves_have_a_point_for_each_latent_frame(frames: int) -> None:
    with torch.no_grad():
        found = make()(clips(frames), SIGMA, TEXT)
    assert found.curves.shape == (2, frames, 2) and found.values.shape == (2, 3)
    assert found.curves.abs().max() <= 1


def test_every_input_matters_and_no_other_clip_does() -> None:
    """Noise level, text and clip change the values; the longer text of another clip in the batch does not."""
    reward, x = make(), clips()
    with torch.no_grad():
        both = reward(x, SIGMA, TEXT).values
        alone = reward(x[:1], SIGMA[:1], TEXT[:1]).values
        others = [
            reward(x[1:], SIGMA[:1], TEXT[:1]).values,
            reward(x[:1], SIGMA[1:], TEXT[:1]).values,
            reward(x[:1], SIGMA[:1], TEXT[1:]).values,
            reward(x[:1].flip(2), SIGMA[:1], TEXT[:1]).values,
            reward(x[:1].flip(4), SIGMA[:1], TEXT[:1]).values,
        ]
        prepared = reward(x, SIGMA, reward.prepare(TEXT)).values
    torch.testing.assert_close(both[:1], alone)
    assert torch.equal(prepared, both)
    for other in others:
        assert (other - alone).abs().min() > 1e-4


def test_the_head_can_tell_left_from_right_and_early_from_late() -> None:
    """A bright column moves; the label, +1 left to right, -1 right to left, learned on some rows, holds on others."""
    reward = make()
    labels = torch.tensor([1.0, -1.0] * 4)
    x = torch.zeros(8, 4, 4, 8, 8)
    for clip, label in enumerate(labels.tolist()):
        for frame in range(4):
            column = 2 * frame if label > 0 else 6 - 2 * frame
            x[clip, :, frame, 2 * (clip // 2) : 2 * (clip // 2) + 2, column : column + 2] = 3.0
    sigma, text = torch.full((8,), 0.2), [TEXT[0]] * 8
    optimiser = torch.optim.Adam(reward.head.parameters(), 5e-3)
    for _ in range(120):
        loss = (reward(x[:6], sigma[:6], text[:6]).values[:, 2] - labels[:6]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        assert loss < 0.01
        assert (reward(x, sigma, text).values[6:, 2].sign() == labels[6:]).all()


def test_standardised_values_have_mean_0_and_deviation_1() -> None:
    """(v - 3) / 2, and once more (v' - 1) / 4 of that: (v - 3 - 2) / 8; the other dimensions stay."""
    reward, x = make(), clips()
    with torch.no_grad():
        before = reward(x, SIGMA, TEXT).values
        reward.standardise("quality", 3.0, 2.0)
        torch.testing.assert_close(reward(x, SIGMA, TEXT).values[:, 2], (before[:, 2] - 3) / 2)
        reward.standardise("quality", 1.0, 4.0)
        after = reward(x, SIGMA, TEXT).values
    torch.testing.assert_close(after[:, 2], (before[:, 2] - 5) / 8)
    assert torch.equal(after[:, :2], before[:, :2])
    for dimension, std in (("dsr", 1.0), ("quality", 0.0)):
        with pytest.raises(ModelError, match=dimension):
            reward.standardise(dimension, 0.0, std)


def test_the_total_is_the_weighted_sum() -> None:
    """0.5 * 2 - 1 * 4 = -3."""
    values = torch.tensor([[2.0, 7.0, 4.0]])
    assert make().total(values, {"quality": -1.0, "dsr": 0.5}).tolist() == [-3.0]
    assert weighted_total(values, ("a", "b", "c"), {"b": 2.0}).tolist() == [14.0]
    with pytest.raises(ConfigError, match=r"'motion'; it has dsr, valid, quality"):
        make().total(values, {"motion": 1.0})


def test_dimensions_and_price() -> None:
    assert make().dimensions == ("dsr", "valid", "quality")
    assert make().blocks_share == 2 / 8
    assert make().knows_noise and not make(replace(INFO, trained_on="clean")).knows_noise
    with pytest.raises(ModelError, match="differ"):
        replace(INFO, further=("dsr",))
    with pytest.raises(ModelError, match="'dirty'"):
        replace(INFO, trained_on="dirty")  # type: ignore[arg-type]


def test_a_file_brings_all_of_it_back(tmp_path: Path) -> None:
    reward = make()
    reward.standardise("quality", 0.3, 1.7)
    save_reward(tmp_path / "full.safetensors", reward, torch.float32)
    save_reward(tmp_path / "half.safetensors", reward)
    full, half = (load_reward(tmp_path / name) for name in ("full.safetensors", "half.safetensors"))
    assert full.info == INFO and full.trunk.config == CONFIG
    with torch.no_grad():
        expected, found = (r(clips(), SIGMA, TEXT) for r in (reward, full))
    torch.testing.assert_close(found.values, expected.values)
    torch.testing.assert_close(found.curves, expected.curves)
    assert torch.equal(half.offset, reward.offset)
    for name, kept in reward.named_parameters():
        expected = kept if kept.ndim == 1 else kept.half().float()
        assert torch.equal(half.get_parameter(name), expected), name
    assert not any(parameter.requires_grad for parameter in full.parameters()) and not full.training


def test_it_can_be_loaded_in_inference_mode_and_in_bfloat16(tmp_path: Path) -> None:
    save_reward(tmp_path / "reward.safetensors", make())
    with torch.inference_mode():
        reward = load_reward(tmp_path / "reward.safetensors", dtype=torch.bfloat16)
    assert not any(tensor.is_inference() for tensor in reward.state_dict().values())
    assert {p.dtype for p in reward.trunk.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in reward.head.parameters()} == {torch.float32}
    with torch.no_grad():
        exact = make()(clips(), SIGMA, TEXT).values
        assert (reward(clips(), SIGMA, TEXT).values - exact).abs().max() < 0.1 * exact.abs().max()


def test_what_it_fits() -> None:
    reward = make()
    check_fits(reward, "wan-vae:0123", 6)
    with pytest.raises(ModelError, match=r"some/model, reads latents of wan-vae:0123; this model's are of wan-vae:9"):
        check_fits(reward, "wan-vae:9", 6)
    with pytest.raises(ModelError, match=r"6 wide; this model's are 4096"):
        check_fits(reward, "wan-vae:0123", 4096)


def test_files_that_are_no_rewards(tmp_path: Path) -> None:
    good = tmp_path / "good.safetensors"
    save_reward(good, make())
    tensors, content = load_file(good), {"kind": "latent-reward", "version": 1}
    (tmp_path / "text.safetensors").write_text("hello")
    save_file(tensors, tmp_path / "lora.safetensors", metadata={"spatialalign": json.dumps({"step": 3})})
    save_file(tensors, tmp_path / "later.safetensors", metadata={"spatialalign": json.dumps(content | {"version": 2})})
    save_file(tensors, tmp_path / "less.safetensors", metadata={"spatialalign": json.dumps(content)})
    cases = {"absent": "does not exist", "text": "no safetensors", "lora": "no latent reward", "later": "version 2"}
    for name, words in (cases | {"less": "damaged"}).items():
        with pytest.raises(ModelError, match=words):
            load_reward(tmp_path / f"{name}.safetensors")
