"""Stage 5: the segmenter (``SamModel``): a picture and a box in, a mask and its expected IoU out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    SamConfig,
    SamImageProcessor,
    SamMaskDecoderConfig,
    SamModel,
    SamProcessor,
    SamPromptEncoderConfig,
    SamVisionConfig,
)

from spatialalign.miniature import HEIGHT
from training.miniature.detector import MEAN, STD
from training.miniature.frames import batch_of, through_vae
from training.miniature.loop import Loop


def processor() -> SamProcessor:
    """Pictures stay 64 pixels; masks come at full size."""
    return SamProcessor(
        SamImageProcessor(
            size={"longest_edge": HEIGHT}, pad_size={"height": HEIGHT, "width": HEIGHT},
            mask_size={"longest_edge": HEIGHT}, mask_pad_size={"height": HEIGHT, "width": HEIGHT},
            image_mean=MEAN, image_std=STD,
        )
    )  # fmt: skip


def model() -> SamModel:
    """About 0.5 M parameters: patches of 4 pixels, four layers of width 64, the usual two-way mask decoder."""
    return SamModel(
        SamConfig(
            vision_config=SamVisionConfig(
                hidden_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=HEIGHT, patch_size=4,
                output_channels=64, window_size=8, global_attn_indexes=[2], mlp_ratio=3.0, num_pos_feats=32,
            ).to_dict(),
            prompt_encoder_config=SamPromptEncoderConfig(
                hidden_size=64, image_size=HEIGHT, patch_size=4, mask_input_channels=16
            ).to_dict(),
            mask_decoder_config=SamMaskDecoderConfig(
                hidden_size=64, mlp_dim=128, num_hidden_layers=2, num_attention_heads=4, iou_head_hidden_dim=64
            ).to_dict(),
        )
    )  # fmt: skip


def build(
    folder: Path,
    vae_folder: Path,
    work: Path,
    seed: int = 4,
    drawn_steps: int = 900,
    seen_steps: int = 500,
    batch: int = 12,
) -> None:
    """Train and write the segmenter's folder."""
    torch.manual_seed(seed)
    sam = model()
    # The class starts its random position features at frequencies fit for being overwritten by a checkpoint: so high
    # that neighbouring places have nothing in common. The original draws them with a scale of one.
    nn.init.normal_(sam.shared_image_embedding.positional_embedding, std=1.0)
    sam.prompt_encoder.shared_embedding = sam.shared_image_embedding
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)

    def step(number: int, seen: dict[str, Tensor] | None) -> dict[str, Tensor]:
        rng = np.random.default_rng((seed, seen is not None, number))
        pictures = [p for p in batch_of(rng, batch, seen) if len(p.names) == 2]
        pixels = torch.from_numpy(np.stack([p.frame for p in pictures])).permute(0, 3, 1, 2) / 255.0
        boxes = torch.from_numpy(np.stack([p.boxes for p in pictures])).float()
        size = (boxes[..., 2:] - boxes[..., :2]).repeat(1, 1, 2)
        boxes = boxes + torch.from_numpy(rng.normal(0, 0.06, boxes.shape)).float() * size
        truth = torch.from_numpy(np.stack([p.masks for p in pictures])).float()
        out = sam(pixel_values=(pixels - mean) / std, input_boxes=boxes, multimask_output=False)
        logits = out.pred_masks[:, :, 0]
        chance = logits.sigmoid()
        overlap = (chance * truth).sum((-1, -2))
        dice = 1 - (2 * overlap + 1) / (chance.sum((-1, -2)) + truth.sum((-1, -2)) + 1)
        # Only pixels near the object are hard; a plain mean would be all background.
        weight = 1 + 9 * functional.max_pool2d(truth, 7, 1, 3)
        entropy = functional.binary_cross_entropy_with_logits(logits, truth, weight) / weight.mean()
        with torch.no_grad():
            hard = logits > 0
            iou = (hard & (truth > 0)).sum((-1, -2)) / (hard | (truth > 0)).sum((-1, -2)).clamp(min=1)
        guess = (out.iou_scores[:, :, 0] - iou).square().mean()
        return {"loss": entropy + dice.mean() + guess, "dice": dice.mean(), "iou": iou.mean(), "guess": guess}

    Loop("segmenter-drawn", work, sam, drawn_steps, lr=1e-3, warmup=100, decay=0.3).run(lambda n: step(n, None))
    seen = through_vae(vae_folder, work)
    Loop("segmenter-seen", work, sam, seen_steps, lr=4e-4, decay=0.8, ema=0.99).run(lambda n: step(n, seen))
    sam.eval().save_pretrained(folder)
    processor().save_pretrained(folder)
