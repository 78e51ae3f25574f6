"""The pack as ComfyUI loads it, on a host whose folders are temporary and whose device is the processor.

The nodes meet a stand-in for ``comfy_api`` (tests/standin). With ``SPATIALALIGN_COMFYUI=/path/to/ComfyUI`` they meet
the real one of that source tree instead.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMFYUI = os.environ.get("SPATIALALIGN_COMFYUI")
HOST = Path(COMFYUI) if COMFYUI else ROOT / "tests" / "standin"
# Inputs that have a value without a link, and which one where the schema names none.
WIDGETS = {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False, "COMBO": None}


class Interrupted(Exception):
    """What the host raises when the user pressed stop."""


class Frozen(type):
    """ComfyUI runs a node on a copy of its class that refuses to be changed."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise AttributeError(f"{cls.__name__} is locked while it runs: {name} cannot be set")


@dataclass
class FakeHost:
    """The folders the nodes see, what they loaded and reported, and the user's stop button."""

    input: Path
    output: Path
    temp: Path
    models: Path
    loaded: list[Any] = field(default_factory=list)
    progress: list[tuple[int, int]] = field(default_factory=list)
    previews: list[Any] = field(default_factory=list)
    interrupt_at: int | None = None
    """The number of the check for an interrupt that finds one, from 0."""
    checks: int = 0
    shown: dict[Any, str] = field(default_factory=dict)
    """The text that each node shows, by the node's id."""

    def show_text(self, text: str, node: Any) -> None:
        """Note what would be drawn on a node."""
        self.shown[node] = text

    def patcher(self, module: Any) -> SimpleNamespace:
        """Something that holds a module as ComfyUI's ModelPatcher does."""
        import torch

        return SimpleNamespace(model=torch.nn.ModuleList([module]), load_device=torch.device("cpu"))

    def load(self, patchers: Any, memory: int = 0) -> Any:
        """Note what was asked for; everything is on the processor already."""
        import torch

        self.loaded += patchers
        return torch.device("cpu")

    def check_interrupt(self) -> None:
        """Raise :class:`Interrupted` at the check that ``interrupt_at`` names."""
        self.checks += 1
        if self.interrupt_at is not None and self.checks > self.interrupt_at:
            raise Interrupted

    def bar(self, total: int) -> SimpleNamespace:
        """A progress bar that notes (done, total)."""

        def update(done: int, preview: Any = None) -> None:
            self.check_interrupt()
            self.progress.append((done, total))
            self.previews += [] if preview is None else [preview]

        return SimpleNamespace(update=update)


@pytest.fixture(scope="session")
def host_path() -> Iterator[Path]:
    """``comfy_api`` can be imported while this fixture lives: the stand-in's, or a real ComfyUI's on the processor."""
    if not (HOST / "comfy_api" / "latest").is_dir():
        pytest.fail(f"SPATIALALIGN_COMFYUI={COMFYUI} is not a source tree of ComfyUI: it has no comfy_api/latest")
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(HOST)
        if COMFYUI:
            from comfy.cli_args import args

            args.cpu = True
        yield HOST
    for name in set(sys.modules) - before:
        if name.startswith((str(ROOT), "comfy_api", "folder_paths")):
            del sys.modules[name]


@pytest.fixture(scope="session")
def pack(host_path: Path) -> ModuleType:
    """The pack under the name ComfyUI gives it: the path of its folder, dots replaced."""
    name = str(ROOT).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py")
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="session")
def module(pack: ModuleType) -> Callable[[str], ModuleType]:
    """``module("tracking")`` is the pack's ``nodes.tracking``, ``module("spatialalign.dsr")`` a part of its engine."""

    def load(name: str) -> ModuleType:
        return importlib.import_module(
            f"{pack.__name__}.{name if name.startswith('spatialalign') else f'nodes.{name}'}"
        )

    return load


@pytest.fixture
def nodes(pack: ModuleType, fake_host: FakeHost) -> dict[str, Any]:
    """All nodes by id, as the pack's entry point hands them to ComfyUI."""
    listed = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
    return {node.GET_SCHEMA().node_id: node for node in listed}


@pytest.fixture
def fake_host(module: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHost:
    """``nodes.host`` with temporary folders, no accelerator, and a record of what the nodes asked for."""
    import folder_paths

    host = FakeHost(*(tmp_path / name for name in ("input", "output", "temp", "models")))
    for folder in (host.input, host.output, host.temp, host.models / "loras"):
        folder.mkdir(parents=True)
    for name in ("input", "output", "temp"):
        monkeypatch.setattr(folder_paths, f"{name}_directory", str(getattr(host, name)))
    monkeypatch.setattr(folder_paths, "models_dir", str(host.models))
    loras = ([str(host.models / "loras")], {".safetensors", ".pt", ".ckpt"})
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {"loras": loras})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    ours = module("host")
    for name, replacement in (
        ("patcher", host.patcher),
        ("load", host.load),
        ("check_interrupt", host.check_interrupt),
        ("interruption", lambda: Interrupted),
        ("show_text", host.show_text),
        ("Progress", host.bar),
        ("intermediate", lambda tensor: tensor.float()),
    ):
        monkeypatch.setattr(ours, name, replacement)
    return host


@pytest.fixture
def run(fake_host: FakeHost) -> Callable[..., Any]:
    """``run(node_class, **inputs)``: one execution as ComfyUI does it, on a locked copy of the class.

    Widgets that are not given have their default, as in a new node; ``hidden`` is a dict of hidden values by name.
    The answer is a NodeOutput.
    """

    def execute(node: Any, hidden: dict[str, Any] | None = None, **inputs: Any) -> Any:
        from comfy_api.latest import io

        schema = node.GET_SCHEMA()
        types = node.INPUT_TYPES()
        sockets = types["required"] | types.get("optional", {})
        wrap = (lambda value: [value]) if schema.is_input_list else (lambda value: value)
        widgets = {
            name: entry for name, entry in sockets.items() if entry[0] in WIDGETS and "forceInput" not in entry[1]
        }
        defaults = {name: wrap(start(*entry)) for name, entry in widgets.items()}
        given = defaults | inputs
        assert set(types["required"]) <= set(given) <= set(sockets), "inputs that ComfyUI would not pass"
        wanted = {one: (hidden or {}).get(one.name) for one in io.Hidden if one in schema.hidden}
        clone = node.PREPARE_CLASS_CLONE({"hidden_inputs": wanted})
        return Frozen(node.__name__, (clone,), {}).EXECUTE_NORMALIZED(**given)

    return execute


def start(kind: str, options: dict[str, Any]) -> Any:
    """The value of an untouched widget."""
    if "default" in options:
        return options["default"]
    return options["options"][0] if kind == "COMBO" else WIDGETS[kind]


@pytest.fixture
def video(host_path: Path) -> Callable[[Any, float], Any]:
    """``video(images, fps)``: a VIDEO of these frames (T, H, W, 3)."""

    def make(images: Any, fps: float) -> Any:
        rate = Fraction(fps).limit_denominator(1000)
        if COMFYUI:
            from comfy_api.latest import InputImpl, Types

            return InputImpl.VideoFromComponents(Types.VideoComponents(images=images, frame_rate=rate))
        parts = SimpleNamespace(images=images, frame_rate=rate, audio=None, metadata=None)
        return SimpleNamespace(get_components=lambda: parts)

    return make
