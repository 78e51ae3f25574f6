"""Metrics of clips, by hand, and its DINOv2 and CLIP, on tiny models of the real classes."""

from __future__ import annotations

import gc
import json
import math
import os
import shutil
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from .test_learned_rewards import PASSAGE, Run, beside, dsr, frames, path

__all__ = ["dsr", "path"]


@pytest.mark.parametrize(("places", "compbench"), [(PASSAGE, 1.0), (PASSAGE[::-1], 0.4)])
def test_metrics_by_hand(
    nodes: dict[str, Any],
    run: Run,
    dsr: Any,
    path: Callable[..., Any],
    places: list[float],
    compbench: float,
) -> None:
    """VBench's rule has no sign: it does not see that a passage goes the wrong way, which has 0.4 by the other."""
    clip = torch.zeros(16, 100, 200, 3)
    clip[8:] = 1  # one step of the whole range between 16 frames: two of 14 triples are half a range off
    answer = run(nodes["SpatialAlignMetrics"], images=clip, tracks=path(places), dsr=dsr)
    assert answer.args[:4] == pytest.approx((1 - 2 * 0.5 / 14, 1 / 15, 1.0, compbench))
    assert math.isnan(answer.args[4]) and json.loads(answer.args[5])["identity"] is None
    assert list(answer.args[6]) == ["smoothness", "change", "vbench", "compbench", "identity", "natural", "quality"]
    assert "identity" not in answer.ui["text"][0] and "vbench 1.000" in answer.ui["text"][0]


def test_metrics_of_frames_alone(nodes: dict[str, Any], run: Run) -> None:
    answer = run(nodes["SpatialAlignMetrics"], images=torch.ones(4, 8, 8, 3), values={"VQ": 2.0})
    assert answer.args[:2] == (1.0, 0.0) and all(map(math.isnan, (*answer.args[2:5], *answer.args[7:])))
    assert answer.args[6]["VQ"] == 2.0


def test_identity_by_a_dinov2(
    nodes: dict[str, Any], run: Run, fake_host: Any, dsr: Any, path: Callable[..., Any]
) -> None:
    """A subject that looks the same in every place has 1, one that does not has less."""
    beside("spatialalign/test_metrics_identity.py").write_dino(fake_host.models / "dinov2" / "tiny")
    pattern = torch.rand(10, 10, 3, generator=torch.Generator().manual_seed(0))
    clip = torch.zeros(16, 100, 200, 3)
    for frame, x in enumerate(PASSAGE):
        clip[frame, 50:60, int(95 + x) : int(105 + x)] = pattern
    metrics = nodes["SpatialAlignMetrics"]
    assert metrics.INPUT_TYPES()["required"]["identity"][1]["options"] == ["none", "tiny"]
    inputs = {"tracks": path(PASSAGE), "dsr": dsr, "identity": "tiny"}
    assert run(metrics, images=clip, **inputs).args[4] == pytest.approx(1, abs=1e-5)
    assert len(fake_host.loaded) == 1
    clip[8:] = 1 - clip[8:]
    assert run(metrics, images=clip, **inputs).args[4] < 0.99


def test_looks_by_a_clip(nodes: dict[str, Any], run: Run, fake_host: Any) -> None:
    """Of frames alone, as the engine measures; the new outputs come after those that graphs of before are linked to."""
    from spatialalign.metrics_clip_iqa import ClipIqa

    folder = beside("spatialalign/test_metrics_clip_iqa.py").write_clip(fake_host.models / "clip_iqa" / "tiny")
    metrics, clip = nodes["SpatialAlignMetrics"], frames()
    assert metrics.INPUT_TYPES()["optional"]["clip_iqa"][1]["options"] == ["none", "tiny"]
    answer = run(metrics, images=clip, clip_iqa="tiny")
    expected = ClipIqa.from_pretrained(folder).score((clip * 255).round().byte().numpy())
    assert answer.args[7:] == pytest.approx(expected, abs=1e-6)
    assert [answer.args[6][name] for name in ("natural", "quality")] == list(answer.args[7:])
    assert json.loads(answer.args[5])["quality"] == answer.args[8] and math.isnan(answer.args[4])
    assert f"natural {answer.args[7]:.3f}" in answer.ui["text"][0]
    (patcher,) = fake_host.loaded
    assert sum(weight.numel() for weight in patcher.model.parameters()) > 1000


def test_models_are_kept_until_others_are_asked_for(
    nodes: dict[str, Any], run: Run, fake_host: Any, dsr: Any, path: Callable[..., Any]
) -> None:
    """A patcher is made when a model is loaded: the same one a second time is the same model."""
    write_dino = beside("spatialalign/test_metrics_identity.py").write_dino
    write_clip = beside("spatialalign/test_metrics_clip_iqa.py").write_clip
    dino, eyes = fake_host.models / "dinov2" / "tiny", fake_host.models / "clip_iqa" / "tiny"
    clip = torch.rand(16, 100, 200, 3, generator=torch.Generator().manual_seed(0))

    def measure(**inputs: Any) -> tuple[list[Any], tuple[Any, ...]]:
        fake_host.loaded.clear()
        answer = run(nodes["SpatialAlignMetrics"], images=clip, tracks=path(PASSAGE), dsr=dsr, **inputs)
        return list(fake_host.loaded), (answer.args[4], *answer.args[7:])

    write_dino(dino)
    write_clip(eyes)
    both = {"identity": "tiny", "clip_iqa": "tiny"}
    first, numbers = measure(**both)
    assert len(first) == 2 and not any(map(math.isnan, numbers))
    again, same = measure(**both)
    assert again == first and same == numbers

    shutil.rmtree(eyes)
    write_clip(eyes, seed=1)
    changed, others = measure(**both)
    assert changed[0] is first[0] and changed[1] is not first[1]
    assert others[0] == numbers[0] and others[1:] != numbers[1:]

    models = [weakref.ref(one.model) for one in (*first, *changed)]
    del first, again, changed
    measure(identity="tiny")
    fake_host.loaded.clear()
    gc.collect()
    assert [model() is None for model in models] == [False, True, False, True], "only the DINOv2 is kept"


def test_other_files_are_another_input(nodes: dict[str, Any], fake_host: Any) -> None:
    """What is linked is None where ComfyUI asks whether a node must run again."""
    folder = fake_host.models / "clip_iqa" / "tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    ask = nodes["SpatialAlignMetrics"].fingerprint_inputs
    assert ask(images=None, identity="none", tracks=None, dsr=None, clip_iqa=None) == ""
    before = ask(images=None, identity="none", clip_iqa="tiny")
    assert before == ask(images=None, identity="none", clip_iqa="tiny")
    os.utime(folder / "config.json", (1, 1))
    assert ask(images=None, identity="none", clip_iqa="tiny") != before


def test_metrics_that_lack_something(
    nodes: dict[str, Any], run: Run, dsr: Any, fake_host: Any, module: Callable[[str], ModuleType]
) -> None:
    error = module("spatialalign.errors").DataError
    with pytest.raises(error, match="both tracks and dsr"):
        run(nodes["SpatialAlignMetrics"], images=frames(), dsr=dsr)
    with pytest.raises(error, match="identity needs tracks"):
        run(nodes["SpatialAlignMetrics"], images=frames(), identity="tiny")
    with pytest.raises(error, match="smoothness is given by two nodes"):
        run(nodes["SpatialAlignMetrics"], images=frames(), values={"smoothness": 1.0})
