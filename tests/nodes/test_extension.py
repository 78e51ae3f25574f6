"""What ComfyUI is told of the nodes, and that what it is told is so.

``tests/golden/object_info.json`` is the answer of the real ``comfy_api`` of the oldest ComfyUI the pack supports. After
a wanted change of the nodes it is made anew from a source tree of that version:

    SPATIALALIGN_COMFYUI=/path/to/ComfyUI SPATIALALIGN_WRITE_GOLDEN=1 python -m pytest tests/nodes/test_extension.py
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import os
import runpy
import sys
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

IDS = [
    *("SpatialAlignPrompt", "SpatialAlignParse", "SpatialAlignPromptSet", "SpatialAlignLoadGroundedSAM"),
    *("SpatialAlignTrack", "SpatialAlignTracksFromMasks", "SpatialAlignTracksFromBoxes", "SpatialAlignDrawTracks"),
    *("SpatialAlignScore", "SpatialAlignPickBest", "SpatialAlignScoreSummary"),
    *("SpatialAlignLoadVideoReward", "SpatialAlignVideoRewardScore", "SpatialAlignLoadVLM", "SpatialAlignVLMJudge"),
    *("SpatialAlignMetrics", "SpatialAlignLoadPatchReward", "SpatialAlignPatchRewardHeatmap", "SpatialAlignLoadLora"),
    *("SpatialAlignLoadReward", "SpatialAlignRewardWeights", "SpatialAlignRewardGuidance"),
    *("SpatialAlignBestOfNSampler", "SpatialAlignParticleSampler"),
    *("SpatialAlignCollect", "SpatialAlignLoadMiniature"),
]
TAKE_LISTS = {"SpatialAlignPickBest", "SpatialAlignScoreSummary"}
END_A_GRAPH = {
    *("SpatialAlignScore", "SpatialAlignScoreSummary", "SpatialAlignCollect"),
    *("SpatialAlignVideoRewardScore", "SpatialAlignVLMJudge", "SpatialAlignMetrics", "SpatialAlignPatchRewardHeatmap"),
}
_SEARCH = [False, False, False, True, False, False]
GIVE_LISTS = {
    "SpatialAlignTrack": [True] * 5,
    "SpatialAlignScore": [False, False, False, True, True, False, False],
    "SpatialAlignBestOfNSampler": _SEARCH,
    "SpatialAlignParticleSampler": _SEARCH,
}
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "object_info.json"


def described(nodes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """``object_info`` of all nodes as JSON has it, without the module, which is named by the pack's folder."""
    told = json.loads(json.dumps({one: node.GET_NODE_INFO_V1() for one, node in nodes.items()}))
    return {one: {key: value for key, value in info.items() if key != "python_module"} for one, info in told.items()}


