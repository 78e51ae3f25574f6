"""Socket types, their inputs and outputs, and how ``object_info`` writes them.

Stricter than the real ones in one thing: only the id, a combo's options and a multi-type's types go by position.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar


class NumberDisplay(str, Enum):
    """How a number's widget looks."""

    number = "number"
    slider = "slider"


class FolderType(str, Enum):
    """Which of the host's folders a saved file lies in."""

    input = "input"
    output = "output"
    temp = "temp"


class UploadType(str, Enum):
    """What a combo lets its user upload."""

    image = "image_upload"
    audio = "audio_upload"
    video = "video_upload"
    model = "file_upload"


@dataclass
class Input:
    """One input socket of a node."""

    io_type: ClassVar[str]

    id: str
    display_name: str | None = field(default=None, kw_only=True)
    optional: bool = field(default=False, kw_only=True)
    tooltip: str | None = field(default=None, kw_only=True)
    lazy: bool | None = field(default=None, kw_only=True)
    raw_link: bool | None = field(default=None, kw_only=True)
    extra_dict: dict[str, Any] = field(default_factory=dict, kw_only=True)

    def get_io_type(self) -> str:
        """The type as ``object_info`` names it."""
        return self.io_type

    def entries(self) -> dict[str, Any]:
        """The settings by the names of ``object_info``; None where unset."""
        return {
            "display_name": self.display_name,
            "tooltip": self.tooltip,
            "lazy": self.lazy,
            "rawLink": self.raw_link,
        }

    def as_dict(self) -> dict[str, Any]:
        """The settings that are set."""
        return {key: value for key, value in (self.entries() | self.extra_dict).items() if value is not None}


@dataclass
class WidgetInput(Input):
    """An input that is also a widget."""

    default: Any = field(default=None, kw_only=True)
    socketless: bool | None = field(default=None, kw_only=True)

    def entries(self) -> dict[str, Any]:
        return super().entries() | {"default": self.default, "socketless": self.socketless}


@dataclass
class ForcibleInput(WidgetInput):
    """A widget that may be turned into a mere socket."""

    force_input: bool | None = field(default=None, kw_only=True)

    def entries(self) -> dict[str, Any]:
        return super().entries() | {"forceInput": self.force_input}


@dataclass
class BooleanInput(ForcibleInput):
    default: bool | None = field(default=None, kw_only=True)
    label_on: str | None = field(default=None, kw_only=True)
    label_off: str | None = field(default=None, kw_only=True)

    def entries(self) -> dict[str, Any]:
        return super().entries() | {"label_on": self.label_on, "label_off": self.label_off}


@dataclass
class NumberInput(ForcibleInput):
    display_mode: NumberDisplay | None = field(default=None, kw_only=True)

    def entries(self) -> dict[str, Any]:
        return super().entries() | {"display": self.display_mode.value if self.display_mode else None}


@dataclass
class IntInput(NumberInput):
    default: int | None = field(default=None, kw_only=True)
    min: int | None = field(default=None, kw_only=True)
    max: int | None = field(default=None, kw_only=True)
    step: int | None = field(default=None, kw_only=True)
    control_after_generate: bool | None = field(default=None, kw_only=True)

    def entries(self) -> dict[str, Any]:
        limits = {"min": self.min, "max": self.max, "step": self.step}
        return super().entries() | limits | {"control_after_generate": self.control_after_generate}


@dataclass
class FloatInput(NumberInput):
    default: float | None = field(default=None, kw_only=True)
    min: float | None = field(default=None, kw_only=True)
    max: float | None = field(default=None, kw_only=True)
    step: float | None = field(default=None, kw_only=True)
    round: float | None = field(default=None, kw_only=True)

    def entries(self) -> dict[str, Any]:
        return super().entries() | {"min": self.min, "max": self.max, "step": self.step, "round": self.round}


