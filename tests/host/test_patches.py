"""The heat map of a clip sampled in ComfyUI against the same clip judged by the engine; and the example on a server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from .test_server import Server, server

__all__ = ["server"]

NAME, SEED, STEPS = "tiny.safetensors", 3, 8


@pytest.fixture(scope="module")
def file(comfy: Path, miniature_weights: Path) -> Path:
    """The shipped latent reward as a judge of 2x4x4 blocks, where ComfyUI looks for patch rewards."""
    import torch

    from spatialalign.blocks import BlockGrid
    from spatialalign.miniature import REWARD
    from spatialalign.rewards.latent import load_reward
    from spatialalign.rewards.patch import PatchReward, save_patch_reward

    path = comfy / "models" / "patch_rewards" / NAME
    path.parent.mkdir(parents=True)
    save_patch_reward(path, PatchReward.from_video(load_reward(REWARD), BlockGrid.parse("2x4x4")), torch.float32)
    return path


@pytest.fixture(scope="module")
def sampled(miniature: SimpleNamespace, conditioning: Any, backbone: Any) -> SimpleNamespace:
    """A clip as the sampler and the VAE of a graph hand it on: ``latent`` and ``images``."""
    import comfy.sample
    import comfy.samplers
    import torch

    import nodes
    from spatialalign.backbones.flow import sampling_sigmas

    noise, method = backbone.noise([SEED], backbone.default_settings()), comfy.samplers.sampler_object("euler")
    with torch.inference_mode():
        samples = comfy.sample.sample_custom(
            *(miniature.model, noise, 1.0, method, sampling_sigmas(STEPS, 3.0).float(), conditioning, conditioning),
            torch.zeros_like(noise),
            disable_pbar=True,
            seed=0,
        )
        images = nodes.VAEDecode().decode(miniature.vae, {"samples": samples})[0]
    return SimpleNamespace(latent={"samples": samples}, images=images)


def drawn(images: Any, scores: Any, latent_frames: int, scale: tuple[float, float] | None) -> Any:
    """The engine's heat map as an IMAGE."""
    import numpy as np
    import torch

    from spatialalign.patch_plot import draw_patches

    frames = (images.clamp(0, 1) * 255).round().byte().cpu().numpy()
    return torch.from_numpy(draw_patches(frames, np.array(scores, np.float32), latent_frames, scale)) / 255


def test_a_patch_reward_scores_as_the_engine(
    module: Callable[[str], ModuleType],
    execute: Callable[..., tuple[Any, ...]],
    miniature: SimpleNamespace,
    conditioning: Any,
    backbone: Any,
    prompt: str,
    file: Path,
    sampled: SimpleNamespace,
) -> None:
    """The engine samples the clip again by diffusers and reads its own latents and text."""
    from dataclasses import replace

    import torch

    from spatialalign.rewards.patch import load_patch_reward

    nodes = module("nodes.patches")
    reward, _ = execute(nodes.LoadPatchReward, reward=NAME)
    clip = {"images": sampled.images, "latent": sampled.latent, "positive": conditioning, "model": miniature.model}
    inputs = {"patch_reward": reward, "grid": "3x2x2", "worst": 0.0, "best": 1.5, **clip}
    overlay, mean, worst, report, values = execute(nodes.PatchRewardHeatmap, **inputs)
    (text,) = backbone.encode_text([prompt])
    settings = replace(backbone.default_settings(), steps=STEPS)
    with torch.no_grad():
        expected = load_patch_reward(file)(backbone.sample([text], text, [SEED], settings), [text]).blocks[0]
    assert expected.std() > 0.01
    scores = json.loads(report)["scores"]
    torch.testing.assert_close(torch.tensor(scores), expected, rtol=0, atol=1e-3)
    assert (mean, worst) == pytest.approx((expected.mean().item(), expected.min().item()), abs=1e-3)
    assert values == {"patch": mean}
    torch.testing.assert_close(overlay, drawn(sampled.images, scores, 4, (0.0, 1.5)), rtol=0, atol=1e-6)
    assert execute(nodes.PatchRewardHeatmap, **inputs)[3] == report


