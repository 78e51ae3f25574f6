"""Winners, losers and the pair stream."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spatialalign.errors import ConfigError, DataError
from spatialalign.files import write_json
from training.pairs import PairStream, PromptPairs, digest, manifest, read_pairs, scored_by, split_pairs

PROMPTS = (PromptPairs("a", (0,), (1, 2, 3)), PromptPairs("b", (4, 5), (6,)))


def test_the_stream_is_a_pure_function_of_seed_and_index() -> None:
    forward = [PairStream(PROMPTS, seed=3).pair(index) for index in range(50)]
    stream = PairStream(PROMPTS, seed=3)
    assert [stream.pair(index) for index in reversed(range(50))] == forward[::-1]
    assert [PairStream(PROMPTS, seed=4).pair(index) for index in range(50)] != forward
    assert [PairStream(PROMPTS, seed=3, stream="held-out").pair(index) for index in range(50)] != forward


def test_prompts_are_uniform_and_pairs_are_uniform_within_them() -> None:
    """Prompt a has 3 pairs and b has 2; each prompt gets half of 6000 draws, each pair its share of that (5 sigma)."""
    stream = PairStream(PROMPTS, seed=0)
    counts = Counter(stream.pair(index) for index in range(6000))
    assert len(counts) == 5
    for pair, count in counts.items():
        assert abs(count - (1000 if pair.prompt_id == "a" else 1500)) < 5 * 36


@given(seed=st.integers(0, 2**40), index=st.integers(0, 2**40))
def test_every_pair_is_a_winner_and_a_loser_of_its_prompt(seed: int, index: int) -> None:
    pair = PairStream(PROMPTS, seed).pair(index)
    entry = {prompt.prompt_id: prompt for prompt in PROMPTS}[pair.prompt_id]
    assert pair.winner in entry.winners
    assert pair.loser in entry.losers


@given(count=st.integers(1, 40), fraction=st.floats(0, 0.95), seed=st.integers(0, 100))
def test_split_keeps_prompts_apart(count: int, fraction: float, seed: int) -> None:
    prompts = [PromptPairs(f"p{index}", (0,), (1,)) for index in range(count)]
    train, held = split_pairs(prompts, fraction, seed)
    assert sorted(p.prompt_id for p in train + held) == sorted(p.prompt_id for p in prompts)
    assert train
    assert bool(held) == (fraction > 0 and count > 1)
    assert (train, held) == split_pairs(prompts, fraction, seed)


def test_split_refuses_to_hold_out_everything() -> None:
    with pytest.raises(ConfigError, match="held-out fraction"):
        split_pairs(PROMPTS, 1.0, 0)


def test_manifest_round_trip(tmp_path: Path) -> None:
    write_json(tmp_path / "pairs.json", manifest(PROMPTS, {"samples": 7}))
    assert read_pairs(tmp_path / "pairs.json") == (PROMPTS, digest(PROMPTS))
    assert digest(PROMPTS) != digest(PROMPTS[:1])


def test_a_manifest_keeps_the_labels_of_its_clips_and_no_others(tmp_path: Path) -> None:
    path, clips = tmp_path / "pairs.json", [(p.prompt_id, s) for p in PROMPTS for s in (*p.winners, *p.losers)]
    scores = {clip: -0.1 * number for number, clip in enumerate(clips)}
    write_json(path, manifest(PROMPTS, {"score": "labels"}, {**scores, ("a", 99): 1.0, ("c", 0): 1.0}))
    prompts, first = read_pairs(path)
    assert prompts == PROMPTS
    assert scored_by(path) == scores
    write_json(path, manifest(PROMPTS, {"score": "labels"}, {**scores, ("b", 4): 9.0}))
    assert read_pairs(path)[1] != first  # Flow-RWR's weights follow from them


def test_what_decided_about_a_manifest_without_labels(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    for statistics, expected in (({}, "official"), ({"score": "robust"}, "robust")):
        write_json(path, manifest(PROMPTS, statistics))
        assert scored_by(path) == expected
    write_json(path, {**manifest(PROMPTS, {}), "scores": {"a": {"zero": 1.0}}})
    with pytest.raises(DataError, match="damaged scores"):
        scored_by(path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"format": "1", "prompts": []}, "no prompts"),
        ({"format": "9", "prompts": []}, "format '9'"),
        ({"prompts": []}, "not a pair manifest"),
        ([], "not a pair manifest"),
        ({"format": "1", "prompts": [{"prompt_id": "a", "winners": [1], "losers": []}]}, "at least one winner"),
        ({"format": "1", "prompts": [{"prompt_id": "a", "winners": [1], "losers": [1]}]}, "both winner and loser"),
    ],
)
def test_damaged_manifests(tmp_path: Path, value: object, message: str) -> None:
    (tmp_path / "pairs.json").write_text(json.dumps(value))
    with pytest.raises(DataError, match=message):
        read_pairs(tmp_path / "pairs.json")
