"""The demo: its parts and its resuming on a tiny random pipeline, and the shortened loop on the shipped miniature."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from spatialalign.backbones.wan import WanBackbone
from spatialalign.errors import ConfigError
from spatialalign.tracking.detect import Detections
from spatialalign.tracking.tracker import Tracker
from training import demo
from training.demo import FULL, SHORT, STAGES, Clock, Demo, Sizes, choose_prompts, main, run, training_settings


def check_structure(result: dict[str, Any], out: Path) -> None:
    """What result.json promises, whichever model it is about."""
    assert json.loads((out / "result.json").read_text()) == json.loads(json.dumps(result))
    for arm in ("base", "aligned"):
        assert set(result[arm]) == {"correct_at_0.7", "invalid_rate", "mean_score"}
        assert 0 <= result[arm]["correct_at_0.7"] <= 1 - result[arm]["invalid_rate"] <= 1
        assert 0 <= result[arm]["mean_score"] <= 1
    change = result["difference"]["correct_at_0.7"]
    assert change["low"] <= change["value"] <= change["high"]
    assert change["value"] == pytest.approx(result["aligned"]["correct_at_0.7"] - result["base"]["correct_at_0.7"])
    assert set(result["seconds"]) == set(STAGES) and all(value >= 0 for value in result["seconds"].values())
    assert {"python", "torch", "diffusers", "spatialalign"} <= set(result["versions"])
    assert result["videos"] == result["prompts"] * result["seeds"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "<video" in page and f"{100 * result['aligned']['correct_at_0.7']:.1f} %" in page


class Coin:
    """Sees every clip either as the prompt's left to right or as its reverse, by a checksum of the picture."""

    def __init__(self) -> None:
        self.calls = 0

    def detect(self, frames: NDArray[np.uint8], phrases: Sequence[str]) -> list[Detections]:
        self.calls += 1
        steps = np.linspace(0.0, 24.0, len(frames))
        out = []
        for step in steps if zlib.crc32(frames.tobytes()) % 2 else steps[::-1]:
            boxes = np.array([[step, 20.0, step + 8.0, 28.0], [12.0, 12.0, 20.0, 20.0]])
            out.append(Detections(boxes, np.array([0.9, 0.9]), np.array([0, 1]), tuple(phrases)))
        return out


def test_the_loop_resumes_and_keeps_seeds_apart(
    backbone: WanBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    coin = Coin()
    monkeypatch.setattr(demo, "load", lambda device, sizes: (backbone, Tracker(coin), backbone.default_settings()))
    small = {"train_prompts": 6, "train_seeds": 6, "held_out_prompts": 6, "held_out_seeds": 1, "swapped_prompts": 0}
    args = Demo(out=tmp_path, dpo_steps=2, batch=8, **small)
    first = run(args)
    assert first is not None
    check_structure(first, tmp_path)
    printed = capsys.readouterr().out
    assert [f"[{k}/8] {name}" in printed for k, name in enumerate(STAGES, 1)] == [True] * 8
    assert "Correct@0.7, %" in printed and str(tmp_path / "report.html") in printed

    calls, (lora,) = coin.calls, tuple(tmp_path.glob("lora/seed0-*/lora_comfyui.safetensors"))
    written = lora.stat().st_mtime_ns
    second = run(args)
    assert second is not None
    assert {**second, "seconds": None} == {**first, "seconds": None}, "nothing was made again"
    assert coin.calls == calls and lora.stat().st_mtime_ns == written
    assert all(second["seconds"][name] >= first["seconds"][name] for name in STAGES), "times add up over the runs"

    other = run(Demo(out=tmp_path, dpo_steps=2, batch=8, seed=1, **small))
    assert other is not None and other["base"] == first["base"] and other["training"]["seed"] == 1
    assert coin.calls == calls + 6, "another training seed only needs the aligned model's clips"
    longer = run(Demo(out=tmp_path, dpo_steps=3, batch=8, **small))
    assert longer is not None and longer["base"] == first["base"], "other sizes begin a training of their own"
    assert json.loads((tmp_path / "results" / "seed0.json").read_text())["training"]["seed"] == 0


def test_held_out_prompts_share_nothing_with_training_prompts(tmp_path: Path) -> None:
    train, held_out = choose_prompts(tmp_path, FULL)
    assert not {p.triple for p in train} & {p.triple for p in held_out}
    types = {"LR", "LT", "RL", "RT", "TL", "TR"}
    assert {p.dsr.type_code for p in train} == {p.dsr.type_code for p in held_out} == types
    assert (tmp_path / "train.csv").is_file() and (tmp_path / "held_out.csv").is_file()


def test_the_clock_adds_up_and_counts_failures(tmp_path: Path) -> None:
    clock = Clock(tmp_path / "seconds.json")
    with clock.stage("score"):
        pass
    with pytest.raises(RuntimeError), clock.stage("dpo"):
        raise RuntimeError
    again = Clock(tmp_path / "seconds.json")
    again.seconds["score"] = 10.0
    with again.stage("score"):
        pass
    assert set(again.seconds) == {"score", "dpo"} and again.seconds["score"] >= 10


def test_options_override_sizes() -> None:
    assert Demo().sizes() == FULL and Demo(short=True).sizes() == SHORT
    assert Demo(short=True, train_seeds=9).sizes().train_seeds == 9
    with pytest.raises(ConfigError, match="held_out_prompts"):
        Demo(held_out_prompts=0).sizes()
    with pytest.raises(ConfigError, match="two clips"):
        Sizes(4, 1, 4, 1, 0)
    settings = training_settings(3, SHORT)
    assert settings.seed == 3 and settings.warmup_steps < settings.steps


@pytest.mark.parametrize("words", [["--short"], ["--short", "true"], ["--short=true"]])
def test_short_may_stand_alone(words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Demo] = []
    monkeypatch.setattr(demo, "run", seen.append)
    main([*words, "--out", str(tmp_path)])
    assert seen == [Demo(out=tmp_path, short=True)]


def test_missing_weights_are_a_clear_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from spatialalign.errors import ModelError

    def load(*_: object) -> None:
        raise ModelError("the folder weights/wan lacks transformer")

    monkeypatch.setattr(demo, "load", load)
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path)])
    assert stop.value.code == 2 and "lacks transformer" in capsys.readouterr().err


def test_the_short_demo_on_the_miniature(miniature_weights: Path, tmp_path: Path) -> None:
    """The real loop in about two minutes: too few clips to prove the gain, enough to see a collapse."""
    result = run(Demo(out=tmp_path / "demo", short=True))
    assert result is not None
    check_structure(result, tmp_path / "demo")
    base, aligned, chance = result["base"], result["aligned"], result["chance"]
    assert base["invalid_rate"] <= 0.35, "the base model draws clips that can be tracked"
    assert base["correct_at_0.7"] > chance["base"], "the base model's captions matter"
    assert aligned["invalid_rate"] <= base["invalid_rate"] + 0.15, "alignment must not destroy the picture"
    assert aligned["correct_at_0.7"] >= base["correct_at_0.7"] - 0.15, "alignment must not lose the relation"
    assert aligned["mean_score"] >= base["mean_score"] - 0.05
    held_out = result["training"]["held_out"]
    assert held_out is not None and all(math.isfinite(value) for value in held_out.values())
    assert 0.8 < held_out["norm_ratio"] < 1.2, "the velocity keeps its size"
