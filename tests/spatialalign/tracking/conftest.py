"""Tiny models of the real classes, randomly initialised, for the tracking backends. No downloads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] ? cat box polar bear sofa bed ham ##ster dog a the".split()


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A word-piece tokenizer whose delimiters have BERT's ids (101, 102, 1012, 1029), as Grounding DINO demands."""
    from transformers import BertTokenizerFast

    fixed = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]", 1012: ".", 1029: "?"}
    words = iter([word for word in WORDS if word not in fixed.values()])
    vocabulary = [fixed.get(i) or next(words, f"[unused{i}]") for i in range(1030)]
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def write_processor() -> Callable[..., None]:
    """Writes the processor file that a model's ``save_pretrained`` would, without needing torchvision to do so."""

    def write(folder: Path, kind: str, size: dict[str, int], pad: int | None = None) -> None:
        image: dict[str, object] = {
            "image_processor_type": f"{kind}ImageProcessor",
            "do_resize": True,
            "size": size,
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
            "resample": 2,
        }
        if pad is not None:
            image |= {"do_pad": True, "pad_size": {"height": pad, "width": pad}}
        content = {"image_processor": image, "processor_class": f"{kind}Processor"}
        (folder / "processor_config.json").write_text(json.dumps(content))

    return write


@pytest.fixture(scope="session")
def clip() -> np.ndarray:
    """Five frames of 48 x 64: a red square that moves right, past a green one."""
    frames = np.full((5, 48, 64, 3), 90, dtype=np.uint8)
    frames += np.arange(64, dtype=np.uint8)[:, None]
    frames[:, 20:36, 30:46] = (30, 200, 40)
    for i in range(5):
        frames[i, 22:32, 4 + 10 * i : 14 + 10 * i] = (220, 30, 30)
    return frames
