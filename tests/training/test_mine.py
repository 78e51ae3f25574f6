"""Mining: the paper's classes on a store with known scores."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from spatialalign.files import write_json
from spatialalign.prompts import Prompt
from spatialalign.score import DsrScore, Limits, dsr_score
from spatialalign.tracks import Tracks
from training.mine import main, mine
from training.pairs import PromptPairs, read_pairs, scored_by
from training.store import LatentsHeader, Store

TEXT = "In a quiet room, a {} is on the left of a box, then the {} walks to the right of the box."
ANIMALS = ("cat", "dog", "fox", "bird")


def an_invalid_score() -> DsrScore:
    """What the scorer gives for tracks in which nothing is ever present."""
    boxes = np.full((9, 2, 4), np.nan)
    tracks = Tracks(boxes, np.zeros((9, 2)), ("cat", "box"), (64, 64), 8.0)
    return dsr_score(tracks, Prompt.parse("x", TEXT.format("cat", "cat")).dsr)


def a_score(value: float | None, robust: float | None = None) -> DsrScore:
    """A score record of a known value (components that give it are beside the point here)."""
    invalid = an_invalid_score()
    assert invalid.robust is not None
    return dataclasses.replace(
        invalid,
        score=value,
        reason=None if value is not None else "frames: none",
        limits=Limits.for_frames(9),
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Prompts 1 to 4; scores by seed as in the tests."""
    store = Store(tmp_path / "store", create=True)
    for number, animal in enumerate(ANIMALS, start=1):
        store.add_prompt(Prompt.parse(f"{number:04d}_LR", TEXT.format(animal, animal)))
    return store


def fill(store: Store, scores: dict[int, list[float | None]]) -> None:
    """Give prompt n samples with these scores, in the order of seeds."""
    for number, values in scores.items():
        name = f"{number:04d}_LR"
        store.write_text(name, torch.zeros(2, 4), "model")
        for seed, value in enumerate(values):
            sample = store.sample(name, seed)
            sample.write_latents(torch.zeros(2, 1, 2, 2), LatentsHeader("space", "model", {}, "digest"))
            sample.video.touch()
            sample.tracks.touch()
            write_json(sample.score, a_score(value).to_dict())


def test_winners_losers_and_the_prompts_that_have_both(store: Store) -> None:
    fill(store, {1: [0.7, 0.69, None, 0.0], 2: [0.9, 0.8], 3: [0.1, None], 4: [None, 1.0, 0.2]})
    found = mine(store)
    assert found.prompts == [PromptPairs("0001_LR", (0,), (1, 3)), PromptPairs("0004_LR", (1,), (2,))]
    counts = found.statistics()
    assert (counts["winners"], counts["losers"], counts["invalid"]) == (4, 4, 3)
    assert (counts["prompts_with_winners_only"], counts["prompts_with_losers_only"]) == (1, 1)
    assert counts["pairs"] == 3


