"""Which model a LoRA is for, by the sizes of its matrices, and what model-spec entries call that model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .module_names import is_ltx

if TYPE_CHECKING:
    from .lora import LoraPair

WIDTHS = {128: "the miniature", 1536: "Wan 1.3B", 3072: "Wan 2.2 5B", 5120: "Wan 14B"}
"""Wan models by the width of their blocks."""

LTX_WIDTHS = {2048: "LTX-Video 2B", 4096: "LTX-Video 13B"}
"""LTX-Video models by the width of their blocks."""

_WAN_21, _WAN_22 = "https://github.com/Wan-Video/Wan2.1", "https://github.com/Wan-Video/Wan2.2"
_ARCHITECTURES = {
    "Wan 1.3B": ("wan-2_1-text2video-1_3b", _WAN_21),
    "Wan 14B": ("wan-2_1-text2video-14b", _WAN_21),
    "Wan 2.2 5B": ("wan-2_2-ti2v-5b", _WAN_22),
}
_A14B = ("wan-2_2-text2video-14b", _WAN_22)
_LTX = ("lightricks-ltx-video", "https://github.com/Lightricks/LTX-Video")
_OTHER_WAN = ("wan2.1", _WAN_21)
"""Of another width, such as the miniature's; also what kohya's musubi-tuner states for every Wan model."""


def guess_base(pairs: Mapping[str, LoraPair]) -> str | None:
    """The model whose width most adapted linears (diffusers module names) give; None where no known one occurs.

    What they take tells less: a text embedding has 4096 values for models of every width.
    """
    widths = LTX_WIDTHS if any(map(is_ltx, pairs)) else WIDTHS
    given = Counter(widths[pair.up.shape[0]] for pair in pairs.values() if pair.up.shape[0] in widths)
    return given.most_common(1)[0][0] if given else None


def architecture(pairs: Mapping[str, LoraPair], notes: Mapping[str, Any]) -> tuple[str, str]:
    """``modelspec.architecture`` and ``modelspec.implementation`` of a LoRA file.

    The names are those that SwarmUI sorts models by, or formed like them where it has none. Wan 2.2 A14B has the sizes
    of Wan 2.1 14B; it is told by the notes: an ``expert``, or a ``base_model`` that says 2.2.
    """
    base = guess_base(pairs)
    if any(map(is_ltx, pairs)):
        name, implementation = _LTX
    elif base == "Wan 14B" and ("expert" in notes or re.search(r"wan[ _-]?2[._]2", str(notes.get("base_model")), re.I)):
        name, implementation = _A14B
    else:
        name, implementation = _ARCHITECTURES.get(base or "", _OTHER_WAN)
    return f"{name}/lora", implementation
