"""The example graphs, held against what ComfyUI and the pack say of their nodes.

``tests/golden/object_info.json`` describes our nodes, ``core_object_info.json`` those of ComfyUI. A graph in
``workflows/`` is what the interface loads, its twin in ``tests/workflows_api/`` what the server is sent for it.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = (
    "best_of_n",
    "best_of_n_sampler",
    "collect_preferences",
    "guided_miniature",
    "judge_video",
    "miniature",
    "patch_heat_map",
    "score_video",
    "video_reward",
    "wan_aligned_lora",
    "wan_guided",
    "wan_text_to_video",
)
CORE = json.loads((Path(__file__).parent / "core_object_info.json").read_text(encoding="utf-8"))["nodes"]
OURS = json.loads((ROOT / "tests" / "golden" / "object_info.json").read_text(encoding="utf-8"))
INFO = {**CORE, **OURS}
NOTES = {"MarkdownNote"}
"""Nodes that the interface knows by itself; the server never hears of them."""
CONTROLS = {"fixed", "increment", "decrement", "randomize"}
FILES = {
    "unet_name": {"wan2.1_t2v_1.3B_fp16.safetensors"},
    "clip_name": {"umt5_xxl_fp8_e4m3fn_scaled.safetensors"},
    "vae_name": {"wan_2.1_vae.safetensors"},
    "lora": {"lora_comfyui.safetensors"},
    "reward": {"miniature", "wan21_reward.safetensors"},
    "file": {"my_video.mp4"},
}
"""Choices that are files on the user's machine, and the names the graphs were saved with."""

Graph = dict[str, Any]


