"""Boxes drawn by hand in a few frames, interpolated to tracks.

The JSON file::

    {"size": [480, 832], "fps": 16, "frames": 81,
     "subject": {"label": "bird", "boxes": {"0": [567, 252, 831, 446], "80": [0, 149, 252, 298]}, "absent": [[47, 75]]},
     "object":  {"label": "pot",  "boxes": {"0": [131, 288, 586, 430]}}}

``size`` is height and width; boxes are x0 y0 x1 y1 in pixels, right and bottom exclusive. Between two keyframes a box
moves linearly, before the first and after the last it stays; ``absent`` lists first and last frame (both included) of
every interval in which the thing is not in the picture.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, TracksError
from ..files import read_json
from ..tracks import Tracks


def load_keyframes(path: str | Path) -> Tracks:
    """Tracks from a keyframe file. Raises :class:`TracksError` naming the file and what is wrong in it."""
    try:
        content = read_json(path)
    except (DataError, OSError) as error:
        raise TracksError(f"{path}: cannot be read as keyframes ({error})") from error
    return tracks_from_keyframes(content, source=f"keyframes {Path(path).name}", where=str(path))


def tracks_from_keyframes(content: Any, source: str = "keyframes", where: str = "keyframes") -> Tracks:
    """Tracks from the parsed JSON of the module's form; ``where`` is how messages call it. Confidence is 1."""
    if not isinstance(content, dict):
        raise TracksError(f"{where}: expected a JSON object, found {type(content).__name__}")
    unknown = sorted(set(content) - {"size", "fps", "frames", "subject", "object"})
    missing = sorted({"size", "fps", "frames", "subject", "object"} - set(content))
    if unknown or missing:
        raise TracksError(
            f"{where}: expected the keys size, fps, frames, subject, object; missing {missing}, unknown {unknown}"
        )
    frames, fps, size = content["frames"], content["fps"], content["size"]
    if not _is_whole(frames) or frames < 1:
        raise TracksError(f"{where}: frames must be a whole number of at least 1, found {frames!r}")
    if not _is_number(fps) or fps <= 0:
        raise TracksError(f"{where}: fps must be a positive number, found {fps!r}")
    if not isinstance(size, list) or len(size) != 2 or not all(_is_whole(side) and side > 0 for side in size):
        raise TracksError(f"{where}: size must be [height, width] in pixels, found {size!r}")
    parts = [_part(content[name], frames, (size[0], size[1]), f"{where}: {name}") for name in ("subject", "object")]
    boxes = np.stack([box for _, box in parts], axis=1)
    return Tracks(
        boxes=boxes,
        confidence=np.where(np.isnan(boxes[..., 0]), 0.0, 1.0),
        labels=(parts[0][0], parts[1][0]),
        size=(size[0], size[1]),
        fps=float(fps),
        source=source,
    )


def _part(part: Any, frames: int, size: tuple[int, int], where: str) -> tuple[str, NDArray[np.float64]]:
    if not isinstance(part, dict) or not {"label", "boxes"} <= set(part) <= {"label", "boxes", "absent"}:
        raise TracksError(f"{where}: expected an object with label, boxes and (if wanted) absent, found {part!r}")
    label, drawn = part["label"], part["boxes"]
    if not isinstance(label, str) or not label.strip():
        raise TracksError(f"{where}: label must be a word such as 'bird', found {label!r}")
    if not isinstance(drawn, dict) or not drawn:
        raise TracksError(f"{where}: boxes must map frame numbers to [x0, y0, x1, y1], found {drawn!r}")
    absent = _absent(part.get("absent", []), frames, where)
    keys: dict[int, list[float]] = {}
    for name, box in drawn.items():
        if not name.isdecimal() or not int(name) < frames:
            raise TracksError(f"{where}: keyframe {name!r} is not a frame number from 0 to {frames - 1}")
        if absent[int(name)]:
            raise TracksError(f"{where}: keyframe {name} lies in an absent interval; remove one of the two")
        _check_box(box, size, f"{where}: frame {name}")
        keys[int(name)] = box
    order = sorted(keys)
    corners = np.array([keys[i] for i in order], dtype=np.float64)
    boxes = np.stack([np.interp(np.arange(frames), order, corners[:, i]) for i in range(4)], axis=1)
    boxes[absent] = np.nan
    return label.strip(), boxes


def _absent(intervals: Any, frames: int, where: str) -> NDArray[np.bool_]:
    absent = np.zeros(frames, dtype=bool)
    if not isinstance(intervals, list):
        raise TracksError(f"{where}: absent must be a list of [first, last] frames, found {intervals!r}")
    for interval in intervals:
        good = isinstance(interval, list) and len(interval) == 2 and all(_is_whole(end) for end in interval)
        if not good or not 0 <= interval[0] <= interval[1] < frames:
            raise TracksError(f"{where}: absent interval {interval!r} is not [first, last] within 0 to {frames - 1}")
        absent[interval[0] : interval[1] + 1] = True
    return absent


def _check_box(box: Any, size: tuple[int, int], where: str) -> None:
    if not isinstance(box, list) or len(box) != 4 or not all(_is_number(value) for value in box):
        raise TracksError(f"{where}: a box is [x0, y0, x1, y1] in pixels, found {box!r}")
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= size[1] and 0 <= y0 < y1 <= size[0]):
        raise TracksError(f"{where}: box {box} must lie within {size[1]} x {size[0]} pixels and have x0 < x1, y0 < y1")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))
