"""Nodes of learned rewards, metrics and mixes, on tiny checkpoints of the real classes."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

TESTS = Path(__file__).resolve().parents[1]
PROMPT = "In a room, a cat is on the left of a box, then the cat walks to the right of the box."
RED, BLUE, GREY = (250, 30, 30), (30, 30, 250), (110, 110, 110)
Run = Callable[..., Any]


def beside(path: str) -> ModuleType:
    """A file of the tests of another folder."""
    spec = importlib.util.spec_from_file_location(f"beside_{path}", TESTS / path)
    assert spec and spec.loader
    loaded = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


video_reward_folder = beside("spatialalign/rewards/conftest.py").video_reward_folder
"""The fixture of the engine's tests."""


@pytest.fixture
def dsr(module: Callable[[str], ModuleType]) -> Any:
    return module("spatialalign.dsr").DSR.parse(PROMPT)


@pytest.fixture
def checkpoint(video_reward_folder: Callable[..., Path], fake_host: Any) -> Callable[..., Path]:
    """``checkpoint(name, full=True)``: a VideoReward as ``models/video_reward/<name>``, its base in ``models/VLM``."""

    def put(name: str, full: bool = True) -> Path:
        made = video_reward_folder(full=full)
        place = fake_host.models / "video_reward" / name
        shutil.copytree(made, place)
        shutil.move(made.parent / "base", fake_host.models / "VLM" / "base")
        return place

    return put


def frames(seed: int = 0, count: int = 9) -> Any:
    """IMAGE of noise whose values are whole 255ths."""
    noise = np.random.default_rng(seed).integers(0, 256, (count, 48, 64, 3), dtype=np.uint8)
    return torch.from_numpy(noise).float() / 255


def plain(*colours: tuple[int, int, int]) -> Any:
    """IMAGE with a frame of each colour."""
    return torch.stack([torch.tensor(colour).float().expand(16, 16, 3) / 255 for colour in colours])


@pytest.fixture
def path(module: Callable[[str], ModuleType]) -> Callable[..., Any]:
    """``path(places)``: tracks of a cat level with a box, ``places`` from its centre; both 10 x 10 in 100 x 200."""

    def make(places: list[float]) -> Any:
        boxes = np.array([[[95 + x, 50 + 0 * x, 105 + x, 60 + 0 * x], [95, 50, 105, 60]] for x in places])
        labels, size = ("cat", "box"), (100, 200)
        return module("spatialalign.tracks").Tracks(boxes, np.full((len(places), 2), 0.9), labels, size, 16)

    return make


PASSAGE = [-50.0] * 6 + [-20, -12, 12, 20] + [50] * 6


# --- VideoReward ----------------------------------------------------------------------------------------------------


def test_video_reward_scores_as_the_engine(
    nodes: dict[str, Any], run: Run, fake_host: Any, checkpoint: Callable[..., Path]
) -> None:
    from spatialalign.rewards.video_reward import load_video_reward
    from spatialalign.video import Video

    folder = checkpoint("mine")
    loader = nodes["SpatialAlignLoadVideoReward"]
    choices = loader.INPUT_TYPES()["required"]
    assert choices["model"][1]["options"] == ["KwaiVGI/VideoReward", "mine"]
    assert choices["base"][1]["options"] == ["none", "base"]
    loaded, report = run(loader, model="mine", base="base", precision="float32").args
    assert report == "mine/checkpoint-10"
    assert not fake_host.loaded, "the network went to the device before it was used"

    clip = frames()
    answer = run(
        nodes["SpatialAlignVideoRewardScore"],
        hidden={"unique_id": "5"},
        video_reward=loaded,
        prompt=PROMPT,
        images=clip,
        fps=8.0,
    )
    assert fake_host.loaded == [loaded.patcher]
    engine = load_video_reward(folder, fake_host.models / "VLM" / "base", dtype=torch.float32)
    expected = engine.score([Video((clip * 255).round().byte().numpy(), 8.0)], [PROMPT])[0]
    np.testing.assert_allclose(answer.args[:4], expected, rtol=1e-5)
    assert len(set(answer.args[:4])) == 4
    assert answer.args[3] == pytest.approx(sum(answer.args[:3]))
    named = dict(zip(("VQ", "MQ", "TA", "Overall"), answer.args[:4], strict=True))
    assert answer.args[5] == named
    told = json.loads(answer.args[4])
    assert told == {"model": "mine/checkpoint-10", "prompt": PROMPT, "scores": named, "notes": []}
    assert fake_host.shown == {"5": answer.ui["text"][0]} and f"VQ {named['VQ']:.3f}" in fake_host.shown["5"]


