"""The official training data, written here as the published programs have it, read into a store for mine and dpo."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from spatialalign.backbones.latent_space import LatentSpace
from spatialalign.backbones.wan import WanBackbone
from spatialalign.errors import DataError
from spatialalign.prompts import Prompt, write_csv
from training import dpo
from training.import_official import ImportOfficial, main, parse_rewards, run
from training.mine import Mine
from training.mine import run as mine
from training.presets import PRESETS
from training.score import score
from training.store import Store

SENTENCES = {
    "0001_LR": "In a quiet room, a cat is on the left of a box, then the cat walks to the right of the box.",
    "0002_RL": "In a quiet room, a dog is on the right of a chair, then the dog runs to the left of the chair.",
}
REWARDS = {"0001_LR": [0.91, -100, 0.25], "0002_RL": [0.7, 0.69, 0.0]}
WORDS = 7
"""Real tokens of the text embedding; the rest of the 512 rows is zero, as DiffSynth's prompter leaves them."""


def content(name: str, clips: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    context = torch.zeros(1, 512, 16)
    context[0, :WORDS] = torch.randn(WORDS, 16, generator=generator)
    latents = torch.randn(clips, 16, 2, 4, 4, generator=generator)
    return {"prompt_id": name, "latents_data": latents.bfloat16(), "prompt_emb": {"context": context.bfloat16()}}


def write_metadata(folder: Path, rewards: dict[str, Any], sentences: bool = True) -> None:
    """As calc_dsr_score.py leaves it: the columns of the prompt file, then the clips' names and their rewards."""
    write_csv(folder / "prompts.csv", [Prompt.parse(name, SENTENCES[name]) for name in rewards])
    with open(folder / "prompts.csv", newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    for row in rows:
        values = rewards[row["prompt_id"]]
        row["video"] = str([f"{row['prompt_id']}_F81_seed{seed:02d}.mp4" for seed in range(len(values))])
        row["reward"] = str(values)
        if not sentences:
            del row["prompt"]
    with open(folder / "train_metadata.csv", "w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The layout of the published run_train.sh: data/train_metadata.csv and data/tensors/<prompt_id>.tensors.pth."""
    folder = tmp_path / "data"
    (folder / "tensors").mkdir(parents=True)
    for name in SENTENCES:
        torch.save(content(name), folder / "tensors" / f"{name}.tensors.pth")
    write_metadata(folder, REWARDS)
    return folder


def test_mine_and_dpo_run_on_it(data: Path, tmp_path: Path, backbone: WanBackbone) -> None:
    summary = run(ImportOfficial(data, tmp_path / "store", latent_space=backbone.latent_space))
    assert (summary.done, summary.skipped, summary.failed) == (6, 0, [])
    store = Store(tmp_path / "store")
    sample = store.sample("0001_LR", 2)
    assert torch.equal(sample.read_latents(), content("0001_LR")["latents_data"][2].float())
    assert torch.equal(store.read_text("0001_LR"), content("0001_LR")["prompt_emb"]["context"][0, :WORDS])
    assert [s.read_score().score for s in store.samples("0001_LR")] == [0.91, None, 0.25]
    header = sample.read_header()
    assert header.space == backbone.latent_space and header.settings["source"].startswith("official")
    assert [header.settings[key] for key in ("frames", "height", "width")] == [5, 32, 32]

    found = mine(Mine(store=store.root))
    assert [(p.prompt_id, p.winners, p.losers) for p in found.prompts] == [
        ("0001_LR", (0,), (2,)),
        ("0002_RL", (0,), (1, 2)),
    ]
    assert found.invalid == 1
    settings = small_settings(pair_weight="margin")  # needs the scores, too
    result = dpo.train(backbone, store, store.root / "pairs.json", tmp_path / "lora", settings)
    assert result.finished and result.step == 2


def small_settings(**changes: Any) -> Any:
    small = {"steps": 2, "warmup_steps": 0, "batch_pairs": 2, "micro_pairs": 2, "arm": "dpo"}
    return dpo.dataclasses.replace(PRESETS["miniature"], **small, **changes)


def test_the_default_space_is_wan_21s(data: Path, tmp_path: Path) -> None:
    run(ImportOfficial(data, tmp_path / "store"))
    header = Store(tmp_path / "store").sample("0001_LR", 0).read_header()
    assert header.space == LatentSpace().name and header.model == "Wan-AI/Wan2.1-T2V-1.3B"


def test_what_is_there_is_skipped_and_what_is_missing_made(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ImportOfficial(data, tmp_path / "store")
    run(args)
    store = Store(args.store)
    before = store.sample("0002_RL", 0).latents.stat().st_mtime_ns
    store.sample("0001_LR", 1).latents.unlink()  # as after a kill between two clips
    store.sample("0001_LR", 2).score.unlink()
    summary = run(args)
    assert (summary.done, summary.skipped) == (2, 4)
    assert store.sample("0002_RL", 0).latents.stat().st_mtime_ns == before
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", None)
        assert run(args).skipped == 6, "not even opened"
    write_metadata(data, REWARDS | {"0002_RL": [0.7, 0.69, 0.5]})
    assert run(args).done == 1 and store.sample("0002_RL", 2).read_score().score == 0.5


def test_imported_scores_are_never_computed_again(data: Path, tmp_path: Path) -> None:
    run(ImportOfficial(data, tmp_path / "store"))
    store = Store(tmp_path / "store")
    for again in (False, True):
        assert score(store, None, again).skipped == 6
    sample = store.sample("0001_LR", 0)
    sample.write_score(sample.read_score(), "a tracker")  # not marked as imported: it has lost its tracks
    with pytest.raises(DataError, match="no tracks beside it"):
        sample.read_score()


class Harm:
    """Pickled, it is a call; nothing may make it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('code was run')",)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"prompt_id": Harm()}, "holds more than tensors"),
        ({"prompt_id": "0009_TL"}, "is of the prompt '0009_TL'"),
        ({"latents_data": torch.zeros(4, 16, 2, 4, 4)}, "4 clips and the metadata 3 rewards"),
        ({"latents_data": torch.zeros(16, 2, 4, 4)}, "latents_data must be a tensor"),
        ({"prompt_emb": {}}, "lacks 'context'"),
        ({"prompt_emb": {"context": torch.zeros(1, 512, 16)}}, "all zeros"),
        ({"prompt_emb": {"context": torch.ones(2, 512, 16)}}, "2 text embeddings"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(data: Path, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    torch.save(content("0001_LR") | change, data / "tensors" / "0001_LR.tensors.pth")
    summary = run(ImportOfficial(data, tmp_path / "store"))
    ((name, reason),) = summary.failed
    assert name == "0001_LR" and words in reason and "0001_LR.tensors.pth" in reason
    assert summary.done == 3, "the other prompt is imported"


def test_a_clip_with_nan_and_a_cut_file(data: Path, tmp_path: Path) -> None:
    broken = content("0001_LR")
    broken["latents_data"][1, 0, 0, 0, 0] = float("nan")
    torch.save(broken, data / "tensors" / "0001_LR.tensors.pth")
    other = data / "tensors" / "0002_RL.tensors.pth"
    other.write_bytes(other.read_bytes()[:-400])
    summary = run(ImportOfficial(data, tmp_path / "store"))
    assert summary.done == 2 and [name for name, _ in summary.failed] == ["0001_LR/1", "0002_RL"]
    assert "NaN" in summary.failed[0][1] and "damaged" in summary.failed[1][1]


def test_sentences_from_elsewhere(data: Path, tmp_path: Path) -> None:
    """train.py itself needs no more than the columns prompt_id and reward."""
    write_metadata(data, REWARDS, sentences=False)
    with pytest.raises(DataError, match="none of 2 prompts.*--prompts"):
        run(ImportOfficial(data, tmp_path / "store"))
    assert run(ImportOfficial(data, tmp_path / "store", prompts=data / "prompts.csv")).done == 6


def test_rows_are_read_as_the_official_program_does(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a file, a row is left out; rewards beyond the clips are; of one id, the first row counts."""
    torch.save(content("0001_LR", clips=2), data / "tensors" / "0001_LR.tensors.pth")
    (data / "tensors" / "0002_RL.tensors.pth").unlink()
    (data / "tensors" / "other.tensors.pth").write_bytes(b"of no row")
    with open(data / "train_metadata.csv", "a", encoding="utf-8") as handle:
        handle.write((data / "train_metadata.csv").read_text(encoding="utf-8").splitlines()[1].replace("0.91", "0.1"))
    summary = run(ImportOfficial(data, tmp_path / "store"))
    assert (summary.done, summary.failed) == (2, [])
    assert [s.read_score().score for s in Store(tmp_path / "store").samples()] == [0.91, None]
    assert "1 of 2 prompts have no file" in caplog.text
    assert run(ImportOfficial(data, tmp_path / "store")).skipped == 2


def test_rewards_keep_the_side_that_the_official_program_gives_them() -> None:
    """Its process_reward: below -1 INVALID, from -1 a loser, from 0.7 a winner."""
    assert parse_rewards("[0.9, -100, 0.25, 1, -0.5, -1, 1.5, -2]") == (0.9, None, 0.25, 1.0, 0.0, 0.0, 1.0, None)


@pytest.mark.parametrize("text", ["", "0.5", "'12'", "[0.5, 'x']", "[nan]", "__import__('os')", "[[0.5]]"])
def test_odd_rewards_are_refused(text: str) -> None:
    with pytest.raises(DataError, match="reward"):
        parse_rewards(text)


def test_latents_that_look_raw_are_warned_about(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    raw = content("0001_LR")
    raw["latents_data"] = 2.4 * raw["latents_data"]
    torch.save(raw, data / "tensors" / "0001_LR.tensors.pth")
    run(ImportOfficial(data, tmp_path / "store"))
    assert len(caplog.records) == 1 and "normalised?" in caplog.text


def test_the_command_line(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--data", str(data), "--store", str(tmp_path / "store")])
    assert "6 done" in capsys.readouterr().out
    empty = tmp_path / "empty"
    empty.mkdir()
    for argv, words in (
        (["--data", str(empty)], "train_metadata.csv does not exist"),
        (["--data", str(empty), "--metadata", str(data / "train_metadata.csv")], "--tensors"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*argv, "--store", str(tmp_path / "other")])
        assert stopped.value.code == 2 and words in capsys.readouterr().err
