"""Evaluation of a LoRA on a tiny Wan pipeline, with a detector whose answer is known."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from spatialalign import lora_record
from spatialalign.backbones.wan import WanBackbone
from spatialalign.dsr import DSR, Relation
from spatialalign.errors import ConfigError, DataError, StoreError
from spatialalign.lora import LoraPair, adapter_metadata, write_pairs
from spatialalign.prompts import Prompt
from spatialalign.tracking.detect import Detections
from spatialalign.tracking.tracker import Tracker
from training.evaluate import Evaluate, evaluate, read_prompts, spread
from training.lora import Inspect, inspect
from training.store import Store
from training.versions import versions

TYPES = ("LR", "RL", "LT")
SEEDS = (7, 8)


class LeftToRight:
    """Sees the subject pass from left to right, a little below the object, whatever the picture; counts its calls.

    With dx = -12 ... 12 and dy = 8, left and right are 12 / sqrt(12² + 8²) = 0.83 at the ends and top is -0.55: type LR
    scores 0.92, and of the other types LT and TR, half right, come nearest with 0.64.
    """

    def __init__(self) -> None:
        self.calls = 0

    def detect(self, frames: NDArray[np.uint8], phrases: Sequence[str]) -> list[Detections]:
        self.calls += 1
        out = []
        for step in np.linspace(0.0, 24.0, len(frames)):
            boxes = np.array([[step, 20.0, step + 8.0, 28.0], [12.0, 12.0, 20.0, 20.0]])
            out.append(Detections(boxes, np.array([0.9, 0.9]), np.array([0, 1]), tuple(phrases)))
        return out


def make_prompts() -> list[Prompt]:
    """One prompt of each type."""
    relations = [(Relation(code[0]), Relation(code[1])) for code in TYPES]
    dsrs = [DSR("cat", "box", a, b, scene="In a quiet room", motion="walks") for a, b in relations]
    return [Prompt.of(f"{k}_{dsr.type_code}", dsr) for k, dsr in enumerate(dsrs)]


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A LoRA that changes the tiny transformer's output."""
    generator = torch.Generator().manual_seed(1)
    pair = LoraPair(torch.randn(4, 12, generator=generator), torch.randn(12, 4, generator=generator))
    return write(tmp_path / "lora.safetensors", pair)


def write(path: Path, pair: LoraPair, module: str = "blocks.0.attn2.to_k") -> Path:
    """A LoRA file with one module."""
    write_pairs({module: pair}, path, path.with_suffix(".diffusers.safetensors"), {})
    return path


def measure(backbone: WanBackbone, detector: LeftToRight, lora: Path, out: Path, swapped: int = 0) -> dict[str, Any]:
    """Evaluate the three prompts."""
    settings = backbone.default_settings()
    return evaluate(backbone, Tracker(detector), make_prompts(), SEEDS, lora, out, settings, swapped=swapped)


def test_every_number_follows_from_what_the_detector_sees(backbone: WanBackbone, lora: Path, tmp_path: Path) -> None:
    result = measure(backbone, LeftToRight(), lora, tmp_path / "out", swapped=3)
    for arm in ("base", "aligned"):
        assert result[arm]["videos"] == 6
        assert result[arm]["invalid_rate"]["value"] == 0.0
        rates = {code: kind["correct_at_0.7"]["value"] for code, kind in result[arm]["per_type"].items()}
        assert rates == {"LR": 1.0, "RL": 0.0, "LT": 0.0}
        # A clip asked for RL or LT is right for one of the five other types, a clip asked for LR for none.
        assert result["controls"]["chance"][arm]["value"] == pytest.approx((0 + 1 / 5 + 1 / 5) / 3)
    assert result["difference"]["correct_at_0.7"]["value"] == 0.0
    # The detector does not read captions, so exchanging the relations in them changes nothing.
    control = result["controls"]["swapped"]
    assert control["prompts"] == 3
    assert control["plain"]["value"] == control["swapped"]["value"] == pytest.approx(1 / 3)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == json.loads(json.dumps(result))
    assert (tmp_path / "out" / "table.md").read_text().startswith("| ")
    reversed_text = Store(tmp_path / "out" / "swapped").prompt("0_LR-reversed").text
    assert "is on the right of a box, then the cat walks to the left of the box" in reversed_text


