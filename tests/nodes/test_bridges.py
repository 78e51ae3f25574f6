"""Tracks from masks and boxes that other nodes made."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

Module = Callable[[str], ModuleType]
Run = Callable[..., Any]


@pytest.fixture
def clip(module: Module) -> Any:
    """A drawn clip of 13 frames of 64 x 64 with true tracks, in the pack's own classes."""
    world = module("spatialalign.miniature.world")
    return world.render(world.prompts("eval")[0].dsr, 3)


@pytest.fixture
def bridge(module: Module) -> ModuleType:
    return module("bridges")


@pytest.fixture
def tracks_error(module: Module) -> Any:
    return module("spatialalign.errors").TracksError


def masks_of(clip: Any) -> tuple[torch.Tensor, torch.Tensor]:
    masks = torch.from_numpy(clip.tracks.masks.astype(np.float32))
    return masks[:, 0], masks[:, 1]


def core_boxes(clip: Any, thing: int) -> list[list[dict[str, float]]]:
    """The true boxes as core's detectors hand them over."""
    corners = clip.tracks.boxes[:, thing].tolist()
    return [[{"x": x0, "y": y0, "width": x1 - x0, "height": y1 - y0, "score": 0.5}] for x0, y0, x1, y1 in corners]


def test_masks_give_the_true_boxes(bridge: ModuleType, run: Run, clip: Any) -> None:
    subject, thing = masks_of(clip)
    tracks = run(bridge.TracksFromMasks, subject_mask=subject, object_mask=thing, dsr=clip.dsr, fps=8.0)[0]
    np.testing.assert_array_equal(tracks.boxes, clip.tracks.boxes)
    np.testing.assert_array_equal(tracks.masks, clip.tracks.masks)
    assert (tracks.labels, tracks.fps, tracks.size) == ((clip.dsr.subject, clip.dsr.object), 8.0, (64, 64))
    stacked = run(bridge.TracksFromMasks, subject_mask=subject[:, None], object_mask=thing, dsr=clip.dsr, fps=8.0)[0]
    assert stacked == tracks


def test_a_mask_counts_above_one_half(bridge: ModuleType, run: Run, clip: Any) -> None:
    subject, thing = masks_of(clip)
    soft = torch.where(subject > 0, 0.51, 0.5)
    tracks = run(bridge.TracksFromMasks, subject_mask=soft, object_mask=thing, dsr=clip.dsr, fps=8.0)[0]
    np.testing.assert_array_equal(tracks.boxes, clip.tracks.boxes)


def test_an_empty_mask_is_an_absent_thing(bridge: ModuleType, run: Run, clip: Any, module: Module) -> None:
    subject, thing = masks_of(clip)
    tracks = run(
        bridge.TracksFromMasks, subject_mask=torch.zeros_like(subject), object_mask=thing, dsr=clip.dsr, fps=8.0
    )[0]
    assert np.isnan(tracks.boxes[:, 0]).all() and (tracks.confidence[:, 0] == 0).all()
    score = module("spatialalign.score").dsr_score(tracks, clip.dsr)
    assert not score.valid and score.reason


def test_masks_that_do_not_fit_each_other(bridge: ModuleType, run: Run, clip: Any, tracks_error: Any) -> None:
    subject, thing = masks_of(clip)
    for other in (thing[:-1], thing[:, :32]):
        frames, height, width = other.shape
        message = (
            f"subject_mask has 13 frames of 64 x 64 pixels, object_mask has {frames} frames of {height} x {width}; "
            "make both from the same frames"
        )
        with pytest.raises(tracks_error, match=message):
            run(bridge.TracksFromMasks, subject_mask=subject, object_mask=other, dsr=clip.dsr)
    for other in (thing[0], thing[:0], thing[None], thing[..., None].expand(-1, -1, -1, 3)):
        with pytest.raises(tracks_error, match="object_mask: expected a mask for each frame"):
            run(bridge.TracksFromMasks, subject_mask=subject, object_mask=other, dsr=clip.dsr)


def test_boxes_of_core_give_the_true_tracks(bridge: ModuleType, run: Run, clip: Any, module: Module) -> None:
    subject, thing = (core_boxes(clip, index) for index in (0, 1))
    subject[4] = []
    tracks = run(
        bridge.TracksFromBoxes, subject_boxes=subject, object_boxes=thing, dsr=clip.dsr, width=64, height=48, fps=8.0
    )[0]
    expected = clip.tracks.boxes.copy()
    expected[4, 0] = np.nan
    np.testing.assert_allclose(tracks.boxes, expected)
    assert tracks.confidence[4].tolist() == [0.0, 0.5] and tracks.confidence[5].tolist() == [0.5, 0.5]
    assert (tracks.size, tracks.fps, tracks.masks) == ((48, 64), 8.0, None)


def test_one_box_stands_for_an_object_that_stands_still(bridge: ModuleType, run: Run, clip: Any) -> None:
    box = clip.tracks.boxes[0, 1]
    given = {"dsr": clip.dsr, "width": 64, "height": 64, "fps": 8.0}
    for form in ({"x": box[0], "y": box[1], "width": box[2] - box[0], "height": box[3] - box[1]}, box.tolist()):
        tracks = run(
            bridge.TracksFromBoxes, subject_boxes=clip.tracks.boxes[:, 0].tolist(), object_boxes=form, **given
        )[0]
        np.testing.assert_allclose(tracks.boxes[:, 1], np.tile(box, (13, 1)))
        np.testing.assert_allclose(tracks.boxes[:, 0], clip.tracks.boxes[:, 0])


@pytest.mark.parametrize(("subject", "thing"), [(1, 13), (13, 12), (12, 13)])
def test_boxes_of_another_number_of_frames(
    bridge: ModuleType, run: Run, clip: Any, tracks_error: Any, subject: int, thing: int
) -> None:
    with pytest.raises(
        tracks_error, match=rf"subject_boxes has {subject} frames, object_boxes has {thing}; .*only the object may"
    ):
        run(
            bridge.TracksFromBoxes,
            subject_boxes=core_boxes(clip, 0)[:subject],
            object_boxes=core_boxes(clip, 1)[:thing],
            dsr=clip.dsr,
        )


def test_the_box_inputs_take_every_kind_of_box_socket(bridge: ModuleType, fake_host: Any) -> None:
    sockets = bridge.TracksFromBoxes.INPUT_TYPES()["required"]
    assert sockets["subject_boxes"][0] == sockets["object_boxes"][0] == "BOUNDING_BOX,BOUNDING_BOXES,BBOX"
