"""One clip scored by the nodes and by ``python -m training.score``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

CLIPS = 4


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, comfy: Path) -> list[SimpleNamespace]:
    """Clips that the programs generated and scored: ``text``, ``video`` and ``score`` of each."""
    from spatialalign.miniature.world import prompts
    from spatialalign.prompts import write_csv
    from training import generate, score
    from training.store import Store

    folder = tmp_path_factory.mktemp("store")
    write_csv(folder / "prompts.csv", prompts("train")[:CLIPS])
    generate.run(generate.Generate("miniature", folder / "prompts.csv", folder / "store", seeds="0", device="cpu"))
    score.run(score.Score(folder / "store", device="cpu"))
    store = Store(folder / "store")
    return [
        SimpleNamespace(text=store.prompt(one.prompt_id).dsr.prompt(), video=one.video, score=one.read_score())
        for one in store.samples()
    ]


@pytest.fixture(params=["images", "video"])
def clip(request: pytest.FixtureRequest, module: Callable[[str], ModuleType]) -> Callable[[Path], dict[str, Any]]:
    """A clip's file as the inputs of GroundedSAM Track, IMAGE or VIDEO."""

    def images(path: Path) -> dict[str, Any]:
        from spatialalign.video import read_video

        video = read_video(path)
        return {"images": module("nodes.sockets").to_image(video.frames), "fps": float(video.fps)}

    def video(path: Path) -> dict[str, Any]:
        from comfy_api.latest import InputImpl

        return {"video": InputImpl.VideoFromFile(str(path)), "fps": 16.0}

    return images if request.param == "images" else video


def test_node_and_program_agree(
    scored: list[SimpleNamespace],
    clip: Callable[[Path], dict[str, Any]],
    miniature: SimpleNamespace,
    module: Callable[[str], ModuleType],
    execute: Callable[..., tuple[Any, ...]],
) -> None:
    track, score = module("nodes.tracking").GroundedSamTrack, module("nodes.scoring").ScoreDsr
    assert len(scored) == CLIPS
    assert any(one.score.score is not None for one in scored)
    for one in scored:
        dsr = module("spatialalign.dsr").DSR.parse(one.text)
        tracks = execute(
            track, grounded_sam=miniature.grounded_sam, dsr=dsr, frames_per_clip=0, overlay=False, **clip(one.video)
        )[0]
        result = execute(score, tracks=tracks[0], dsr=dsr, threshold=0.7)[-1]
        # The program gives its detector larger batches, which moves the last bits of its sums.
        assert result.score == pytest.approx(one.score.score, abs=1e-6)
        assert result.reason == one.score.reason
        assert list(result.frames_used) == list(one.score.frames_used)
        assert list(result.initial_ssr) == pytest.approx(list(one.score.initial_ssr), abs=1e-6, nan_ok=True)
        assert list(result.final_ssr) == pytest.approx(list(one.score.final_ssr), abs=1e-6, nan_ok=True)
