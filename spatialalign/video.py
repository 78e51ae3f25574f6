"""Video files in and out of uint8 frames (PyAV; H.264 that browsers play)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import VideoError
from .files import atomic_path

if TYPE_CHECKING:
    from av.container import InputContainer

DEFAULT_FPS = 16.0
"""Frame rate of the paper's clips, assumed when a file does not state one."""

_SMALL_AREA = 256 * 256
_TINY_AREA = 128 * 128
_NOTE = re.compile(r"spatialalign size=(\d+)x(\d+) scale=(\d+)")


@dataclass(frozen=True, eq=False)
class Video:
    """A decoded clip: ``frames`` uint8 ``(T, H, W, 3)`` RGB with ``T >= 1``, ``fps`` frames a second."""

    frames: np.ndarray
    fps: float

    def __post_init__(self) -> None:
        check_frames(self.frames)
        if not (np.isfinite(self.fps) and self.fps > 0):
            raise VideoError(f"fps must be a positive number, found {self.fps}")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return int(self.frames.shape[1]), int(self.frames.shape[2])


def check_frames(frames: Any) -> None:
    """Raise :class:`VideoError` unless ``frames`` is a uint8 array ``(T, H, W, 3)`` with at least one frame.

    Float arrays are refused rather than guessed at: 0..1 and 0..255 look alike in a dark clip.
    """
    if not isinstance(frames, np.ndarray):
        raise VideoError(f"frames must be a numpy array (T, H, W, 3) of uint8, found {type(frames).__name__}")
    if np.issubdtype(frames.dtype, np.floating) and not np.isfinite(frames).all():
        bad = int((~np.isfinite(frames)).sum())
        raise VideoError(
            f"frames must be uint8 in 0..255, found {frames.dtype} with {bad} NaN or infinite values; "
            "the clip was not decoded properly, generate or decode it again"
        )
    if frames.dtype != np.uint8:
        raise VideoError(
            f"frames must be uint8 in 0..255, found {frames.dtype}; convert with (x * 255).round().astype('uint8')"
        )
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise VideoError(f"frames must have the shape (T, H, W, 3), found {frames.shape}")
    if 0 in frames.shape:
        raise VideoError(f"frames must hold at least one frame of at least one pixel, found the shape {frames.shape}")


def is_own(metadata: Mapping[str, str]) -> bool:
    """Whether a file with these tags was written by :func:`write_video`, so that only :func:`read_video` undoes it."""
    return _NOTE.search(metadata.get("comment", "")) is not None


def read_video(path: str | Path, max_frames: int | None = None) -> Video:
    """Decode every frame of the first video stream, in presentation order.

    ``max_frames`` stops after that many frames. Raises :class:`VideoError`, naming the file and the remedy, for a file
    that is missing, empty, not a video, without a video stream, or that ends before the frames it announces.
    Files of :func:`write_video` come back at the size of the array that was written.
    A clip of one frame decodes; whether it can be scored is for the score to say.
    """
    import av

    file = Path(path)
    if not file.is_file():
        raise VideoError(f"{file}: no such video file; check the path, or generate the clip again")
    if file.stat().st_size == 0:
        raise VideoError(f"{file}: the file is empty (0 bytes); delete it and generate the clip again")
    if max_frames is not None and max_frames < 1:
        raise VideoError(f"max_frames must be at least 1, found {max_frames}")
    try:
        with av.open(str(file)) as container:
            return _decode(container, file, max_frames)
    except (av.FFmpegError, OSError) as error:
        raise VideoError(
            f"{file}: cannot be read as a video ({error.strerror or error}); the file is damaged, cut off or not a "
            "video: delete it and generate or download it again"
        ) from error


