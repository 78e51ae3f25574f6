"""From clips to tracks, and tracks drawn over their clip."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ..spatialalign.dsr import DSR
from ..spatialalign.errors import ConfigError
from . import host
from .bridges import CATEGORY, TracksFromBoxes, TracksFromMasks, fps_input
from .grounded_sam import GroundedSam, LoadGroundedSam, grounded_sam
from .sockets import DSR_SOCKET, GROUNDED_SAM_SOCKET, TRACKS_SOCKET, clip_inputs, frames_of, to_image, to_uint8

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ..spatialalign.tracks import Tracks

__all__ = [
    "DrawTracks",
    "GroundedSam",
    "GroundedSamTrack",
    "LoadGroundedSam",
    "TracksFromBoxes",
    "TracksFromMasks",
    "grounded_sam",
]


class GroundedSamTrack(io.ComfyNode):
    """Detection, segmentation and tracking of the subject and the object in every clip."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpatialAlignTrack",
            display_name="GroundedSAM Track",
            category=CATEGORY,
            description=(
                "Finds the subject and the object of a relationship in every frame of a clip and follows them. A clip "
                "in which they cannot be found comes back INVALID with the reason; it is a result, not an error."
            ),
            inputs=[
                GROUNDED_SAM_SOCKET.Input("grounded_sam", tooltip="From Load GroundedSAM or Load Miniature."),
                DSR_SOCKET.Input("dsr", tooltip="Its subject and object are the two things that are looked for."),
                *clip_inputs("The frames. Connect these or video, not both."),
                fps_input(),
                io.Int.Input(
                    "frames_per_clip",
                    default=0,
                    min=0,
                    max=100000,
                    tooltip=(
                        "Frames of one clip when images holds several, e.g. a batch of videos; 0 when all frames are "
                        "one clip. It must divide the number of frames."
                    ),
                ),
                io.Boolean.Input(
                    "overlay",
                    default=True,
                    tooltip="Draw boxes, names and outlines over the frames. Off, the overlay is the plain frames.",
                ),
            ],
            outputs=[
                TRACKS_SOCKET.Output(display_name="tracks", is_output_list=True, tooltip="Tracks of each clip."),
                io.Mask.Output(
                    display_name="subject_mask",
                    is_output_list=True,
                    tooltip=(
                        "Where the subject is, per clip one mask for each frame; empty where it is not seen. Without a "
                        "segmenter the boxes, filled."
                    ),
                ),
                io.Mask.Output(
                    display_name="object_mask", is_output_list=True, tooltip="Where the object is, likewise."
                ),
                io.Image.Output(display_name="overlay", is_output_list=True, tooltip="Each clip with its tracks."),
                io.Image.Output(display_name="clips", is_output_list=True, tooltip="The frames of each clip."),
            ],
        )

    @classmethod
    def execute(
        cls,
        grounded_sam: GroundedSam,
        dsr: DSR,
        fps: float,
        frames_per_clip: int,
        overlay: bool,
        images: Tensor | None = None,
        video: Any = None,
    ) -> io.NodeOutput:
        images, fps = frames_of(images, video, fps)
        clips = images.split(_clip_length(len(images), frames_per_clip))
        host.load(grounded_sam.patchers, grounded_sam.memory(*clips[0].shape[:3]))
        bar = host.Progress(len(images))
        found: list[Tracks] = []
        drawn: list[Tensor] = []
        for number, clip in enumerate(clips):
            first, frames = number * len(clip), to_uint8(clip)

            def progress(done: int, total: int, first: int = first, length: int = len(clip)) -> None:
                bar.update(first + done * length // total)

            found.append(grounded_sam.tracker.track(frames, dsr.subject, dsr.object, fps, progress))
            drawn.append(_overlay(frames, found[-1], True) if overlay else clip)
            bar.update(first + len(clip))
        filled = grounded_sam.tracker.segmenter is None
        masks = [[_masks(tracks, thing, filled) for tracks in found] for thing in (0, 1)]
        return io.NodeOutput(found, *masks, drawn, list(clips))


class DrawTracks(io.ComfyNode):
    """A clip with its tracks drawn over it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpatialAlignDrawTracks",
            display_name="Draw Tracks",
            category=CATEGORY,
            description="Draws boxes, names, confidences and outlines over a clip. Small clips are enlarged.",
            inputs=[
                io.Image.Input("images", tooltip="The frames of the one clip that the tracks belong to."),
                TRACKS_SOCKET.Input("tracks", tooltip="As many frames as images, of the same size."),
                io.Boolean.Input(
                    "masks", default=True, tooltip="Tint what the masks cover, where the tracks have them."
                ),
            ],
            outputs=[io.Image.Output(display_name="overlay", tooltip="The drawn frames, with a line of text below.")],
        )

    @classmethod
    def execute(cls, images: Tensor, tracks: Tracks, masks: bool) -> io.NodeOutput:
        return io.NodeOutput(_overlay(to_uint8(images), tracks, masks))


def _clip_length(frames: int, wanted: int) -> int:
    length = wanted or frames
    if frames % length:
        raise ConfigError(
            f"frames_per_clip is {wanted}, but {frames} frames cannot be cut into clips of {length}; set it to the "
            "length of one clip, or to 0 when all frames are one clip"
        )
    return length


def _masks(tracks: Tracks, thing: int, filled: bool) -> Tensor:
    """MASK (T, H, W) of one thing; ``filled`` takes its boxes where the tracks have no masks."""
    import numpy as np
    import torch

    masks = np.zeros((tracks.frames, *tracks.size), dtype=np.float32)
    if tracks.masks is not None:
        masks[:] = tracks.masks[:, thing]
    elif filled:
        for mask, box in zip(masks, tracks.boxes[:, thing], strict=True):
            if not np.isnan(box[0]):
                x0, y0, x1, y1 = (max(0, round(side)) for side in box)
                mask[y0:y1, x0:x1] = 1
    return host.intermediate(torch.from_numpy(masks))


def _overlay(frames: np.ndarray, tracks: Tracks, masks: bool) -> Tensor:
    from ..spatialalign.plot import draw_tracks

    return host.intermediate(to_image(draw_tracks(frames, tracks, masks=masks)))
