"""The pack's own socket types, and what goes in and out of ComfyUI's IMAGE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ..spatialalign.errors import VideoError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

DSR_SOCKET = io.Custom("SPATIALALIGN_DSR")
"""A :class:`~spatialalign.dsr.DSR`: who moves from where to where."""
TRACKS_SOCKET = io.Custom("SPATIALALIGN_TRACKS")
"""A :class:`~spatialalign.tracks.Tracks`: boxes of both things in every frame of one clip."""
SCORE_SOCKET = io.Custom("SPATIALALIGN_SCORE")
"""A :class:`~spatialalign.score.DsrScore`."""
GROUNDED_SAM_SOCKET = io.Custom("SPATIALALIGN_GROUNDED_SAM")
"""A detector and a segmenter, loaded through the host's model management."""
REWARD_SOCKET = io.Custom("SPATIALALIGN_REWARD")
"""A :class:`~.rewards.Reward`: latent rewards, loaded through the host's model management, and their weights."""
PATCH_REWARD_SOCKET = io.Custom("SPATIALALIGN_PATCH_REWARD")
"""A :class:`~.patches.LoadedPatchReward`: a judge of blocks, loaded through the host's model management."""
VIDEO_REWARD_SOCKET = io.Custom("SPATIALALIGN_VIDEO_REWARD")
"""A :class:`~.learned_rewards.LoadedVideoReward`: a VideoReward, loaded through the host's model management."""
VLM_SOCKET = io.Custom("SPATIALALIGN_VLM")
"""A :class:`~.learned_rewards.LoadedVlm`: a chat model that sees, likewise."""
VALUES_SOCKET = io.Custom("SPATIALALIGN_VALUES")
"""A mapping of names to numbers of one clip, NaN where there is none: rewards for Pick Best to mix."""


def to_uint8(images: Tensor) -> np.ndarray:
    """IMAGE (T, H, W, C) float 0..1, C at least 3, as uint8 frames (T, H, W, 3); alpha is dropped.

    Raises:
        VideoError: another shape, or values that are not finite.
    """
    import torch

    if images.ndim != 4 or images.shape[-1] < 3 or 0 in images.shape:
        raise VideoError(f"images: expected a batch (frames, height, width, 3), found the shape {tuple(images.shape)}")
    frames = images[..., :3].detach().cpu().float()
    if not torch.isfinite(frames).all():
        raise VideoError("images: they hold NaN or infinite values; the sampler or the VAE failed, generate again")
    return (frames.clamp(0, 1) * 255).round().to(torch.uint8).contiguous().numpy()


def to_image(frames: np.ndarray) -> Tensor:
    """uint8 frames (T, H, W, 3), or one picture (H, W, 3), as an IMAGE: float32 0..1, (T, H, W, 3)."""
    import torch

    pictures = torch.from_numpy(frames.copy()).float() / 255
    return pictures if pictures.ndim == 4 else pictures[None]


def from_video(video: Any) -> tuple[Tensor, float]:
    """IMAGE and frame rate of a VIDEO.

    A file that SpatialAlign wrote is decoded as ``python -m training.score`` decodes it, so that both find the same
    score: ComfyUI's versions differ in their colours, and none knows that tiny clips are stored enlarged.
    """
    from ..spatialalign.video import is_own, read_video

    parts = video.get_components()
    if is_own(parts.metadata or {}) and isinstance(source := video.get_stream_source(), str):
        own = read_video(source)
        if len(own.frames) == len(parts.images):  # otherwise a part was cut out
            return to_image(own.frames), own.fps
    return parts.images, float(parts.frame_rate)


def clip_inputs(
    images: str = "The frames of one clip, or a list of clips.",
    video: str = "A clip with its frame rate, instead of images.",
) -> list[Any]:
    """The two sockets for a clip, of which one is connected (:func:`frames_of`), with these tooltips."""
    return [
        io.Image.Input("images", optional=True, tooltip=images),
        io.Video.Input("video", optional=True, tooltip=video),
    ]


def frames_of(images: Tensor | None, video: Any, fps: float) -> tuple[Tensor, float]:
    """IMAGE and frame rate from the one of two sockets that is connected; ``fps`` is that of ``images``.

    Raises:
        VideoError: none or both are connected, or what is connected is no batch of frames.
    """
    if (images is None) == (video is None):
        found = "neither is" if images is None else "both are"
        raise VideoError(f"connect images or video: {found} connected, one is needed")
    frames, rate = from_video(video) if images is None else (images, fps)
    if frames.ndim != 4 or 0 in frames.shape:
        raise VideoError(f"images: expected frames (frames, height, width, 3), found the shape {tuple(frames.shape)}")
    return frames, rate