def sockets(info: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """The inputs of a node by id, required ones first: (type, options)."""
    return info["input"]["required"] | info["input"].get("optional", {})


def host_version(host_path: Path) -> str | None:
    """The version of the ComfyUI whose ``comfy_api`` is in use; None for the stand-in."""
    file = host_path / "comfyui_version.py"
    return str(runpy.run_path(str(file))["__version__"]) if file.is_file() else None


def oldest(root: Path) -> str:
    """The oldest ComfyUI that the pack says it supports."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    return str(project["tool"]["comfy"]["requires-comfyui"]).removeprefix(">=")


def test_object_info_is_that_of_the_oldest_host(nodes: dict[str, Any], host_path: Path, repo_root: Path) -> None:
    told, version = described(nodes), host_version(host_path)
    if os.environ.get("SPATIALALIGN_WRITE_GOLDEN"):
        assert version == oldest(repo_root), f"the golden file is made with ComfyUI {oldest(repo_root)}, not {version}"
        GOLDEN.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert list(told) == list(golden) == IDS
    for one, info in golden.items():
        # A newer host tells more of a node. What the oldest one tells must stay as it was.
        found = {key: told[one].get(key) for key in info} if version not in (None, oldest(repo_root)) else told[one]
        assert found == info, f"{one} is described otherwise than in {GOLDEN.name}"


def test_every_node_and_socket_is_described(nodes: dict[str, Any]) -> None:
    told = described(nodes)
    names = [info["display_name"] for info in told.values()]
    assert all(names) and len(set(names)) == len(names)
    for one, info in told.items():
        assert one.startswith("SpatialAlign") and info["category"].startswith("SpatialAlign/")
        bare = [name for name, (_, options) in sockets(info).items() if not options.get("tooltip", "").strip()]
        bare += [name for name, tip in zip(info["output_name"], info["output_tooltips"], strict=True) if not tip]
        assert not bare, f"{one}: no tooltip on {bare}"
        assert len(info["description"]) > 40, f"{one} has no description"
        # A file of translations addresses sockets by name.
        assert len(set(info["output_name"])) == len(info["output_name"])
        assert not [name for name in (one, *sockets(info)) if "." in name]


def test_defaults_can_be_chosen(nodes: dict[str, Any]) -> None:
    """A widget that starts at a value it would not accept stops its graph before anything ran."""
    for one, info in described(nodes).items():
        for name, (kind, options) in sockets(info).items():
            start = options.get("default")
            if kind == "COMBO":
                # A new installation has no LoRA.
                assert options["options"] or name == "lora", f"{one}.{name} offers nothing to choose"
                assert start is None or start in options["options"], f"{one}.{name}: {start!r} is not on offer"
            if kind in ("INT", "FLOAT"):
                assert start is not None and {"min", "max"} <= set(options), f"{one}.{name} has no default or limits"
                assert options["min"] <= start <= options["max"], f"{one}.{name} starts outside its limits"


def test_lists_and_ends(nodes: dict[str, Any]) -> None:
    schemas = {one: node.GET_SCHEMA() for one, node in nodes.items()}
    assert {one for one, schema in schemas.items() if schema.is_input_list} == TAKE_LISTS
    assert {one for one, schema in schemas.items() if schema.is_output_node} == END_A_GRAPH
    lists = {one: [output.is_output_list for output in schema.outputs] for one, schema in schemas.items()}
    assert {one: flags for one, flags in lists.items() if any(flags)} == GIVE_LISTS


def test_execute_takes_what_the_schema_offers(nodes: dict[str, Any]) -> None:
    for one, node in nodes.items():
        inputs = node.GET_SCHEMA().inputs
        taken = inspect.signature(node.execute).parameters
        assert sorted(taken) == sorted(socket.id for socket in inputs), f"{one}: inputs and execute differ"
        assert {p.kind for p in taken.values()} <= {inspect.Parameter.POSITIONAL_OR_KEYWORD}
        # ComfyUI leaves an optional input out when nothing is linked to it, and always passes the others.
        for socket in inputs:
            has_default = taken[socket.id].default is not inspect.Parameter.empty
            assert has_default == socket.optional, f"{one}.execute: {socket.id} and its schema disagree on optional"
        for name in ("validate_inputs", "fingerprint_inputs", "check_lazy_status"):
            if name in vars(node):
                asked = set(inspect.signature(getattr(node, name)).parameters) - {"input_types"}
                assert asked <= set(taken), f"{one}.{name} asks for what is no input: {sorted(asked - set(taken))}"


def test_tools_that_only_read_the_source_find_every_node(repo_root: Path) -> None:
    """ComfyUI's manager looks for classes right below ``io.ComfyNode`` with a literal ``node_id``."""
    found = []
    for path in sorted((repo_root / "nodes").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and any("ComfyNode" in ast.unparse(base) for base in node.bases):
                assert [ast.unparse(base) for base in node.bases] == ["io.ComfyNode"], node.name
                named = [key.value for key in ast.walk(node) if isinstance(key, ast.keyword) and key.arg == "node_id"]
                assert len(named) == 1 and isinstance(named[0], ast.Constant), f"{node.name} has no literal node_id"
                found.append(named[0].value)
    assert sorted(found) == sorted(IDS)


def test_a_failed_import_says_why(
    pack: ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import asyncio

    monkeypatch.delitem(sys.modules, f"{pack.__name__}.nodes.extension", raising=False)
    monkeypatch.setitem(sys.modules, f"{pack.__name__}.nodes.dataset", None)
    with pytest.raises(ImportError, match="dataset"):
        asyncio.run(pack.comfy_entrypoint())
    (record,) = [record for record in caplog.records if record.name == "spatialalign"]
    assert record.levelname == "ERROR" and record.exc_info
    assert "extension.py" in caplog.text and "dataset" in caplog.text


def test_an_unknown_keyword_is_refused(host_path: Path) -> None:
    """The stand-in is as strict as the host: a keyword it does not know would cost the user every node."""
    from comfy_api.latest import io

    for wrong in (
        lambda: io.Schema(node_id="x", spelt_wrong=True),
        lambda: io.Int.Input("x", spelt_wrong=True),
        lambda: io.Image.Input("x", default=1),
        lambda: io.Custom("X").Output("x", spelt_wrong=True),
        lambda: io.NodeOutput(1, spelt_wrong=True),
    ):
        with pytest.raises(TypeError, match="unexpected keyword"):
            wrong()


def test_the_standin_accepts_nothing_the_host_refuses(host_path: Path, repo_root: Path) -> None:
    """Every keyword of the stand-in's classes is one of the real class of the same name."""
    if host_version(host_path) is None:
        pytest.skip("SPATIALALIGN_COMFYUI names no source tree of ComfyUI to compare the stand-in with")
    from comfy_api.latest import io as real

    ours = standin_io(repo_root)
    compared = 0
    for name in ours.__all__:
        for one, other in pairs(getattr(ours, name), getattr(real, name)):
            assert keywords(one) <= keywords(other), f"{name}: the host does not know {keywords(one) - keywords(other)}"
            compared += 1
    assert compared >= 40
    assert {one.name: one.value for one in ours.Hidden}.items() <= {one.name: one.value for one in real.Hidden}.items()


def standin_io(repo_root: Path) -> ModuleType:
    """The stand-in's ``io`` under a name of its own, beside the real one."""
    folder = repo_root / "tests" / "standin" / "comfy_api" / "latest"
    spec = importlib.util.spec_from_file_location("standin_latest", folder / "__init__.py")
    assert spec and spec.loader
    package = importlib.util.module_from_spec(spec)
    sys.modules["standin_latest"] = package
    spec.loader.exec_module(package)
    io: ModuleType = package.io
    return io


def pairs(one: Any, other: Any) -> list[tuple[Any, Any]]:
    """A class of the stand-in and the host's, or the inputs and outputs of a socket type."""
    if hasattr(one, "Input"):
        return [(one.Input, other.Input), (one.Output, other.Output)]
    return [(one, other)] if isinstance(one, type) and not issubclass(one, Enum) else []


def keywords(made: Any) -> set[str]:
    """The keywords that making an object of a class takes."""
    return set(inspect.signature(made).parameters)