def test_both_models_start_from_the_same_noise(backbone: WanBackbone, lora: Path, tmp_path: Path) -> None:
    result = measure(backbone, LeftToRight(), lora, tmp_path / "out")
    assert not getattr(backbone.transformer, "peft_config", {}), "the base model is left without an adapter"
    stores = [Store(tmp_path / "out" / name) for name in ("base", "aligned")]
    base, aligned = (store.sample("0_LR", SEEDS[0]).read_latents() for store in stores)
    assert not torch.equal(base, aligned), "the LoRA was in use"
    again = backbone.sample(
        backbone.encode_text([make_prompts()[0].text]),
        backbone.encode_text([backbone.default_settings().negative_prompt])[0],
        [SEEDS[0]],
        backbone.default_settings(),
    )[0]
    torch.testing.assert_close(again, base)
    assert "+lora:" in result["settings"]["aligned"]


def test_a_second_run_makes_nothing_again(
    backbone: WanBackbone, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detector = LeftToRight()
    first = measure(backbone, detector, lora, tmp_path / "out")
    calls, before = detector.calls, (tmp_path / "out" / "base" / "0_LR" / "7" / "video.mp4").stat().st_mtime_ns
    capsys.readouterr()
    assert measure(backbone, detector, lora, tmp_path / "out") == first
    assert detector.calls == calls
    assert (tmp_path / "out" / "base" / "0_LR" / "7" / "video.mp4").stat().st_mtime_ns == before
    assert capsys.readouterr().out.count("0 done, 6 there before") == 4


def test_a_cut_run_is_completed(backbone: WanBackbone, lora: Path, tmp_path: Path) -> None:
    out, detector = tmp_path / "out", LeftToRight()
    first = measure(backbone, detector, lora, out)
    (out / "aligned" / "1_RL" / "8" / "video.mp4").unlink()
    (out / "base" / "2_LT" / "7" / "tracks.safetensors").unlink()  # a score without tracks
    (out / "metrics.json").unlink()
    calls = detector.calls
    assert measure(backbone, detector, lora, out)["samples"] == first["samples"]
    assert detector.calls == calls + 1, "only the clip whose tracks were lost is tracked again"


def test_another_lora_needs_another_folder(backbone: WanBackbone, lora: Path, tmp_path: Path) -> None:
    measure(backbone, LeftToRight(), lora, tmp_path / "out")
    ones = LoraPair(torch.ones(1, 12), torch.ones(12, 1))
    other = write(tmp_path / "other.safetensors", ones, "blocks.1.attn2.to_k")
    with pytest.raises(StoreError, match="made otherwise"):
        measure(backbone, LeftToRight(), other, tmp_path / "out")
    assert not getattr(backbone.transformer, "peft_config", {}), "the adapter is taken off after an error too"


def test_a_lora_that_ruins_the_model_counts_as_invalid(backbone: WanBackbone, tmp_path: Path) -> None:
    path = write(tmp_path / "nan.safetensors", LoraPair(torch.full((1, 12), float("nan")), torch.ones(12, 1)))
    with pytest.raises(DataError, match="none of 6 clips could be made"):
        measure(backbone, LeftToRight(), path, tmp_path / "out")


def test_a_clip_that_cannot_be_scored_counts_as_invalid(backbone: WanBackbone, lora: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    measure(backbone, LeftToRight(), lora, out)
    for name in ("tracks.safetensors", "score.json"):
        (out / "base" / "0_LR" / "7" / name).unlink()
    (out / "base" / "0_LR" / "7" / "video.mp4").write_bytes(b"not a video")
    result = measure(backbone, LeftToRight(), lora, out)
    assert result["base"]["per_type"]["LR"]["correct_at_0.7"]["value"] == 0.5
    assert result["base"]["invalid_rate"]["value"] == pytest.approx(1 / 6)
    assert result["base"]["invalid_reasons"] == {"failed": 1}
    row = next(row for row in result["samples"] if row["prompt_id"] == "0_LR" and row["seed"] == 7)
    assert row["base"]["score"] is None and "video" in row["base"]["reason"]


def test_a_sample_in_other_hands_is_waited_for(backbone: WanBackbone, lora: Path, tmp_path: Path) -> None:
    sample = Store(tmp_path / "out" / "base", create=True).sample("0_LR", 7)
    sample.folder.mkdir(parents=True)
    # The claim of a process of this machine that is alive: this one's parent.
    claim = {"host": socket.gethostname(), "pid": os.getppid(), "started": ""}
    (sample.folder / ".claim-generate").write_text(json.dumps(claim))
    with pytest.raises(DataError, match="0_LR/7.*another process"):
        measure(backbone, LeftToRight(), lora, tmp_path / "out")


def test_the_lora_carries_its_scores_and_stays_the_same(
    backbone: WanBackbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """LR is right and scores 0.92, RL and LT are wrong, by either model; see LeftToRight."""
    comfy, diffusers = (tmp_path / f"lora_{name}.safetensors" for name in ("comfyui", "diffusers"))
    pair = LoraPair(torch.randn(4, 12), torch.randn(12, 4))
    write_pairs({"blocks.0.attn2.to_k": pair}, comfy, diffusers, {"step": 5})
    before, detector = {path: load_file(path) for path in (comfy, diffusers)}, LeftToRight()
    result = evaluate(
        backbone,
        Tracker(detector),
        make_prompts(),
        SEEDS,
        comfy,
        tmp_path / "out",
        backbone.default_settings(),
        record=False,
    )
    assert adapter_metadata(comfy) == {"step": 5}
    calls = detector.calls
    for _ in range(2):
        capsys.readouterr()
        assert measure(backbone, detector, comfy, tmp_path / "out") == result
        assert capsys.readouterr().out.count("0 done, 6 there before") == 4, (
            "the LoRA's identity is that of its tensors"
        )
    assert detector.calls == calls
    for path, tensors in before.items():
        notes = adapter_metadata(path)
        scores = notes.pop("scores")
        assert notes == {"step": 5} and (scores["prompts"], scores["seeds"], scores["strength"]) == (3, [7, 8], 1.0)
        for arm in ("base", "aligned"):
            assert scores[arm]["correct_at_0.7"] == pytest.approx(1 / 3)
            assert scores[arm]["invalid_rate"] == 0.0
            assert scores[arm]["mean_score"] == result[arm]["mean_score"]["value"]
        found = load_file(path)
        assert found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in tensors)
    inspect(Inspect(comfy))
    assert "scores, base → aligned: Correct@0.7 33.3% → 33.3%" in capsys.readouterr().out


def test_a_lora_that_cannot_be_written_is_no_failure(
    backbone: WanBackbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "lora.safetensors"
    write_pairs({"blocks.0.attn2.to_k": LoraPair(torch.ones(1, 12), torch.ones(12, 1))}, path, tmp_path / "d", {"a": 1})

    def refuse(*args: object) -> None:
        raise PermissionError("read-only folder")

    monkeypatch.setattr(lora_record, "atomic_path", refuse)
    assert measure(backbone, LeftToRight(), path, tmp_path / "out")["prompts"] == 3
    assert "could not be written" in caplog.text and "read-only folder" in caplog.text


def test_nothing_to_evaluate(backbone: WanBackbone, lora: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to evaluate"):
        evaluate(backbone, Tracker(LeftToRight()), [], SEEDS, lora, tmp_path, backbone.default_settings())
    with pytest.raises(ConfigError, match="limit"):
        Evaluate(model="miniature", lora=lora, out=tmp_path, prompts="miniature", limit=0)


def test_spread_is_balanced_and_keeps_the_order() -> None:
    prompts = read_prompts("miniature")
    chosen = spread(prompts, 12)
    assert len(chosen) == 12
    assert sorted(p.dsr.type_code for p in chosen) == sorted(2 * ["LR", "LT", "RL", "RT", "TL", "TR"])
    places = [prompts.index(prompt) for prompt in chosen]
    assert places == sorted(places) and len({prompt.triple for prompt in chosen}) > 6
    assert spread(prompts, None) == spread(prompts, 10_000) == prompts
    assert len(spread(prompts, 7)) == 7 and len(spread(prompts, 1)) == 1


def test_versions_name_what_a_result_depends_on() -> None:
    found = versions()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0] and "spatialalign" in found
