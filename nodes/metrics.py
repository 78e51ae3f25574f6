"""Metrics of a clip beside its score: how other benchmarks see the relation, and whether quality was lost."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from comfy_api.latest import io

from ..spatialalign.dsr import DSR
from ..spatialalign.errors import DataError
from ..spatialalign.tracks import Tracks
from . import host
from .kept import NONE, Kept, file_times, model_folders
from .sockets import DSR_SOCKET, TRACKS_SOCKET, to_uint8
from .values import Values, figure, joined, json_text, shown, values_input, values_output

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

DINOS, CLIPS = "dinov2", "clip_iqa"
"""Folders below ``models``."""
LATER = ("natural", "quality")
"""Metrics whose outputs come after all others, where no graph of before has one."""


class ClipMetrics(io.ComfyNode):
    """Metrics from frames, and from tracks where they are connected."""

    kept: ClassVar[Kept] = Kept()
    """The DINOv2 and the CLIP, from one clip to the next."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpatialAlignMetrics",
            display_name="Metrics",
            category="SpatialAlign/Score",
            description=(
                "Measures a clip beside its score: how smoothly it moves and how much it changes, how VBench and "
                "T2V-CompBench would judge its relationship by the same tracks, with a DINOv2 whether the subject "
                "keeps its looks, and with a CLIP how natural and how good its pictures are."
            ),
            inputs=[
                io.Image.Input("images", tooltip="The frames of one clip, or a list of clips."),
                TRACKS_SOCKET.Input(
                    "tracks", optional=True, tooltip="The clip's tracks, for the metrics that look at the two things."
                ),
                DSR_SOCKET.Input("dsr", optional=True, tooltip="Its relationship; tracks and dsr go together."),
                io.Combo.Input(
                    "identity",
                    options=[NONE, *model_folders(DINOS)],
                    default=NONE,
                    tooltip="A DINOv2 for the subject's identity: a transformers folder in models/dinov2, or none.",
                ),
                values_input(),
                # optional and last, for graphs of before that lack it
                io.Combo.Input(
                    "clip_iqa",
                    options=[NONE, *model_folders(CLIPS)],
                    default=NONE,
                    optional=True,
                    tooltip="A CLIP for natural and quality: a transformers folder in models/clip_iqa, or none.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    display_name="smoothness",
                    tooltip="How well each frame lies between its neighbours, 0 to 1. A still clip has 1.",
                ),
                io.Float.Output(
                    display_name="change",
                    tooltip="Mean change of a pixel from frame to frame, 0 to 1. A still clip has 0.",
                ),
                io.Float.Output(
                    display_name="vbench",
                    tooltip="The relationship by VBench's rule, 0 to 1, which does not tell left from right.",
                ),
                io.Float.Output(display_name="compbench", tooltip="The relationship by T2V-CompBench's rule, 0 to 1."),
                io.Float.Output(
                    display_name="identity", tooltip="How alike the subject stays, -1 to 1; NaN without a DINOv2."
                ),
                io.String.Output(display_name="report", tooltip="JSON: all of them; null for what was not measured."),
                values_output(),
                io.Float.Output(
                    display_name="natural",
                    tooltip="CLIP-IQA: how natural the frames look, mean over them, 0 to 1; NaN without a CLIP.",
                ),
                io.Float.Output(display_name="quality", tooltip="CLIP-IQA: how good the frames look, likewise."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(
        cls,
        images: Tensor,
        identity: str,
        tracks: Tracks | None = None,
        dsr: DSR | None = None,
        values: Values | None = None,
        clip_iqa: str = NONE,
    ) -> str:
        """Times of its models' files: by a changed one the clip is measured anew."""
        chosen = ((DINOS, identity), (CLIPS, clip_iqa))
        # what is linked is None here
        named = ((folder, name) for folder, name in chosen if name not in (None, NONE))
        return " ".join(file_times(host.model_path(folder, name)) for folder, name in named)

    @classmethod
    def execute(
        cls,
        images: Tensor,
        identity: str,
        tracks: Tracks | None = None,
        dsr: DSR | None = None,
        values: Values | None = None,
        clip_iqa: str = NONE,
    ) -> io.NodeOutput:
        from ..spatialalign.metrics_frames import frame_change, linear_smoothness

        if (tracks is None) != (dsr is None):
            raise DataError("Metrics: connect both tracks and dsr, or neither")
        if identity != NONE and tracks is None:
            raise DataError("Metrics: identity needs tracks and dsr, which say where the subject is; connect them")
        for folder, name in ((DINOS, identity), (CLIPS, clip_iqa)):
            if name == NONE:
                cls.kept.drop(folder)
        frames = to_uint8(images)
        own: dict[str, float | None] = {"smoothness": linear_smoothness(frames), "change": frame_change(frames)}
        own |= dict.fromkeys(("vbench", "compbench", "identity", *LATER))
        if tracks is not None and dsr is not None:
            own |= _of_tracks(frames, tracks.oriented(dsr.subject, dsr.object), dsr, identity, cls.kept)
        if clip_iqa != NONE:
            own |= zip(LATER, _looks(frames, clip_iqa, cls.kept), strict=True)
        found = {name: math.nan if value is None else value for name, value in own.items()}
        lines = [f"{name} {figure(value)}" for name, value in found.items() if not math.isnan(value)]
        first = [value for name, value in found.items() if name not in LATER]
        last = [found[name] for name in LATER]
        return io.NodeOutput(*first, json_text(found), joined(values, found), *last, ui=shown(cls, lines))


def _of_tracks(frames: np.ndarray, tracks: Tracks, dsr: DSR, identity: str, kept: Kept) -> dict[str, float | None]:
    from ..spatialalign.metrics_spatial import compbench_score, vbench_score

    found = {"vbench": vbench_score(tracks, dsr), "compbench": compbench_score(tracks, dsr)}
    if identity != NONE:
        found["identity"] = _identity(frames, tracks, dsr, identity, kept)
    return found


def _identity(frames: np.ndarray, tracks: Tracks, dsr: DSR, name: str, kept: Kept) -> float | None:
    """None for a clip that is INVALID: it is not known where its subject is."""
    from ..spatialalign.metrics_identity import IdentityEncoder
    from ..spatialalign.score import dsr_score
    from ..spatialalign.video import Video

    result = dsr_score(tracks, dsr)
    if not result.valid:
        return None
    encoder: IdentityEncoder = kept.ready(DINOS, name, IdentityEncoder.from_pretrained)
    return encoder.score(Video(frames, tracks.fps), tracks, result.frames_used)


def _looks(frames: np.ndarray, name: str, kept: Kept) -> tuple[float, float]:
    from ..spatialalign.metrics_clip_iqa import ClipIqa

    judge: ClipIqa = kept.ready(CLIPS, name, ClipIqa.from_pretrained)
    return judge.score(frames)