def test_scores_that_are_not_comparable_say_so(
    nodes: dict[str, Any], run: Run, fake_host: Any, checkpoint: Callable[..., Path]
) -> None:
    folder = checkpoint("mine")
    loader = nodes["SpatialAlignLoadVideoReward"]
    before = loader.fingerprint_inputs("mine", "none", "float32")
    assert before == loader.fingerprint_inputs("mine", "base", "bfloat16")
    (folder / "prompt_template.txt").unlink()
    assert loader.fingerprint_inputs("mine", "none", "float32") != before, "the old one would be kept"
    loaded, report = run(loader, model="mine", base="base").args
    assert "not comparable" in report
    answer = run(nodes["SpatialAlignVideoRewardScore"], video_reward=loaded, prompt=PROMPT, images=frames())
    assert "not comparable" in answer.ui["text"][0] and "not comparable" in json.loads(answer.args[4])["notes"][0]


def test_a_single_frame_has_no_scores(nodes: dict[str, Any], run: Run, checkpoint: Callable[..., Path]) -> None:
    checkpoint("mine")
    loaded = run(nodes["SpatialAlignLoadVideoReward"], model="mine", base="base").args[0]
    answer = run(nodes["SpatialAlignVideoRewardScore"], video_reward=loaded, prompt=PROMPT, images=frames(count=1))
    assert all(math.isnan(value) for value in answer.args[:4])
    assert json.loads(answer.args[4])["scores"]["VQ"] is None and answer.ui["text"][0].startswith("not scored")


def test_where_a_video_reward_may_lie(
    nodes: dict[str, Any], run: Run, checkpoint: Callable[..., Path], module: Callable[[str], ModuleType]
) -> None:
    loader, error = nodes["SpatialAlignLoadVideoReward"], module("spatialalign.errors").ModelError
    with pytest.raises(error, match="hf download KwaiVGI/VideoReward --local-dir models/video_reward/VideoReward"):
        run(loader)
    checkpoint("VideoReward")
    assert loader.INPUT_TYPES()["required"]["model"][1]["options"] == ["KwaiVGI/VideoReward"]
    assert run(loader, base="base").args[1] == "VideoReward/checkpoint-10"
    with pytest.raises(error, match="models/video_reward"):
        run(loader, model="../x")


def test_adapters_need_their_base(
    nodes: dict[str, Any], run: Run, checkpoint: Callable[..., Path], module: Callable[[str], ModuleType]
) -> None:
    """The base is not where the settings say, so it is given by name, or asked for."""
    checkpoint("mine", full=False)
    loader = nodes["SpatialAlignLoadVideoReward"]
    with pytest.raises(module("spatialalign.errors").ModelError, match="needs the base model"):
        run(loader, model="mine")
    assert run(loader, model="mine", base="base").args[1] == "mine/checkpoint-10"


# --- VLM Judge ------------------------------------------------------------------------------------------------------


@pytest.fixture
def vlm(nodes: dict[str, Any], run: Run, fake_host: Any, tiny_vlm: Path) -> Any:
    shutil.copytree(tiny_vlm, fake_host.models / "VLM" / "tiny")
    loader = nodes["SpatialAlignLoadVLM"]
    assert loader.INPUT_TYPES()["required"]["model"][1]["options"] == ["Qwen/Qwen2.5-VL-7B-Instruct", "tiny"]
    return run(loader, model="tiny", precision="float32").args[0]


@pytest.mark.parametrize(
    ("colours", "initial", "final"),
    [([RED, GREY, BLUE], 1, 1), ([BLUE, RED, RED], 0, 0), ([RED, GREY, GREY], 1, math.nan)],
)
def test_the_judge_is_asked_about_both_ends(
    nodes: dict[str, Any], run: Run, fake_host: Any, vlm: Any, dsr: Any, colours: Any, initial: float, final: float
) -> None:
    """Red shows the cat on the left and blue on the right; of grey it says "maybe"."""
    judge = nodes["SpatialAlignVLMJudge"]
    answer = run(judge, vlm=vlm, dsr=dsr, images=plain(*colours), frames=1, values={"smoothness": 0.5})
    assert fake_host.loaded == [vlm.patcher]
    assert answer.args[0] is (initial == final == 1)
    np.testing.assert_equal(answer.args[1:3], (initial, final))
    np.testing.assert_equal(answer.args[4], {"smoothness": 0.5, "vlm_initial": initial, "vlm_final": final})
    told = json.loads(answer.args[3])
    assert told["model"] == "tiny" and told["initial"]["answer"] == ("yes" if initial else "no")
    assert "on the left of the box in this picture" in told["initial"]["question"]
    assert told["final"]["reply"] in answer.ui["text"][0]