@dataclass
class StringInput(ForcibleInput):
    default: str | None = field(default=None, kw_only=True)
    multiline: bool = field(default=False, kw_only=True)
    placeholder: str | None = field(default=None, kw_only=True)
    dynamic_prompts: bool | None = field(default=None, kw_only=True)

    def entries(self) -> dict[str, Any]:
        return super().entries() | {
            "multiline": self.multiline,
            "placeholder": self.placeholder,
            "dynamicPrompts": self.dynamic_prompts,
        }


@dataclass
class ComboInput(WidgetInput):
    options: list[Any] | type[Enum] | None = None
    control_after_generate: bool | None = field(default=None, kw_only=True)
    upload: UploadType | None = field(default=None, kw_only=True)
    image_folder: FolderType | None = field(default=None, kw_only=True)

    def entries(self) -> dict[str, Any]:
        options = [one.value for one in self.options] if isinstance(self.options, type) else self.options
        return super().entries() | {
            "default": self.default.value if isinstance(self.default, Enum) else self.default,
            "multiselect": False,
            "options": options,
            "control_after_generate": self.control_after_generate,
            "image_folder": self.image_folder.value if self.image_folder else None,
            **({self.upload.value: True} if self.upload else {}),
        }


class Output:
    """One output socket of a node."""

    io_type: ClassVar[str]

    def __init__(
        self,
        id: str | None = None,
        display_name: str | None = None,
        tooltip: str | None = None,
        is_output_list: bool = False,
    ) -> None:
        self.id = id
        self.display_name = display_name or id
        self.tooltip = tooltip
        self.is_output_list = is_output_list


class ComfyType:
    """A socket type. A subclass names it, and its ``Input`` and ``Output`` are bound to that name."""

    Type = Any
    io_type: ClassVar[str]

    def __init_subclass__(cls, io_type: str = "") -> None:
        cls.io_type = io_type
        for side in ("Input", "Output"):
            if io_type:
                setattr(cls, side, type(side, (getattr(cls, side),), {"io_type": io_type}))


class ComfyTypeIO(ComfyType):
    """A type without a widget."""

    class Input(Input): ...

    class Output(Output): ...


def Custom(io_type: str) -> type[ComfyTypeIO]:
    """A socket type of the pack's own."""
    return type("Custom", (ComfyTypeIO,), {}, io_type=io_type)


class Boolean(ComfyType, io_type="BOOLEAN"):
    class Input(BooleanInput): ...

    class Output(Output): ...


class Int(ComfyType, io_type="INT"):
    class Input(IntInput): ...

    class Output(Output): ...


class Float(ComfyType, io_type="FLOAT"):
    class Input(FloatInput): ...

    class Output(Output): ...


class String(ComfyType, io_type="STRING"):
    class Input(StringInput): ...

    class Output(Output): ...


class Combo(ComfyType, io_type="COMBO"):
    class Input(ComboInput): ...

    class Output(Output): ...


class Image(ComfyTypeIO, io_type="IMAGE"): ...


class Mask(ComfyTypeIO, io_type="MASK"): ...


class Latent(ComfyTypeIO, io_type="LATENT"): ...


class Conditioning(ComfyTypeIO, io_type="CONDITIONING"): ...


class Model(ComfyTypeIO, io_type="MODEL"): ...


class Clip(ComfyTypeIO, io_type="CLIP"): ...


class Vae(ComfyTypeIO, io_type="VAE"): ...


class Video(ComfyTypeIO, io_type="VIDEO"): ...


class BBOX(ComfyTypeIO, io_type="BBOX"): ...


class AnyType(ComfyTypeIO, io_type="*"): ...


@dataclass
class MultiTypeInput(Input):
    types: list[type[ComfyType]] = field(default_factory=list)

    def get_io_type(self) -> str:
        return ",".join(dict.fromkeys(one.io_type for one in self.types))


class MultiType(ComfyType, io_type="COMFY_MULTITYPED_V3"):
    """Inputs that take more than one type. The real ones may carry a widget, too."""

    class Input(MultiTypeInput): ...

    class Output(Output): ...
