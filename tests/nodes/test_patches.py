"""Load Patch Reward and Patch Reward Heatmap: what goes in and out. The real host is tried in tests/host."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

NAME = "tiny.safetensors"
Run = Callable[..., Any]


@pytest.fixture
def file(fake_host: Any, miniature_weights: Path) -> Path:
    """The shipped latent reward as a judge of 2x4x4 blocks, in ``models/patch_rewards``."""
    from spatialalign.blocks import BlockGrid
    from spatialalign.miniature import REWARD
    from spatialalign.rewards.latent import load_reward
    from spatialalign.rewards.patch import PatchReward, save_patch_reward

    path: Path = fake_host.models / "patch_rewards" / NAME
    path.parent.mkdir(parents=True)
    save_patch_reward(path, PatchReward.from_video(load_reward(REWARD), BlockGrid.parse("2x4x4")), torch.float32)
    return path


@pytest.fixture
def space(module: Callable[[str], ModuleType], miniature_weights: Path) -> Any:
    """The latent space of the miniature."""
    config = module("spatialalign.files").read_json(miniature_weights / "wan" / "vae" / "config.json")
    return module("spatialalign.backbones.latent_space").LatentSpace.from_config(config)


@pytest.fixture
def clip(space: Any, module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> Any:
    """A clip of noise: ``inputs`` of the node, and ``x`` and ``text`` as the engine reads them."""
    host = module("host")
    monkeypatch.setattr(host, "describe_wan", lambda model: host.WanModel(128, 4096, space.mean, space.std))
    generator = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 16, 4, 8, 8, generator=generator), torch.randn(5, 4096, generator=generator)
    padded = torch.cat([text, torch.zeros(507, 4096)])[None]
    inputs = {
        "images": torch.randint(0, 256, (13, 64, 64, 3), generator=generator) / 255,
        "latent": {"samples": space.denormalise(x)},
        "positive": [[padded, {}]],
        "model": object(),
    }
    return SimpleNamespace(x=x, text=text, inputs=inputs)


@pytest.fixture
def heat(nodes: dict[str, Any], run: Run) -> Run:
    """``heat(**inputs)``: one execution of Patch Reward Heatmap."""
    return lambda **inputs: run(nodes["SpatialAlignPatchRewardHeatmap"], hidden={"unique_id": "4"}, **inputs)


@pytest.fixture
def error(module: Callable[[str], ModuleType]) -> type[Exception]:
    """The pack's base error."""
    found: type[Exception] = module("spatialalign.errors").SpatialAlignError
    return found


def judge(answers: list[str]) -> Any:
    """What Load VLM hands out, with a judge that gives these answers in turn and notes what it was asked."""
    asked: list[tuple[Any, str]] = []

    class Judge:
        name, window = "teller", 3

        def __call__(self, frames: Any, question: str) -> str:
            asked.append((frames, question))
            return answers[len(asked) - 1]

    return SimpleNamespace(judge=Judge(), patcher=object(), asked=asked)


def drawn(images: Any, values: Any, latent_frames: int, scale: Any = None) -> Any:
    """The engine's heat map as an IMAGE."""
    from spatialalign.patch_plot import draw_patches

    frames = (images * 255).round().byte().numpy()
    return torch.from_numpy(draw_patches(frames, np.array(values, np.float32), latent_frames, scale)) / 255


# --- the file -------------------------------------------------------------------------------------------------------


