"""Labelled pairs: the official columns, rows of no use, and labels that teach a loss nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spatialalign.errors import DataError
from training.reward_model_settings import RewardLoss
from training.reward_pairs import RewardPairs, check_labels, counts, read_pairs

HEADER = "path_A,path_B,prompt,VQ,MQ,TA,fps_A,MOS_A_VQ,MOS_B_VQ"


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """A folder with the (empty) files a.mp4 to d.mp4; nobody looks into them here."""
    for name in "abcd":
        (tmp_path / f"{name}.mp4").touch()
    return tmp_path


def table(folder: Path, *rows: str, header: str = HEADER) -> Path:
    path = folder / "pairs.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def test_the_official_columns(clips: Path) -> None:
    found = read_pairs(
        table(clips, 'a.mp4,b.mp4,"a dog, far away",A,B,same,8,4.5,2', "c.mp4,d.mp4,a cat,same,invalid,,8,0,")
    )
    np.testing.assert_array_equal(found.preference, [[1, -1, 0], [0, np.nan, np.nan]])
    np.testing.assert_array_equal(found.ratings[:, :, 0], [[4.5, 2], [np.nan, np.nan]])
    assert np.isnan(found.ratings[:, :, 1:]).all()
    assert found.prompts == ("a dog, far away", "a cat")
    assert found.clips[1] == (clips / "c.mp4", clips / "d.mp4")
    assert counts(found)["MQ"] == {"A": 0, "B": 1, "same": 0, "unknown": 1}


def test_rows_of_no_use_are_named(clips: Path) -> None:
    rows = [
        "a.mp4,b.mp4,a cat,A,A,A,,,",
        "a.mp4,gone.mp4,a cat,A,A,A,,,",
        "a.mp4,b.mp4, ,A,A,A,,,",
        "a.mp4,b.mp4,x,?,,,,,",
    ]
    found = read_pairs(table(clips, *rows))
    assert len(found) == 1
    reasons = [f"there is no video {clips / 'gone.mp4'}", "the prompt is empty", "no label in any dimension"]
    assert list(found.left_out.values()) == reasons
    assert [name.rpartition(" ")[2] for name in found.left_out] == ["3", "4", "5"]
    with pytest.raises(DataError, match="none of 1 rows can be used; the first: there is no video"):
        read_pairs(table(clips, rows[1]))
    with pytest.raises(DataError, match="the file has no rows"):
        read_pairs(table(clips))


def test_the_videos_may_lie_elsewhere(clips: Path, tmp_path: Path) -> None:
    (tmp_path / "tables").mkdir()
    path = table(tmp_path / "tables", "a.mp4,b.mp4,a cat,A,A,A,,,")
    assert read_pairs(path, clips).clips == ((clips / "a.mp4", clips / "b.mp4"),)
    with pytest.raises(DataError, match="no video"):
        read_pairs(path)


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("path_A,path_B,prompt", "a.mp4,b.mp4,a cat", "at least one of VQ, MQ, TA, found path_A, path_B, prompt"),
        ("path_A,prompt,VQ", "a.mp4,a cat,A", "expected the columns path_A, path_B, prompt"),
        (HEADER, "a.mp4,b.mp4,a cat,A,A,A,,6,", "line 2: MOS_A_VQ must be a rating from 1 to 5.*found '6'"),
        (HEADER, "a.mp4,b.mp4,a cat,A,A,A,,,good", "MOS_B_VQ must be a rating"),
    ],
)
def test_what_cannot_be_is_refused(clips: Path, header: str, row: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_pairs(table(clips, row, header=header))


def test_a_file_that_is_none(clips: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        read_pairs(clips / "none.csv")
    (clips / "bad.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="no CSV file in UTF-8"):
        read_pairs(clips / "bad.csv")


def pairs(labels: list[list[float]], ratings: float | list[float] = np.nan) -> RewardPairs:
    preference = np.array(labels, dtype=np.float32)
    rated = np.full((len(labels), 2, 3), np.nan, dtype=np.float32)
    rated[:, :, 0] = ratings
    names = tuple(f"p{row // 2}" for row in range(len(labels)))
    return RewardPairs(tuple((Path("a"), Path("b")) for _ in names), names, preference, rated)


NAN = np.nan


@pytest.mark.parametrize(
    ("loss", "found", "message"),
    [
        ("bt", pairs([[0, 0, 0]] * 2), "VQ: every label is a tie"),
        ("btt", pairs([[0, NAN, NAN]] * 2), "MQ: no labels"),
        ("regression", pairs([[1, 0, 0]] * 2), r"VQ: no ratings \(columns MOS_A_"),
        ("regression", pairs([[0, 0, 0]] * 2, 3.0), "VQ: every rating is 3"),
        ("bt-ratings", pairs([[1, 1, 1]] * 2), "VQ: no ratings"),
        ("bt-scaled", pairs([[0, 0, 0]] * 2, [4.0, 2.0]), "VQ: every label is a tie"),
    ],
)
def test_labels_that_teach_nothing_are_refused(loss: RewardLoss, found: RewardPairs, message: str) -> None:
    with pytest.raises(DataError, match=f"the loss {loss} has nothing to learn from 2 pairs: .*{message}"):
        check_labels(found, loss)


def test_one_dimension_is_enough(clips: Path) -> None:
    found = pairs([[1, 0, NAN]])
    assert check_labels(found, "btt") == [
        "MQ is not learnt: every label is a tie",
        "TA is not learnt: no labels",
    ]
    assert check_labels(pairs([[1, -1, 1]]), "bt") == []


def test_pairs_of_a_prompt_stay_together() -> None:
    found = pairs([[1, 1, 1]] * 20)  # ten prompts
    kept, held = found.split(0.3, seed=0)
    assert (len(kept), len(held)) == (14, 6) and not set(kept.prompts) & set(held.prompts)
    assert found.split(0.3, seed=0)[1].prompts == held.prompts
    assert [len(part) for part in found.split(0.0, seed=0)] == [20, 0]
    assert len(pairs([[1, 1, 1]]).split(0.5, seed=0)[0]) == 1


def test_the_digest_tells_labels_apart() -> None:
    one, other = pairs([[1, 1, 1]]), pairs([[1, 1, -1]])
    assert one.digest == pairs([[1, 1, 1]]).digest != other.digest
