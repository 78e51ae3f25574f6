"""Video generators behind one small protocol."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, ModelError

if TYPE_CHECKING:
    from .base import Backbone, ExpertName


def load_backbone(name: str, device: str = "auto", dtype: str = "auto", expert: ExpertName | None = None) -> Backbone:
    """Load a model by name; what it is comes from its ``model_index.json``.

    Args:
        name: ``"miniature"`` (the one shipped with this package), a diffusers folder, or a hub id. Known are
            text-to-video Wan 2.1 (1.3B, 14B), Wan 2.2 (TI2V-5B, T2V-A14B) and LTX-Video.
        device: ``"auto"`` (CUDA, then MPS, then CPU) or a torch device such as ``"cuda:1"``.
        dtype: ``"auto"`` (bfloat16 on CUDA, float32 elsewhere), ``"float32"``, ``"bfloat16"`` or ``"float16"``.
        expert: of a model with two experts (A14B), the one that may be trained or carry a LoRA: ``"high"`` (also None)
            or ``"low"``.

    Raises:
        ModelError: the folder lacks a part, or is no text-to-video model known here.
        ConfigError: an expert is asked of a model that has one transformer.
    """
    source = str(Path(__file__).parent.parent / "miniature" / "weights" / "wan") if name == "miniature" else name
    if name == "miniature" and not Path(source).is_dir():
        raise ModelError(f"the miniature's weights are not in {source}; build them with python -m training.miniature")

    from .loading import read_index

    pipeline = read_index(source).get("_class_name")
    if pipeline == "WanPipeline":
        from .wan import WanBackbone

        return WanBackbone.from_pretrained(source, device, dtype, name, expert)
    if pipeline == "LTXPipeline":
        from .ltx import LtxBackbone

        if expert is not None:
            raise ConfigError(f"expert {expert!r} needs a model with two (Wan 2.2 A14B); {name} has one transformer")
        return LtxBackbone.from_pretrained(source, device, dtype, name)
    raise ModelError(
        f"{name} is a {pipeline or 'model without _class_name in its model_index.json'}; known are text-to-video "
        "models in a WanPipeline (Wan 2.1 and 2.2) or an LTXPipeline (LTX-Video)"
    )
