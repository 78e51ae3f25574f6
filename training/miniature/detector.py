"""Stage 4: the detector (``GroundingDinoForObjectDetection``): phrases in, boxes out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import (
    BertConfig,
    BertTokenizerFast,
    ConvNextConfig,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
)

from spatialalign.miniature import HEIGHT
from training.miniature.frames import NAMES, batch_of, through_vae
from training.miniature.loop import Loop

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def processor(folder: Path) -> GroundingDinoProcessor:
    """Image processor and word-piece tokenizer. Grounding DINO finds phrases by BERT's ids of ``[CLS]`` (101), ``[SEP]``
    (102), ``.`` (1012) and ``?`` (1029), so the small vocabulary keeps those places."""
    words = [f"[unused{i}]" for i in range(1060)]
    for place, token in {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}.items():
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
            ),
            text_config=BertConfig(
                vocab_size=1060, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128,
                hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
            ),
            d_model=64, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=256, decoder_ffn_dim=256,
            encoder_attention_heads=4, decoder_attention_heads=4, num_queries=12, num_feature_levels=3, dropout=0.0,
            fusion_droppath=0.0, auxiliary_loss=True, disable_custom_kernels=True,
        )
    )  # fmt: skip


def build(folder: Path, vae_folder: Path, work: Path, seed: int = 3, drawn_steps: int = 2400, seen_steps: int = 1200, batch: int = 16) -> None:
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
        return {"loss": out.loss, "ce": parts["loss_ce"], "box": parts["loss_bbox"], "giou": parts["loss_giou"]}

    # Drawn pictures need no autoencoder, so this part can run while that is still being trained.
    Loop("detector-drawn", work, detector, drawn_steps, lr=1e-3, warmup=200, decay=0.3).run(lambda n: step(n, None))
    seen = through_vae(vae_folder, work)
    Loop("detector-seen", work, detector, seen_steps, lr=5e-4, decay=0.8, ema=0.998).run(lambda n: step(n, seen))
    detector.eval().save_pretrained(folder)
    tools.save_pretrained(folder)