def _decode(container: InputContainer, file: Path, max_frames: int | None) -> Video:
    if not container.streams.video:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "none"
        raise VideoError(f"{file}: no video stream (streams found: {kinds}); give a file that holds a video")
    stream = container.streams.video[0]
    announced, fps = int(stream.frames or 0), stream.average_rate or stream.guessed_rate
    frames: list[np.ndarray] = []
    packets = 0
    for packet in container.demux(stream):
        damaged = packet.is_corrupt
        packets += bool(packet.size)
        for frame in packet.decode():
            if damaged or getattr(frame, "is_corrupt", False):
                raise VideoError(
                    f"{file}: frame {len(frames)} is damaged; the file is cut off or corrupt: generate it again"
                )
            frames.append(frame.to_ndarray(format="rgb24"))
            if max_frames is not None and len(frames) == max_frames:
                return _video(frames, container, fps, file)
    if not frames:
        raise VideoError(f"{file}: the video stream holds no frames; delete it and generate the clip again")
    # Counted in packets: an edit list may hide frames on purpose, a cut-off file lacks the packets themselves.
    if packets < announced:
        raise VideoError(
            f"{file}: cut off, it announces {announced} frames and {packets} are there; generate or download it again"
        )
    return _video(frames, container, fps, file)


def _video(frames: list[np.ndarray], container: InputContainer, fps: Fraction | None, file: Path) -> Video:
    shapes = {frame.shape for frame in frames}
    if len(shapes) > 1:
        raise VideoError(f"{file}: frames change their size ({sorted(shapes)}); re-encode the clip at one size")
    note = _NOTE.search(container.metadata.get("comment", ""))
    stacked = np.stack(frames)
    if note is not None:
        height, width, scale = (int(number) for number in note.groups())
        # A tool that resized the file may have kept the note; it then says nothing about these frames.
        if scale > 0 and stacked.shape[1:3] == (_even(height * scale), _even(width * scale)):
            stacked = _reduced(stacked[:, : height * scale, : width * scale], scale)
    return Video(stacked, float(fps or DEFAULT_FPS))


def _even(side: int) -> int:
    return side + side % 2


def _reduced(frames: np.ndarray, scale: int) -> np.ndarray:
    """Mean over blocks of ``scale`` x ``scale`` pixels."""
    if scale == 1:
        return np.ascontiguousarray(frames)
    count, height, width = frames.shape[0], frames.shape[1] // scale, frames.shape[2] // scale
    blocks = frames.reshape(count, height, scale, width, scale, 3)
    return np.asarray(blocks.mean(axis=(2, 4), dtype=np.float32).round().astype(np.uint8))


def write_video(path: str | Path, frames: np.ndarray, fps: float, crf: int | None = None) -> None:
    """Encode ``frames`` (uint8 ``(T, H, W, 3)``) as H.264 yuv420p MP4, whole or not at all.

    yuv420p is what every browser plays. It needs even sides, so an odd side is padded by repeating its last row or
    column, and it halves the resolution of colour, which costs a tiny clip of sprites all but 31 dB PSNR; so clips
    up to 128 x 128 are stored at twice their size (hard pixel edges, 40 dB). A note in the file lets
    :func:`read_video` undo both. ``crf`` is x264's quality (0 lossless, 51 worst), by default 4 up to 256 x 256 pixels
    and 16 above.
    """
    import av

    check_frames(frames)
    if not (np.isfinite(fps) and fps > 0):
        raise VideoError(f"{path}: fps must be a positive number, found {fps}")
    height, width = frames.shape[1:3]
    if crf is None:
        crf = 4 if height * width <= _SMALL_AREA else 16
    scale = 2 if height * width <= _TINY_AREA else 1
    large = frames.repeat(scale, axis=1).repeat(scale, axis=2) if scale > 1 else frames
    extra = large.shape[1] % 2, large.shape[2] % 2
    padded = np.pad(large, ((0, 0), (0, extra[0]), (0, extra[1]), (0, 0)), mode="edge")
    with atomic_path(path) as temporary:
        try:
            with av.open(str(temporary), "w", format="mp4", options={"movflags": "+faststart"}) as container:
                container.metadata["comment"] = f"spatialalign size={height}x{width} scale={scale}"
                stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
                stream.width, stream.height, stream.pix_fmt = padded.shape[2], padded.shape[1], "yuv420p"
                stream.options = {"crf": str(crf), "preset": "medium"}
                for image in padded:
                    container.mux(
                        stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24"))
                    )
                container.mux(stream.encode(None))
        except (av.FFmpegError, OSError) as error:
            raise VideoError(
                f"{path}: cannot be written ({error.strerror or error}); check the folder and the free space"
            ) from error
