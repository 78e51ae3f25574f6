"""The grammar: every official prompt to the letter, our relations, and errors that name the part that failed."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spatialalign.dsr import DSR, Relation, article, relations_of
from spatialalign.errors import PromptError

GOOD = "In a quiet room, a cat is on the left of an ottoman, then the cat walks to the top of the ottoman."

relations = st.sampled_from(list(Relation))
words = st.from_regex(r"[a-z]{1,9}(-[a-z]{1,5})?", fullmatch=True).filter(
    lambda w: w not in {"a", "an", "the", "is", "then", "of", "on", "to", "in", "under", "behind"}
)
nouns = st.lists(words, min_size=1, max_size=3).map(" ".join)
scenes = st.one_of(
    st.just(""),
    st.lists(st.from_regex(r"[A-Za-z0-9,.'-]{1,8}", fullmatch=True), min_size=1, max_size=8)
    .map(" ".join)
    .filter(lambda s: not s.endswith((",", "."))),
)


@st.composite
def dsrs(draw: st.DrawFn) -> DSR:
    initial, final = draw(st.tuples(relations, relations).filter(lambda pair: pair[0] is not pair[1]))
    subject, thing = draw(st.tuples(nouns, nouns).filter(lambda pair: pair[0] != pair[1]))
    return DSR(subject, thing, initial, final, draw(scenes), draw(nouns))


@pytest.mark.parametrize(("name", "count"), [("eval30", 30), ("eval120", 120)])
def test_official_prompts_parse_and_render_to_the_letter(shared_data: Path, name: str, count: int) -> None:
    with open(shared_data / f"{name}.csv", encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == count
    for row in rows:
        dsr = DSR.parse(row["prompt"])
        assert dsr.prompt() == row["prompt"]
        assert (dsr.subject, dsr.object, dsr.type_code) == (row["animal"], row["object"], row["type"])
        assert dsr.initial.initial_phrase == row["initial_SR"]
        assert dsr.final.final_phrase == row["final_SR"]
        assert dsr.scene == row["scene"].removesuffix(",")
        assert dsr.is_paper


@given(dsrs())
def test_parsing_undoes_rendering(dsr: DSR) -> None:
    assert DSR.parse(dsr.prompt()) == dsr
    assert DSR.from_dict(dsr.to_dict()) == dsr


@given(st.text(max_size=200))
def test_any_text_parses_to_itself_or_is_a_prompt_error(text: str) -> None:
    try:
        dsr = DSR.parse(text)
    except PromptError:
        return
    assert dsr.prompt() == " ".join(text.split())


@given(st.integers(0, len(GOOD) - 1), st.sampled_from(["", " ", "x", ",", "A", " the ", " of"]))
def test_a_damaged_prompt_is_an_error_or_another_sentence(at: int, patch: str) -> None:
    text = GOOD[:at] + patch + GOOD[at + 1 :]
    try:
        assert DSR.parse(text).prompt() == " ".join(text.split())
    except PromptError as error:
        assert str(error)


def test_extended_relations_are_marked_as_ours() -> None:
    assert [r.code for r in Relation if r.is_paper] == ["L", "R", "T"]
    text = "A fox is in front of a crate, then the fox crawls under the crate."
    dsr = DSR.parse(text)
    assert (dsr.initial, dsr.final, dsr.scene) == (Relation.FRONT, Relation.UNDER, "")
    assert dsr.prompt() == text
    assert not dsr.is_paper
    assert DSR.parse("A fox is behind a crate, then the fox runs in front of the crate.").type_code == "BF"


def test_several_words_and_no_scene() -> None:
    text = "An arctic fox is under a picnic table, then the arctic fox jumps over to the right of the picnic table."
    with pytest.raises(PromptError, match="motion: 'jumps over to' is ambiguous"):
        DSR.parse(text.replace("over to the right", "over to to the right"))
    dsr = DSR.parse(text)
    assert (dsr.subject, dsr.object, dsr.motion) == ("arctic fox", "picnic table", "jumps over")


def test_opposites_mirror_and_reversal() -> None:
    for relation in Relation:
        assert relation.opposite.opposite is relation
        assert relation.opposite is not relation
        assert relation.mirrored is (relation.opposite if relation.code in "LR" else relation)
    dsr = DSR("cat", "box", Relation.LEFT, Relation.TOP)
    assert dsr.mirrored().type_code == "RT"
    assert dsr.reversed().type_code == "TL"
    assert dsr.reversed().reversed() == dsr == dsr.mirrored().mirrored()


@pytest.mark.parametrize(
    ("noun", "expected"),
    [
        ("cat", "a"),
        ("owl", "an"),
        ("unicorn", "a"),  # sounds like you
        ("umbrella", "an"),
        ("uninvited guest", "an"),
        ("hourglass", "an"),  # silent h
        ("house", "a"),
        ("ewe", "a"),
        ("one-eyed cat", "a"),
        ("urn", "an"),
    ],
)
def test_article_follows_the_sound(noun: str, expected: str) -> None:
    assert article(noun) == expected


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (("ottoman.", "ottoman"), "end of prompt"),
        ((", then the", ", and the"), "second clause"),
        (("then the cat", "then the dog"), "second clause: expected 'the cat'"),
        (("top of the ottoman.", "top of the chair."), "second clause: expected it to end in 'the ottoman'"),
        (("on the left of", "near"), "initial relation"),
        (("on the left of", "to the left of"), "initial relation"),
        (("to the top of", "on the top of"), "final relation"),
        (("walks to the top of", "walks around"), "final relation"),
        (("walks to", "to"), "motion"),
        ((" a cat is", " the cat is"), "subject: expected 'a' or 'an'"),
        (("a cat is", "an cat is"), "subject: expected 'a cat'"),
        (("an ottoman", "a ottoman"), "object: expected 'an ottoman'"),
        (("a cat is", "a Cat is"), "subject: expected lower-case"),
        (("a cat is", "a cat of a man is"), "subject: .* is ambiguous"),
        (("In a quiet room, a", "in a room a"), "scene or subject"),
        (("In a quiet room,", ","), "scene"),
        (("to the top of the", "to the left of the"), "final relation: LEFT is the initial relation too"),
    ],
)
def test_errors_name_the_part(change: tuple[str, str], part: str) -> None:
    text = GOOD.replace(*change)
    assert text != GOOD
    with pytest.raises(PromptError, match=part):
        DSR.parse(text)


def test_two_second_clauses_are_ambiguous() -> None:
    with pytest.raises(PromptError, match="found it 2 times"):
        DSR.parse(GOOD[:-1] + ", then the cat sleeps.")


def test_values_are_checked_when_made() -> None:
    with pytest.raises(PromptError, match="could not tell them apart"):
        DSR("cat", "cat", Relation.LEFT, Relation.RIGHT)
    with pytest.raises(PromptError, match="scene"):
        DSR("cat", "box", Relation.LEFT, Relation.RIGHT, scene="In a room,")
    with pytest.raises(PromptError, match="scene: must not contain"):
        DSR("cat", "box", Relation.LEFT, Relation.RIGHT, scene="A dog sits, then the dog")
    with pytest.raises(PromptError, match="final relation: expected a Relation"):
        DSR("cat", "box", Relation.LEFT, "R")  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="needs the key 'subject'"):
        DSR.from_dict({"initial": "L", "final": "R"})


@pytest.mark.parametrize("code", ["", "L", "LX", "LRT", "LL"])
def test_bad_type_codes(code: str) -> None:
    with pytest.raises(PromptError, match=re.escape(repr(code))):
        relations_of(code)
