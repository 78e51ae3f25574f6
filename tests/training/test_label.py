"""The labels of a store from every kind of source; the learned ones are asked directly for the expected values."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from spatialalign.errors import DataError
from spatialalign.files import write_json
from spatialalign.miniature import REWARD
from spatialalign.prompts import Prompt
from spatialalign.rewards.latent import load_reward
from spatialalign.score import dsr_score
from spatialalign.tracks import Tracks
from training.bench_scorers import RandomScorer
from training.label import Label, learned, main, run, stored
from training.labels import read_table
from training.mine import mixed_labels
from training.store import LatentsHeader, Store

NOTHING = Tracks(np.full((9, 2, 4), np.nan), np.zeros((9, 2)), ("cat", "box"), (64, 64), 8.0)
TEXT = "In a quiet room, a cat is on the left of a box, then the cat walks to the right of the box."


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """One prompt, three clips of noise: scores 0.9, INVALID, and none yet; the last one's latents are NaN."""
    reward = load_reward(REWARD)
    random = torch.Generator().manual_seed(0)
    store = Store(tmp_path / "store", create=True)
    store.add_prompt(Prompt.parse("0001_LR", TEXT))
    store.write_text("0001_LR", torch.randn(6, reward.trunk.config.text_dim, generator=random), "miniature")
    header = LatentsHeader(reward.info.latent_space, "miniature", {}, "digest")
    for seed, score in enumerate((0.9, None, None)):
        sample = store.sample("0001_LR", seed)
        sample.write_latents(torch.randn(16, 4, 8, 8, generator=random) * (math.nan if seed == 2 else 1), header)
        sample.video.touch()
        sample.tracks.touch()
        if seed < 2:
            invalid = dsr_score(NOTHING, Prompt.parse("x", TEXT).dsr)
            write_json(sample.score, replace(invalid, score=score, reason=None if score else "frames: none").to_dict())
    return store


def fails(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """What the program says when it ends with an error."""
    with pytest.raises(SystemExit) as stopped:
        main(options)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_scores_of_the_store(store: Store) -> None:
    table = stored(store.samples(), "dsr")
    np.testing.assert_array_equal(table.values, [[0.9], [np.nan], [np.nan]])
    assert np.isnan(stored(store.samples(), "robust").values).all()  # those of clips in which nothing is seen


def test_sources_stand_side_by_side(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.csv").write_text("prompt_id,seed,quality\n0001_LR,2,31.5\nelsewhere,0,1\n0001_LR,0,30\n")
    main(["--store", str(store.root), "--sources", f"dsr, csv:{tmp_path / 'own.csv'}"])
    with (store.root / "labels.csv").open(newline="") as handle:
        assert list(csv.reader(handle)) == [
            ["prompt_id", "seed", "dsr", "quality"],
            ["0001_LR", "0", "0.9", "30"],
            ["0001_LR", "1", "", ""],
            ["0001_LR", "2", "", "31.5"],
        ]
    assert "quality: 2 of 3 clips, mean 30.75, deviation within prompts 0.75" in capsys.readouterr().out
    assert mixed_labels(read_table(tmp_path / "own.csv"), {})["0001_LR", 2] > 0


def test_a_latent_reward_is_asked_about_the_finished_clip(store: Store) -> None:
    table = run(Label(store.root, f"latent:{REWARD}", batch=2, device="cpu"))
    reward, text = load_reward(REWARD), store.read_text("0001_LR")
    assert table.names == tuple(f"latent_{name}" for name in reward.dimensions)
    for seed in (0, 1):
        latents = store.sample("0001_LR", seed).read_latents()[None]
        with torch.no_grad():
            expected = reward(latents, torch.zeros(1), [text]).values[0]
        assert table.values[seed] == pytest.approx(expected.numpy(), abs=1e-5)
    assert np.isnan(table.values[2]).all()


def test_a_learned_reward_is_asked_once(store: Store, tmp_path: Path) -> None:
    args = Label(store.root, out=tmp_path / "mine.csv", batch=1)
    samples = store.samples()
    table = learned(store, samples, "random", args, "cpu")
    expected = RandomScorer().score([Path(sample.name) for sample in samples], [TEXT] * 3)
    assert len(set(table.values[:, 0])) == 3
    kept = (tmp_path / "mine-random.jsonl").read_text()
    assert len(kept.splitlines()) == 1 + len(expected)
    np.testing.assert_array_equal(learned(store, samples, "random", args, "cpu").values, table.values)
    assert (tmp_path / "mine-random.jsonl").read_text() == kept


def test_what_cannot_be_used_is_said(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.csv").write_text("prompt_id,seed,dsr\nelsewhere,0,1\n")
    root = str(store.root)
    assert "expected dsr, robust, csv:<file>" in fails(capsys, "--store", root, "--sources", "vq")
    assert "different sources" in fails(capsys, "--store", root, "--sources", "dsr,dsr")
    assert "no label for any clip" in fails(capsys, "--store", root, "--sources", f"csv:{tmp_path / 'other.csv'}")
    (tmp_path / "other.csv").write_text("prompt_id,seed,dsr\n0001_LR,0,1\n")
    message = fails(capsys, "--store", root, "--sources", f"dsr,csv:{tmp_path / 'other.csv'}")
    assert "two sources have a dimension 'dsr'" in message
    assert not (store.root / "labels.csv").exists()


def test_a_reward_of_other_latents_is_refused(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    store.sample("0001_LR", 0).write_latents(torch.zeros(16, 4, 8, 8), LatentsHeader("other", "m", {}, "digest"))
    assert "this model's are of other" in fails(capsys, "--store", str(store.root), "--sources", f"latent:{REWARD}")


def test_an_empty_store(tmp_path: Path) -> None:
    Store(tmp_path / "store", create=True).add_prompt(Prompt.parse("0001_LR", TEXT))
    with pytest.raises(DataError, match="holds no clips"):
        run(Label(tmp_path / "store"))
