"""SAM 2 video (transformers ``Sam2VideoModel``): both things followed from one frame, in memory.

The session is built by hand, so neither JPEG files nor torchvision are needed, and the image encoder, which dominates
the cost, runs in batches before the propagation instead of frame by frame within it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from ..errors import TracksError
from ..video import check_frames
from .parts import WEIGHTS, Progress, guarded, require_local
from .preprocess import Preprocess
from .segment import Propagation

_TOP_LEFT, _BOTTOM_RIGHT = 2, 3
"""Point labels by which SAM 2 knows the two corners of a box."""


@dataclass(frozen=True)
class Sam2VideoPropagator:
    """A :class:`~spatialalign.tracking.segment.Propagator`, forward and backward from the seed frame.

    ``prefill`` encodes all frames in batches of ``batch`` first; off, the model encodes each frame when it gets there
    (same masks, slower, less memory). ``fresh_backward`` forgets the forward pass before the backward one, as the
    official program does; by default the backward pass may use what the forward pass saw.
    """

    model: Any
    preprocess: Preprocess
    batch: int = 8
    prefill: bool = True
    fresh_backward: bool = False

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        device: str | torch.device = "cpu",
        batch: int = 8,
        fresh_backward: bool = False,
    ) -> Sam2VideoPropagator:
        """Load a folder or hub id such as ``facebook/sam2.1-hiera-large``.

        Raises :class:`~spatialalign.errors.ModelError` naming the part that is missing.
        """
        from transformers import Sam2VideoModel

        require_local(name, ["config.json", WEIGHTS])
        model = guarded(str(name), lambda: Sam2VideoModel.from_pretrained(str(name)))
        return cls.for_model(model.to(device).eval(), batch, fresh_backward=fresh_backward)

    @classmethod
    def for_model(
        cls, model: Any, batch: int = 8, prefill: bool = True, fresh_backward: bool = False
    ) -> Sam2VideoPropagator:
        """With the preprocessing that all released SAM 2 models share: square, ImageNet statistics."""
        side = int(model.config.image_size)
        return cls(model, Preprocess({"height": side, "width": side}), batch, prefill, fresh_backward)

    @torch.inference_mode()
    def propagate(
        self,
        frames: NDArray[np.uint8],
        seed_frame: int,
        boxes: NDArray[np.float64],
        progress: Progress | None = None,
    ) -> Propagation:
        """See :meth:`spatialalign.tracking.segment.Propagator.propagate`. The score is SAM 2's presence probability."""
        check_frames(frames)
        if not 0 <= seed_frame < len(frames):
            raise TracksError(f"seed frame {seed_frame} is not within 0 to {len(frames) - 1}")
        if boxes.shape != (2, 4) or not np.isfinite(boxes).all():
            raise TracksError(f"the seed frame needs two boxes (2, 4) without NaN, found {boxes.tolist()}")
        count, height, width = frames.shape[:3]
        masks, scores = np.zeros((count, 2, height, width), dtype=bool), np.zeros((count, 2))
        # Encoded, then visited; the seed is visited twice when there are frames before it.
        encoded = count if self.prefill else 0
        steps = encoded + count + (seed_frame > 0)
        session = self._session(frames)
        try:
            if self.prefill:
                for done in self._fill(session, frames):
                    if progress is not None:
                        progress(done, steps)
            for done, output in enumerate(self._walk(session, seed_frame, boxes, (height, width)), encoded + 1):
                logits = F.interpolate(output.pred_masks.float(), (height, width), mode="bilinear", align_corners=False)
                masks[output.frame_idx] = (logits[:, 0] > 0).cpu().numpy()
                scores[output.frame_idx] = _presence(session, output.frame_idx, seed_frame).cpu().numpy()
                if progress is not None:
                    progress(done, steps)
        finally:
            # An exception keeps this frame alive until someone has handled it; the memory must not wait for that.
            session.reset_inference_session()
        return Propagation(masks, scores)

    def _walk(self, session: Any, seed: int, boxes: NDArray[np.float64], size: tuple[int, int]) -> Iterator[Any]:
        self._prompt(session, seed, boxes, size)
        yield from self.model.propagate_in_video_iterator(session, start_frame_idx=seed)
        if seed == 0:
            return
        if self.fresh_backward:
            session.reset_tracking_data()
            self._prompt(session, seed, boxes, size)
        yield from self.model.propagate_in_video_iterator(session, start_frame_idx=seed, reverse=True)

    def _session(self, frames: NDArray[np.uint8]) -> Any:
        from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

        parameter = next(self.model.parameters())
        device, dtype = parameter.device, parameter.dtype
        if self.prefill:
            # The pixels are used up by the encoder below; the session only has to know how many frames there are.
            video = torch.zeros(len(frames), 0)
        else:
            video = self.preprocess(frames, torch.device("cpu"), dtype)
        session = Sam2VideoInferenceSession(
            video=video,
            video_height=int(frames.shape[1]),
            video_width=int(frames.shape[2]),
            inference_device=device,
            inference_state_device=device,
            video_storage_device="cpu",
            dtype=dtype,
            max_vision_features_cache_size=len(frames) if self.prefill else 1,
        )
        return session

    def _fill(self, session: Any, frames: NDArray[np.uint8]) -> Iterator[int]:
        """Encode all frames in batches; yields how many are done."""
        parameter = next(self.model.parameters())
        positions: list[torch.Tensor] | None = None
        for start in range(0, len(frames), self.batch):
            pixels = self.preprocess(frames[start : start + self.batch], parameter.device, parameter.dtype)
            found = self.model.get_image_features(pixels)
            # transformers 4 gives a tuple
            features, places = (
                found[:2] if isinstance(found, tuple) else (found.fpn_hidden_states, found.fpn_position_encoding)
            )
            if positions is None:
                # Constant over frames, and five times the size of the features: kept once, shared by all.
                positions = [level[:, :1].clone() for level in places]
            for i in range(len(pixels)):
                own = [level[:, i : i + 1] for level in features]
                session.cache.cache_vision_features(start + i, {"vision_feats": own, "vision_pos_embeds": positions})
            yield start + len(pixels)

    def _prompt(self, session: Any, seed: int, boxes: NDArray[np.float64], size: tuple[int, int]) -> None:
        target = self.preprocess.target(*size)
        scale = np.array([target[1] / size[1], target[0] / size[0]] * 2)
        for thing, box in enumerate(boxes * scale):
            index = session.obj_id_to_idx(thing)
            # In half precision a coordinate would be off by pixels; the model casts what it computes from them.
            corners = torch.as_tensor(box.reshape(1, 1, 2, 2), dtype=torch.float32)
            labels = torch.tensor([[[_TOP_LEFT, _BOTTOM_RIGHT]]], dtype=torch.int32)
            session.add_point_inputs(index, seed, {"point_coords": corners, "point_labels": labels})
        session.obj_with_new_inputs = [0, 1]


def _presence(session: Any, frame: int, seed: int) -> torch.Tensor:
    """The probability ``(2,)`` that each thing is in a frame; the outputs of transformers 4 do not carry it."""
    logits = [session.get_output(thing, frame, "object_score_logits", frame == seed) for thing in (0, 1)]
    return torch.cat(logits).float().sigmoid().reshape(2)
