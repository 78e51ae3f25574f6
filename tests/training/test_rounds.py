"""Online rounds: a run that was cut in every stage ends like one that was not; a small run on the miniature."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from spatialalign.backbones.wan import WanBackbone
from spatialalign.errors import ConfigError, DataError, LoraError
from spatialalign.lora import adapter_metadata
from spatialalign.prompts import Prompt, write_csv
from spatialalign.tracking.detect import Detections
from spatialalign.tracking.tracker import Tracker
from training import dpo, rounds
from training.generate import lora_model_name
from training.presets import PRESETS
from training.rounds import Plan, Rounds, check_apart, main, run_rounds, table
from training.store import Store

TEXTS = {
    "0001_LR": "In a quiet room, a cat is on the left of a box, then the cat walks to the right of the box.",
    "0002_RL": "In a quiet room, a dog is on the right of a chair, then the dog runs to the left of the chair.",
    "0003_LR": "By a sunny meadow, a fox is on the left of a bench, then the fox runs to the right of the bench.",
}
HELD_OUT = {
    "9001_LR": "By a sunny meadow, a cat is on the left of a stone, then the cat trots to the right of the stone."
}


class Coin:
    """Sees a clip from left to right where its left half is the brighter one, else the reverse; may fail at a call.

    The limit lies well between the values of the tiny pipeline's clips: decoding is exact to the last bit only.
    """

    def __init__(self) -> None:
        self.calls, self.fails_at = 0, -1

    def detect(self, frames: NDArray[np.uint8], phrases: Sequence[str]) -> list[Detections]:
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        steps = np.linspace(0.0, 24.0, len(frames))
        out = []
        left, right = np.split(frames.astype(np.float64), 2, axis=2)
        for step in steps if left.mean() - right.mean() > 1.15 else steps[::-1]:
            boxes = np.array([[step, 20.0, step + 8.0, 28.0], [12.0, 12.0, 20.0, 20.0]])
            out.append(Detections(boxes, np.array([0.9, 0.9]), np.array([0, 1]), tuple(phrases)))
        return out


def make_plan(out: Path, backbone: WanBackbone, coin: Coin, **changes: Any) -> Plan:
    training = PRESETS["miniature"]
    training = rounds.dataclasses.replace(training, steps=4, warmup_steps=1, batch_pairs=2, micro_pairs=2, **changes)
    train, held_out = ([Prompt.parse(*item) for item in texts.items()] for texts in (TEXTS, HELD_OUT))
    return Plan(out, backbone, Tracker(coin), train, 6, held_out, 2, backbone.default_settings(), training, batch=3)


def outcome(out: Path) -> dict[str, Any]:
    """All that must not depend on interruptions."""
    found: dict[str, Any] = {"rounds": json.loads((out / "rounds.json").read_text())}
    found["table"] = (out / "table.md").read_text()
    for number in (1, 2):
        folder = out / f"round-{number:02d}"
        found[f"pairs {number}"] = json.loads((folder / "store" / "pairs.json").read_text())
        found[f"lora {number}"] = load_file(folder / "lora" / "lora_comfyui.safetensors")
    return found


def check_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        if name.startswith("lora"):
            assert value.keys() == other[name].keys()
            assert all(torch.equal(tensor, other[name][key]) for key, tensor in value.items()), name
        else:
            assert value == other[name], name


@contextmanager
def stopping_after(steps: int) -> Iterator[Callable[[], bool]]:
    """A signal that arrives while training has asked so many times whether one came."""
    asked = iter(range(10**9))
    yield lambda: next(asked) >= steps


def test_rounds_build_on_each_other_and_resume_in_every_stage(
    backbone: WanBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    straight = make_plan(tmp_path / "straight", backbone, Coin())
    entries = run_rounds(straight, 2)
    assert entries is not None and [entry["round"] for entry in entries] == [1, 2]

    for number in (1, 2):
        store = Store(straight.folder(number) / "store")
        lora = straight.lora(number - 1)
        maker = backbone.model_id if lora is None else lora_model_name(backbone.model_id, lora, 1.0)
        assert {sample.read_header().model for sample in store.samples()} == {maker}, "the last model samples"
        assert {sample.seed for sample in store.samples()} == set(range(6 * number - 6, 6 * number))
        settings = json.loads((straight.folder(number) / "lora" / "summary.json").read_text())["settings"]
        assert settings["seed"] == number - 1
        scores = adapter_metadata(straight.folder(number) / "lora" / "lora_diffusers.safetensors")["scores"]
        assert [scores[arm] for arm in ("base", "aligned")] == [
            entries[number - 1]["held_out"][arm] for arm in ("base", "aligned")
        ]
    assert not getattr(backbone.transformer, "peft_config", {}), "the base model is left as it was"
    assert entries[0]["held_out"]["base"] == entries[1]["held_out"]["base"], "one base, measured once"

    cut, coin = make_plan(tmp_path / "cut", backbone, Coin()), Coin()
    cut = rounds.dataclasses.replace(cut, tracker=Tracker(coin))
    real = backbone.sample
    for number in (1, 2):
        calls = iter(range(10**9))

        def sample(*args: Any, calls: Iterator[int] = calls) -> torch.Tensor:
            if next(calls) == 2:
                raise KeyboardInterrupt
            return real(*args)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(backbone, "sample", sample)
            run_rounds(cut, number)
        assert len([s for s in Store(cut.folder(number) / "store").samples() if s.generated]) == 6

        coin.fails_at = coin.calls + 4
        with pytest.raises(KeyboardInterrupt):
            run_rounds(cut, number)
        assert not (cut.folder(number) / "store" / "pairs.json").exists()

        with monkeypatch.context() as patch:
            patch.setattr(dpo, "stop_requests", lambda: stopping_after(2))
            assert run_rounds(cut, number) is None
        assert (cut.folder(number) / "store" / "pairs.json").is_file()
        assert not (cut.folder(number) / "lora" / "summary.json").exists()

        coin.fails_at = coin.calls + 1
        with pytest.raises(KeyboardInterrupt):
            run_rounds(cut, number)
        assert (cut.folder(number) / "lora" / "summary.json").is_file()
        assert len(json.loads((cut.out / "rounds.json").read_text())["rounds"]) == number - 1

        assert run_rounds(cut, number) is not None
    check_equal(outcome(cut.out), outcome(straight.out))

    calls_before = coin.calls
    assert run_rounds(cut, 2) == entries and coin.calls == calls_before, "nothing is made again"
    other = make_plan(cut.out, backbone, coin, beta=60.0)
    with pytest.raises(ConfigError, match=r"beta: 50.0 -> 60.0.*--allow_changes true"):
        run_rounds(other, 3)
    with caplog.at_level("WARNING"):
        entries = run_rounds(other, 3, allow_changes=True)
    assert entries is not None and len(entries) == 3
    assert "continuing although beta: 50.0 -> 60.0" in caplog.text
    settings = [json.loads((other.folder(n) / "lora" / "summary.json").read_text())["settings"] for n in (2, 3)]
    assert [values["beta"] for values in settings] == [50.0, 60.0]


class Alternating(Coin):
    """Sees the first clip from left to right, the next from right to left, and so on."""

    def detect(self, frames: NDArray[np.uint8], phrases: Sequence[str]) -> list[Detections]:
        left = np.zeros_like(frames)
        left[:, :, : frames.shape[2] // 2] = 255
        return super().detect(255 - left if self.calls % 2 else left, phrases)


def test_rounds_on_one_of_two_experts(tiny_a14b: Path, miniature_weights: Path, tmp_path: Path) -> None:
    """Its LoRA samples the next round; the other expert neither continues the folder nor takes that LoRA."""
    out = tmp_path / "out"

    def plan_of(expert: Literal["high", "low"]) -> Plan:
        args = Rounds(str(tiny_a14b), tmp_path / "train.csv", out, device="cpu", expert=expert)
        plan = make_plan(out, cast(WanBackbone, rounds.load(args)[0]), Alternating())
        return rounds.dataclasses.replace(plan, clips=2, held_out=[])

    low, high = plan_of("low"), plan_of("high")
    assert run_rounds(low, 2) is not None
    names = [{s.read_header().model for s in Store(low.folder(n) / "store").samples()} for n in (1, 2)]
    lora = low.folder(1) / "lora" / "lora_comfyui.safetensors"
    assert names == [{str(tiny_a14b)}, {lora_model_name(f"{tiny_a14b}:low", lora, 1.0)}]
    assert adapter_metadata(lora)["expert"] == "low"
    with pytest.raises(ConfigError, match="expert: 'low' -> 'high'"):
        run_rounds(high, 3)
    with pytest.raises(LoraError, match="low-noise expert .*--expert low"):
        run_rounds(high, 3, allow_changes=True)
    assert not getattr(high.backbone.transformer, "peft_config", {})


def test_a_round_without_pairs_is_named(backbone: WanBackbone, tmp_path: Path) -> None:
    plan = rounds.dataclasses.replace(make_plan(tmp_path, backbone, Coin()), threshold=1.0)
    with pytest.raises(DataError, match="round 1: no winners"):
        run_rounds(plan, 1)


def test_contradictions_are_refused(tmp_path: Path) -> None:
    train = [Prompt.parse(*item) for item in TEXTS.items()]
    other = Prompt.of("new_RL", train[0].dsr.reversed())
    with pytest.raises(ConfigError, match="prove nothing"):
        check_apart(train, [other])
    with pytest.raises(ConfigError, match="clips must be at least 2"):
        Rounds("m", tmp_path, tmp_path, clips=1)
    with pytest.raises(ConfigError, match="rounds .* together with clips"):
        Rounds("m", tmp_path, tmp_path, rounds=1000, clips=1000)


def test_the_table_without_held_out_prompts() -> None:
    entries = [{"round": 1, "held_out": None, "training_clips": {"pairs": 7}}]
    assert "| round 1 | –" in table(entries) and "\n| base " not in table(entries)


def test_two_small_rounds_on_the_miniature(
    miniature_weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real models, from the command line, with far too few clips for a gain."""
    from spatialalign.miniature.world import prompts
    from training.evaluate import spread

    write_csv(tmp_path / "train.csv", spread(prompts("train"), 4))
    out = tmp_path / "out"
    argv = ["--model", "miniature", "--prompts", str(tmp_path / "train.csv"), "--out", str(out), "--clips", "4"]
    argv += ["--preset", "miniature", "--steps", "3", "--warmup_steps", "1", "--batch_pairs", "4", "--micro_pairs", "4"]
    argv += ["--held_out_prompts", "miniature", "--held_out_limit", "3", "--held_out_clips", "1", "--batch", "16"]
    argv += ["--device", "cpu", "--sampling_steps", "8"]
    main(argv)
    assert str(out / "rounds.json") in capsys.readouterr().out
    entries = json.loads((out / "rounds.json").read_text())["rounds"]
    assert [entry["training_clips"]["generator"] for entry in entries] == ["base", "base + LoRA of round 1"]
    for entry in entries:
        assert entry["training"]["step"] == 3 and (out / entry["lora"]).is_file()
        assert 0 <= entry["held_out"]["aligned"]["correct_at_0.7"] <= 1
    assert (out / "table.md").read_text().count("\n| round ") == 2
