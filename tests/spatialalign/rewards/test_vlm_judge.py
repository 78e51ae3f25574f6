"""The judge on a small LLaVA that really looks at its pictures."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from spatialalign.dsr import DSR, Relation
from spatialalign.errors import ConfigError, ModelError
from spatialalign.rewards.base import VideoReward
from spatialalign.rewards.vlm_judge import VlmJudge, question, read_answer
from spatialalign.video import Video

RED, BLUE, GREY = (250, 30, 30), (30, 30, 250), (110, 110, 110)
"""The cat is on the left, on the right, nowhere: see the fixture."""
PROMPT = "In a quiet room, a cat is on the left of a box, then the cat walks to the right of the box."


def clip(first: tuple[int, int, int], last: tuple[int, int, int], frames: int = 9) -> Video:
    """A clip of one colour, but for its last three frames."""
    pixels = np.empty((frames, 16, 16, 3), np.uint8)
    pixels[:], pixels[-3:] = first, last
    return Video(pixels, 8.0)


@pytest.fixture(scope="module")
def judge(tiny_vlm: Path) -> VlmJudge:
    return VlmJudge.from_pretrained(tiny_vlm, dtype=torch.float32)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Yes", "yes"),
        ("yes.", "yes"),
        (" **No**, it is not.", "no"),
        ("Answer: yes", "yes"),
        ("The answer is no", "no"),
        ("No, but yes later", "no"),
        ("", "unclear"),
        ("maybe", "unclear"),
        ("There is no cat.", "unclear"),
        ("I cannot say yes", "unclear"),
        ("Yes or no?", "unclear"),
        ("yes/no", "unclear"),
        ("Nothing", "unclear"),
        ("yesterday", "unclear"),
        ("Not at all", "unclear"),
    ],
)
def test_only_a_reply_that_begins_with_yes_or_no_is_one(text: str, answer: str) -> None:
    assert read_answer(text) == answer


def test_the_question_is_about_a_state() -> None:
    dsr = DSR.parse(PROMPT)
    assert question(dsr, dsr.final, 1).startswith("Is the cat on the right of the box in this picture? ")
    assert "in these 3 consecutive frames of a video?" in question(dsr, dsr.initial, 3)


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        pytest.param(RED, BLUE, ("yes", "yes"), id="as asked"),
        pytest.param(RED, RED, ("yes", "no"), id="it stays"),
        pytest.param(BLUE, RED, ("no", "no"), id="the other way round"),
        pytest.param(GREY, BLUE, ("unclear", "yes"), id="not seen at first"),
    ],
)
def test_both_ends_are_asked_about(judge: VlmJudge, first: tuple, last: tuple, expected: tuple) -> None:  # type: ignore[type-arg]
    verdict = judge.judge(clip(first, last), DSR.parse(PROMPT))
    assert (verdict.initial.answer, verdict.final.answer) == expected
    assert verdict.unclear == ("unclear about the initial relation: 'maybe'" if "unclear" in expected else "")


def test_it_is_a_reward_and_what_is_unclear_is_no_number(judge: VlmJudge) -> None:
    reward: VideoReward = judge
    clips = [clip(RED, BLUE), clip(RED, RED), clip(GREY, RED), clip(RED, BLUE)]
    scores = reward.score(clips, [PROMPT] * 3 + ["a cat walks"])
    assert reward.dimensions == ("initial", "final") and reward.name == "tiny-vlm"
    assert scores.dtype == np.float64
    np.testing.assert_array_equal(scores, [[1, 1], [1, 0], [np.nan, 0], [np.nan, np.nan]])
    with pytest.raises(ConfigError, match="2 clips and 1 prompts"):
        judge.score(clips[:2], [PROMPT])


def test_as_a_callable_it_answers_any_question(judge: VlmJudge) -> None:
    dsr = DSR.parse(PROMPT)
    assert judge(clip(BLUE, BLUE).frames[:1], question(dsr, Relation.RIGHT, 1)) == "yes"
    assert judge(clip(BLUE, BLUE).frames[:1], question(dsr, Relation.LEFT, 1)) == "no"


def test_what_is_no_judge_is_refused(tiny_vlm: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="lacks processor_config.json"):
        (tmp_path / "empty").mkdir()
        shutil.copy(tiny_vlm / "config.json", tmp_path / "empty")
        shutil.copy(tiny_vlm / "model.safetensors", tmp_path / "empty")
        VlmJudge.from_pretrained(tmp_path / "empty")
    mute = shutil.copytree(tiny_vlm, tmp_path / "mute")
    (mute / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        VlmJudge.from_pretrained(mute)
