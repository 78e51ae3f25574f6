"""Collecting into a store: shared with other processes, and honest about what is damaged. The rest: tests/nodes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from spatialalign.collect import Clip, check_set_name, collect, derived_id, describe_set, settings_digest
from spatialalign.errors import StoreError
from spatialalign.prompts import Prompt
from spatialalign.store import LatentsHeader, Store
from spatialalign.tracks import Tracks
from spatialalign.video import Video

TEXT = "In a quiet room, a cat is on the left of a box, then the cat walks to the right of the box."
PROMPT = Prompt.parse("0001_LR", TEXT)
HEADER = LatentsHeader("space", "model", {"steps": 3}, settings_digest({"steps": 3}))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store", create=True)


@pytest.fixture
def clip() -> Clip:
    """Five frames of 16x16 in which the cat walks over."""
    generator = torch.Generator().manual_seed(0)
    x = np.linspace(0, 12, 5)
    cat = np.stack([x, x * 0, x + 4, x * 0 + 4], axis=1)
    boxes = np.stack([cat, np.tile([6.0, 0, 10, 4], (5, 1))], axis=1)
    return Clip(
        torch.randn(16, 2, 2, 2, generator=generator),
        torch.randn(3, 8, generator=generator),
        Video(np.zeros((5, 16, 16, 3), dtype=np.uint8), 8),
        Tracks(boxes, np.ones((5, 2)), ("cat", "box"), (16, 16), 8.0, source="truth"),
    )


def test_a_sample_that_another_process_works_on_is_left_alone(store: Store, clip: Clip) -> None:
    with store.sample("0001_LR", 0).claim("generate"), pytest.raises(StoreError, match="at work on"):
        collect(store, PROMPT, 0, clip, HEADER)
    assert not store.sample("0001_LR", 0).latents.exists()
    assert collect(store, PROMPT, 0, clip, HEADER) == ("latents", "video", "tracks", "score")
    assert collect(store, PROMPT, 0, clip, HEADER) == ()


def test_damaged_latents_are_written_again_with_all_that_was_made_from_them(store: Store, clip: Clip) -> None:
    collect(store, PROMPT, 0, clip, HEADER)
    sample = store.sample("0001_LR", 0)
    sample.latents.write_bytes(b"cut")
    untracked = replace(clip, tracks=None)
    assert collect(store, PROMPT, 0, untracked, HEADER) == ("latents", "video")
    assert torch.equal(sample.read_latents(), clip.latents)
    assert not sample.scored


def test_the_set_is_counted_as_it_can_be_used(store: Store, clip: Clip) -> None:
    """Seed 0 wins; seed 1 played backwards loses; seed 2 has a spoilt score, seed 3 none and seed 4 no video."""
    assert clip.tracks is not None
    for seed, tracks in enumerate((clip.tracks, clip.tracks.reversed(), clip.tracks, None, clip.tracks)):
        collect(store, PROMPT, seed, replace(clip, tracks=tracks), HEADER)
    store.sample("0001_LR", 2).score.write_text("{")
    store.sample("0001_LR", 4).video.unlink()
    words = "4 clips of 1 prompts, 2 of them scored: 1 winners, 1 losers, 0 INVALID; 1 pairs"
    assert describe_set(store) == words


def test_ids_and_digests_are_stable() -> None:
    """Sets outlive versions: another derivation would give the same prompt a second folder."""
    assert derived_id(PROMPT.dsr) == "f86eff24_LR"
    assert settings_digest({"b": 1, "a": 2}) == settings_digest({"a": 2, "b": 1}) != settings_digest({"a": 2})


@pytest.mark.parametrize("name", ["my_set", "a", "Katzen und Hunde 2", "猫", "v1.2-b"])
def test_plain_set_names(name: str) -> None:
    check_set_name(name)
