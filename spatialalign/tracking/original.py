"""The original ``.pth`` checkpoints, through ``groundingdino-py`` and ``segment-anything``.

For users who have these files already. Everything else about them (phrases, thresholds, batches) is as in the
transformers backends. Files are read with ``weights_only=True``, so a checkpoint cannot run code. Needs the extra
``original``.
"""

from __future__ import annotations

import contextlib
import io
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import ModelError
from ._compat import bert_with_mask_helpers
from .detect import Detections
from .grounding_dino import Matching, detect_frames
from .parts import Progress, guarded
from .preprocess import Preprocess
from .sam import check_prompts
from .segment import Propagation

# Width of the first Swin stage -> the configuration that the package ships for it.
_CONFIGS = {96: "GroundingDINO_SwinT_OGC", 128: "GroundingDINO_SwinB_cfg"}
_OFFICIAL_SIZE = {"shortest_edge": 800, "longest_edge": 1333}


@dataclass(frozen=True)
class OriginalGroundingDino:
    """A :class:`~spatialalign.tracking.detect.Detector` on the ``groundingdino`` package's own model."""

    model: Any
    preprocess: Preprocess = field(default_factory=lambda: Preprocess(_OFFICIAL_SIZE))
    matching: Matching = field(default_factory=Matching)
    batch: int = 4

    @classmethod
    def from_pth(
        cls,
        path: str | Path,
        bert: str | Path = "bert-base-uncased",
        device: str | torch.device = "cpu",
        matching: Matching | None = None,
        config: Mapping[str, Any] | None = None,
        preprocess: Preprocess | None = None,
        batch: int = 4,
    ) -> OriginalGroundingDino:
        """Load ``groundingdino_swint_ogc.pth`` or ``groundingdino_swinb_cogcoor.pth``.

        ``bert`` is a folder or hub id with tokenizer and configuration of the text encoder (its weights are in the
        checkpoint); ``config`` changes single values of the shipped configuration. Raises
        :class:`~spatialalign.errors.ModelError` when the file is missing, unsafe or of another model.
        """
        state = read_pth(path)
        state = {key.removeprefix("module."): value for key, value in state.get("model", state).items()}
        patch = state.get("backbone.0.patch_embed.proj.weight")
        if patch is None or len(patch) not in _CONFIGS:
            raise ModelError(f"{path}: not a Grounding DINO checkpoint of the SwinT or SwinB form")
        model = build_grounding_dino(_CONFIGS[len(patch)], bert, config)
        missing, _ = guarded(str(path), lambda: model.load_state_dict(state, strict=False))
        # Releases carry a training-only label encoder and BERT's position ids, which transformers stopped saving.
        lost = [key for key in missing if "position_ids" not in key]
        if lost:
            raise ModelError(
                f"{path}: {len(lost)} weights of {_CONFIGS[len(patch)]} are missing (first: {lost[0]}); "
                "give the config the checkpoint was trained with"
            )
        model = model.to(device).eval()
        return cls(model, preprocess or Preprocess(_OFFICIAL_SIZE), matching or Matching(), batch)

    def detect(
        self, frames: NDArray[np.uint8], phrases: Sequence[str], progress: Progress | None = None
    ) -> list[Detections]:
        """See :meth:`spatialalign.tracking.detect.Detector.detect`."""
        place = next(self.model.parameters()).device, torch.float32
        tokenizer = self.model.tokenizer
        return detect_frames(
            self._forward, tokenizer, self.preprocess, self.matching, frames, phrases, self.batch, place, progress
        )

    def _forward(self, pixels: torch.Tensor, text: str) -> tuple[torch.Tensor, torch.Tensor, Sequence[int]]:
        output = self.model(pixels, captions=[text] * len(pixels))
        return output["pred_logits"], output["pred_boxes"], self.model.tokenizer(text)["input_ids"]


def groundingdino(part: str) -> Any:
    """The module ``groundingdino.<part>``; raises :class:`ModelError` saying what to do when it is not installed."""
    try:
        return import_module(f"groundingdino.{part}")
    except ImportError as error:
        raise ModelError(
            f"groundingdino-py cannot be imported ({error}); install it: pip install 'spatialalign[original]', "
            "or take the model's transformers folder (IDEA-Research/grounding-dino-tiny), which needs no extra library"
        ) from error


def build_grounding_dino(name: str, bert: str | Path, config: Mapping[str, Any] | None = None) -> Any:
    """The ``groundingdino`` model of a shipped configuration ``name``, untrained but for BERT.

    Works with transformers 4 and 5; ``groundingdino.util.inference`` (which needs an old ``supervision``) is not used.
    """
    build_model, module = groundingdino("models").build_model, groundingdino(f"config.{name}")
    values = {key: value for key, value in vars(module).items() if not key.startswith("_")}
    # Gradient checkpointing saves memory in training only, and warns when there are no gradients.
    values |= {"use_checkpoint": False, "use_transformer_ckpt": False, "text_encoder_type": str(bert)}
    values |= dict(config or {})
    with bert_with_mask_helpers(), contextlib.redirect_stdout(io.StringIO()):
        return guarded(str(bert), lambda: build_model(Namespace(**values)))


