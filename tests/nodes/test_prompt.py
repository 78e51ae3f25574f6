"""Prompts from words, from sentences and from sets, as a user would ask for them."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

SENTENCE = "In a sunny meadow, a cat is on the left of a box, then the cat walks to the right of the box."
HEADER = "group,type,prompt_id,scene,initial_SR,final_SR,animal,object,prompt"
ROW = f'0001,LR,0001_LR,In a sunny meadow,on the left of,to the right of,cat,box,"{SENTENCE}"'
OTHER = (
    "0002,TL,0002_TL,In a café,on the top of,to the left of,owl,hat stand,"
    '"In a café, an owl is on the top of a hat stand, then the owl hops to the left of the hat stand."'
)

Run = Callable[..., Any]


@pytest.fixture
def prompt(module: Callable[[str], Any]) -> Any:
    """The pack's nodes.prompt."""
    return module("prompt")


@pytest.fixture
def refused(module: Callable[[str], Any]) -> type[Exception]:
    """The pack's PromptError."""
    error: type[Exception] = module("spatialalign.errors").PromptError
    return error


def numbered(run: Run, node: Any, count: int, **inputs: Any) -> list[Any]:
    """The results for number 0, 1, ..."""
    return [run(node, number=number, **inputs).args for number in range(count)]


# --- from words ---------------------------------------------------------------------------------------------------


def test_a_new_node_writes_the_example(run: Run, prompt: Any) -> None:
    text, negative, dsr = run(prompt.DsrPrompt).args
    assert text == SENTENCE
    assert negative.startswith("Bright tones, overexposed") and negative.endswith("walking backwards")
    assert (dsr.subject, dsr.object, dsr.type_code, dsr.motion) == ("cat", "box", "LR", "walks")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("cat", "cat"),
        ("  Polar   Bear ", "polar bear"),
        ("The old grey\nowl", "old grey owl"),
        ("an hourglass.", "hourglass"),
        ("A jack-in-the-box", "jack-in-the-box"),
        ("theatre", "theatre"),
        ("ant", "ant"),
        ("Éléphant", "éléphant"),
    ],
)
def test_names_are_taken_kindly(run: Run, prompt: Any, written: str, meant: str) -> None:
    text, _, dsr = run(prompt.DsrPrompt, subject=written, object="chair").args
    assert dsr.subject == meant and f"then the {meant} walks" in text
    assert prompt.DsrPrompt.validate_inputs(subject=written, object="chair") is True


def test_scene_and_motion_are_taken_kindly(run: Run, prompt: Any) -> None:
    text, _, dsr = run(prompt.DsrPrompt, scene="On a\n wide  beach, ", motion=" Runs  quickly.").args
    assert (dsr.scene, dsr.motion) == ("On a wide beach", "runs quickly")
    assert text.startswith("On a wide beach, a cat is")
    assert run(prompt.DsrPrompt, scene="  \n").args[0].startswith("A cat is on the left of a box, then")


def test_every_pair_of_sides_can_be_asked_for_and_read_back(run: Run, prompt: Any) -> None:
    letters = {"left": "L", "right": "R", "top": "T", "under": "U", "in front of": "F", "behind": "B"}
    options = prompt.DsrPrompt.INPUT_TYPES()["required"]["initial"][1]["options"]
    assert options == list(letters)
    for initial, final in permutations(letters, 2):
        text, _, dsr = run(prompt.DsrPrompt, initial=initial, final=final).args
        again, same, subject, thing, kind = run(prompt.DsrFromText, text=text).args
        assert (again, same, subject, thing) == (text, dsr, "cat", "box")
        assert kind == letters[initial] + letters[final]


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"subject": ""}, "subject: expected lower-case words, found ''"),
        ({"object": " \n"}, "object: expected lower-case words, found ''"),
        ({"object": "the CAT"}, "object: 'cat' is the subject too"),
        ({"subject": "the"}, "subject: 'the' is ambiguous"),
        ({"subject": "cat on a mat"}, "subject: 'cat on a mat' is ambiguous"),
        ({"object": "box no. 7"}, "object: expected lower-case words"),
    ],
)
def test_bad_names_are_refused_before_anything_runs(
    run: Run, prompt: Any, refused: type[Exception], inputs: dict[str, str], said: str
) -> None:
    early = prompt.DsrPrompt.validate_inputs(**{"subject": "cat", "object": "box"} | inputs)
    assert isinstance(early, str) and early.startswith(said)
    with pytest.raises(refused) as error:
        run(prompt.DsrPrompt, **inputs)
    assert str(error.value) == early


