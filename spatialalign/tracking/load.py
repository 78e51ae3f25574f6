"""A ready tracker by name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import ModelError
from .parts import PROCESSOR, TOKENIZER, WEIGHTS, require
from .tracker import Tracker

if TYPE_CHECKING:
    from .grounding_dino import GroundingDinoDetector
    from .original import OriginalGroundingDino, OriginalSam
    from .sam import SamFrameSegmenter
    from .sam2 import Sam2VideoPropagator

MINIATURE = Path(__file__).resolve().parent.parent / "miniature" / "weights"
DEFAULT = "openmmlab-community/mm_grounding_dino_tiny_o365v1_goldg_v3det+facebook/sam2.1-hiera-base-plus"
"""What we recommend for real video; ``PAPER`` is what the paper used."""
PAPER = "IDEA-Research/grounding-dino-tiny+facebook/sam2.1-hiera-large"
BERT = "google-bert/bert-base-uncased"
"""Text encoder of the original Grounding DINO checkpoints."""
_MISMATCH = "torchvision::|'torchvision' has no attribute|PyTorch and torchvision"
"""In what PyTorch says when torchvision's compiled part does not fit it."""


def load_tracker(
    name: str | Path = "miniature", device: str = "cpu", rule: Literal["robust", "paper"] = "robust", batch: int = 8
) -> Tracker:
    """A tracker from

    * ``"miniature"``: the detector and segmenter that are shipped with the package;
    * a folder with ``detector/`` and ``segmenter/`` in it (transformers model folders; the segmenter may be left out);
    * ``"<detector>+<segmenter>"``: hub ids or folders, e.g. ``DEFAULT`` and ``PAPER``; one id alone is a detector.

    ``rule`` "paper" also takes the paper's label rule and thresholds. Raises
    :class:`~spatialalign.errors.ModelError` naming the missing part.
    """
    text = str(name)
    folder = MINIATURE if text == "miniature" else Path(text)
    segmenter_name: str | None
    if text == "miniature" or folder.is_dir():
        require(folder / "detector", ["config.json", WEIGHTS, PROCESSOR, TOKENIZER])
        if text == "miniature" or (folder / "segmenter").exists():
            require(folder / "segmenter", ["config.json", WEIGHTS, PROCESSOR])
            segmenter_name = str(folder / "segmenter")
        else:
            segmenter_name = None
        detector_name = str(folder / "detector")
    else:
        detector_name, plus, rest = text.partition("+")
        segmenter_name = rest if plus else None
        if not detector_name or segmenter_name == "":
            raise ModelError(f"tracker {text!r}: expected 'miniature', a folder, or '<detector>+<segmenter>'")
        if text.startswith((".", "/", "~")) and not plus:
            raise ModelError(f"{text}: no such folder; expected one with detector/ and segmenter/ in it")
    detector = load_detector(detector_name, device, rule, batch)
    segmenter = None if segmenter_name is None else load_segmenter(segmenter_name, device, rule == "paper", batch)
    return Tracker(detector, segmenter, rule=rule)


def load_detector(
    name: str | Path,
    device: str = "cpu",
    rule: Literal["robust", "paper"] = "robust",
    batch: int = 8,
    bert: str | Path | None = None,
) -> GroundingDinoDetector | OriginalGroundingDino:
    """Grounding DINO from a transformers folder or hub id, or from an original ``.pth`` file.

    ``bert`` is the text encoder that only a ``.pth`` file needs beside it, by default ``BERT`` from the hub. Raises
    :class:`~spatialalign.errors.ModelError` naming the file or the missing part.
    """
    original = _is_original(name)
    with _library_errors():
        from .grounding_dino import OFFICIAL, GroundingDinoDetector, Matching

        matching = OFFICIAL if rule == "paper" else Matching()
        if not original:
            return GroundingDinoDetector.from_pretrained(name, device, matching, batch)
        from .original import OriginalGroundingDino

        return OriginalGroundingDino.from_pth(name, bert or BERT, device, matching, batch=batch)


def load_segmenter(
    name: str | Path, device: str = "cpu", fresh_backward: bool = False, batch: int = 8
) -> Sam2VideoPropagator | SamFrameSegmenter | OriginalSam:
    """SAM 2 video or SAM per frame, by the ``model_type`` of a transformers folder or hub id; SAM for a ``.pth`` file.

    Raises :class:`~spatialalign.errors.ModelError` naming the file or the missing part.
    """
    original, text = _is_original(name), str(name)
    with _library_errors():
        if original:
            from .original import OriginalSam

            return OriginalSam.from_pth(name, device)
        from transformers import AutoConfig

        from .parts import guarded
        from .sam import SamFrameSegmenter
        from .sam2 import Sam2VideoPropagator

        kind = guarded(text, lambda: AutoConfig.from_pretrained(text)).model_type
        if kind in ("sam2", "sam2_video"):
            return Sam2VideoPropagator.from_pretrained(name, device, batch, fresh_backward)
        if kind == "sam":
            return SamFrameSegmenter.from_pretrained(name, device, batch)
    raise ModelError(f"{text}: model type {kind!r} is no segmenter; expected sam, sam2 or sam2_video")


def _is_original(name: str | Path) -> bool:
    """Whether ``name`` is an original checkpoint; raises for any other single file."""
    if Path(name).is_file() and Path(name).suffix != ".pth":
        raise ModelError(
            f"{name}: a single file of this kind cannot be read; take the model's transformers folder (config.json, "
            "model.safetensors and the processor's files), or the original .pth of Grounding DINO or SAM"
        )
    return Path(name).suffix == ".pth"


@contextmanager
def _library_errors() -> Iterator[None]:
    """Say what to do when torchvision, which transformers imports if it is there, was built for another torch."""
    try:
        yield
    except (ModelError, RuntimeError, ImportError, AttributeError) as error:
        if not re.search(_MISMATCH, str(error)):
            raise
        from importlib.metadata import version

        raise ModelError(
            f"torchvision {version('torchvision')} does not work with torch {version('torch')} ({error}); "
            "install the torchvision that belongs to this torch, or uninstall torchvision"
        ) from error
