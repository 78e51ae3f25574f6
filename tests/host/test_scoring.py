"""One clip scored by the nodes and by ``python -m training.score``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

CLIPS = 4


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory, backbone: Any) -> list[Any]:
    """Clips of a sample store, generated and scored by the programs."""
    from spatialalign.miniature.world import prompts
    from spatialalign.prompts import write_csv
    from training import generate, score
    from training.store import Store

    folder = tmp_path_factory.mktemp("store")
    write_csv(folder / "prompts.csv", prompts("train")[:CLIPS])
    store = folder / "store"
    generate.run(generate.Generate("miniature", folder / "prompts.csv", store, seeds="0", device="cpu"))
    score.run(score.Score(store, device="cpu"))
    return Store(store).samples()


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
    samples: list[Any],
    clip: Callable[[Path], dict[str, Any]],
    miniature: SimpleNamespace,
    module: Callable[[str], ModuleType],
    execute: Callable[..., tuple[Any, ...]],
) -> None:
    track, score = module("nodes.tracking").GroundedSamTrack, module("nodes.scoring").ScoreDsr
    assert len(samples) == CLIPS
    expected = [sample.read_score() for sample in samples]
    assert any(one.score is not None for one in expected)
    for sample, one in zip(samples, expected, strict=True):
        text = sample.store.prompt(sample.prompt_id).dsr.prompt()
        dsr = module("spatialalign.dsr").DSR.parse(text)
        tracks = execute(
            track, grounded_sam=miniature.grounded_sam, dsr=dsr, frames_per_clip=0, overlay=False, **clip(sample.video)
        )[0]
        result = execute(score, tracks=tracks[0], dsr=dsr, threshold=0.7)[-1]
        assert result.to_dict() == one.to_dict()
