"""A running ComfyUI server by its HTTP interface: the nodes it offers, and a whole graph without any download."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SHIPPED = ("__init__.py", "pyproject.toml", "requirements.txt", "nodes", "spatialalign", "web", "locales", "workflows")
"""What the pack needs inside ComfyUI: neither the training programs nor the tests."""
START_SECONDS = 600
RUN_SECONDS = 600


@dataclass(frozen=True)
class Server:
    """A server that answers at ``address`` and keeps its files in ``base``."""

    address: str
    base: Path

    def raw(self, path: str, data: Any = None) -> bytes:
        """The body of the answer to a GET, or to a POST of ``data`` as JSON; an HTTP error fails with its body."""
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.address + path, body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            pytest.fail(f"{path}: {error.code} {error.read().decode()}")

    def json(self, path: str, data: Any = None) -> Any:
        """The same, decoded."""
        return json.loads(self.raw(path, data))

    def run(self, workflow: dict[str, Any]) -> dict[str, Any]:
        """Queue a workflow in API format and return its history entry; fails when ComfyUI refuses it or it errs."""
        queued = self.json("/prompt", {"prompt": workflow})["prompt_id"]
        for _ in range(2 * RUN_SECONDS):
            history = self.json(f"/history/{queued}")
            if queued in history and history[queued]["status"]["completed"] is not None:
                assert history[queued]["status"]["status_str"] == "success", history[queued]["status"]
                return dict(history[queued])
            time.sleep(0.5)
        pytest.fail(f"the workflow did not end within {RUN_SECONDS} seconds")


@pytest.fixture(scope="module")
def server(comfyui: Path, repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """ComfyUI with a copy of what it needs of this repository as its only custom node."""
    base = tmp_path_factory.mktemp("server")
    for folder in ("custom_nodes", "models", "input", "output", "user"):
        (base / folder).mkdir()
    pack = base / "custom_nodes" / "SpatialAlign"
    pack.mkdir()
    for name in SHIPPED:
        copy = shutil.copytree if (repo_root / name).is_dir() else shutil.copy
        copy(repo_root / name, pack / name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "main.py", "--cpu", "--port", str(port), "--base-directory", str(base)]
    command += ["--database-url", "sqlite:///:memory:", "--disable-api-nodes"]
    log = base / "log.txt"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=comfyui, stdout=output, stderr=subprocess.STDOUT, env=dict(os.environ))
        try:
            yield _wait(Server(f"http://127.0.0.1:{port}", base), process, log)
        finally:
            process.terminate()
            process.wait(60)


def _wait(server: Server, process: subprocess.Popen[bytes], log: Path) -> Server:
    for _ in range(2 * START_SECONDS):
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(server.address + "/queue", timeout=5).close()
            return server
        except OSError:
            time.sleep(0.5)
    pytest.fail("ComfyUI did not start:\n" + log.read_text(encoding="utf-8", errors="replace")[-4000:])


@pytest.fixture(scope="module")
def offered(server: Server) -> dict[str, Any]:
    """What the server says about this pack's nodes."""
    info = server.json("/object_info")
    return {name: node for name, node in info.items() if node["python_module"] == "custom_nodes.SpatialAlign"}


def test_every_node_is_offered_as_the_golden_file_says(offered: dict[str, Any], repo_root: Path) -> None:
    golden = json.loads((repo_root / "tests" / "golden" / "object_info.json").read_text(encoding="utf-8"))
    assert sorted(offered) == sorted(golden)
    for name, node in golden.items():
        found = json.loads(json.dumps(offered[name]))
        assert {key: found[key] for key in node} == node, name


def test_help_and_translations_are_served(server: Server, offered: dict[str, Any]) -> None:
    for name in offered:
        assert server.raw(f"/extensions/SpatialAlign/docs/{name}.md").startswith(b"#")
    translations = server.json("/i18n")
    for language in ("en", "zh"):
        assert set(offered) <= set(translations[language]["nodeDefs"])


def test_example_workflows_are_templates(server: Server, repo_root: Path) -> None:
    listed = server.json("/workflow_templates")["SpatialAlign"]
    assert sorted(listed) == sorted(path.stem for path in (repo_root / "workflows").glob("*.json"))
    for name in listed:
        quoted = urllib.parse.quote(name)
        assert json.loads(server.raw(f"/api/workflow_templates/SpatialAlign/{quoted}.json"))["nodes"]


@pytest.fixture(scope="module")
def workflow(repo_root: Path) -> dict[str, Any]:
    """The example that needs no download, in API format."""
    path = repo_root / "tests" / "workflows_api" / "miniature.json"
    return dict(json.loads(path.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def history(server: Server, workflow: dict[str, Any]) -> dict[str, Any]:
    """What the server keeps of its first run of the example."""
    return server.run(workflow)


def test_the_miniature_end_to_end(server: Server, workflow: dict[str, Any], history: dict[str, Any]) -> None:
    """Prompt, sampling, decoding, tracking and scoring, queued as a client queues it."""
    scored = [key for key, node in workflow.items() if node["class_type"] == "SpatialAlignScore"]
    assert scored
    for key in scored:
        shown = history["outputs"][key]
        score = re.search(r"DSR-Score (0\.\d+|1\.0+) (passes|fails) 0\.7", "\n".join(shown["text"]))
        assert score, shown["text"]
        picture = server.raw("/view?" + urllib.parse.urlencode(shown["images"][0]))
        assert picture.startswith(b"\x89PNG")


def test_a_second_run_is_cached(server: Server, workflow: dict[str, Any], history: dict[str, Any]) -> None:
    messages = dict(server.run(workflow)["status"]["messages"])
    assert set(messages["execution_cached"]["nodes"]) == set(workflow)


def test_nothing_is_written_into_the_pack(server: Server, history: dict[str, Any], repo_root: Path) -> None:
    """Python's own caches aside."""
    pack = server.base / "custom_nodes" / "SpatialAlign"
    files = [path.relative_to(pack) for path in pack.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert [str(path) for path in files if not (repo_root / path).is_file()] == []
