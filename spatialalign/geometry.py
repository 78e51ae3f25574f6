"""The spatial relation score (SSR) of two boxes, and other pure geometry of boxes. Numpy only, vectorised.

Boxes are ``(..., 4)`` arrays of ``x1 y1 x2 y2`` in pixels, x to the right, y **down**; NaN means absent.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .dsr import Relation
from .errors import TracksError

#: Relative disparity difference from which one thing counts as fully nearer; below it the order is uncertain.
DEPTH_BAND = 0.1

Floats = NDArray[np.float64]


def ssr(
    subject_boxes: ArrayLike,
    object_boxes: ArrayLike,
    relation: Relation,
    *,
    subject_depth: ArrayLike | None = None,
    object_depth: ArrayLike | None = None,
) -> Floats:
    """How well ``subject is <relation> object`` holds, frame by frame: ``(...)`` float64 in [-1, 1].

    For left, right and top this is the paper's score (official ``calc_dsr_score.py``)::

        SSR(L) = -cos_x D_x    SSR(R) = +cos_x D_x    SSR(T) = -cos_y D_y
        cos = centre difference / centre distance (0 when the centres coincide)
        D_x = min(1, |dx| / mean width),  D_y = min(1, |dy| / mean height)

    so it saturates exactly when the boxes stop overlapping along that axis.

    NaN marks frames that are not valid, by the paper's rule: a box is absent, a width is zero, or both heights are
    (a single zero height is not checked there, hence not here).

    Ours: **under** is the mirror of top, SSR(U) = -SSR(T). The official ``calc_metric.py`` has another rule for it
    (full score once the centres are 10 % of the smaller height apart), which it computes and never uses: it calls
    boxes that overlap by 80 % fully *under*, divides by a height that may be zero, and is no mirror of top, so
    that TU and UT would be scored by different yardsticks.

    Ours, after T2V-CompBench: **in front of** and **behind** compare the mean disparity inside the two masks (larger
    is nearer), passed as ``subject_depth`` and ``object_depth`` of shape ``(...)``, never negative::

        SSR(F) = clip((d_s - d_o) / (DEPTH_BAND max(d_s, d_o)), -1, 1) * intersection / smaller area = -SSR(B)

    As there, boxes that do not overlap (IoU 0) are neither in front nor behind: 0. The share of the smaller box takes
    the place of their IoU, so that a small animal before a large thing can reach 1; within the band the
    order of two disparities is uncertain and the score falls to 0 linearly. NaN also where a disparity is NaN.

    Raises :class:`TracksError` for wrong shapes, boxes with negative extents, missing or negative disparities.
    """
    subject, thing = _boxes("subject_boxes", subject_boxes), _boxes("object_boxes", object_boxes)
    try:
        subject, thing = np.broadcast_arrays(subject, thing)
    except ValueError as error:
        raise TracksError(f"subject_boxes {subject.shape} and object_boxes {thing.shape} do not match") from error
    if relation.is_depth:
        return _depth_ssr(subject, thing, relation, subject_depth, object_depth)
    return _planar_ssr(subject, thing, relation)


def valid_frames(subject_boxes: Floats, object_boxes: Floats) -> NDArray[np.bool_]:
    """``(...)`` bool: the paper's rule for frames that count (see :func:`ssr`)."""
    finite = np.isfinite(subject_boxes).all(-1) & np.isfinite(object_boxes).all(-1)
    (sw, sh), (ow, oh) = _extents(subject_boxes), _extents(object_boxes)
    with np.errstate(invalid="ignore"):
        return finite & (sw != 0) & (ow != 0) & (sw + ow != 0) & (sh + oh != 0)


def iou(first: ArrayLike, second: ArrayLike) -> Floats:
    """Intersection over union of boxes ``(..., 4)``, broadcast; 0 where the union is empty, NaN where one is absent."""
    a, b = np.broadcast_arrays(_boxes("first", first), _boxes("second", second))
    shared = _intersection(a, b)
    union = _area(a) + _area(b) - shared
    return np.divide(shared, union, out=np.where(np.isnan(union), np.nan, 0.0), where=union > 0)


def centres(boxes: Floats) -> Floats:
    """Centres ``(..., 2)`` (x, y) of boxes ``(..., 4)``."""
    return (boxes[..., :2] + boxes[..., 2:]) / 2


def _planar_ssr(subject: Floats, thing: Floats, relation: Relation) -> Floats:
    dx, dy = np.moveaxis(centres(subject) - centres(thing), -1, 0)
    (sw, sh), (ow, oh) = _extents(subject), _extents(thing)
    valid = valid_frames(subject, thing)
    distance = np.hypot(dx, dy)
    along, reach = (dx, (sw + ow) / 2) if relation in (Relation.LEFT, Relation.RIGHT) else (dy, (sh + oh) / 2)
    cosine = np.divide(along, distance, out=np.zeros_like(along), where=valid & (distance > 0))
    share = np.divide(np.abs(along), reach, out=np.zeros_like(along), where=valid)
    sign = 1.0 if relation in (Relation.RIGHT, Relation.UNDER) else -1.0
    return np.where(valid, sign * cosine * np.minimum(1.0, share), np.nan)


def _depth_ssr(
    subject: Floats, thing: Floats, relation: Relation, subject_depth: ArrayLike | None, object_depth: ArrayLike | None
) -> Floats:
    if subject_depth is None or object_depth is None:
        raise TracksError(
            f"relation {relation.name} needs the mean disparity of subject and object (larger = nearer), found none; "
            "run a depth estimator over the masks, or use a left, right, top or under relation"
        )
    near = np.broadcast_to(np.asarray(subject_depth, dtype=np.float64), subject.shape[:-1])
    far = np.broadcast_to(np.asarray(object_depth, dtype=np.float64), subject.shape[:-1])
    if (near < 0).any() or (far < 0).any():
        raise TracksError("disparities must not be negative (larger = nearer); shift or invert the depth maps first")
    valid = valid_frames(subject, thing) & np.isfinite(near) & np.isfinite(far)
    band = DEPTH_BAND * np.maximum(near, far)
    order = np.divide(near - far, band, out=np.zeros_like(band), where=valid & (band > 0))
    smaller = np.minimum(_area(subject), _area(thing))
    overlap = np.divide(_intersection(subject, thing), smaller, out=np.zeros_like(band), where=valid & (smaller > 0))
    sign = 1.0 if relation is Relation.FRONT else -1.0
    return np.where(valid, sign * np.clip(order, -1.0, 1.0) * overlap, np.nan)


def _boxes(name: str, value: ArrayLike) -> Floats:
    boxes = np.asarray(value, dtype=np.float64)
    if boxes.ndim < 1 or boxes.shape[-1] != 4:
        raise TracksError(f"{name}: expected an array (..., 4) of x1 y1 x2 y2, found shape {boxes.shape}")
    if (boxes[..., 2:] < boxes[..., :2]).any():
        raise TracksError(f"{name}: a box ends before it begins; expected x1 <= x2 and y1 <= y2")
    return boxes


def _extents(boxes: Floats) -> tuple[Floats, Floats]:
    return boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]


def _area(boxes: Floats) -> Floats:
    width, height = _extents(boxes)
    return width * height


def _intersection(a: Floats, b: Floats) -> Floats:
    low, high = np.maximum(a[..., :2], b[..., :2]), np.minimum(a[..., 2:], b[..., 2:])
    return np.asarray(np.prod(np.clip(high - low, 0.0, None), axis=-1), dtype=np.float64)
