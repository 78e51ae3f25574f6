"""Tracks: where the subject and the object are in every frame. The one value that trackers make and scores read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import TracksError


@dataclass(frozen=True, eq=False)
class Tracks:
    """Boxes of a subject and an object over the frames of one video; index 0 is the subject, 1 the object.

    Attributes:
        boxes: (T, 2, 4) float64, ``x1 y1 x2 y2`` in pixels, right and bottom exclusive; four NaN where absent.
        confidence: (T, 2) float64 in [0, 1]; becomes 0 where the box is absent.
        labels: what the two are, e.g. ``("cat", "box")``.
        size: height and width of the frames in pixels.
        fps: frames per second.
        masks: (T, 2, H, W) bool, or None.
        depth: (T, 2) float64, mean disparity inside the two masks (larger = nearer, never negative, NaN = unknown),
            or None; needed for the relations in front of and behind only.
        invalid: the tracker's reason why this video must not be scored, or None.
        source: which tracker or file it came from, for the record.

    The arrays are private read-only copies. Raises :class:`TracksError` when shapes or values are impossible.
    """

    boxes: NDArray[np.float64]
    confidence: NDArray[np.float64]
    labels: tuple[str, str]
    size: tuple[int, int]
    fps: float
    masks: NDArray[np.bool_] | None = None
    depth: NDArray[np.float64] | None = None
    invalid: str | None = None
    source: str = ""

    def __post_init__(self) -> None:
        boxes = _checked_boxes(self.boxes)
        frames = len(boxes)
        labels, size = _pair("labels", self.labels), _pair("size", self.size)
        if not all(isinstance(label, str) and label for label in labels):
            raise TracksError(f"labels: expected two non-empty strings, found {self.labels!r}")
        if not all(isinstance(side, int | np.integer) and side > 0 for side in size):
            raise TracksError(f"size: expected (height, width) as positive whole numbers, found {self.size!r}")
        if not (np.isfinite(self.fps) and self.fps > 0):
            raise TracksError(f"fps: expected a positive number, found {self.fps!r}")
        if self.invalid == "":
            raise TracksError("invalid: expected None or a reason in words, found an empty string")
        confidence = np.array(self.confidence, dtype=np.float64)
        _expect_shape("confidence", confidence, (frames, 2))
        absent = np.isnan(boxes[..., 0])
        confidence[absent] = 0.0
        if not ((confidence >= 0) & (confidence <= 1)).all():
            raise TracksError("confidence: expected numbers in [0, 1] wherever a box is present")
        frozen: dict[str, Any] = {"boxes": boxes, "confidence": confidence}
        if self.masks is not None:
            masks = np.array(self.masks)
            if masks.dtype != np.bool_:
                raise TracksError(f"masks: expected bool, found {masks.dtype}")
            _expect_shape("masks", masks, (frames, 2, int(size[0]), int(size[1])))
            frozen["masks"] = masks
        if self.depth is not None:
            depth = np.array(self.depth, dtype=np.float64)
            _expect_shape("depth", depth, (frames, 2))
            if (depth < 0).any() or np.isinf(depth).any():
                raise TracksError("depth: expected finite disparities >= 0 (larger = nearer) or NaN for unknown")
            frozen["depth"] = depth
        for array in frozen.values():
            array.setflags(write=False)
        frozen |= {"labels": labels, "size": (int(size[0]), int(size[1])), "fps": float(self.fps)}
        for name, value in frozen.items():
            object.__setattr__(self, name, value)

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        """Equal when every field is, NaN counting as equal to NaN."""
        if not isinstance(other, Tracks):
            return NotImplemented
        return all(_same(getattr(self, field.name), getattr(other, field.name)) for field in fields(self))

    @property
    def frames(self) -> int:
        """Number of frames T."""
        return len(self.boxes)

    @property
    def present(self) -> NDArray[np.bool_]:
        """(T,) bool: both boxes are there."""
        return np.asarray(~np.isnan(self.boxes[..., 0]).any(axis=1))

    @property
    def subject(self) -> NDArray[np.float64]:
        """(T, 4) boxes of the subject."""
        return self.boxes[:, 0]

    @property
    def object(self) -> NDArray[np.float64]:
        """(T, 4) boxes of the object."""
        return self.boxes[:, 1]

    def mirrored(self) -> Tracks:
        """The tracks of the mirror image (left and right swapped)."""
        boxes = self.boxes.copy()
        boxes[..., [0, 2]] = self.size[1] - self.boxes[..., [2, 0]]
        masks = None if self.masks is None else self.masks[..., ::-1]
        return replace(self, boxes=boxes, masks=masks)

    def reversed(self) -> Tracks:
        """The tracks of the video played backwards."""
        return self._taken(slice(None, None, -1), slice(None))

    def oriented(self, subject: str, object: str) -> Tracks:
        """These tracks with ``subject`` first; raises :class:`TracksError` when the labels are other ones."""
        if self.labels == (subject, object):
            return self
        if self.labels == (object, subject):
            return replace(self._taken(slice(None), slice(None, None, -1)), labels=(subject, object))
        raise TracksError(f"labels: the tracks show {self.labels}, the relationship is about {(subject, object)}")

    def _taken(self, time: slice, things: slice) -> Tracks:
        return replace(
            self,
            boxes=self.boxes[time, things],
            confidence=self.confidence[time, things],
            masks=None if self.masks is None else self.masks[time, things],
            depth=None if self.depth is None else self.depth[time, things],
        )

    def save(self, path: str | Path) -> None:
        """Write ``.safetensors`` or ``.json`` atomically; see :mod:`spatialalign.tracks_file` for the form."""
        from .tracks_file import save_tracks

        save_tracks(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Tracks:
        """Read what :meth:`save` wrote; raises :class:`TracksError` naming the file when it is damaged or foreign."""
        from .tracks_file import load_tracks

        return load_tracks(Path(path))

    @classmethod
    def from_official(
        cls,
        records: Sequence[Sequence[Any]],
        subject: str,
        object: str,
        size: tuple[int, int],
        fps: float,
        frames: int | None = None,
    ) -> Tracks:
        """Tracks from the official detection list: items ``[frame, labels, boxes, (masks)]`` in any order.

        A box goes to the thing its label names; boxes with other labels, and the ``[0, 0, 0, 0]`` of an empty mask,
        are absent. Coordinates stay as they are, so that scores agree with the official program; note that its
        boxes are *inclusive* pixel extents, one pixel narrower than ours. ``frames`` is the length of the video,
        by default the last frame named plus one. An empty list (the official mark of an invalid video) becomes
        tracks without boxes and with ``invalid`` set. Confidence is 1 wherever a box is.

        Raises :class:`TracksError` for malformed items, frames beyond ``frames`` and frames named twice
        (:func:`spatialalign.score.score_records` scores such lists as they are).
        """
        numbers = [int(record[0]) for record in records]
        length = frames if frames is not None else max(numbers, default=-1) + 1
        boxes = np.full((max(length, 1), 2, 4), np.nan)
        seen: set[int] = set()
        for number, record in zip(numbers, records, strict=True):
            if not 0 <= number < length:
                raise TracksError(f"frame {number}: expected 0 to {length - 1}")
            if number in seen:
                raise TracksError(f"frame {number} is named twice; expected each frame at most once")
            seen.add(number)
            labels = [str(label) for label in record[1]]
            found = np.asarray(record[2], dtype=np.float64).reshape(-1, 4)
            if len(labels) != len(found):
                raise TracksError(f"frame {number}: expected a label for every box, found {len(labels)}, {len(found)}")
            for slot, name in enumerate((subject, object)):
                if labels.count(name) == 1 and len(labels) <= 2 and found[labels.index(name)].any():
                    boxes[number, slot] = found[labels.index(name)]
        return cls(
            boxes=boxes,
            confidence=np.where(np.isnan(boxes[..., 0]), 0.0, 1.0),
            labels=(subject, object),
            size=size,
            fps=fps,
            invalid=None if numbers else "official: the detection list is empty",
            source="official",
        )


def _checked_boxes(value: Any) -> NDArray[np.float64]:
    boxes = np.array(value, dtype=np.float64)
    if boxes.ndim != 3 or boxes.shape[1:] != (2, 4) or len(boxes) == 0:
        raise TracksError(f"boxes: expected shape (T, 2, 4) with T >= 1, found {boxes.shape}")
    if np.isinf(boxes).any():
        raise TracksError(f"boxes: frame {int(np.argwhere(np.isinf(boxes))[0, 0])} has an infinite coordinate")
    partly = np.isnan(boxes).any(-1) & ~np.isnan(boxes).all(-1)
    if partly.any():
        frame = int(np.argwhere(partly)[0, 0])
        raise TracksError(f"boxes: frame {frame} has a box with some NaN; an absent box is four NaN")
    inside_out = (boxes[..., 2:] < boxes[..., :2]).any(-1)
    if inside_out.any():
        frame, slot = (int(i) for i in np.argwhere(inside_out)[0])
        raise TracksError(f"boxes: frame {frame}: expected x1 <= x2 and y1 <= y2, found {boxes[frame, slot].tolist()}")
    return boxes


def _pair(name: str, value: Any) -> tuple[Any, Any]:
    items = tuple(value)
    if len(items) != 2 or isinstance(value, str):
        raise TracksError(f"{name}: expected two values, found {value!r}")
    return items


def _expect_shape(name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise TracksError(f"{name}: expected shape {shape}, found {array.shape}")


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return bool(np.array_equal(a, b, equal_nan=a.dtype != np.bool_))
    return bool(type(a) is type(b) and a == b)