@dataclass(frozen=True)
class OriginalSam:
    """A :class:`~spatialalign.tracking.segment.FrameSegmenter` on the ``segment_anything`` package's own model."""

    model: Any

    @classmethod
    def from_pth(cls, path: str | Path, device: str | torch.device = "cpu") -> OriginalSam:
        """Load ``sam_vit_b_01ec64.pth``, ``sam_vit_l_0b3195.pth`` or ``sam_vit_h_4b8939.pth``.

        The sizes are read off the weights, so the model's kind need not be named. Raises
        :class:`~spatialalign.errors.ModelError` when the file is missing, unsafe or of another model.
        """
        state = read_pth(path)
        if "image_encoder.pos_embed" not in state or "mask_decoder.mask_tokens.weight" not in state:
            raise ModelError(f"{path}: not a segment-anything checkpoint (no image_encoder.pos_embed in it)")
        model = build_sam(state)
        guarded(str(path), lambda: model.load_state_dict(state))
        return cls(model.to(device).eval())

    @torch.inference_mode()
    def segment(
        self, frames: NDArray[np.uint8], boxes: NDArray[np.float64], progress: Progress | None = None
    ) -> Propagation:
        """See :meth:`spatialalign.tracking.segment.FrameSegmenter.segment`; one frame at a time."""
        check_prompts(frames, boxes)
        predictor = import_module("segment_anything").SamPredictor(self.model)
        masks = np.zeros((len(frames), 2, *frames.shape[1:3]), dtype=bool)
        scores = np.zeros((len(frames), 2))
        present = ~np.isnan(boxes[..., 0])
        wanted = np.flatnonzero(present.any(axis=1))
        for done, i in enumerate(wanted, 1):
            things = np.flatnonzero(present[i])
            predictor.set_image(frames[i])
            scaled = predictor.transform.apply_boxes(boxes[i, things], frames.shape[1:3])
            prompts = torch.as_tensor(scaled, dtype=torch.float32, device=predictor.device)
            found, quality, _ = predictor.predict_torch(None, None, prompts, multimask_output=False)
            masks[i, things] = found[:, 0].cpu().numpy()
            scores[i, things] = quality[:, 0].clamp(0, 1).cpu().numpy()
            if progress is not None:
                progress(done, len(wanted))
        return Propagation(masks, scores)


def build_sam(state: Mapping[str, torch.Tensor]) -> Any:
    """The ``segment_anything`` model whose sizes are those of the weights in ``state``, untrained.

    All sizes show in tensor shapes but the decoder's 8 heads and its three-layer IoU head, which every release shares.
    """
    try:
        modeling = import_module("segment_anything.modeling")
    except ImportError as error:
        raise ModelError(
            f"segment-anything cannot be imported ({error}); install it: pip install 'spatialalign[original]', "
            "or take the model's transformers folder (facebook/sam-vit-base), which needs no extra library"
        ) from error
    patch = state["image_encoder.patch_embed.proj.weight"]
    side, width = state["image_encoder.pos_embed"].shape[1], patch.shape[0]
    image = side * patch.shape[-1]
    depth = _count(state, "image_encoder.blocks.")
    relative = [state[f"image_encoder.blocks.{i}.attn.rel_pos_h"].shape for i in range(depth)]
    # A block's table covers 2 n - 1 offsets of its window of n, or of the whole grid when its attention is global.
    windows = [(rows + 1) // 2 for rows, _ in relative]
    everywhere = [i for i, window in enumerate(windows) if window == side]
    channels = state["image_encoder.neck.0.weight"].shape[0]
    encoder = modeling.ImageEncoderViT(
        depth=depth,
        embed_dim=width,
        img_size=image,
        mlp_ratio=state["image_encoder.blocks.0.mlp.lin1.weight"].shape[0] / width,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        num_heads=width // relative[0][1],
        patch_size=patch.shape[-1],
        qkv_bias=True,
        use_rel_pos=True,
        global_attn_indexes=everywhere,
        window_size=min(windows),
        out_chans=channels,
    )
    prompts = modeling.PromptEncoder(
        embed_dim=channels,
        image_embedding_size=(side, side),
        input_image_size=(image, image),
        mask_in_chans=state["prompt_encoder.mask_downscaling.6.weight"].shape[1],
    )
    decoder = modeling.MaskDecoder(
        num_multimask_outputs=state["mask_decoder.mask_tokens.weight"].shape[0] - 1,
        transformer=modeling.TwoWayTransformer(
            depth=_count(state, "mask_decoder.transformer.layers."),
            embedding_dim=channels,
            mlp_dim=state["mask_decoder.transformer.layers.0.mlp.lin1.weight"].shape[0],
            num_heads=8,
        ),
        transformer_dim=channels,
        iou_head_depth=_count(state, "mask_decoder.iou_prediction_head.layers."),
        iou_head_hidden_dim=state["mask_decoder.iou_prediction_head.layers.0.weight"].shape[0],
    )
    return modeling.Sam(image_encoder=encoder, prompt_encoder=prompts, mask_decoder=decoder)


def read_pth(path: str | Path) -> dict[str, Any]:
    """The tensors of a ``.pth`` file, never running code from it. Raises :class:`ModelError` naming the file."""
    file = Path(path)
    if not file.is_file():
        raise ModelError(f"{file}: no such checkpoint; check the path, or download it from its project's page")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises pickle, runtime and zip errors of many classes here
        raise ModelError(
            f"{file}: cannot be read safely ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "it is damaged, or holds more than tensors"
        ) from error
    if not isinstance(state, dict):
        raise ModelError(f"{file}: expected a dict of tensors, found {type(state).__name__}")
    return state


def _count(state: Mapping[str, torch.Tensor], prefix: str) -> int:
    return 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in state if key.startswith(prefix))