def test_unusable_samples_are_left_out_with_their_reason(store: Store) -> None:
    fill(store, {1: [0.9, 0.8, 0.9, 0.1, 0.2]})
    samples = [store.sample("0001_LR", seed) for seed in range(5)]
    samples[0].write_latents(torch.full((2, 1, 2, 2), float("nan")), LatentsHeader("space", "model", {}, "digest"))
    samples[0].tracks.touch()
    write_json(samples[0].score, a_score(0.9).to_dict())
    samples[1].tracks.unlink()
    samples[3].score.unlink()
    found = mine(store)
    assert found.prompts == [PromptPairs("0001_LR", (2,), (4,))]
    reasons = dict(found.unusable)
    assert "NaN" in reasons["0001_LR/0"]
    assert "no tracks" in reasons["0001_LR/1"]
    assert "does not exist" in reasons["0001_LR/3"]
    assert "0001_LR/0: " in found.text()


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        ({1: [0.1, 0.2], 2: [None]}, r"no winners: 0 winners, 2 losers, 1 INVALID.*more seeds"),
        ({1: [0.9], 2: [0.8]}, r"no losers: 2 winners, 0 losers.*harder"),
        ({1: [0.9], 2: [0.1]}, "no prompt has both"),
        ({1: [None]}, "no winners"),
        ({}, "no clip can be used"),
    ],
)
def test_nothing_to_pair_is_said_with_counts_and_a_remedy(
    store: Store, scores: dict[int, list[float | None]], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(store, scores)
    (store.root / "pairs.json").write_text("the list of an earlier run")
    with pytest.raises(SystemExit) as stopped:
        main(["--store", str(store.root)])
    assert stopped.value.code == 2
    import re

    assert re.search(message, capsys.readouterr().err)
    assert (store.root / "pairs.json").read_text() == "the list of an earlier run"


def test_the_program_writes_the_manifest(store: Store, tmp_path: Path) -> None:
    fill(store, {1: [0.9, 0.1], 2: [0.6, 0.4]})
    main(["--store", str(store.root)])
    assert read_pairs(store.root / "pairs.json")[0] == (PromptPairs("0001_LR", (0,), (1,)),)
    main(["--store", str(store.root), "--threshold", "0.5", "--out", str(tmp_path / "p.json")])
    assert len(read_pairs(tmp_path / "p.json")[0]) == 2
    value = json.loads((tmp_path / "p.json").read_text())
    assert (value["statistics"]["threshold"], value["statistics"]["pairs"]) == (0.5, 2)
    with pytest.raises(SystemExit):
        main(["--store", str(store.root), "--threshold", "1.5"])


def test_only_clips_of_the_model_that_is_asked_for(store: Store) -> None:
    fill(store, {1: [0.9, 0.1, 0.2]})
    other = store.sample("0001_LR", 2)
    other.write_latents(torch.zeros(2, 1, 2, 2), LatentsHeader("space", "model+lora:abc@1", {}, "digest"))
    other.tracks.touch()
    write_json(other.score, a_score(0.2).to_dict())
    assert mine(store).prompts == [PromptPairs("0001_LR", (0,), (1, 2))]
    found = mine(store, model="model")
    assert found.prompts == [PromptPairs("0001_LR", (0,), (1,))]
    assert found.unusable == [("0001_LR/2", "made by model+lora:abc@1, not by model")]


def test_the_robust_score_decides_on_request(store: Store) -> None:
    """Without any track the robust score is INVALID, so it can use no clip, whatever the official one says."""
    fill(store, {1: [0.9, 0.1]})
    assert len(mine(store).prompts) == 1
    with pytest.raises(ValueError, match="0 winners, 0 losers, 2 INVALID"):
        mine(store, "robust")


def labels_file(path: Path, columns: dict[str, dict[int, list[float | None]]]) -> Path:
    """A file of labels: by dimension, then by prompt, in the order of seeds."""
    keys = [(n, seed) for n, values in next(iter(columns.values())).items() for seed in range(len(values))]
    rows = [",".join(["prompt_id", "seed", *columns])]
    for number, seed in keys:
        cells = [columns[name][number][seed] for name in columns]
        rows.append(",".join([f"{number:04d}_LR", str(seed), *("" if c is None else str(c) for c in cells)]))
    path.write_text("\n".join(rows) + "\n")
    return path


def test_best_against_worst_and_margin_on_the_scores_of_the_store(store: Store) -> None:
    fill(store, {1: [0.45, 0.9, None, 0.1], 2: [0.4, 0.3], 3: [0.6], 4: [None]})
    found = mine(store, rule="best-worst")
    assert found.prompts == [PromptPairs("0001_LR", (1,), (3,)), PromptPairs("0002_LR", (0,), (1,))]
    assert (found.winners, found.losers, found.invalid, found.too_close) == (2, 2, 2, 1)
    assert mine(store, rule="margin", margin=0.4).prompts == [PromptPairs("0001_LR", (1,), (0, 3))]
    with pytest.raises(ValueError, match=r"no prompt has clips that differ enough: .*lower --margin"):
        mine(store, rule="best-worst", margin=0.85)


def test_clips_that_are_all_alike_are_not_called_unscored(store: Store) -> None:
    fill(store, {1: [0.5, 0.5]})
    with pytest.raises(ValueError, match="no prompt has clips that differ enough"):
        mine(store, rule="best-worst")


def test_labels_decide_in_standard_deviations_and_go_into_the_manifest(store: Store, tmp_path: Path) -> None:
    """The store's scores say the opposite and are not looked at; a clip without a label takes no part.

    Every label is 0.1 from its prompt's mean, and the mean of all is 0.65.
    """
    fill(store, {1: [0.0, 1.0, 1.0], 2: [0.1, 0.9]})
    labels = labels_file(tmp_path / "labels.csv", {"VQ": {1: [0.7, 0.5, None], 2: [0.8, 0.6]}})
    out = tmp_path / "pairs.json"
    main(["--store", str(store.root), "--labels", str(labels), "--out", str(out), "--rule", "best-worst"])
    expected = (PromptPairs("0001_LR", (0,), (1,)), PromptPairs("0002_LR", (0,), (1,)))
    assert read_pairs(out)[0] == expected
    scores = scored_by(out)
    assert scores == {
        ("0001_LR", 0): pytest.approx(0.5),
        ("0001_LR", 1): pytest.approx(-1.5),
        ("0002_LR", 0): pytest.approx(1.5),
        ("0002_LR", 1): pytest.approx(-0.5),
    }
    main(["--store", str(store.root), "--labels", str(labels), "--out", str(out)])
    assert read_pairs(out)[0] == expected  # the mean, 0.65, lies between
    with pytest.raises(SystemExit):
        main(["--store", str(store.root), "--labels", str(labels), "--out", str(out), "--threshold", "1.6"])
    assert read_pairs(out)[0] == expected


def test_a_mix_of_dimensions_relabels_the_pairs(store: Store, tmp_path: Path) -> None:
    """By VQ alone clip 0 wins, by TA alone clip 1, mixed 3:1 again clip 0; the manifest tells how often each agrees."""
    fill(store, {1: [0.9, 0.1]})
    labels = labels_file(tmp_path / "labels.csv", {"VQ": {1: [3.0, 1.0]}, "TA": {1: [10.0, 20.0]}})
    common = ["--store", str(store.root), "--labels", str(labels), "--rule", "best-worst"]
    for weights, winner in (('{"VQ": 1}', 0), ('{"TA": 1}', 1), ('{"VQ": 3, "TA": 1}', 0), ('{"VQ": 1, "TA": 3}', 1)):
        main([*common, "--weights", weights])
        assert read_pairs(store.root / "pairs.json")[0] == (PromptPairs("0001_LR", (winner,), (1 - winner,)),)
    statistics = json.loads((store.root / "pairs.json").read_text())["statistics"]
    assert statistics["winner_is_better"] == {"VQ": 0.0, "TA": 1.0}
    assert (statistics["score"], statistics["weights"]) == ("labels", {"VQ": 1, "TA": 3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rule", "margin"], "margin must be above 0"),
        (["--margin", "0.1"], "rule threshold knows no margin"),
        (["--rule", "best-worst", "--threshold", "0.5"], "knows no threshold"),
        (["--rule", "best-worst", "--margin", "-1"], "margin must be above 0"),
        (["--weights", '{"VQ": 1}'], "give --labels"),
        (["--labels", "labels.csv", "--score", "robust"], "does not decide where labels do"),
        (["--labels", "two.csv"], r"dimensions VQ, TA; give --weights, as '{\"VQ\": 1, \"TA\": 1}'"),
    ],
)
def test_options_that_contradict(
    store: Store,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    labels_file(Path("two.csv"), {"VQ": {1: [3.0, 1.0]}, "TA": {1: [10.0, 20.0]}})
    with pytest.raises(SystemExit):
        main(["--store", str(store.root), *options])
    import re

    assert re.search(message, capsys.readouterr().err)
