"""The prompts program: files that generate and evaluate can take."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from spatialalign.prompts import read_csv
from training.prompts import main


def test_training_and_held_out_files_share_no_triple(tmp_path: Path) -> None:
    train, held = tmp_path / "train.csv", tmp_path / "held.csv"
    argv = ["--out", str(train), "--held_out", str(held), "--held_out_share", "0.25", "--count", "48", "--seed", "3"]
    main(argv)
    ours, theirs = read_csv(train), read_csv(held)
    assert len(ours) + len(theirs) == 48
    assert not {p.triple for p in ours} & {p.triple for p in theirs}
    assert set(Counter(p.dsr.type_code for p in ours + theirs).values()) == {8}  # 48 over six types

    before = train.read_bytes()
    main(argv)  # the same again: nothing to do
    assert train.read_bytes() == before


def test_an_excluded_set_is_kept_away_from(tmp_path: Path) -> None:
    main(["--out", str(tmp_path / "a.csv"), "--count", "12"])
    main(["--out", str(tmp_path / "b.csv"), "--count", "12", "--exclude", str(tmp_path / "a.csv")])
    first, second = read_csv(tmp_path / "a.csv"), read_csv(tmp_path / "b.csv")
    assert not {p.triple for p in first} & {p.triple for p in second}


def test_other_prompts_are_not_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--out", str(tmp_path / "a.csv"), "--count", "6"])
    before = (tmp_path / "a.csv").read_bytes()
    with pytest.raises(SystemExit) as stopped:
        main(["--out", str(tmp_path / "a.csv"), "--count", "6", "--seed", "1"])
    assert stopped.value.code == 2
    assert "holds other prompts" in capsys.readouterr().err
    assert (tmp_path / "a.csv").read_bytes() == before
    main(["--out", str(tmp_path / "a.csv"), "--count", "6", "--seed", "1", "--replace", "true"])
    assert (tmp_path / "a.csv").read_bytes() != before


def test_the_miniatures_world_has_its_own_words_and_split(tmp_path: Path) -> None:
    from spatialalign.miniature.world import prompts

    argv = ["--model", "miniature", "--out", str(tmp_path / "t.csv"), "--held_out", str(tmp_path / "h.csv")]
    main([*argv, "--count", "20", "--types", "LR,RL"])
    train, held = read_csv(tmp_path / "t.csv"), read_csv(tmp_path / "h.csv")
    assert len(train) == 20
    assert {p.dsr.type_code for p in train} == {"LR", "RL"}
    assert {p.text for p in train} <= {p.text for p in prompts("train")}
    assert {p.text for p in held} == {p.text for p in prompts("eval") if p.dsr.type_code in ("LR", "RL")}