def test_names_from_other_nodes_are_not_judged_early(prompt: Any) -> None:
    assert prompt.DsrPrompt.validate_inputs(subject=None, object="box") is True
    assert prompt.DsrPrompt.validate_inputs(subject=None, object=None) is True
    assert prompt.DsrPrompt.validate_inputs(subject="", object=None) is not True


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"final": "left"}, "final relation: LEFT is the initial relation too"),
        ({"motion": ""}, "motion: expected lower-case words, found ''"),
        ({"scene": "At night, then the moon rises"}, "scene: must not contain"),
    ],
)
def test_other_bad_words_are_refused_with_their_name(
    run: Run, prompt: Any, refused: type[Exception], inputs: dict[str, str], said: str
) -> None:
    with pytest.raises(refused, match=said):
        run(prompt.DsrPrompt, **inputs)


# --- from a sentence ------------------------------------------------------------------------------------------------


def test_a_sentence_is_read_with_its_white_space_put_right(run: Run, prompt: Any) -> None:
    text = SENTENCE.replace("a cat is", "a  polar bear\nis").replace("the cat", "the polar bear")
    clean, dsr, subject, thing, kind = run(prompt.DsrFromText, text=text).args
    assert clean == SENTENCE.replace("cat", "polar bear")
    assert (subject, thing, kind, dsr.scene) == ("polar bear", "box", "LR", "In a sunny meadow")
    assert run(prompt.DsrFromText).args[0] == SENTENCE


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "end of prompt: expected a full stop"),
        ("A cat sits.", "second clause: expected ', then the' once"),
        (SENTENCE.replace("the left", "the side"), "initial relation: expected"),
        (SENTENCE.replace("the cat walks", "the dog walks"), "second clause: expected 'the cat'"),
    ],
)
def test_other_sentences_are_refused_before_anything_runs(
    run: Run, prompt: Any, refused: type[Exception], text: str, said: str
) -> None:
    assert str(prompt.DsrFromText.validate_inputs(text=text)).startswith(said)
    with pytest.raises(refused, match=said):
        run(prompt.DsrFromText, text=text)
    assert prompt.DsrFromText.validate_inputs(text=SENTENCE) is True
    assert prompt.DsrFromText.validate_inputs(text=None) is True


# --- from a set -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "sizes"), [("built-in", (480, 120)), ("miniature", (288, 96))])
def test_the_halves_of_a_set_share_no_triple(run: Run, prompt: Any, world: str, sizes: tuple[int, int]) -> None:
    halves = []
    for part, size in zip(("train", "held-out"), sizes, strict=True):
        prompts = prompt._prompts(f"{world}: {part}")
        assert len(prompts) == size == len({one.text for one in prompts}) == len({one.prompt_id for one in prompts})
        halves.append({one.triple for one in prompts})
        for number in (0, 1, size - 1):
            text, _, dsr, name, count = run(prompt.DsrFromSet, set=f"{world}: {part}", number=number).args
            assert (text, name, count) == (prompts[number].text, prompts[number].prompt_id, size)
            assert text == dsr.prompt()
    assert not halves[0] & halves[1]


def test_the_built_in_set_is_what_the_program_writes(run: Run, prompt: Any, tmp_path: Path) -> None:
    from spatialalign.prompts import read_csv
    from training.prompts import main

    main([f"--out={tmp_path / 'train.csv'}", f"--held_out={tmp_path / 'held.csv'}"])
    for part, file in (("train", "train.csv"), ("held-out", "held.csv")):
        written = read_csv(tmp_path / file)
        for number in (0, 1, len(written) - 1):
            row = run(prompt.DsrFromSet, set=f"built-in: {part}", pick="index", number=number).args
            assert (row[0], row[3], row[4]) == (written[number].text, written[number].prompt_id, len(written))


def test_an_index_goes_round(run: Run, prompt: Any) -> None:
    texts = [row[0] for row in numbered(run, prompt.DsrFromSet, 97, set="miniature: held-out", pick="index")]
    assert len(set(texts[:96])) == 96 and texts[96] == texts[0]
    large = 0xFFFFFFFFFFFFFFFF  # what a seed widget may hold
    assert run(prompt.DsrFromSet, set="miniature: held-out", number=large).args[0] == texts[large % 96]


