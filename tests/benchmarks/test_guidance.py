"""The guidance benchmark's own measurements, and one small run of it with the shipped reward."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from spatialalign.errors import ConfigError, DataError
from spatialalign.files import read_json
from spatialalign.miniature.world import prompts, render
from spatialalign.video import write_video
from training.latent_labels import read_further
from training.store import Store


@pytest.fixture(scope="module")
def parts(repo_root: Path) -> dict[str, ModuleType]:
    """The modules; benchmarks/ is no installed package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repo_root))
        return {name: importlib.import_module(f"benchmarks.{name}") for name in ("guidance", "background_labels")}


def test_frames_with_a_lost_animal_do_not_count(parts: dict[str, ModuleType]) -> None:
    """A true render has the true background, though the animal, whose box is missing, is none of it."""
    labels = parts["background_labels"]
    clip = render(prompts("eval")[0].dsr, 0)
    boxes = clip.tracks.boxes.copy()
    boxes[5:, 0] = np.nan
    lost = replace(clip.tracks, boxes=boxes, masks=None)
    assert labels.background_psnr(clip.frames, lost, clip.dsr.scene) < 30
    assert labels.fidelity(clip.frames, lost, clip.dsr.scene) > 55
    boxes[:, 1] = np.nan
    assert np.isnan(labels.fidelity(clip.frames, replace(lost, boxes=boxes), clip.dsr.scene))


def test_the_file_of_labels(parts: dict[str, ModuleType], tmp_path: Path) -> None:
    labels, prompt = parts["background_labels"], prompts("train")[0]
    store = Store(tmp_path / "store", create=True)
    store.add_prompt(prompt)
    args = labels.BackgroundLabels(store.root, tmp_path / "quality.csv")
    with pytest.raises(DataError, match="no clip of .* has a video and tracks"):
        labels.run(args)
    for seed, noise in enumerate((0, 20)):
        clip, sample = render(prompt.dsr, seed), store.sample(prompt.prompt_id, seed)
        frames = clip.frames.astype(int) + np.random.default_rng(0).choice([-noise, noise], clip.frames.shape)
        sample.folder.mkdir(parents=True)
        write_video(sample.video, np.clip(frames, 0, 255).astype(np.uint8), 8.0)
        clip.tracks.save(sample.tracks)
    assert labels.run(args) == 2
    names, values = read_further(args.out)
    assert names == ("quality",)
    assert values[prompt.prompt_id, 0][0] > values[prompt.prompt_id, 1][0] + 3
    assert labels.fidelity_of(store, [prompt], (0, 1)) == pytest.approx(np.mean([*values.values()]), abs=1e-3)


def test_unknown_parts_are_refused(parts: dict[str, ModuleType]) -> None:
    with pytest.raises(ConfigError, match="parts must be among time, main.*found 'speed'"):
        parts["guidance"].Guidance(parts="main,speed").chosen()


def test_a_small_run(parts: dict[str, ModuleType], tmp_path: Path) -> None:
    """One prompt and seed. Of 16 steps those from 1 to 9 are guided, each for 3 passes of 2 of 6 blocks: 25/16."""
    bench = parts["guidance"]
    args = bench.Guidance(out=tmp_path, parts="time,main", seeds="0", limit=1)
    result = bench.run(args)
    assert result["time"]["evaluations"] == pytest.approx(1 + 9 / 16, abs=1e-3)
    assert [row["arm"] for row in result["main"]] == ["base", "noisy x0", "noisy nrg"]
    assert read_json(tmp_path / "guidance.json") == result
    assert (tmp_path / "guidance.md").read_text().count("\n| base | 1 |") == 1
    scores = {row["arm"]: row["mean_score"]["value"] for row in result["main"]}
    assert scores["noisy x0"] != scores["base"]
