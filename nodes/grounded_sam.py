"""The node that loads a detector and a segmenter, and where their weights are looked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from comfy_api.latest import io

from ..spatialalign.errors import ConfigError, ModelError
from . import host
from .sockets import GROUNDED_SAM_SOCKET

if TYPE_CHECKING:
    from ..spatialalign.tracking.preprocess import Preprocess
    from ..spatialalign.tracking.tracker import Tracker

BATCH = 2
"""Frames given to a model at once: so often progress is shown and a stop is heard."""
MINIATURE, NONE = "miniature", "none"
_DETECTORS, _SEGMENTERS = ("grounding-dino",), ("sam2", "sams")


@dataclass(frozen=True)
class HubModel:
    """A model on the Hugging Face hub: its folder below ``models``, its pinned commit, size and licence.

    A model whose commit could not be verified has none, and is never downloaded by the pack.
    """

    folder: str
    revision: str | None
    megabytes: int
    licence: str = "Apache-2.0"


HUB = {
    "openmmlab-community/mm_grounding_dino_tiny_o365v1_goldg_v3det": HubModel("grounding-dino", None, 692),
    "IDEA-Research/grounding-dino-tiny": HubModel("grounding-dino", "a2bb814dd30d776dcf7e30523b00659f4f141c71", 690),
    "facebook/sam2.1-hiera-base-plus": HubModel("sam2", "b7320756a13354e7530a63935656d35b2f91a290", 324),
    "facebook/sam2.1-hiera-large": HubModel("sam2", "665f8e2ad61cf5f53d65644ff27c8ee525124610", 898),
    "facebook/sam-vit-base": HubModel("sams", "70c1a07f894ebb5b307fd9eaaee97b9dfc16068f", 375),
}
"""Recommended for real video: MM Grounding DINO and SAM 2.1 base plus. Then the paper's two, and SAM as a light one."""
_ALL = HUB | {
    "google-bert/bert-base-uncased": HubModel("grounding-dino", "86b5e0934494bd15c9632b12f734a8a67f723594", 441)
}
_FILES = ["config.json", "model.safetensors", "*processor_config.json", "tokenizer*.json", "vocab.txt"]


@dataclass(frozen=True)
class GroundedSam:
    """A tracker, and the host's patchers about its models; the models are on the device only after ``host.load``.

    ``preprocess`` is the detector's, for :meth:`memory`.
    """

    tracker: Tracker
    patchers: tuple[Any, ...]
    preprocess: Preprocess | None = None

    def memory(self, frames: int, height: int, width: int) -> int:
        """About how many bytes tracking a clip takes beside the weights.

        Measured for a batch in Grounding DINO (Swin-T) and computed for what SAM 2 remembers of each frame; both see
        pictures of about the same size.
        """
        if self.preprocess is None:
            return 0
        rows, columns = self.preprocess.target(height, width)
        return rows * columns * (1200 * BATCH + 16 * frames)