def test_a_seed_draws_again_what_it_drew(run: Run, prompt: Any) -> None:
    rows, again = (
        [row[3] for row in numbered(run, prompt.DsrFromSet, 200, set="miniature: held-out", pick="seed")] for _ in "ab"
    )
    assert rows == again
    # 200 draws of 96 miss a given one with a chance of 0.12, and do not follow the order of the set.
    assert 70 < len(set(rows)) <= 96
    ordered = [row[3] for row in numbered(run, prompt.DsrFromSet, 96, set="miniature: held-out", pick="index")]
    assert rows[:96] != ordered


def test_a_csv_file_of_the_input_folder_is_a_set(run: Run, prompt: Any, fake_host: Any) -> None:
    (fake_host.input / "mine.csv").write_text("\n".join((HEADER, ROW, OTHER, "")), encoding="utf-8-sig")
    (fake_host.input / "clip.mp4").touch()
    options = prompt.DsrFromSet.INPUT_TYPES()["required"]["set"][1]["options"]
    assert options == [*prompt.SETS, "mine.csv"]
    assert prompt.DsrFromSet.validate_inputs(set="mine.csv") is True
    text, negative, dsr, name, count = run(prompt.DsrFromSet, set="mine.csv", number=3).args
    assert (name, count, dsr.object, dsr.scene) == ("0002_TL", 2, "hat stand", "In a café")
    assert text.startswith("In a café, an owl is on the top of a hat stand")
    assert negative == run(prompt.DsrPrompt).args[1]


def test_an_edited_csv_file_runs_again(prompt: Any, fake_host: Any) -> None:
    file = fake_host.input / "mine.csv"
    inputs = {"set": "mine.csv", "pick": "index", "number": 0}
    missing = prompt.DsrFromSet.fingerprint_inputs(**inputs)
    file.write_text("\n".join((HEADER, ROW)), encoding="utf-8")
    first = prompt.DsrFromSet.fingerprint_inputs(**inputs)
    assert first == prompt.DsrFromSet.fingerprint_inputs(**inputs) != missing
    state = file.stat()
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 1_000_000))
    assert prompt.DsrFromSet.fingerprint_inputs(**inputs) != first
    # What needs no file is never new; neither is a set that another node names, which ComfyUI passes as None.
    for name in (*prompt.SETS, None):
        same = {prompt.DsrFromSet.fingerprint_inputs(**inputs | {"set": name}) for _ in range(2)}
        assert len(same) == 1


@pytest.mark.parametrize("name", ["../secret.csv", "a/../../secret.csv", "ABSOLUTE", ""])
def test_a_file_outside_the_input_folder_is_refused(
    run: Run, prompt: Any, fake_host: Any, refused: type[Exception], name: str
) -> None:
    secret = fake_host.input.parent / "secret.csv"
    secret.write_text("\n".join((HEADER, ROW)), encoding="utf-8")
    asked = str(secret) if name == "ABSOLUTE" else name
    early = prompt.DsrFromSet.validate_inputs(set=asked)
    assert "is not a file inside ComfyUI's input folder" in early and str(fake_host.input) in early
    with pytest.raises(refused, match="input folder"):
        run(prompt.DsrFromSet, set=asked)


def test_a_missing_file_is_named_with_its_folder(
    run: Run, prompt: Any, fake_host: Any, refused: type[Exception]
) -> None:
    early = prompt.DsrFromSet.validate_inputs(set="gone.csv")
    assert early.startswith("gone.csv is not in ComfyUI's input folder") and str(fake_host.input) in early
    with pytest.raises(refused, match="gone.csv is not in"):
        run(prompt.DsrFromSet, set="gone.csv")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ((HEADER,), "no prompt below its header"),
        (("prompt", SENTENCE), "column 'prompt_id' is missing"),
        ((HEADER, ROW.replace("on the left of,", "behind,")), "row 2, column 'initial_SR'"),
        ((HEADER, ROW, OTHER.replace("0002_TL", "0001_LR")), "prompt_id '0001_LR' occurs 2 times"),
    ],
)
def test_a_bad_file_is_refused_with_its_place(
    run: Run, prompt: Any, fake_host: Any, refused: type[Exception], lines: tuple[str, ...], said: str
) -> None:
    (fake_host.input / "bad.csv").write_text(
        "\n".join(f'"{x}"' if x == SENTENCE else x for x in lines), encoding="utf-8"
    )
    with pytest.raises(refused, match=said):
        run(prompt.DsrFromSet, set="bad.csv")
