"""Tracks: refused when impossible, unchanged through files, and damaged files named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spatialalign.errors import TracksError
from spatialalign.tracks import Tracks

SUFFIXES = (".safetensors", ".json")


def make(frames: int = 5, seed: int = 0, with_masks: bool = False, with_depth: bool = False, **changes: Any) -> Tracks:
    """Random tracks with some absences, in a picture of 13 x 21 pixels (no multiple of 8: packed bits have a tail)."""
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 6, (frames, 2, 2))
    boxes = np.concatenate([low, low + rng.uniform(1, 6, low.shape)], axis=-1)
    boxes[rng.random((frames, 2)) < 0.3] = np.nan
    values: dict[str, Any] = {
        "boxes": boxes,
        "confidence": rng.random((frames, 2)),
        "labels": ("cat", "box"),
        "size": (13, 21),
        "fps": 8,
        "masks": rng.random((frames, 2, 13, 21)) < 0.5 if with_masks else None,
        "depth": np.where(rng.random((frames, 2)) < 0.2, np.nan, rng.random((frames, 2))) if with_depth else None,
    }
    return Tracks(**(values | changes))


@given(
    st.integers(1, 12),
    st.integers(0, 2**32),
    st.booleans(),
    st.booleans(),
    st.one_of(st.none(), st.text(min_size=1)),
    st.sampled_from(SUFFIXES),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_files_keep_everything(
    tmp_path: Path, frames: int, seed: int, masks: bool, depth: bool, invalid: str | None, suffix: str
) -> None:
    # A lone surrogate is no text that UTF-8 can hold.
    invalid = None if invalid is None else invalid.encode("utf-8", "replace").decode()
    tracks = make(frames, seed, masks, depth, invalid=invalid, labels=("arctic fox", "Stuhl übrig"), source="tests")
    tracks.save(tmp_path / f"t{suffix}")
    assert Tracks.load(tmp_path / f"t{suffix}") == tracks
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp-")] == []


def test_masks_are_packed(tmp_path: Path) -> None:
    frames = 81
    masks = np.zeros((frames, 2, 120, 208), dtype=np.bool_)
    masks[:, 0, 20:50, 30:70] = True
    size = (120, 208)
    for suffix in SUFFIXES:
        make(frames, size=size, masks=masks).save(tmp_path / f"m{suffix}")
        # Unpacked they are 4 MB; packed bits half a megabyte; deflated, these are next to nothing.
        assert (tmp_path / f"m{suffix}").stat().st_size < 60_000


def test_absent_boxes_have_no_confidence_and_presence_needs_both() -> None:
    boxes = np.tile([[[0.0, 0, 5, 5], [5, 5, 9, 9]]], (3, 1, 1))
    boxes[1, 0] = np.nan
    tracks = make(3, boxes=boxes, confidence=np.full((3, 2), 0.8))
    assert tracks.confidence.tolist() == [[0.8, 0.8], [0.0, 0.8], [0.8, 0.8]]
    assert tracks.present.tolist() == [True, False, True]
    assert tracks.frames == 3
    nan = np.array([[0.8, 0.8], [np.nan, 0.8], [0.8, 0.8]])
    assert make(3, boxes=boxes, confidence=nan) == tracks


def test_arrays_are_private_and_read_only() -> None:
    boxes = np.tile([[[0.0, 0, 5, 5], [5, 5, 9, 9]]], (2, 1, 1))
    tracks = make(2, boxes=boxes)
    boxes[0, 0, 0] = 3.0
    assert tracks.boxes[0, 0, 0] == 0.0
    with pytest.raises(ValueError, match="read-only"):
        tracks.boxes[0, 0, 0] = 1.0


@given(st.integers(1, 9), st.integers(0, 999))
def test_mirror_reversal_and_orientation_undo_themselves(frames: int, seed: int) -> None:
    # Whole pixels, so that width - (width - x) is x exactly.
    tracks = make(frames, seed, with_masks=True, with_depth=True)
    whole = make(frames, seed, with_masks=True, with_depth=True, boxes=np.round(tracks.boxes))
    assert whole.mirrored().mirrored() == whole
    assert tracks.reversed().reversed() == tracks
    swapped = tracks.oriented("box", "cat")
    assert swapped.labels == ("box", "cat")
    assert np.array_equal(swapped.subject, tracks.object, equal_nan=True)
    assert swapped.oriented("cat", "box") == tracks == tracks.oriented("cat", "box")


def test_mirror_by_hand() -> None:
    boxes = np.array([[[1.0, 2, 4, 8], [10, 0, 20, 5]]])
    masks = np.zeros((1, 2, 13, 21), dtype=np.bool_)
    masks[0, 0, 2:8, 1:4] = True
    mirrored = make(1, boxes=boxes, masks=masks).mirrored()
    assert mirrored.boxes[0].tolist() == [[17, 2, 20, 8], [1, 0, 11, 5]]
    assert np.argwhere(mirrored.masks[0, 0]).min(0).tolist() == [2, 17]  # type: ignore[index]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boxes": np.zeros((5, 4))}, r"boxes: expected shape \(T, 2, 4\)"),
        ({"boxes": np.zeros((0, 2, 4)), "confidence": np.zeros((0, 2))}, "T >= 1"),
        ({"boxes": np.full((5, 2, 4), np.inf)}, "frame 0 has an infinite"),
        ({"boxes": np.tile([0, 0, np.nan, 1], (5, 2, 1))}, "frame 0 has a box with some NaN"),
        ({"boxes": np.tile([5, 0, 1, 1], (5, 2, 1))}, "x1 <= x2"),
        ({"confidence": np.zeros((4, 2))}, r"confidence: expected shape \(5, 2\), found \(4, 2\)"),
        (
            {"boxes": np.zeros((5, 2, 4)), "confidence": np.full((5, 2), 1.5)},
            r"confidence: expected numbers in \[0, 1\]",
        ),
        ({"boxes": np.zeros((5, 2, 4)), "confidence": np.full((5, 2), np.nan)}, "confidence"),
        ({"labels": ("cat",)}, "labels: expected two"),
        ({"labels": "ab"}, "labels: expected two"),
        ({"labels": ("cat", "")}, "labels: expected two non-empty"),
        ({"size": (0, 5)}, "size"),
        ({"size": (2.5, 5)}, "size"),
        ({"fps": 0}, "fps"),
        ({"fps": float("nan")}, "fps"),
        ({"invalid": ""}, "invalid: expected None or a reason"),
        ({"masks": np.zeros((5, 2, 13, 20), dtype=np.bool_)}, "masks: expected shape"),
        ({"masks": np.zeros((5, 2, 13, 21))}, "masks: expected bool"),
        ({"depth": np.full((5, 2), -1.0)}, "depth"),
        ({"depth": np.zeros((5,))}, "depth: expected shape"),
    ],
)
def test_impossible_tracks_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TracksError, match=message):
        make(**changes)


def test_unlike_tracks_are_not_equal() -> None:
    tracks = make(with_masks=True)
    assert tracks != make(with_masks=False)
    assert tracks != make(with_masks=True, seed=1)
    assert tracks != "tracks"
    with pytest.raises(TypeError):
        hash(tracks)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_truncated_file_is_an_error_that_names_it(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"t{suffix}"
    make(with_masks=True, with_depth=True).save(path)
    whole = path.read_bytes()
    for length in (0, 5, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:length])
        with pytest.raises(TracksError, match=f"t{suffix}"):
            Tracks.load(path)


def test_foreign_and_missing_files(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    with pytest.raises(TracksError, match="does not exist"):
        Tracks.load(tmp_path / "none.json")
    with pytest.raises(TracksError, match="suffix '.pkl'"):
        Tracks.load(tmp_path / "t.pkl")
    with pytest.raises(TracksError, match="suffix '.pt'"):
        make().save(tmp_path / "t.pt")
    save_file({"x": np.zeros(3)}, tmp_path / "x.safetensors")
    with pytest.raises(TracksError, match="without tracks"):
        Tracks.load(tmp_path / "x.safetensors")
    for content, message in (
        ([1], "expected a JSON object"),
        ({"format": "other"}, "expected format"),
        ({"format": "spatialalign.tracks", "version": 99}, "expected version 1, found 99"),
        ({"format": "spatialalign.tracks", "version": 1}, "not a valid tracks file"),
    ):
        (tmp_path / "x.json").write_text(json.dumps(content))
        with pytest.raises(TracksError, match=message):
            Tracks.load(tmp_path / "x.json")


def test_masks_of_the_wrong_length_do_not_inflate(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    make(with_masks=True).save(path)
    value = json.loads(path.read_text())
    value["size"] = [5, 5]
    path.write_text(json.dumps(value))
    with pytest.raises(TracksError, match="masks: expected 32 packed bytes"):
        Tracks.load(path)


def test_from_official_by_hand() -> None:
    records = [
        [3, ["box", "cat"], [[9, 9, 12, 12], [1, 1, 4, 4]]],  # swapped
        [0, ["cat", "box"], [[0, 0, 3, 3], [9, 9, 12, 12]]],
        [1, ["cat", "box"], [[0, 0, 0, 0], [9, 9, 12, 12]]],  # the empty mask
        [2, ["cat", "dog"], [[0, 0, 3, 3], [9, 9, 12, 12]]],  # a foreign label
    ]
    tracks = Tracks.from_official(records, "cat", "box", (20, 20), 16, frames=6)
    assert tracks.frames == 6
    assert tracks.subject[[0, 2, 3]].tolist() == [[0, 0, 3, 3], [0, 0, 3, 3], [1, 1, 4, 4]]
    assert tracks.object[[0, 1, 3]].tolist() == [[9, 9, 12, 12]] * 3
    assert tracks.present.tolist() == [True, False, False, True, False, False]
    assert Tracks.from_official([], "cat", "box", (20, 20), 16, frames=81).invalid is not None
    with pytest.raises(TracksError, match="frame 3 is named twice"):
        Tracks.from_official([*records, records[0]], "cat", "box", (20, 20), 16)
    with pytest.raises(TracksError, match="frame 3: expected 0 to 1"):
        Tracks.from_official(records, "cat", "box", (20, 20), 16, frames=2)