def test_a_patch_reward_of_another_space_is_refused(
    module: Callable[[str], ModuleType],
    execute: Callable[..., tuple[Any, ...]],
    miniature: SimpleNamespace,
    conditioning: Any,
    file: Path,
    sampled: SimpleNamespace,
) -> None:
    from dataclasses import replace

    from spatialalign.rewards.patch import load_patch_reward, save_patch_reward

    other = load_patch_reward(file)
    other.info = replace(other.info, latent_space="wan-vae:0123456789ab")
    save_patch_reward(file.with_name("other.safetensors"), other)
    nodes = module("nodes.patches")
    reward, _ = execute(nodes.LoadPatchReward, reward="other.safetensors")
    clip = {"images": sampled.images, "latent": sampled.latent, "positive": conditioning, "model": miniature.model}
    with pytest.raises(module("spatialalign.errors").ModelError, match="reads latents of wan-vae:0123456789ab; these"):
        execute(nodes.PatchRewardHeatmap, patch_reward=reward, grid="3x2x2", worst=0.0, best=0.0, **clip)


def test_a_chat_model_answers_as_in_the_engine(
    comfy: Path,
    module: Callable[[str], ModuleType],
    execute: Callable[..., tuple[Any, ...]],
    tiny_vlm: Path,
    sampled: SimpleNamespace,
) -> None:
    """Loaded and moved by the host; one that was taught other questions answers this one somehow."""
    import numpy as np
    import torch

    from spatialalign.blocks import BlockGrid, crops
    from spatialalign.rewards.vlm_blocks import vlm_teacher
    from spatialalign.rewards.vlm_judge import VlmJudge

    shutil.copytree(tiny_vlm, comfy / "models" / "VLM" / "blocks")
    (vlm,) = execute(module("nodes.learned_rewards").LoadVlm, model="blocks", precision="float32")
    images = sampled.images.clone()
    images[:5, :, :32] = torch.tensor([250.0, 30.0, 30.0]) / 255
    node = module("nodes.patches").PatchRewardHeatmap
    overlay, *_, report, _ = execute(node, images=images, vlm=vlm, grid="2x1x2", worst=0.0, best=0.0)
    teacher = vlm_teacher(VlmJudge.from_pretrained(tiny_vlm, dtype=torch.float32))
    frames = (images.clamp(0, 1) * 255).round().byte().numpy()
    expected = np.array([teacher(block, "") for block in crops(frames, BlockGrid(2, 1, 2), 4)]).reshape(2, 1, 2)
    assert not np.isnan(expected).all()
    np.testing.assert_equal(np.array(json.loads(report)["scores"], float), expected)
    torch.testing.assert_close(overlay, drawn(images, expected, 4, None), rtol=0, atol=1e-6)


def test_the_example_marks_the_square(server: Server, repo_root: Path) -> None:
    """The clip as sampled, and with a black square in the third block of the second row, at both times."""
    graph = json.loads((repo_root / "tests" / "workflows_api" / "patch_heat_map.json").read_text(encoding="utf-8"))
    outputs = server.run(graph)["outputs"]
    shown = [outputs[key]["text"][0] for key, node in graph.items() if "Heatmap" in node["class_type"]]
    plain, square = (text.splitlines() for text in shown)
    assert plain[0].startswith("2x4x4 blocks by miniature: mean ") and square[1].endswith("row 2 of 4, column 3 of 4")
    assert float(square[0].rsplit(" ", 1)[1]) < 0.5 < float(plain[0].rsplit(" ", 1)[1])
    pictures = [len(shown["images"]) for key, shown in outputs.items() if graph[key]["class_type"] == "PreviewImage"]
    assert pictures == [13, 13]