def test_the_list_has_the_shipped_reward_only_where_it_is(
    nodes: dict[str, Any], module: Callable[[str], ModuleType], file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def offered() -> list[str]:
        listed: list[str] = nodes["SpatialAlignLoadPatchReward"].INPUT_TYPES()["required"]["reward"][1]["options"]
        return listed

    monkeypatch.setattr(module("spatialalign.miniature"), "PATCH_REWARD", tmp_path / "shipped")
    assert offered() == [NAME]
    shutil.copy(file, tmp_path / "shipped")
    assert offered() == ["miniature", NAME]


def test_a_loaded_reward_is_the_hosts_and_says_what_it_is(
    nodes: dict[str, Any], run: Run, fake_host: Any, file: Path, space: Any
) -> None:
    reward, report = run(nodes["SpatialAlignLoadPatchReward"], reward=NAME).args
    assert reward.patcher.model[0] is reward.network and not fake_host.loaded
    assert not any(weight.requires_grad for weight in reward.network.parameters())
    assert report.splitlines() == [
        f"{NAME}: made with {reward.network.info.base_model}, reads latents of {space.name}",
        "  2x4x4 blocks (time x height x width), taught by nobody yet",
    ]


def test_files_of_another_kind(nodes: dict[str, Any], run: Run, fake_host: Any, file: Path, error: Any) -> None:
    from spatialalign.miniature import REWARD

    shutil.copy(REWARD, file.with_name("latent.safetensors"))
    (fake_host.models / "latent_rewards").mkdir()
    shutil.copy(file, fake_host.models / "latent_rewards" / NAME)
    for node, name, words in (
        ("Patch", "latent.safetensors", "latent.safetensors is no patch reward"),
        ("Patch", "x.safetensors", "not in models/patch_rewards"),
        ("", NAME, "tiny.safetensors is no latent reward"),
    ):
        with pytest.raises(error, match=words):
            run(nodes[f"SpatialAlignLoad{node}Reward"], reward=name)


def test_a_reward_that_was_trained_anew_is_loaded_anew(nodes: dict[str, Any], file: Path) -> None:
    node = nodes["SpatialAlignLoadPatchReward"]
    before = node.fingerprint_inputs(reward=NAME)
    assert node.fingerprint_inputs(reward=NAME) == before
    file.write_bytes(file.read_bytes() + b" ")
    assert node.fingerprint_inputs(reward=NAME) != before


# --- by a patch reward ----------------------------------------------------------------------------------------------


@pytest.fixture
def reward(nodes: dict[str, Any], run: Run, file: Path) -> Any:
    return run(nodes["SpatialAlignLoadPatchReward"], reward=NAME).args[0]


def test_a_patch_reward_is_drawn_as_by_the_engine(heat: Run, reward: Any, clip: Any, fake_host: Any) -> None:
    """It reads latents in the model's space, though the graph's are in the VAE's, and texts without padding."""
    answer = heat(patch_reward=reward, worst=-1.0, best=2.0, values={"dsr": 0.5}, **clip.inputs)
    expected = reward.network(clip.x, [clip.text]).blocks[0]
    told = json.loads(answer.args[3])
    assert (told["judge"], told["grid"]) == (NAME, "2x4x4")
    torch.testing.assert_close(torch.tensor(told["scores"]), expected, rtol=0, atol=1e-4)
    assert expected.std() > 1e-3
    overlay = drawn(clip.inputs["images"], told["scores"], 4, (-1.0, 2.0))
    torch.testing.assert_close(answer.args[0], overlay, rtol=0, atol=1e-6)
    np.testing.assert_allclose(answer.args[1:3], (expected.mean(), expected.min()), atol=1e-4)
    assert answer.args[4] == {"dsr": 0.5, "patch": answer.args[1]}
    assert fake_host.loaded == [reward.patcher]
    assert fake_host.shown == {"4": answer.ui["text"][0]}


def test_clip_and_text_follow_the_weights_to_the_device(
    heat: Run, reward: Any, clip: Any, module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network runs whole on the device "meta"; only its answer cannot be brought back from there."""
    monkeypatch.setattr(module("host"), "load", lambda patchers, memory=0: torch.device("meta"))
    with pytest.raises(NotImplementedError, match="[Cc]annot copy out of meta"):
        heat(patch_reward=reward, **clip.inputs, worst=0.0, best=0.0)


def test_what_it_needs_beside_the_weights_grows_with_the_clip(reward: Any) -> None:
    """Miniature: inner width 512, outer 128; a token has 2 x 2 latents."""
    assert reward.network.trunk.config.ffn_dim == 512
    assert reward.memory(torch.zeros(1, 16, 4, 8, 8)) == 4 * (4 * 4 * 4) * (2 * 512 + 6 * 128)


def test_one_judge_with_all_it_needs(heat: Run, reward: Any, clip: Any, error: Any) -> None:
    images = clip.inputs["images"]
    with pytest.raises(error, match="connect patch_reward or vlm: neither is connected"):
        heat(images=images)
    with pytest.raises(error, match="connect patch_reward or vlm: both are connected"):
        heat(patch_reward=reward, vlm=judge([]), **clip.inputs)
    for missing, words in ((("latent", "model"), "connect latent and model as well"), (("positive",), "positive as")):
        with pytest.raises(error, match=words):
            heat(patch_reward=reward, **{key: one for key, one in clip.inputs.items() if key not in missing})


def test_clips_that_a_patch_reward_cannot_read(
    heat: Run, reward: Any, clip: Any, space: Any, error: Any, module: Callable[[str], ModuleType], monkeypatch: Any
) -> None:
    def refused(words: str, **changes: Any) -> None:
        with pytest.raises(error, match=words):
            heat(patch_reward=reward, **{**clip.inputs, **changes})

    samples, (padded, _) = clip.inputs["latent"]["samples"], clip.inputs["positive"][0]
    refused(r"expected one clip \(1, 16, .*found \(2, 16,", latent={"samples": samples.repeat(2, 1, 1, 1, 1)})
    refused(r"found \(1, 48,", latent={"samples": samples.repeat(1, 3, 1, 1, 1)})
    refused("found list", latent={"samples": [samples]})
    refused(r"expected one text \(1, tokens, 4096\), found \[\(1, 512, 64\)\]", positive=[[padded[..., :64], {}]])
    refused("expected one text", positive=[[padded, {}]] * 2)
    refused("all zeros", positive=[[torch.zeros(1, 5, 4096), {}]])
    refused("3 x 4 x 4 .* cannot be cut into 2x4x4", latent={"samples": samples[:, :, :3]})
    refused("12 frames do not fit 4 latent frames", images=clip.inputs["images"][:12])
    refused("62 x 64 .* cannot be cut into 2x4x4 equal", images=clip.inputs["images"][:, 1:63, :])
    host = module("host")
    monkeypatch.setattr(host, "describe_wan", lambda model: host.WanModel(1536, 4096, space.mean, space.std))
    refused(f"reads latents of {space.name}; these are of wan-vae:", images=clip.inputs["images"])


# --- by a chat model ------------------------------------------------------------------------------------------------


def test_a_chat_model_is_asked_about_every_block(heat: Run, fake_host: Any) -> None:
    """Five frames are two latent frames; the first of them holds one frame."""
    vlm, images = judge(["yes", "unclear", "no", "yes"]), torch.rand(5, 32, 32, 3)
    answer = heat(images=images, vlm=vlm, grid="2x1x2", worst=0.0, best=1.0)
    assert [frames.shape for frames, _ in vlm.asked] == [(1, 32, 16, 3)] * 2 + [(3, 32, 16, 3)] * 2
    np.testing.assert_array_equal(vlm.asked[2][0], (images[[1, 3, 4], :, :16] * 255).round().byte().numpy())
    assert all("free of visible defects" in question for _, question in vlm.asked)
    scores = [[[1.0, None]], [[0.0, 1.0]]]
    mean = pytest.approx(2 / 3)
    assert answer.args[1:3] == (mean, 0.0) and answer.args[4] == {"patch": mean}
    told = {"judge": "teller", "grid": "2x1x2", "mean": mean, "worst": 0.0, "scores": scores}
    assert json.loads(answer.args[3]) == told
    expected = drawn((images * 255).round() / 255, [[[1, np.nan]], [[0, 1]]], 2, (0.0, 1.0))
    torch.testing.assert_close(answer.args[0], expected, rtol=0, atol=1e-6)
    assert answer.ui["text"][0].splitlines() == [
        "2x1x2 blocks by teller: mean 0.667, worst 0.000",
        "worst: frames 1 to 4, row 1 of 1, column 1 of 2",
        "1 of 4 blocks are unknown",
    ]
    assert fake_host.loaded == [vlm.patcher] and fake_host.progress == [(done, 4) for done in (1, 2, 3, 4)]


def test_nothing_known(heat: Run) -> None:
    answer = heat(images=torch.rand(4, 32, 32, 3), vlm=judge(["unclear"] * 4), grid="4x1x1")
    assert all(math.isnan(value) for value in (*answer.args[1:3], answer.args[4]["patch"]))
    assert json.loads(answer.args[3])["mean"] is None
    assert answer.ui["text"][0].endswith("none, worst none\n4 of 4 blocks are unknown")


def test_a_stop_is_heard_between_two_blocks(heat: Run, fake_host: Any) -> None:
    vlm, fake_host.interrupt_at = judge(["yes"] * 4), 2
    with pytest.raises(Exception, match="^$") as raised:
        heat(images=torch.rand(5, 32, 32, 3), vlm=vlm, grid="2x1x2")
    assert type(raised.value).__name__ == "Interrupted" and len(vlm.asked) == 2


def test_blocks_and_scales_that_cannot_be(heat: Run, nodes: dict[str, Any], error: Any) -> None:
    vlm, images, node = judge([]), torch.rand(13, 32, 32, 3), nodes["SpatialAlignPatchRewardHeatmap"]
    with pytest.raises(error, match="4 latent frames cannot be cut into 3 equal blocks"):
        heat(images=images, vlm=vlm, grid="3x2x2")
    with pytest.raises(error, match="such as 2x4x4; found '2 x 2'"):
        heat(images=images, vlm=vlm, grid="2 x 2")
    with pytest.raises(error, match="from worst 1 up to best 0.5; swap them"):
        heat(images=images, vlm=vlm, worst=1.0, best=0.5)
    assert not vlm.asked
    assert node.validate_inputs(grid="3x2x2", worst=0.0, best=0.0) is True
    assert node.validate_inputs() is True  # all of them linked
    assert "2x4x4" in node.validate_inputs(grid="3x2", worst=0.0, best=0.0)
    assert "swap them" in node.validate_inputs(grid="3x2x2", worst=1.0, best=0.0)
