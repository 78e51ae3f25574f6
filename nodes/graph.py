"""What the graph that is running says about how a value was made: read from the prompt that ComfyUI hands to a node."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Graph = Mapping[str, Mapping[str, Any]]
"""ComfyUI's hidden ``PROMPT``: node id -> ``{"class_type": ..., "inputs": {name: value or [node id, output]}}``."""

_SETTINGS = {
    "steps": "steps",
    "cfg": "guidance",
    "shift": "shift",
    "sampler_name": "sampler",
    "scheduler": "scheduler",
    "denoise": "denoise",
    "start_at_step": "first_step",
    "end_at_step": "last_step",
    "unet_name": "checkpoint",
    "ckpt_name": "checkpoint",
}
"""Inputs of core's samplers, schedulers and loaders, and the name under which a sample records them."""


def sampling_settings(graph: Graph | None, node: str, name: str) -> dict[str, Any]:
    """The sampling settings stated by the nodes that lead to input ``name`` of ``node``.

    A setting that several nodes state is a list, nearest node first; what is computed by other nodes is left out.
    """
    found: dict[str, list[Any]] = {}
    for inputs in _leading_to(graph or {}, node, name):
        for key in inputs.keys() & _SETTINGS.keys():
            value = _literal(graph or {}, inputs[key])
            if value is not None:
                found.setdefault(_SETTINGS[key], []).append(value)
    return {key: values[0] if len(values) == 1 else values for key, values in sorted(found.items())}


def loras(graph: Graph | None, node: str, name: str) -> list[str]:
    """``<file>@<strength>`` of the LoRAs that lead to input ``name`` of ``node``, nearest first, without those at 0."""
    found = []
    for inputs in _leading_to(graph or {}, node, name):
        file = _literal(graph or {}, inputs.get("lora_name", inputs.get("lora")))
        strength = _literal(graph or {}, inputs.get("strength_model", inputs.get("strength")))
        if isinstance(file, str) and isinstance(strength, int | float) and strength:
            found.append(f"{file}@{strength:g}")
    return found


def seeds(graph: Graph | None, node: str, name: str) -> set[int]:
    """The seeds stated by the nodes that lead to input ``name`` of ``node``."""
    values = (
        _literal(graph or {}, inputs.get(key))
        for inputs in _leading_to(graph or {}, node, name)
        for key in ("seed", "noise_seed")
    )
    return {value for value in values if isinstance(value, int)}


def model_file(graph: Graph | None, node: str, name: str) -> str | None:
    """The file of the diffusion model that input ``name`` of ``node`` comes from, if a loader on the way states it."""
    files = sampling_settings(graph, node, name).get("checkpoint")
    return files[0] if isinstance(files, list) else files


def _leading_to(graph: Graph, node: str, name: str) -> Iterator[Mapping[str, Any]]:
    """The inputs of every node upstream of an input, each node once, nearest first."""
    waiting = [graph.get(node, {}).get("inputs", {}).get(name)]
    seen = set()
    while waiting:
        link = waiting.pop(0)
        if not _is_link(link) or link[0] in seen or link[0] not in graph:
            continue
        seen.add(link[0])
        inputs = graph[link[0]].get("inputs", {})
        yield inputs
        waiting += inputs.values()


def _is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str)


def _literal(graph: Graph, value: Any) -> Any:
    """A widget's value, also where it comes from a node that only holds it; None when it is computed."""
    if not _is_link(value):
        return value if isinstance(value, str | int | float) else None
    inputs = graph.get(value[0], {}).get("inputs", {})
    held = inputs.get("value")
    return held if set(inputs) == {"value"} and isinstance(held, str | int | float) else None
