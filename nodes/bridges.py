"""Tracks from masks and boxes that other nodes made, core's SAM 3 and RT-DETR among them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ..spatialalign.dsr import DSR
from ..spatialalign.errors import TracksError
from .boxes import boxes_of
from .sockets import DSR_SOCKET, TRACKS_SOCKET

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

CATEGORY = "SpatialAlign/Tracking"


class TracksFromMasks(io.ComfyNode):
    """Tracks from masks of any segmenter."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpatialAlignTracksFromMasks",
            display_name="Tracks From Masks",
            category=CATEGORY,
            description="Tracks from two masks with one picture for each frame, e.g. of core's SAM 3 or drawn by hand.",
            inputs=[
                io.Mask.Input("subject_mask", tooltip="The thing that moves; an empty mask where it is not seen."),
                io.Mask.Input("object_mask", tooltip="The thing it moves about, in the same frames."),
                DSR_SOCKET.Input("dsr", tooltip="Names the two things."),
                fps_input(),
            ],
            outputs=[TRACKS_SOCKET.Output(display_name="tracks", tooltip="The extents of both masks over time.")],
        )

    @classmethod
    def execute(cls, subject_mask: Tensor, object_mask: Tensor, dsr: DSR, fps: float) -> io.NodeOutput:
        import numpy as np

        from ..spatialalign.tracking.tracker import tracks_from_masks

        masks = [_flags(subject_mask, "subject_mask"), _flags(object_mask, "object_mask")]
        if masks[0].shape != masks[1].shape:
            sizes = ["{} frames of {} x {}".format(*mask.shape) for mask in masks]
            raise TracksError(
                f"subject_mask has {sizes[0]} pixels, object_mask has {sizes[1]}; make both from the same frames, or "
                "resize and cut one of them (for a thing that stands still repeat its mask for every frame)"
            )
        return io.NodeOutput(tracks_from_masks(np.stack(masks, axis=1), (dsr.subject, dsr.object), fps))


class TracksFromBoxes(io.ComfyNode):
    """Tracks from boxes of any detector."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        types = [io.Custom("BOUNDING_BOX"), io.Custom("BOUNDING_BOXES"), io.BBOX]
        return io.Schema(
            node_id="SpatialAlignTracksFromBoxes",
            display_name="Tracks From Boxes",
            category=CATEGORY,
            description=(
                "Tracks from boxes with one entry for each frame, e.g. of core's detectors. An entry is a box in "
                "pixels (x, y, width and height, or x1, y1, x2, y2), a list of boxes (the best score is taken), or "
                "nothing."
            ),
            inputs=[
                io.MultiType.Input(
                    "subject_boxes", types=types, tooltip="The thing that moves: one entry for each frame."
                ),
                io.MultiType.Input(
                    "object_boxes",
                    types=types,
                    tooltip="The thing it moves about: one entry for each frame, or one box for the whole clip.",
                ),
                DSR_SOCKET.Input("dsr", tooltip="Names the two things."),
                io.Int.Input("width", default=832, min=1, max=16384, tooltip="Width of the frames in pixels."),
                io.Int.Input("height", default=480, min=1, max=16384, tooltip="Height of the frames in pixels."),
                fps_input(),
            ],
            outputs=[TRACKS_SOCKET.Output(display_name="tracks", tooltip="Both things over time, without masks.")],
        )

    @classmethod
    def execute(
        cls, subject_boxes: Any, object_boxes: Any, dsr: DSR, width: int, height: int, fps: float
    ) -> io.NodeOutput:
        import numpy as np

        from ..spatialalign.tracking.tracker import tracks_from_boxes

        subject, subject_scores = boxes_of(subject_boxes, "subject_boxes")
        thing, scores = boxes_of(object_boxes, "object_boxes")
        if len(thing) == 1:
            thing, scores = thing.repeat(len(subject), axis=0), scores.repeat(len(subject))
        if len(subject) != len(thing):
            raise TracksError(
                f"subject_boxes has {len(subject)} frames, object_boxes has {len(thing)}; give both an entry for "
                "every frame, None where nothing is seen (only the object may have one box for all frames)"
            )
        boxes, confidence = np.stack([subject, thing], axis=1), np.stack([subject_scores, scores], axis=1)
        return io.NodeOutput(tracks_from_boxes(boxes, (dsr.subject, dsr.object), (height, width), fps, confidence))


def fps_input() -> Any:
    """The frame rate, where no VIDEO brings one."""
    return io.Float.Input(
        "fps",
        default=16.0,
        min=0.1,
        max=1000.0,
        step=0.1,
        tooltip="Frames per second: 16 for Wan 2.1, 8 for the miniature. A VIDEO brings its own.",
    )


def _flags(mask: Tensor, name: str) -> np.ndarray:
    """MASK (T, H, W) or (T, 1, H, W) as bool (T, H, W)."""
    stack = mask[:, 0] if mask.ndim == 4 and mask.shape[1] == 1 else mask
    if stack.ndim != 3 or 0 in stack.shape:
        raise TracksError(f"{name}: expected a mask for each frame (frames, height, width), found {tuple(mask.shape)}")
    return (stack > 0.5).cpu().numpy()
