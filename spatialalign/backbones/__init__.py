"""Video generators behind one small protocol."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ModelError

if TYPE_CHECKING:
    from .wan import WanBackbone


def load_backbone(name: str, device: str = "auto", dtype: str = "auto") -> WanBackbone:
    """Load a Wan model by name.

    Args:
        name: ``"miniature"`` (the one shipped with this package), a diffusers ``WanPipeline`` folder, or a hub id.
        device: ``"auto"`` (CUDA, then MPS, then CPU) or a torch device such as ``"cuda:1"``.
        dtype: ``"auto"`` (bfloat16 on CUDA, float32 elsewhere), ``"float32"``, ``"bfloat16"`` or ``"float16"``.

    Raises:
        ModelError: when the folder lacks a part, or is not a text-to-video Wan model.
    """
    source = str(Path(__file__).parent.parent / "miniature" / "weights" / "wan") if name == "miniature" else name
    if name == "miniature" and not Path(source).is_dir():
        raise ModelError(f"the miniature's weights are not in {source}; build them with python -m training.miniature")

    from .wan import WanBackbone

    return WanBackbone.from_pretrained(source, device=device, dtype=dtype, model_id=name)
