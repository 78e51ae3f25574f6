"""What a graph says of a value's making, read from the form in which ComfyUI hands graphs to nodes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

TWO_EXPERTS = {
    "high": {"class_type": "UNETLoader", "inputs": {"unet_name": "wan2.2_high.safetensors"}},
    "low": {"class_type": "UNETLoader", "inputs": {"unet_name": "wan2.2_low.safetensors"}},
    "shift": {"class_type": "ModelSamplingSD3", "inputs": {"model": ["high", 0], "shift": ["count", 0]}},
    "count": {"class_type": "PrimitiveFloat", "inputs": {"value": 8.0}},
    "sum": {"class_type": "Add", "inputs": {"a": 1, "b": 2}},
    "first": {
        "class_type": "KSamplerAdvanced",
        "inputs": {"model": ["shift", 0], "noise_seed": 3, "steps": 20, "end_at_step": 10, "cfg": ["sum", 0]},
    },
    "second": {
        "class_type": "KSamplerAdvanced",
        "inputs": {"model": ["low", 0], "latent_image": ["first", 0], "noise_seed": 4, "steps": 20, "end_at_step": 20},
    },
    "here": {"class_type": "SpatialAlignCollect", "inputs": {"latent": ["second", 0], "seed": 9}},
    "aside": {"class_type": "KSampler", "inputs": {"steps": 1, "seed": 5}},
}


@pytest.fixture
def graph(module: Callable[[str], Any]) -> Any:
    """The pack's nodes.graph."""
    return module("graph")


def test_what_several_nodes_state_is_listed_nearest_first(graph: Any) -> None:
    """Computed values and nodes that lead elsewhere are left out; a value held by a node of its own is read."""
    assert graph.sampling_settings(TWO_EXPERTS, "here", "latent") == {
        "checkpoint": ["wan2.2_low.safetensors", "wan2.2_high.safetensors"],
        "last_step": [20, 10],
        "shift": 8.0,
        "steps": [20, 20],
    }
    assert graph.seeds(TWO_EXPERTS, "here", "latent") == {3, 4}
    assert graph.model_file(TWO_EXPERTS, "first", "model") == "wan2.2_high.safetensors"
    assert graph.model_file(TWO_EXPERTS, "here", "latent") == "wan2.2_low.safetensors"


@pytest.mark.parametrize("hidden", [None, {}, {"here": {"class_type": "X", "inputs": {"latent": ["gone", 0]}}}])
def test_without_a_graph_nothing_is_known(graph: Any, hidden: Any) -> None:
    assert graph.sampling_settings(hidden, "here", "latent") == {}
    assert graph.loras(hidden, "here", "latent") == []
    assert graph.seeds(hidden, "here", "latent") == set()
    assert graph.model_file(hidden, "here", "latent") is None


def test_a_circle_ends(graph: Any) -> None:
    circle = {"a": {"inputs": {"x": ["b", 0], "steps": 3}}, "b": {"inputs": {"x": ["a", 0]}}}
    assert graph.sampling_settings(circle, "a", "x") == {"steps": 3}