def inputs(kind: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """The inputs of a node by name, in their order: (type, options)."""
    groups = INFO[kind]["input"]
    specs = {**groups.get("required", {}), **groups.get("optional", {})}
    return {name: (spec[0], spec[1] if len(spec) > 1 else {}) for name, spec in specs.items()}


def is_widget(kind: str) -> bool:
    return kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def widgets(kind: str) -> list[tuple[str, str, dict[str, Any]]]:
    """What ``widgets_values`` holds, in order: (name, type, options); "" for a control or an upload button."""
    found = []
    for name, (sort, options) in inputs(kind).items():
        if is_widget(sort):
            found.append((name, sort, options))
            # The interface also gives a control to every number of these names.
            if options.get("control_after_generate") or (sort == "INT" and name in ("seed", "noise_seed")):
                found.append(("", "CONTROL", {}))
            if options.get("video_upload"):
                found.append(("", "UPLOAD", {}))
    return found


def api_form(ui: Graph) -> Graph:
    """What the interface sends to the server for a graph without subgraphs, bypassed or muted nodes."""
    origin = {link[0]: [str(link[1]), link[2]] for link in ui["links"]}
    sent = {}
    for node in ui["nodes"]:
        if node["type"] in NOTES:
            continue
        named = zip(widgets(node["type"]), node.get("widgets_values", []), strict=True)
        values = {name: value for (name, _, _), value in named if name}
        values |= {slot["name"]: origin[slot["link"]] for slot in node["inputs"] if slot["link"] is not None}
        title = node.get("title", INFO[node["type"]]["display_name"])
        sent[str(node["id"])] = {"class_type": node["type"], "inputs": values, "_meta": {"title": title}}
    return sent


def problems(ui: Graph) -> list[str]:
    """Everything that is wrong with a graph, in words."""
    unknown = [node["type"] for node in ui["nodes"] if node["type"] not in {*INFO, *NOTES}]
    if unknown:
        return [f"unknown nodes {unknown}"]
    nodes = [node for node in ui["nodes"] if node["type"] not in NOTES]
    found = _form(ui) + _links(ui)
    for node in nodes:
        found += [f"node {node['id']} {node['type']}: {words}" for words in _sockets(node) + _values(node)]
    return found + _ends(ui, nodes)


def _form(ui: Graph) -> list[str]:
    ids = [node["id"] for node in ui["nodes"]]
    links = [link[0] for link in ui["links"]]
    checks = {
        "version is not 0.4": ui.get("version") == 0.4,
        "node ids repeat": len(set(ids)) == len(ids),
        "link ids repeat": len(set(links)) == len(links),
        "last_node_id is wrong": ui["last_node_id"] == max(ids),
        "last_link_id is wrong": ui["last_link_id"] == max(links),
        "a node is muted or bypassed": all(node["mode"] == 0 for node in ui["nodes"]),
        "the order is no order": sorted(node["order"] for node in ui["nodes"]) == list(range(len(ids))),
        "there is no note": any(node["type"] in NOTES and node["widgets_values"][0].strip() for node in ui["nodes"]),
    }
    return [words for words, fine in checks.items() if not fine]


def _links(ui: Graph) -> list[str]:
    nodes = {node["id"]: node for node in ui["nodes"]}
    found = []
    for one, source, out, target, slot, kind in ui["links"]:
        try:
            start, end = nodes[source]["outputs"][out], nodes[target]["inputs"][slot]
        except (KeyError, IndexError):
            found.append(f"link {one} has a loose end")
            continue
        if one not in (start["links"] or []) or end["link"] != one:
            found.append(f"link {one} is not in the tables of both its nodes")
        if kind != start["type"] or (end["type"] not in (kind, "*")):
            found.append(f"link {one} joins {start['type']} to {end['type']} as {kind}")
        if nodes[source]["order"] >= nodes[target]["order"]:
            found.append(f"link {one} runs against the order")
    held = [link for node in ui["nodes"] for slot in node["outputs"] for link in slot["links"] or []]
    held += [slot["link"] for node in ui["nodes"] for slot in node["inputs"] if slot["link"] is not None]
    if sorted(held) != sorted(2 * [link[0] for link in ui["links"]]):
        found.append("sockets hold links that are not in the table")
    return found


def _sockets(node: Graph) -> list[str]:
    declared, info, found = inputs(node["type"]), INFO[node["type"]], []
    linked = {slot["name"] for slot in node["inputs"] if slot["link"] is not None}
    # A widget has a socket in the file only where it is linked.
    wanted = {name: sort for name, (sort, _) in declared.items() if not is_widget(sort) or name in linked}
    if {slot["name"]: slot["type"] for slot in node["inputs"]} != wanted:
        found.append("its inputs are not the declared ones")
    for slot in node["inputs"]:
        if (slot.get("widget", {}).get("name") == slot["name"]) != is_widget(slot["type"]):
            found.append(f"input {slot['name']} is wrongly marked as widget or socket")
        if slot["link"] is None and not is_widget(slot["type"]) and slot["name"] in info["input"].get("required", {}):
            found.append(f"required input {slot['name']} is not connected")
    if [(slot["name"], slot["type"]) for slot in node["outputs"]] != list(
        zip(info["output_name"], info["output"], strict=True)
    ):
        found.append("its outputs are not the declared ones")
    pack = "spatialalign" if node["type"] in OURS else "comfy-core"
    properties = node["properties"]
    if (properties["Node name for S&R"], properties["cnr_id"]) != (node["type"], pack) or not properties["ver"]:
        found.append(f"its properties are {properties}")
    return found


def _values(node: Graph) -> list[str]:
    declared, values = widgets(node["type"]), node.get("widgets_values", [])
    if len(declared) != len(values):
        return [f"{len(values)} values for {len(declared)} widgets"]
    found = []
    for (name, sort, options), value in zip(declared, values, strict=True):
        fits = {
            "CONTROL": lambda value=value: value in CONTROLS,
            "UPLOAD": lambda value=value: value == "image",
            "BOOLEAN": lambda value=value: isinstance(value, bool),
            "STRING": lambda value=value: isinstance(value, str),
            "INT": lambda value=value, o=options: type(value) is int and _within(value, o),
            "FLOAT": lambda value=value, o=options: type(value) in (int, float) and _within(value, o),
            "COMBO": lambda value=value, name=name, o=options: value in FILES.get(name, o["options"]),
        }
        if not fits[sort]():
            found.append(f"{name or sort} cannot be {value!r}")
    return found


def _within(value: float, options: dict[str, Any]) -> bool:
    return bool(options.get("min", value) <= value <= options.get("max", value))


def _ends(ui: Graph, nodes: list[Graph]) -> list[str]:
    """Every node must lead to one that ends a graph, or it would never run."""
    kept = {node["id"] for node in nodes if INFO[node["type"]]["output_node"]}
    for node in sorted(nodes, key=lambda node: -node["order"]):
        if any(link[1] == node["id"] and link[3] in kept for link in ui["links"]):
            kept.add(node["id"])
    return [f"node {node['id']} {node['type']} leads nowhere" for node in nodes if node["id"] not in kept]


def load(name: str) -> Graph:
    graph: Graph = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    return graph


def test_these_are_all() -> None:
    """ComfyUI offers every JSON file of the folder as a template."""
    assert {path.name for path in (ROOT / "workflows").iterdir()} == {
        f"{name}.{form}" for name in NAMES for form in ("json", "jpg")
    }
    assert {path.name for path in (ROOT / "tests" / "workflows_api").iterdir()} == {f"{name}.json" for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_graph_is_sound(name: str) -> None:
    assert not problems(load(name))


@pytest.mark.parametrize("name", NAMES)
def test_graph_names_no_place_on_a_machine(name: str) -> None:
    text = (ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8")
    assert not re.findall(r'"(?:/|~|[A-Za-z]:\\)[^"]*"', text)


@pytest.mark.parametrize("name", NAMES)
def test_twin_is_what_the_interface_would_send(name: str) -> None:
    twin = json.loads((ROOT / "tests" / "workflows_api" / f"{name}.json").read_text(encoding="utf-8"))
    assert twin == api_form(load(name))


@pytest.mark.parametrize("name", NAMES)
def test_thumbnail(name: str) -> None:
    from PIL import Image

    path = ROOT / "workflows" / f"{name}.jpg"
    assert path.stat().st_size < 150_000
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "JPEG" and 300 <= min(picture.size) and max(picture.size) <= 1200


def test_every_node_of_ours_that_needs_no_other_pack_is_shown() -> None:
    used = {node["type"] for name in NAMES for node in load(name)["nodes"]}
    bridges = {"SpatialAlignTracksFromMasks", "SpatialAlignTracksFromBoxes", "SpatialAlignDrawTracks"}
    assert set(OURS) - used == bridges


def _node(ui: Graph, kind: str) -> Graph:
    return next(node for node in ui["nodes"] if node["type"] == kind)


BREAKS: dict[str, Callable[[Graph], Any]] = {
    "a node of another pack": lambda ui: _node(ui, "VAEDecode").update(type="VHS_VideoCombine"),
    "a value too many": lambda ui: _node(ui, "KSampler")["widgets_values"].append(1),
    "no control after the seed": lambda ui: _node(ui, "KSampler")["widgets_values"].pop(1),
    "values in another order": lambda ui: _node(ui, "KSampler")["widgets_values"].reverse(),
    "a choice that is not offered": lambda ui: _node(ui, "KSampler")["widgets_values"].__setitem__(4, "eulre"),
    "a number out of range": lambda ui: _node(ui, "KSampler")["widgets_values"].__setitem__(2, 0),
    "a link of another type": lambda ui: ui["links"][0].__setitem__(5, "LATENT"),
    "a link to a missing node": lambda ui: ui["links"][0].__setitem__(3, 999),
    "a link to another slot": lambda ui: ui["links"][0].__setitem__(4, ui["links"][0][4] + 1),
    "a link that is only in the table": lambda ui: ui["links"].append([ui["last_link_id"] + 1, *ui["links"][0][1:]]),
    "an input that is not connected": lambda ui: (
        [node["inputs"][0].update(link=None) for node in ui["nodes"] if node["type"] == "SpatialAlignScore"]
    ),
    "a renamed output": lambda ui: _node(ui, "SpatialAlignTrack")["outputs"][0].update(name="track"),
    "two nodes of one id": lambda ui: ui["nodes"][1].update(id=ui["nodes"][2]["id"]),
    "an old last id": lambda ui: ui.update(last_node_id=1),
    "a muted node": lambda ui: ui["nodes"][1].update(mode=2),
    "no note": lambda ui: ui["nodes"].remove(_node(ui, "MarkdownNote")),
}


@pytest.mark.parametrize("fault", BREAKS)
def test_faults_are_seen(fault: str) -> None:
    ui = copy.deepcopy(load("miniature"))
    BREAKS[fault](ui)
    assert problems(ui)
