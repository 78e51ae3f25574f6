"""A ready tracker by name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ..errors import ModelError
from .parts import PROCESSOR, TOKENIZER, WEIGHTS, require
from .segment import FrameSegmenter, Propagator
from .tracker import Tracker

MINIATURE = Path(__file__).resolve().parent.parent / "miniature" / "weights"
DEFAULT = "openmmlab-community/mm_grounding_dino_tiny_o365v1_goldg_v3det+facebook/sam2.1-hiera-base-plus"
"""What we recommend for real video; ``PAPER`` is what the paper used."""
PAPER = "IDEA-Research/grounding-dino-tiny+facebook/sam2.1-hiera-large"


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
    from .grounding_dino import OFFICIAL, GroundingDinoDetector, Matching

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
    matching = OFFICIAL if rule == "paper" else Matching()
    detector = GroundingDinoDetector.from_pretrained(detector_name, device, matching, batch)
    segmenter = None if segmenter_name is None else load_segmenter(segmenter_name, device, rule == "paper", batch)
    return Tracker(detector, segmenter, rule=rule)


def load_segmenter(
    name: str, device: str = "cpu", fresh_backward: bool = False, batch: int = 8
) -> Propagator | FrameSegmenter:
    """SAM 2 video or SAM per frame, by the ``model_type`` in the configuration of a folder or hub id."""
    from transformers import AutoConfig

    from .parts import guarded
    from .sam import SamFrameSegmenter
    from .sam2 import Sam2VideoPropagator

    kind = guarded(name, lambda: AutoConfig.from_pretrained(name)).model_type
    if kind in ("sam2", "sam2_video"):
        return Sam2VideoPropagator.from_pretrained(name, device, batch, fresh_backward)
    if kind == "sam":
        return SamFrameSegmenter.from_pretrained(name, device, batch)
    raise ModelError(f"{name}: model type {kind!r} is no segmenter; expected sam, sam2 or sam2_video")
