"""Names of the tensors in VideoReward checkpoints, and where each belongs (methods: 2.4).

The released names are those of peft 0.10 around transformers 4.45: ``base_model.model.`` in front, ``.base_layer``
inside a layer with an adapter, ``visual.`` and ``model.`` where transformers has ``model.visual.`` and
``model.language_model.`` since 4.52.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .video_reward_config import LoraSettings

if TYPE_CHECKING:
    from torch import Tensor, dtype

PEFT = "base_model.model."
HEAD = "rm_head.weight"
EMBEDDING = "model.language_model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
_SIDES: tuple[Literal["A", "B"], ...] = ("A", "B")


@dataclass(frozen=True)
class Slot:
    """Where a tensor of a checkpoint belongs.

    Attributes:
        parameter: its name in today's ``Qwen2VLForConditionalGeneration``, or ``HEAD``.
        shape: as it must be.
        side: ``""`` for the parameter itself, ``"A"`` or ``"B"`` for a side of the adapter beside it.
    """

    parameter: str
    shape: tuple[int, ...]
    side: Literal["", "A", "B"] = ""


def released_name(name: str) -> str:
    """The name that transformers 4.45 had for a parameter or module of today's; older names stay as they are."""
    for today, then in (("model.visual.", "visual."), ("model.language_model.", "model.")):
        if name.startswith(today):
            return then + name.removeprefix(today)
    return name


def layout(
    shapes: Mapping[str, tuple[int, ...]], wrapped: Collection[str], lora: LoraSettings | None
) -> dict[str, Slot]:
    """Every tensor of a checkpoint by its released name.

    Args:
        shapes: of all parameters, by today's names.
        wrapped: today's names of the layers with adapters.
    """
    slots = {stored_name(name, wrapped, lora is not None): Slot(name, shape) for name, shape in shapes.items()}
    if lora is not None:
        for module in wrapped:
            rows, columns = shapes[f"{module}.weight"]
            for side, shape in zip(_SIDES, ((lora.rank, columns), (rows, lora.rank)), strict=True):
                stored = f"{PEFT}{released_name(module)}.lora_{side}.default.weight"
                slots[stored] = Slot(f"{module}.weight", shape, side)
    return slots


def stored_name(name: str, wrapped: Collection[str], peft: bool) -> str:
    """The name in a checkpoint of parameter ``name``, whether given as today's or as transformers 4.45's."""
    if not peft:
        return released_name(name)
    module, _, leaf = name.rpartition(".")
    inner = f"{module}.base_layer.{leaf}" if module in wrapped else name
    return PEFT + released_name(inner)


def normalised_name(name: str) -> str:
    """A name found in a file as the released one: adapter sides get their ``.default``, today's names the old ones."""
    for side in _SIDES:
        if name.endswith(f".lora_{side}.weight"):
            name = name.removesuffix("weight") + "default.weight"
    prefix = PEFT if name.startswith(PEFT) else ""
    return prefix + released_name(name.removeprefix(prefix))


def merged(parts: Mapping[str, Mapping[str, Tensor]], scaling: float, dtype: dtype) -> dict[str, Tensor]:
    """Parameters with their adapters added, from ``by_side``: ``W + scaling * B @ A`` in float32, then in ``dtype``."""
    whole = dict(parts[""])
    for name, a in parts["A"].items():
        whole[name] = (whole[name].float() + scaling * (parts["B"][name].float() @ a.float())).to(dtype)
    return whole


def by_side(tensors: Mapping[str, Tensor], slots: Mapping[str, Slot]) -> dict[str, dict[str, Tensor]]:
    """Sort tensors by ``Slot.side``, then by the parameter that they belong to."""
    parts: dict[str, dict[str, Tensor]] = {"": {}, "A": {}, "B": {}}
    for name, slot in slots.items():
        parts[slot.side][slot.parameter] = tensors[name]
    return parts
