"""Stage 4: the detector (``GroundingDinoForObjectDetection``): phrases in, boxes out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    BertConfig,
    BertTokenizerFast,
    ConvNextConfig,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
)
from transformers.image_transforms import center_to_corners_format
from transformers.loss.loss_for_object_detection import generalized_box_iou

from spatialalign.miniature import HEIGHT
from training.miniature.frames import NAMES, batch_of, through_vae
from training.miniature.loop import Loop

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def processor(folder: Path) -> GroundingDinoProcessor:
    """Image processor and word-piece tokenizer.

    Grounding DINO finds phrases by BERT's ids of ``[CLS]`` (101), ``[SEP]`` (102), ``.`` (1012) and ``?`` (1029), so
    the small vocabulary keeps those places.
    """
    words = [f"[unused{i}]" for i in range(1060)]
    for place, token in {
        0: "[PAD]",
        100: "[UNK]",
        101: "[CLS]",
        102: "[SEP]",
        103: "[MASK]",
        1012: ".",
        1029: "?",
    }.items():
        words[place] = token
    words[1030 : 1030 + len(NAMES)] = NAMES
    folder.mkdir(parents=True, exist_ok=True)
    listing = folder / "vocab.txt"
    listing.write_text("\n".join(words) + "\n", encoding="utf-8")
    tokenizer = BertTokenizerFast(vocab=str(listing))
    images = GroundingDinoImageProcessor(
        size={"shortest_edge": HEIGHT, "longest_edge": HEIGHT}, image_mean=MEAN, image_std=STD
    )
    return GroundingDinoProcessor(images, tokenizer)


def model() -> GroundingDinoForObjectDetection:
    """About 1.3 M parameters; feature maps of stride 4, 8 and 16 of a 64-pixel picture."""
    return GroundingDinoForObjectDetection(
        GroundingDinoConfig(
            backbone_config=ConvNextConfig(
                patch_size=2, hidden_sizes=[32, 64, 128], depths=[1, 2, 2], num_stages=3, image_size=HEIGHT,
                out_features=["stage2", "stage3"], drop_path_rate=0.0,
                # The usual 1e-6 switches the blocks off until long after so short a training is over.
                layer_scale_init_value=1.0,
            ),
            text_config=BertConfig(
                vocab_size=1060, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            ),
            d_model=64, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=256, decoder_ffn_dim=256,
            encoder_attention_heads=4, decoder_attention_heads=4, num_queries=20,
            focal_alpha=0.5, num_feature_levels=3, dropout=0.0,
            fusion_droppath=0.0, auxiliary_loss=True, disable_custom_kernels=True,
        )
    )  # fmt: skip


def dense_loss(
    classes: Tensor, boxes: Tensor, labels: list[dict[str, Tensor]], levels: tuple[int, ...] = (16, 8, 4)
) -> Tensor:
    """Supervision of the encoder at every place of the feature maps at once, beside the class's own matched queries.

    Matching two boxes to a dozen queries teaches an untrained encoder next to nothing about places; here each place
    near the middle of a thing must name it, and each place inside a thing must give its box.

    Args:
        classes: text logits ``(b, places, tokens)``; phrase k of a caption is token ``1 + 2 k``.
        boxes: box logits ``(b, places, 4)`` of centre and size; not finite where the class forbids a proposal.
        labels: per picture ``class_labels`` (n,) and ``boxes`` (n, 4), centre and size in [0, 1].
        levels: sides of the square feature maps.
    """
    grids = [(torch.arange(n) + 0.5) / n for n in levels]
    places = torch.cat([torch.stack(torch.meshgrid(g, g, indexing="xy"), -1).view(-1, 2) for g in grids])
    wanted = torch.zeros(classes.shape[0], classes.shape[1], 8)
    predicted, truth = [], []
    for row, label in enumerate(labels):
        for number, box in zip(label["class_labels"], label["boxes"], strict=True):
            away = (places - box[:2]).abs() / box[2:]
            wanted[row, (away < 0.22).all(1), 1 + 2 * int(number)] = 1
            inside = (away < 0.4).all(1) & boxes[row].isfinite().all(1)
            predicted.append(boxes[row, inside].sigmoid())
            truth.append(box.expand(int(inside.sum()), 4))
    usable = boxes.isfinite().all(-1)
    logits = classes[usable][:, :8]
    real = logits.isfinite()
    target = wanted[usable][real]
    chance = logits[real].sigmoid()
    entropy = functional.binary_cross_entropy_with_logits(logits[real], target, reduction="none")
    hard = (target - chance).abs().square() * (0.25 + 0.5 * (1 - target))
    ours, theirs = torch.cat(predicted), torch.cat(truth)
    overlap = generalized_box_iou(center_to_corners_format(ours), center_to_corners_format(theirs)).diagonal()
    focal = (entropy * hard).sum() / target.sum().clamp(min=1)
    return 2 * focal + 5 * (ours - theirs).abs().sum(1).mean() + 2 * (1 - overlap).mean()


def build(
    folder: Path,
    vae_folder: Path,
    work: Path,
    seed: int = 3,
    drawn_steps: int = 1000,
    seen_steps: int = 800,
    batch: int = 16,
) -> None:
    """Train and write the detector's folder."""
    torch.manual_seed(seed)
    tools = processor(folder)
    detector = model()
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)

    def step(number: int, seen: dict[str, Tensor] | None) -> dict[str, Tensor]:
        rng = np.random.default_rng((seed, seen is not None, number))
        pictures = batch_of(rng, batch, seen)
        pixels = torch.from_numpy(np.stack([p.frame for p in pictures])).permute(0, 3, 1, 2) / 255.0
        captions, labels = [], []
        for item in pictures:
            asked = list(item.names)
            while len(asked) < 2 or (len(asked) < 3 and rng.random() < 0.2):
                asked.append(str(rng.choice([n for n in NAMES if n not in asked])))
            order = [asked[i] for i in rng.permutation(len(asked))]
            captions.append(" ".join(f"{name}." for name in order))
            boxes = torch.from_numpy(item.boxes).float().view(-1, 4) / HEIGHT
            centres = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)
            labels.append({"class_labels": torch.tensor([order.index(n) for n in item.names], dtype=torch.long),
                           "boxes": centres})  # fmt: skip
        words = tools.tokenizer(captions, padding=True, return_tensors="pt")
        # With auxiliary losses the class returns the loss of every decoder layer and of the encoder's proposals.
        out = detector((pixels - mean) / std, **words, labels=labels)
        parts = out.loss_dict
        dense = dense_loss(out.enc_outputs_class, out.enc_outputs_coord_logits, labels)
        return {"loss": out.loss + 2 * dense, "dense": dense, "ce": parts["loss_ce"], "box": parts["loss_bbox"],
                "giou": parts["loss_giou"]}  # fmt: skip

    # Drawn pictures need no autoencoder, so this part can run while that is still being trained.
    Loop("detector-drawn", work, detector, drawn_steps, lr=4e-4, warmup=100, decay=0.4).run(lambda n: step(n, None))
    seen = through_vae(vae_folder, work)
    Loop("detector-seen", work, detector, seen_steps, lr=2e-4, decay=0.8, ema=0.998).run(lambda n: step(n, seen))
    detector.eval().save_pretrained(folder)
    tools.save_pretrained(folder)
