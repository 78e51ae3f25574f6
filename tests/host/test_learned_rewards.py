"""Learned rewards under ComfyUI's memory management, and the example graph that mixes them, on tiny checkpoints."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

TESTS = Path(__file__).resolve().parents[1]
PROMPT = "In a room, a cat is on the left of a box, then the cat walks to the right of the box."


def beside(path: str) -> ModuleType:
    """A file of the tests of another folder."""
    spec = importlib.util.spec_from_file_location(f"host_beside_{path}", TESTS / path)
    assert spec and spec.loader
    loaded = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


video_reward_folder = beside("spatialalign/rewards/conftest.py").video_reward_folder
server = beside("host/test_server.py").server


def clip(count: int = 9) -> Any:
    """IMAGE of noise whose values are whole 255ths."""
    import torch

    return torch.randint(0, 256, (count, 48, 64, 3), generator=torch.Generator().manual_seed(0)) / 255


def test_video_reward(
    comfy: Path,
    module: Callable[[str], ModuleType],
    execute: Callable[..., tuple[Any, ...]],
    video_reward_folder: Callable[..., Path],
) -> None:
    """Loaded in inference mode, as the host runs nodes, moved by the host, and scored as the engine scores."""
    import torch

    from spatialalign.rewards.video_reward import load_video_reward
    from spatialalign.video import Video

    folder = video_reward_folder()
    shutil.copytree(folder, comfy / "models" / "video_reward" / "mine")
    nodes = module("nodes.learned_rewards")
    loaded, report = execute(nodes.LoadVideoReward, model="mine", base="none", precision="float32")
    assert report == "mine/checkpoint-10"
    images = clip()
    answer = execute(nodes.VideoRewardScore, video_reward=loaded, prompt=PROMPT, images=images, fps=8.0)
    engine = load_video_reward(folder, dtype=torch.float32)
    expected = engine.score([Video((images * 255).round().byte().numpy(), 8.0)], [PROMPT])[0]
    assert answer[:4] == pytest.approx(expected.tolist(), rel=1e-4)
    again = execute(nodes.VideoRewardScore, video_reward=loaded, prompt=PROMPT, images=images, fps=8.0)
    assert again[:4] == answer[:4]


def test_vlm_judge(
    comfy: Path, module: Callable[[str], ModuleType], execute: Callable[..., tuple[Any, ...]], tiny_vlm: Path
) -> None:
    """Red shows the cat on the left, blue on the right; of grey it says "maybe"."""
    import torch

    shutil.copytree(tiny_vlm, comfy / "models" / "VLM" / "tiny")
    nodes = module("nodes.learned_rewards")
    (vlm,) = execute(nodes.LoadVlm, model="tiny", precision="float32")
    colours = {name: torch.tensor(rgb) / 255 for name, rgb in (("red", (250.0, 30, 30)), ("blue", (30.0, 30, 250)))}
    images = torch.stack([colours["red"].expand(16, 16, 3)] * 3 + [colours["blue"].expand(16, 16, 3)] * 3)
    dsr = module("spatialalign.dsr").DSR.parse(PROMPT)
    assert execute(nodes.JudgeByVlm, vlm=vlm, dsr=dsr, images=images, frames=3)[:3] == (True, 1, 1)
    grey = execute(nodes.JudgeByVlm, vlm=vlm, dsr=dsr, images=torch.full((1, 16, 16, 3), 110 / 255), frames=1)
    assert grey[0] is False and math.isnan(grey[1]) and math.isnan(grey[2])


def test_metrics(comfy: Path, module: Callable[[str], ModuleType], execute: Callable[..., tuple[Any, ...]]) -> None:
    """A DINOv2 and a CLIP, kept by the node, and taken off the device by the host."""
    import torch
    from comfy import model_management

    from spatialalign.metrics_clip_iqa import ClipIqa

    engine = beside("spatialalign/test_metrics_identity.py")
    engine.write_dino(comfy / "models" / "dinov2" / "tiny")
    folder = beside("spatialalign/test_metrics_clip_iqa.py").write_clip(comfy / "models" / "clip_iqa" / "tiny")
    video, tracks = engine.moving(9)
    inputs = {
        "images": torch.from_numpy(video.frames) / 255,
        "tracks": module("spatialalign.tracks").Tracks(tracks.boxes, tracks.confidence, tracks.labels, tracks.size, 8),
        "dsr": module("spatialalign.dsr").DSR.parse(PROMPT),
        "identity": "tiny",
        "clip_iqa": "tiny",
    }
    node = module("nodes.metrics").ClipMetrics
    first = execute(node, **inputs)
    assert first[4] == pytest.approx(1, abs=1e-5)
    assert first[7:] == pytest.approx(ClipIqa.from_pretrained(folder).score(video.frames), abs=1e-5)
    held = [loaded.model for loaded in model_management.current_loaded_models]
    assert len(held) >= 2 and execute(node, **inputs)[:5] == first[:5]
    assert [loaded.model for loaded in model_management.current_loaded_models] == held, "they were loaded again"
    model_management.unload_all_models()
    assert execute(node, **inputs)[7:] == first[7:]


def test_the_example_of_three_judges(server: Any, tiny_vlm: Path, repo_root: Path) -> None:
    """A video file, by the miniature's own tracker: the values of Metrics and of the chat model arrive together."""
    from spatialalign.dsr import DSR
    from spatialalign.metrics_frames import frame_change, linear_smoothness
    from spatialalign.miniature.world import render
    from spatialalign.video import read_video, write_video

    dsr = DSR.parse("In a snowy garden, a cat is on the left of a rock, then the cat walks to the right of the rock.")
    file = server.base / "input" / "my_video.mp4"
    write_video(file, render(dsr, 0).frames, 8.0)
    frames = read_video(file).frames
    shutil.copytree(tiny_vlm, server.base / "models" / "VLM" / "Qwen2.5-VL-7B-Instruct")
    graph = json.loads((repo_root / "tests" / "workflows_api" / "judge_video.json").read_text(encoding="utf-8"))
    keys = {node["class_type"]: key for key, node in graph.items()}
    graph[keys["SpatialAlignLoadGroundedSAM"]]["inputs"] |= {"detector": "miniature", "segmenter": "miniature"}
    graph[keys["SpatialAlignParse"]]["inputs"]["text"] = dsr.prompt()
    outputs = server.run(graph)["outputs"]
    values = json.loads(outputs[keys["PreviewAny"]]["text"][0])
    metrics = ["smoothness", "change", "vbench", "compbench", "identity", "natural", "quality"]
    assert list(values) == [*metrics, "vlm_initial", "vlm_final"]
    assert values["smoothness"] == pytest.approx(linear_smoothness(frames))
    assert values["change"] == pytest.approx(frame_change(frames))
    assert 0 < values["vbench"] <= 1 and math.isnan(values["natural"])
    assert "DSR-Score" in outputs[keys["SpatialAlignScore"]]["text"][0]
    said = outputs[keys["SpatialAlignVLMJudge"]]["text"][0]
    assert "Is the cat on the left of the rock in these 3 consecutive frames" in said


def test_the_example_mixes_rewards(server: Any, video_reward_folder: Callable[..., Path], repo_root: Path) -> None:
    """Four clips, sampled, tracked, scored by geometry, by a random VideoReward and by smoothness."""
    shutil.copytree(video_reward_folder(), server.base / "models" / "video_reward" / "VideoReward")
    graph = json.loads((repo_root / "tests" / "workflows_api" / "video_reward.json").read_text(encoding="utf-8"))
    outputs = server.run(graph)["outputs"]
    by_kind = {graph[key]["class_type"]: shown for key, shown in outputs.items()}
    assert len(by_kind["SpatialAlignVideoRewardScore"]["text"]) == 4
    assert all(text.startswith("VQ ") for text in by_kind["SpatialAlignVideoRewardScore"]["text"])
    assert len(set(by_kind["SpatialAlignMetrics"]["text"])) == 4
    (ranking,) = by_kind["PreviewAny"]["text"]
    lines = ranking.splitlines()
    assert lines[0].startswith("by a mix of dsr 1, Overall 1, smoothness 0.2") and len(lines) == 5
    assert sorted(line.split(":")[0].split(". ")[1] for line in lines[1:]) == [f"clip {i}" for i in range(4)]
