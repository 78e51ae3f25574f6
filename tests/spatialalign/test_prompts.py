"""Prompt sets: official files byte for byte, a seeded balanced generator, and splits that share no triple."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spatialalign.dsr import DSR, Relation
from spatialalign.errors import PromptError
from spatialalign.prompts import COLUMNS, PAPER_TYPES, Prompt, generate, read_csv, split, write_csv
from spatialalign.vocabulary import VOCABULARY, Animal, Setting, Vocabulary

TINY = Vocabulary(
    (Animal("cat", ("walks",), ("jumps",)), Animal("owl", ("hops",), ("flies",))),
    (Setting("here", ("box",), ("In a room", "In a hall")), Setting("there", ("rock", "urn"), ("On a hill",))),
)


@pytest.mark.parametrize("name", ["eval30", "eval120"])
def test_official_files_are_written_back_byte_for_byte(
    shared_data: Path, tmp_path: Path, name: Literal["eval30", "eval120"]
) -> None:
    original = shared_data / f"{name}.csv"
    prompts = read_csv(original)
    write_csv(tmp_path / "out.csv", prompts, name)
    assert (tmp_path / "out.csv").read_bytes() == original.read_bytes()


def test_either_layout_reads_back(tmp_path: Path) -> None:
    prompts = [
        *generate(30, seed=1),
        *generate(6, seed=2, types=("LU", "FB", "BT"), first_group=500),
        Prompt.of("bare", DSR("cat", "box", Relation.LEFT, Relation.RIGHT)),
    ]
    for layout in COLUMNS:
        write_csv(tmp_path / "p.csv", prompts, layout)  # type: ignore[arg-type]
        assert read_csv(tmp_path / "p.csv") == prompts


@given(st.integers(1, 60), st.integers(0, 2**32))
@settings(max_examples=30)
def test_generator(count: int, seed: int) -> None:
    prompts = generate(count, seed)
    assert prompts == generate(count, seed)
    assert len({p.prompt_id for p in prompts}) == len({p.text for p in prompts}) == len(prompts) == count
    assert len({p.triple for p in prompts}) == count
    kinds = Counter(p.dsr.type_code for p in prompts)
    assert set(kinds) <= set(PAPER_TYPES)
    assert max(kinds.values()) - min(kinds[kind] for kind in PAPER_TYPES) <= 1
    animals = {animal.name: animal for animal in VOCABULARY.animals}
    for prompt in prompts:
        dsr = DSR.parse(prompt.text)
        assert dsr == prompt.dsr
        assert prompt.prompt_id == f"{prompt.group}_{dsr.type_code}"
        assert dsr.motion in animals[dsr.subject].verbs(dsr.initial, dsr.final)
        home = [s for s in VOCABULARY.settings if dsr.object in s.objects]
        assert len(home) == 1
        assert dsr.scene in home[0].scenes


def test_different_seeds_differ() -> None:
    assert generate(12, seed=0) != generate(12, seed=1)


def test_generator_uses_up_a_vocabulary_exactly() -> None:
    # 2 animals x (1 object x 2 scenes + 2 objects x 1 scene) = 8 triples, counted by hand.
    assert TINY.triples == 8
    everything = generate(8, 0, TINY)
    assert {p.triple for p in everything} == {
        (animal, thing, scene)
        for animal in ("cat", "owl")
        for thing, scene in (("box", "In a room"), ("box", "In a hall"), ("rock", "On a hill"), ("urn", "On a hill"))
    }
    with pytest.raises(PromptError, match="the vocabulary has 8 left"):
        generate(9, 0, TINY)
    rest = generate(5, 3, TINY, exclude=everything[:3])
    assert {p.triple for p in rest} == {p.triple for p in everything[3:]}
    with pytest.raises(PromptError, match="5 left"):
        generate(6, 3, TINY, exclude=everything[:3])


def test_articles_in_generated_prompts() -> None:
    texts = " ".join(p.text for p in generate(400, seed=5))
    assert " an owl is" in texts
    assert " of an " in texts
    assert " a owl" not in texts
    assert " an cat" not in texts


@given(st.integers(2, 80), st.floats(0.05, 0.95), st.integers(0, 1000))
@settings(max_examples=40)
def test_split_shares_no_triple(count: int, held_out: float, seed: int) -> None:
    prompts = [p for group in generate(count, seed) for p in _both_ways(group)]
    train, test = split(prompts, held_out, seed)
    assert (train, test) == split(prompts, held_out, seed)
    assert not {p.triple for p in train} & {p.triple for p in test}
    assert sorted([*train, *test], key=prompts.index) == prompts
    assert train
    assert test
    assert abs(len(test) - held_out * len(prompts)) <= 2


def test_split_keeps_types_in_proportion() -> None:
    train, test = split(generate(120, seed=0), 0.25, seed=0)
    assert Counter(p.dsr.type_code for p in test) == dict.fromkeys(PAPER_TYPES, 5)
    assert Counter(p.dsr.type_code for p in train) == dict.fromkeys(PAPER_TYPES, 15)


def test_split_refuses_what_it_cannot_split() -> None:
    with pytest.raises(PromptError, match="between 0 and 1"):
        split(generate(4, 0), 1.0, 0)
    with pytest.raises(PromptError, match="at least two"):
        split(_both_ways(generate(1, 0)[0]), 0.5, 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt\nx\n", "column 'prompt_id' is missing"),
        ("prompt_id,prompt\na,hello\n", "row 2: end of prompt"),
        ("prompt_id,prompt\na,{p}\nb,{p}\n", "prompt .* occurs 2 times"),
        ("prompt_id,prompt\na,{p}\na,{q}\n", "prompt_id 'a' occurs 2 times"),
        ("prompt_id,type,prompt\na,RL,{p}\n", "row 2, column 'type': the prompt says 'LR', found 'RL'"),
        ("prompt_id,animal,prompt\na,dog,{p}\n", "column 'animal'"),
        ("prompt_id,scene,prompt\na,In a hall,{p}\n", "column 'scene'"),
        ("prompt_id,prompt\n../up,{p}\n", "prompt_id '../up'"),
        ("prompt_id,prompt\na\n", "as many fields"),
        ("prompt_id,prompt\na,{p},x\n", "as many fields"),
        ('prompt_id,prompt\na,"{p}\n', "not a CSV file"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    p = '"In a room, a cat is on the left of a box, then the cat walks to the right of the box."'
    quoted = text.replace('"{p}', p[:-1]).replace("{p}", p).replace("{q}", p.replace("walks", "runs"))
    (tmp_path / "p.csv").write_text(quoted)
    with pytest.raises(PromptError, match=message):
        read_csv(tmp_path / "p.csv")


def test_missing_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="does not exist"):
        read_csv(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(PromptError, match="UTF-8"):
        read_csv(tmp_path / "b.csv")


def test_prompt_text_must_be_its_dsr() -> None:
    dsr = DSR("cat", "box", Relation.LEFT, Relation.RIGHT)
    with pytest.raises(PromptError, match="is not the sentence"):
        Prompt("a", dsr, "A cat runs.")
    prompt = Prompt.of("a", dsr)
    assert Prompt.from_dict(prompt.to_dict()) == prompt


def test_vocabulary_refuses_a_second_instance_in_the_scene() -> None:
    animal = Animal("cat", ("walks",), ("jumps",))
    with pytest.raises(PromptError, match="shows 'box'"):
        Vocabulary((animal,), (Setting("s", ("box",), ("In a room with boxes",)),))
    with pytest.raises(PromptError, match="ambiguous"):
        Vocabulary((animal,), (Setting("s", ("box of an owl",), ("In a room",)),))


def _both_ways(prompt: Prompt) -> list[Prompt]:
    """The prompt and its reversal, one group: they share the triple."""
    return [prompt, Prompt.of(f"{prompt.group}_{prompt.dsr.reversed().type_code}", prompt.dsr.reversed())]
