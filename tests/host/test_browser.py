"""The shipped workflows in ComfyUI's own front end, in headless Chromium: they load whole, and a picture is taken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .test_server import Server, server

__all__ = ["server"]

WORKFLOWS = sorted(path.stem for path in (Path(__file__).resolve().parents[2] / "workflows").glob("*.json"))
LOADED = """name => {
    const graph = window.app?.graph;
    // the whole name: "miniature" is also a part of "guided_miniature"
    return Boolean(graph?._nodes?.length) && document.title.split(/\\W+/).includes(name);
}"""
NODES = """() => window.app.graph._nodes.map(node => ({
    id: Number(node.id),
    type: node.type,
    known: node.type in window.LiteGraph.registered_node_types,
    links: (node.inputs ?? []).filter(input => input.link != null).length,
}))"""


@pytest.fixture(scope="module")
def page(server: Server) -> Iterator[Any]:
    """A page of headless Chromium; skips where Playwright or Chromium is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next((found for name in names if (found := shutil.which(name))), None)
    if chromium is None:
        pytest.skip(f"none of {', '.join(names)} is installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield browser.new_page(viewport={"width": 2300, "height": 1060})
        browser.close()


@pytest.mark.parametrize("name", WORKFLOWS)
def test_the_front_end_loads_every_workflow(page: Any, server: Server, name: str, repo_root: Path) -> None:
    shipped = json.loads((repo_root / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    page.goto(f"{server.address}/?template={name}&source=SpatialAlign")
    page.wait_for_function(LOADED, arg=name, timeout=120_000)
    shown = {node["id"]: node for node in page.evaluate(NODES)}
    notes = {"MarkdownNote", "Note"}  # known to the front end alone
    assert {key: node["type"] for key, node in shown.items()} == {node["id"]: node["type"] for node in shipped["nodes"]}
    for node in shipped["nodes"]:
        found = shown[node["id"]]
        assert found["known"] or node["type"] in notes, f"{name}: {node['type']} is not known"
        assert found["links"] == sum(slot["link"] is not None for slot in node.get("inputs", [])), node["type"]


def test_a_picture_of_the_miniature_workflow_is_no_blank_page(page: Any, server: Server, tmp_path: Path) -> None:
    from PIL import Image

    page.goto(f"{server.address}/?template=miniature&source=SpatialAlign")
    page.wait_for_function(LOADED, arg="miniature", timeout=120_000)
    page.wait_for_timeout(2000)
    page.screenshot(path=tmp_path / "graph.png")
    colours = Image.open(tmp_path / "graph.png").convert("RGB").getcolors(1 << 22)
    assert colours is not None and len(colours) > 500
