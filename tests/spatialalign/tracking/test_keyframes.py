"""Boxes by hand: interpolation, absence, and every mistake named."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spatialalign.errors import TracksError
from spatialalign.tracking.keyframes import load_keyframes, tracks_from_keyframes

GOOD: dict[str, Any] = {
    "size": [40, 60],
    "fps": 8,
    "frames": 9,
    "subject": {"label": "cat", "boxes": {"0": [0, 10, 6, 16], "4": [20, 10, 26, 18]}, "absent": [[5, 6]]},
    "object": {"label": "box", "boxes": {"2": [25, 20, 35, 28]}},
}


def test_linear_between_and_constant_outside() -> None:
    tracks = tracks_from_keyframes(GOOD)
    # Frame 1 is a quarter of the way, frame 3 three quarters; the last box stays after frame 4.
    np.testing.assert_allclose(tracks.subject[[1, 3]], [[5, 10, 11, 16.5], [15, 10, 21, 17.5]])
    np.testing.assert_array_equal(np.isnan(tracks.subject[:, 0]), [i in (5, 6) for i in range(9)])
    np.testing.assert_array_equal(tracks.subject[7], [20, 10, 26, 18])
    np.testing.assert_array_equal(tracks.object, [[25, 20, 35, 28]] * 9)
    assert tracks.labels == ("cat", "box") and tracks.size == (40, 60) and tracks.confidence[5].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("size",), [40], r"size must be \[height, width\]"),
        (("fps",), 0, "fps must be a positive number, found 0"),
        (("frames",), 2.5, "frames must be a whole number"),
        (("extra",), 1, r"unknown \['extra'\]"),
        (("subject", "label"), "", "subject: label must be a word"),
        (("subject", "boxes"), {}, "subject: boxes must map frame numbers"),
        (("subject", "boxes", "9"), [0, 0, 1, 1], "subject: keyframe '9' is not a frame number from 0 to 8"),
        (("subject", "boxes", "x"), [0, 0, 1, 1], "keyframe 'x' is not a frame number"),
        (("subject", "boxes", "5"), [0, 0, 1, 1], "subject: keyframe 5 lies in an absent interval"),
        (("subject", "boxes", "0"), [5, 0, 5, 1], "subject: frame 0: box .* must lie within 60 x 40"),
        (("object", "boxes", "2"), [0, 0, 61, 1], "object: frame 2: box .* must lie within"),
        (("object", "boxes", "2"), [0, 0, "1", 1], r"a box is \[x0, y0, x1, y1\]"),
        (("subject", "absent"), [[6, 5]], r"absent interval \[6, 5\] is not"),
        (("subject", "absent"), [[5, 9]], "within 0 to 8"),
        (("object", "colour"), "red", "object: expected an object with label"),
    ],
)
def test_mistakes_are_named(path: tuple[str, ...], value: Any, message: str) -> None:
    content = copy.deepcopy(GOOD)
    place = content
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    with pytest.raises(TracksError, match=message):
        tracks_from_keyframes(content)


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "clip.json"
    file.write_text(json.dumps(GOOD))
    assert load_keyframes(file) == tracks_from_keyframes(GOOD, source="keyframes clip.json")
    file.write_text("{")
    with pytest.raises(TracksError, match=r"clip\.json: cannot be read as keyframes"):
        load_keyframes(file)
    with pytest.raises(TracksError, match=r"none\.json does not exist"):
        load_keyframes(tmp_path / "none.json")
    file.write_text("[]")
    with pytest.raises(TracksError, match=r"clip\.json: expected a JSON object, found list"):
        load_keyframes(file)