def test_how_many_frames_the_judge_sees(nodes: dict[str, Any], run: Run, vlm: Any, dsr: Any) -> None:
    answer = run(nodes["SpatialAlignVLMJudge"], vlm=vlm, dsr=dsr, images=plain(*[RED] * 3, *[BLUE] * 3))
    assert answer.args[:3] == (True, 1.0, 1.0)
    assert "these 3 consecutive frames" in json.loads(answer.args[3])["final"]["question"]


def test_a_judge_that_is_not_there(
    nodes: dict[str, Any], run: Run, fake_host: Any, module: Callable[[str], ModuleType]
) -> None:
    with pytest.raises(module("spatialalign.errors").ModelError, match="hf download Qwen/Qwen2.5-VL-7B-Instruct"):
        run(nodes["SpatialAlignLoadVLM"])


# --- Pick Best on a mix ---------------------------------------------------------------------------------------------


@pytest.fixture
def pick(nodes: dict[str, Any], run: Run, dsr: Any, path: Callable[..., Any], module: Any) -> SimpleNamespace:
    """``pick(values=..., weights=...)`` among a wrong, a right and an INVALID clip, of DSR-Scores 0, 1 and none."""
    score = module("spatialalign.score").dsr_score
    results = [score(path(places), dsr) for places in (PASSAGE[::-1], PASSAGE, [math.nan] * 16)]
    assert [result.score for result in results] == [0, 1, None]
    clips = [frames(seed, 2) for seed in range(3)]

    def choose(**inputs: Any) -> Any:
        wrapped = {key: value if key == "values" else [value] for key, value in inputs.items()}
        return run(nodes["SpatialAlignPickBest"], clips=clips, results=results, **wrapped)

    return SimpleNamespace(choose=choose, clips=clips, errors=module("spatialalign.errors"))


def overall(*numbers: float) -> list[dict[str, float]]:
    return [{"Overall": number, "VQ": -number} for number in numbers]


def test_without_values_nothing_has_changed(pick: SimpleNamespace) -> None:
    answer = pick.choose(weights="nonsense")
    assert answer.args[1:3] == (1, 1.0) and answer.args[3].startswith("by the paper score:\n1. clip 1: 1.000\n")


def test_the_mix_decides(pick: SimpleNamespace) -> None:
    """The scores 0 and 1 are -1 and 1 in deviations; Overall 5, 1, 3 is sqrt(3/2) times 1, -1, 0."""
    step = math.sqrt(1.5)
    answer = pick.choose(values=overall(5, 1, 3))
    assert answer.args[1] == 0 and answer.args[0] is pick.clips[0]
    assert answer.args[2] == pytest.approx(-1 + step)
    assert answer.args[3].splitlines() == [
        "by a mix of dsr 1, Overall 1, each in deviations from its mean over the clips:",
        f"1. clip 0: {step - 1:+.3f} (dsr 0.000, Overall 5.000)",
        f"2. clip 1: {1 - step:+.3f} (dsr 1.000, Overall 1.000)",
        "3. clip 2: not compared (dsr none, Overall 3.000)",
    ]
    assert pick.choose(values=overall(5, 1, 3), weights="dsr:2, Overall:1").args[1] == 1


def test_a_mix_without_the_score_compares_invalid_clips(pick: SimpleNamespace) -> None:
    assert pick.choose(values=overall(1, 2, 3), weights="Overall:1").args[1] == 2
    assert pick.choose(values=overall(1, 2, 3), weights="Overall:-1").args[1] == 0
    assert pick.choose(values=overall(1, 2, 3), weights="VQ:1, dsr:0").args[1] == 0


def test_values_that_are_missing(pick: SimpleNamespace) -> None:
    nothing = pick.choose(values=overall(math.nan, math.nan, 3))
    assert nothing.args[1] == 0 and math.isnan(nothing.args[2])
    assert nothing.args[3].startswith("no clip has all of dsr, Overall; the first is handed on:")
    with pytest.raises(pick.errors.DataError, match="3 results and 2 values"):
        pick.choose(values=overall(1, 2))
    with pytest.raises(pick.errors.ConfigError, match="'Overall'; it has dsr, smoothness"):
        pick.choose(values=[{"smoothness": 1.0}] * 3)