class LoadGroundedSam(io.ComfyNode):
    """A detector and a segmenter from the models folder, the miniature, or a download that was asked for."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpatialAlignLoadGroundedSAM",
            display_name="Load GroundedSAM",
            category="SpatialAlign/Tracking",
            description=(
                "Loads a Grounding DINO, which finds the two things by their names, and a SAM, which outlines and "
                "follows them. Names with a slash are models of the Hugging Face hub: they are looked for in ComfyUI's "
                "models folder, then in the Hugging Face cache, and downloaded only if you say so."
            ),
            inputs=[
                io.Combo.Input(
                    "detector",
                    options=[MINIATURE, *_choices(_DETECTORS)],
                    default=MINIATURE,
                    tooltip=(
                        "Grounding DINO. miniature knows the words of the miniature world only. Put transformers "
                        "folders (or the original .pth) into models/grounding-dino."
                    ),
                ),
                io.Combo.Input(
                    "segmenter",
                    options=[MINIATURE, NONE, *_choices(_SEGMENTERS)],
                    default=MINIATURE,
                    tooltip=(
                        "SAM 2 follows both things through the clip; SAM outlines each frame's boxes; none takes the "
                        "detector's boxes. Put transformers folders into models/sam2 or models/sams (also SAM's .pth)."
                    ),
                ),
                io.Combo.Input(
                    "rule",
                    options=["robust", "paper"],
                    default="robust",
                    tooltip=(
                        "Which clips count as tracked: robust matches names by their tokens and starts at the best "
                        "frame; paper follows the published program to the letter."
                    ),
                ),
                io.Combo.Input(
                    "precision",
                    options=["float32", "bfloat16", "float16"],
                    default="float32",
                    tooltip="Number format of the weights. Scores are comparable between runs in float32 only.",
                ),
                io.Boolean.Input(
                    "download",
                    default=False,
                    tooltip=(
                        "Allow a download into the Hugging Face cache when a hub model is not on this machine. A fixed "
                        "version is taken; HF_HUB_OFFLINE is respected."
                    ),
                ),
            ],
            outputs=[
                GROUNDED_SAM_SOCKET.Output(
                    display_name="grounded_sam", tooltip="Detector and segmenter, for GroundedSAM Track."
                )
            ],
        )

    @classmethod
    def execute(
        cls, detector: str, segmenter: str, rule: Literal["robust", "paper"], precision: str, download: bool
    ) -> io.NodeOutput:
        return io.NodeOutput(grounded_sam(detector, segmenter, rule, precision, download))


def grounded_sam(
    detector: str, segmenter: str, rule: Literal["robust", "paper"], precision: str, download: bool
) -> GroundedSam:
    """Load both models in host memory and hand them to the host's memory management.

    Args:
        detector: "miniature", a name in ``models/grounding-dino``, or a key of :data:`HUB`.
        segmenter: "miniature", "none", a name in ``models/sam2`` or ``models/sams``, or a key of :data:`HUB`.
        rule: "robust" or "paper".
        precision: name of a torch number format.
        download: whether a hub model that is not here may be fetched.

    Raises:
        ModelError: a model is missing, damaged or of another kind.
    """
    import torch

    from ..spatialalign.miniature import DETECTOR, SEGMENTER
    from ..spatialalign.tracking.load import load_detector, load_segmenter
    from ..spatialalign.tracking.tracker import Tracker

    if precision != "float32" and (detector.endswith(".pth") or segmenter.endswith(".pth")):
        raise ConfigError(f"precision {precision}: original .pth models run in float32 only; set it to float32")
    path = DETECTOR if detector == MINIATURE else _located(detector, _DETECTORS, download)
    bert = _text_encoder(download) if detector.endswith(".pth") else None
    finder = load_detector(path, rule=rule, batch=BATCH, bert=bert)
    modules, outliner = [finder.model], None
    if segmenter != NONE:
        path = SEGMENTER if segmenter == MINIATURE else _located(segmenter, _SEGMENTERS, download)
        outliner = load_segmenter(path, fresh_backward=rule == "paper", batch=BATCH)
        modules.append(outliner.model)
    patchers = tuple(host.patcher(module.to(getattr(torch, precision))) for module in modules)
    return GroundedSam(Tracker(finder, outliner, rule=rule), patchers, finder.preprocess)


def _choices(folders: Sequence[str]) -> list[str]:
    """Hub models, and what else is in ``folders``; a hub model that is there under its own name is listed once."""
    hub = [name for name, model in HUB.items() if model.folder in folders]
    here = [name for folder in folders for name in host.model_names(folder)]
    known = {alias for name in _ALL for alias in _aliases(name)}
    return [*hub, *dict.fromkeys(name for name in here if name not in known)]


def _aliases(name: str) -> tuple[str, ...]:
    """Names under which a choice may lie in a folder: a hub model with its owner's name or without."""
    return (name, name.rpartition("/")[2]) if name in _ALL else (name,)


def _located(name: str, folders: Sequence[str], download: bool) -> Path:
    for folder in folders:
        for alias in _aliases(name):
            if alias in host.model_names(folder):
                return host.model_path(folder, alias)
    if name not in _ALL:
        return host.model_path(folders[0], name)  # says what is missing and where it goes
    return _from_hub(name, download)


def _text_encoder(download: bool) -> Path:
    """What an original Grounding DINO needs beside its file. Without its library no one is sent to fetch this."""
    from ..spatialalign.tracking.load import BERT
    from ..spatialalign.tracking.original import groundingdino

    groundingdino("models")
    return _located(BERT, _DETECTORS, download)


def _from_hub(name: str, download: bool) -> Path:
    """The folder of a hub model in the Hugging Face cache, fetched if that is allowed and its version is pinned."""
    from huggingface_hub import snapshot_download

    model = _ALL[name]
    fetch = download and model.revision is not None
    try:
        found = snapshot_download(name, revision=model.revision, allow_patterns=_FILES, local_files_only=not fetch)
    except Exception as error:  # the client raises errors of its own, of its HTTP library and of the system
        reason = f"could not be downloaded ({type(error).__name__}: {error})" if fetch else "is not on this machine"
        page = f"https://huggingface.co/{name}" + (f"/tree/{model.revision}" if model.revision else "")
        raise ModelError(
            f"{name} {reason}; put its files ({page}, {model.megabytes} MB, {model.licence}) into "
            f"models/{model.folder}/{name.rpartition('/')[2]}"
            + (", or switch download on" if model.revision and not download else "")
        ) from error
    return Path(found)
