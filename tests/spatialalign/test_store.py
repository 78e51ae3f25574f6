"""The sample store: what is written comes back, what is damaged is named, and nobody works twice."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from spatialalign.claims import exclusive, try_claim
from spatialalign.errors import DataError, StoreError
from spatialalign.prompts import Prompt
from spatialalign.store import LatentsHeader, Sample, Store, classify

TEXT = "In a quiet room, a cat is on the left of a box, then the cat walks to the right of the box."
HEADER = LatentsHeader("space", "model", {"steps": 3}, "digest")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store", create=True)
    store.add_prompt(Prompt.parse("0001_LR", TEXT), {"steps": 3})
    return store


@pytest.fixture
def sample(store: Store) -> Sample:
    return store.sample("0001_LR", 4)


def test_layout_is_the_documented_one(store: Store, sample: Sample) -> None:
    sample.write_latents(torch.zeros(2, 1, 2, 2), HEADER)
    store.write_text("0001_LR", torch.ones(3, 4), "model")
    found = sorted(str(path.relative_to(store.root)) for path in store.root.rglob("*") if path.is_file())
    assert found == ["0001_LR/4/latents.safetensors", "0001_LR/prompt.json", "0001_LR/prompt.safetensors"]
    names = [path.name for path in (sample.video, sample.tracks, sample.score)]
    assert names == ["video.mp4", "tracks.safetensors", "score.json"]


def test_prompts_round_trip(store: Store) -> None:
    assert store.prompts() == [Prompt.parse("0001_LR", TEXT)]
    value = json.loads((store.root / "0001_LR/prompt.json").read_text())
    assert value["dsr"]["subject"] == "cat"
    assert value["generator"] == {"steps": 3}


def test_latents_round_trip_with_their_header(sample: Sample) -> None:
    latents = torch.randn(2, 1, 2, 2)
    sample.write_latents(latents.bfloat16(), HEADER)
    assert torch.equal(sample.read_latents(), latents.bfloat16().float())
    assert sample.read_header() == HEADER
    with safe_open(sample.latents, "pt") as file:
        assert file.metadata()["space"] == "space"  # anyone can read it, not only this project


def test_text_round_trip(store: Store) -> None:
    assert not store.has_text("0001_LR")
    store.write_text("0001_LR", torch.arange(6.0).reshape(2, 3), "model")
    assert store.read_text("0001_LR").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert store.has_text("0001_LR", "model")
    assert not store.has_text("0001_LR", "another")


def test_new_latents_remove_what_was_made_from_the_old_ones(sample: Sample) -> None:
    sample.write_latents(torch.zeros(2, 1, 2, 2), HEADER)
    for path in (sample.video, sample.tracks, sample.score):
        path.write_bytes(b"old")
    assert sample.generated
    assert sample.scored
    sample.write_latents(torch.ones(2, 1, 2, 2), HEADER)
    assert not sample.generated
    assert not sample.scored
    assert not sample.score.exists()


def test_parts_alone_do_not_count_as_done(sample: Sample) -> None:
    sample.write_latents(torch.zeros(2, 1, 2, 2), HEADER)
    assert not sample.generated
    sample.score.write_text("{}")
    assert not sample.scored


def test_a_write_that_dies_leaves_the_former_file(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    sample.write_latents(torch.zeros(2, 1, 2, 2), HEADER)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        sample.write_latents(torch.ones(2, 1, 2, 2), HEADER)
    assert not sample.read_latents().any()
    assert [path.name for path in sample.folder.iterdir()] == ["latents.safetensors"]


def test_temporary_files_of_a_killed_process_are_not_samples(store: Store, sample: Sample) -> None:
    sample.folder.mkdir()
    (sample.folder / ".tmp-123-abc-latents.safetensors").write_bytes(b"half")
    (store.root / "0001_LR" / "notes").mkdir()
    assert [found.name for found in store.samples()] == ["0001_LR/4"]
    assert not sample.generated


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.full((2, 1, 2, 2), float("nan")), "NaN"),
        (torch.full((2, 1, 2, 2), float("inf")), "infinite"),
        (torch.zeros(2, 2), "shape"),
    ],
)
def test_unusable_latents_name_the_file(sample: Sample, content: torch.Tensor, message: str) -> None:
    sample.write_latents(content, HEADER)
    with pytest.raises(DataError, match=rf"latents\.safetensors.*{message}"):
        sample.read_latents()


def test_damaged_and_foreign_files_name_themselves(store: Store, sample: Sample) -> None:
    with pytest.raises(DataError, match="does not exist"):
        sample.read_latents()
    sample.write_latents(torch.zeros(2, 1, 2, 2), HEADER)
    sample.latents.write_bytes(sample.latents.read_bytes()[:-5])
    with pytest.raises(DataError, match="cannot be read"):
        sample.read_latents()
    save_file({"latents": torch.zeros(2, 1, 2, 2)}, sample.latents)
    with pytest.raises(DataError, match="latents format"):
        sample.read_latents()
    save_file({"other": torch.zeros(1)}, sample.latents, metadata=HEADER.to_metadata())
    with pytest.raises(DataError, match=r"latents\.safetensors"):
        sample.read_latents()
    (store.root / "0001_LR/prompt.json").write_text('{"text": 3')
    with pytest.raises(DataError, match=r"prompt\.json"):
        store.prompts()
    (store.root / "0001_LR/prompt.json").write_text('{"prompt_id": "0001_LR"}')
    with pytest.raises(DataError, match=r"prompt\.json"):
        store.prompts()


def test_opening_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        Store(tmp_path / "absent")
    with pytest.raises(StoreError, match="not a sample store"):
        Store(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="is a file"):
        Store(tmp_path / "file", create=True)


def test_one_id_has_one_text(store: Store) -> None:
    other = Prompt.parse("0001_LR", TEXT.replace("cat", "dog"))
    with pytest.raises(StoreError, match="another text"):
        store.add_prompt(other)
    store.add_prompt(Prompt.parse("0001_LR", TEXT))
    assert store.prompt("0001_LR").text == TEXT


@given(name=st.text(max_size=8))
def test_ids_never_leave_the_store(name: str) -> None:
    """A path is either refused or lies directly below the root."""
    store = Store.__new__(Store)
    store.root = Path("/store")
    try:
        folder = store.prompt_folder(name)
    except StoreError:
        return
    assert Path(os.path.normpath(folder)).parent == store.root
    assert not folder.name.startswith(".")


@pytest.mark.parametrize(
    ("header", "what"),
    [
        (LatentsHeader("other", "model", {"steps": 3}, "digest"), "latent space"),
        (LatentsHeader("space", "other", {"steps": 3}, "digest"), "model"),
        (LatentsHeader("space", "model", {"steps": 4}, "other"), "steps 3 there, 4 now"),
        (LatentsHeader("space", "model", {"steps": 3}, "other"), "settings"),
    ],
)
def test_mixing_is_refused(store: Store, sample: Sample, header: LatentsHeader, what: str) -> None:
    store.check_same_settings([sample], header)  # nothing there yet
    sample.write_latents(torch.zeros(2, 1, 2, 2), HEADER)
    assert store.check_same_settings([sample], HEADER) == []
    with pytest.raises(StoreError, match=f"made otherwise .*{what}"):
        store.check_same_settings([sample], header)
    sample.latents.write_bytes(b"cut")
    assert store.check_same_settings([sample], header) == [sample]


def test_a_claim_excludes_and_is_released(sample: Sample) -> None:
    with sample.claim("generate") as first, sample.claim("generate") as second, sample.claim("score") as other:
        assert (first, second, other) == (True, False, True)
    with sample.claim("generate") as again:
        assert again
    assert not list(sample.folder.glob(".claim*"))


def test_the_claim_of_a_killed_process_is_taken_over(sample: Sample) -> None:
    """A real process claims and is killed before it can release."""
    code = (
        "import sys, time; from pathlib import Path; from spatialalign.claims import try_claim;"
        "print(try_claim(Path(sys.argv[1])), flush=True); time.sleep(60)"
    )
    path = sample.folder / ".claim-generate"
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    assert not try_claim(path)
    with pytest.raises(StoreError, match=f"process {process.pid} on"), exclusive(path, "the store"):
        pass
    process.kill()
    process.wait()
    assert try_claim(path)


def test_other_machines_are_believed_and_reused_ids_are_not(tmp_path: Path) -> None:
    path = tmp_path / ".claim"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": ""}))
    assert not try_claim(path)
    # our own id, but a process that started at another time
    path.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "started": "1"}))
    assert try_claim(path) == Path("/proc/self/stat").exists()


def test_an_empty_claim_is_live_for_a_moment_only(tmp_path: Path) -> None:
    path = tmp_path / ".claim"
    path.touch()
    assert not try_claim(path)
    os.utime(path, (time.time() - 3600, time.time() - 3600))
    assert try_claim(path)


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (0.7, "winner"),  # exactly 0.7 is a winner, though Correct@0.7 of the official code counts it wrong
        (1.0, "winner"),
        (0.6999, "loser"),
        (-1.0, "loser"),
        (-1.001, None),
        (-100.0, None),  # the official mark of an INVALID clip
        (None, None),
        (float("nan"), None),
    ],
)
def test_classify(score: float | None, expected: str | None) -> None:
    assert classify(score) == expected
