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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

SHIPPED = ("__init__.py", "pyproject.toml", "requirements.txt", "nodes", "spatialalign", "web", "locales", "workflows")
"""What the pack needs inside ComfyUI: neither the training programs nor the tests."""
SCORE = "SpatialAlignScore"
RUN_HERE = ("miniature", "best_of_n", "collect_preferences", "guided_miniature")
"""The examples that need no download and end in a DSR-Score."""
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
def workflow(repo_root: Path) -> Callable[[str], dict[str, Any]]:
    """An example in API format, by name."""
    folder = repo_root / "tests" / "workflows_api"
    return lambda name: dict(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def histories(server: Server, workflow: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """What the server keeps of its first run of each example that needs no download."""
    return {name: server.run(workflow(name)) for name in RUN_HERE}


def _scores(workflow: dict[str, Any], history: dict[str, Any]) -> list[str]:
    """The scores that the DSR-Score nodes of a workflow show."""
    shown = [history["outputs"][key]["text"] for key, node in workflow.items() if node["class_type"] == SCORE]
    return re.findall(r"DSR-Score (\d\.\d+) (?:passes|fails) 0\.7", "\n".join(line for text in shown for line in text))


@pytest.mark.parametrize("name", RUN_HERE)
def test_examples_run_to_a_score(
    server: Server, workflow: Callable[[str], dict[str, Any]], histories: dict[str, Any], name: str
) -> None:
    """Prompt, sampling, decoding, tracking and scoring, queued as a client queues it."""
    assert _scores(workflow(name), histories[name])
    for key, node in workflow(name).items():
        if node["class_type"] == SCORE:
            for picture in histories[name]["outputs"][key]["images"]:
                assert server.raw("/view?" + urllib.parse.urlencode(picture)).startswith(b"\x89PNG")


def test_the_searching_samplers_run(server: Server, workflow: Callable[[str], dict[str, Any]]) -> None:
    """Eight clips that are finished in the order of a reward until one is good enough, and four that are resampled."""
    graph = workflow("best_of_n_sampler")
    history = server.run(graph)
    for kind, title in (("BestOfNSampler", "pruned-8"), ("ParticleSampler", "particles-4")):
        (key,) = [key for key, node in graph.items() if node["class_type"] == f"SpatialAlign{kind}"]
        (ranking,), (sheet,) = history["outputs"][key]["text"], history["outputs"][key]["images"]
        assert ranking.startswith(f"{title}, by the paper score:\n1. clip ") and " steps, by the reward: " in ranking
        assert server.raw("/view?" + urllib.parse.urlencode(sheet)).startswith(b"\x89PNG")


def test_a_second_run_is_cached(
    server: Server, workflow: Callable[[str], dict[str, Any]], histories: dict[str, Any]
) -> None:
    server.run(workflow("miniature"))
    messages = dict(server.run(workflow("miniature"))["status"]["messages"])
    assert set(messages["execution_cached"]["nodes"]) == set(workflow("miniature"))


def test_the_collected_sample_is_a_training_sample(server: Server, histories: dict[str, Any], backbone: Any) -> None:
    """Its latents decode to its video in diffusers, its text is ours, and the programs find it in its place."""
    import numpy as np

    from spatialalign.video import read_video
    from training.store import Store

    store = Store(server.base / "output" / "spatialalign" / "miniature_set")
    sample = store.samples()[0]
    assert len(store.samples()) == 1 and sample.scored and sample.tracks.is_file()
    assert sample.read_header().space == backbone.latent_space
    decoded = backbone.decode(sample.read_latents()[None])[0].astype(float)
    assert decoded.std() > 20
    assert np.abs(decoded - read_video(sample.video).frames).mean() < 4  # the file is H.264
    text = backbone.encode_text([store.prompt(sample.prompt_id).dsr.prompt()])[0]
    np.testing.assert_allclose(store.read_text(sample.prompt_id), text, rtol=0, atol=1e-4)


def test_a_video_file_is_scored_as_the_program_scores_it(
    server: Server, workflow: Callable[[str], dict[str, Any]], histories: dict[str, Any]
) -> None:
    """The example for a video file, with the miniature's own models and the clip that was collected."""
    from spatialalign.score import dsr_score
    from spatialalign.tracking.load import load_tracker
    from spatialalign.video import read_video
    from training.store import Store

    store = Store(server.base / "output" / "spatialalign" / "miniature_set")
    sample = store.samples()[0]
    dsr, video = store.prompt(sample.prompt_id).dsr, read_video(sample.video)
    expected = dsr_score(load_tracker("miniature").track(video.frames, dsr.subject, dsr.object, video.fps), dsr)
    shutil.copy(sample.video, server.base / "input" / "my_video.mp4")
    graph = workflow("score_video")
    for node in graph.values():
        if node["class_type"] == "SpatialAlignLoadGroundedSAM":
            node["inputs"] |= {"detector": "miniature", "segmenter": "miniature"}
        if node["class_type"] == "SpatialAlignParse":
            node["inputs"]["text"] = dsr.prompt()
    assert expected.score is not None
    assert _scores(graph, server.run(graph)) == [f"{expected.score:.3f}"]


def test_nothing_is_written_into_the_pack(server: Server, histories: dict[str, Any], repo_root: Path) -> None:
    """Python's own caches aside."""
    pack = server.base / "custom_nodes" / "SpatialAlign"
    files = [path.relative_to(pack) for path in pack.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert [str(path) for path in files if not (repo_root / path).is_file()] == []
