"""Load Miniature: what it asks of the host. The loaded models themselves are tried in tests/host."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SIDE = 4096
"""Width of the text embeddings of every Wan model."""


@pytest.fixture
def asked(module: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, ...]]:
    """The arguments of the host's loaders, which return their own names."""
    calls: dict[str, tuple[Any, ...]] = {}

    def note(name: str) -> Callable[..., str]:
        def loader(*arguments: Any) -> str:
            calls[name] = arguments
            return name

        return loader

    for name in ("wan_model", "wan_clip", "wan_vae"):
        monkeypatch.setattr(module("host"), name, note(name))
    return calls


def test_it_hands_the_shipped_weights_to_the_native_loaders(
    nodes: dict[str, Any], run: Callable[..., Any], asked: dict[str, tuple[Any, ...]], miniature_weights: Path
) -> None:
    outputs = run(nodes["SpatialAlignLoadMiniature"]).result
    assert outputs[:3] == ("wan_model", "wan_clip", "wan_vae")
    assert outputs[3].tracker.segmenter is not None and len(outputs[3].patchers) == 2
    scheduler = json.loads((miniature_weights / "wan" / "scheduler" / "scheduler_config.json").read_text("utf-8"))
    weights, shift = asked["wan_model"]
    assert shift == scheduler["shift"] == 3.0
    # The two weights by which ComfyUI tells Wan 2.1 from other models, and sees its width.
    assert tuple(weights["head.modulation"].shape) == (1, 2, 128)
    assert tuple(weights["patch_embedding.weight"].shape) == (128, 16, 1, 2, 2)
    assert "decoder.middle.0.residual.0.gamma" in asked["wan_vae"][0]
    weights, config, tokenizer = asked["wan_clip"]
    assert tuple(weights["shared.weight"].shape) == (config["vocab_size"], SIDE)
    assert config["dense_act_fn"] == "gelu_pytorch_tanh" and config["is_gated_act"]
    assert (tokenizer / "tokenizer.json").is_file()


def test_its_help_names_what_it_can_be_asked_for(nodes: dict[str, Any], miniature_weights: Path) -> None:
    """The size and the steps in the description are those of the model's own settings."""
    description = nodes["SpatialAlignLoadMiniature"].GET_SCHEMA().description
    settings = json.loads(
        (Path(__file__).parents[2] / "spatialalign/miniature/weights/wan/spatialalign.json").read_text()
    )
    for words in (
        f"{settings['frames']} frames of {settings['width']}x{settings['height']}",
        f"{settings['fps']:g} frames per second",
        f"{settings['steps']} steps and cfg {settings['guidance']:g}",
    ):
        assert words in description
