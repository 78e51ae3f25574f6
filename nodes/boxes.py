"""Boxes in the forms that ComfyUI and other packs use, as one array per thing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..spatialalign.errors import TracksError

if TYPE_CHECKING:
    import numpy as np

_SIDES = ("x", "y", "width", "height")


def boxes_of(value: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (T, 4) as x1 y1 x2 y2 in pixels, NaN where there is none, and their scores (T,), 1 where none is given.

    A box is ``{x, y, width, height[, score]}`` or ``[x1, y1, x2, y2]``. ``value`` is one box, or a list with an entry
    per frame: a box, None, or a list of boxes, of which the one with the best score is taken. Empty lists and boxes
    without area mean that nothing was found.

    Raises:
        TracksError: something is no box, or the coordinates are fractions; the message begins with ``name``.
    """
    import numpy as np

    frames = _entries(value)
    boxes, scores = np.full((len(frames), 4), np.nan), np.zeros(len(frames))
    for index, entry in enumerate(frames):
        where = f"{name}: frame {index}"
        candidates = [_corners(one, where) for one in _candidates(entry)]
        seen = [one for one in candidates if one[2] > one[0] and one[3] > one[1]]
        if seen:
            *boxes[index], scores[index] = max(seen, key=lambda one: one[4])
    if (~np.isnan(boxes)).any() and np.nanmax(boxes) <= 1:
        raise TracksError(
            f"{name}: no coordinate is above 1, so these are fractions of the picture; multiply them by its width "
            "and height, boxes are in pixels"
        )
    return boxes, scores


def _entries(value: Any) -> list[Any]:
    """One entry per frame."""
    value = _plain(value)
    if value is None or value == [] or _is_box(value):
        return [value]
    return list(value) if isinstance(value, list | tuple) else [value]


def _candidates(entry: Any) -> Sequence[Any]:
    """The boxes of one frame."""
    entry = _plain(entry)
    if entry is None:
        return []
    return entry if isinstance(entry, list | tuple) and not _is_box(entry) else [entry]


def _corners(box: Any, where: str) -> tuple[float, float, float, float, float]:
    """x1, y1, x2, y2 and the score of one box."""
    import numpy as np

    box = _plain(box)
    if not _is_box(box):
        raise TracksError(f"{where}: expected a box {{x, y, width, height}} or [x1, y1, x2, y2], found {box!r}")
    if isinstance(box, dict):
        x, y, width, height = (float(box[side]) for side in _SIDES)
        found = (x, y, x + width, y + height, float(box.get("score", 1.0)))
    else:
        x1, y1, x2, y2 = (float(side) for side in box)
        found = (x1, y1, x2, y2, 1.0)
    if not np.isfinite(found).all() or found[2] < found[0] or found[3] < found[1]:
        raise TracksError(f"{where}: expected finite pixels with x1 <= x2 and y1 <= y2, found {box!r}")
    return found


def _is_box(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_is_number(value.get(side)) for side in _SIDES)
    return isinstance(value, list | tuple) and len(value) == 4 and all(_is_number(side) for side in value)


def _is_number(value: Any) -> bool:
    import numpy as np

    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    """Arrays and tensors as lists; anything else as it is."""
    import numpy as np
    import torch

    return value.tolist() if isinstance(value, np.ndarray | torch.Tensor) else value
