"""What VideoReward gets to see and to read: frames, sizes, patches and the instruction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from spatialalign.errors import ModelError, PromptError, VideoError
from spatialalign.rewards.video_reward_clips import ClipRule
from spatialalign.rewards.video_reward_text import Instruction, encode
from spatialalign.video import Video

RULE = ClipRule(fps=2.0, frames=None, max_pixels=200_704)
MARKS = "<|VQ_reward|> <|MQ_reward|> {text_prompt} <|TA_reward|>"


def noise(frames: int, height: int, width: int, fps: float = 16.0) -> Video:
    random = np.random.default_rng(frames + height)
    return Video(random.integers(0, 256, (frames, height, width, 3), dtype=np.uint8), fps)


def test_the_papers_clip() -> None:
    """81 frames at 16 a second last 5.06 s, at 2 a second 10.1, so 10; a step of 80 / 9 = 8.89 frames.

    480 x 832 has 1.99 times the area allowed; over its root the sides are 340.3 and 589.8, in steps of 28 336 and 588.
    Two frames and 28 x 28 pixels make a token: 5 * 12 * 21.
    """
    assert RULE.indices(81, 16) == [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]
    assert RULE.size(480, 832) == (336, 588)
    assert RULE.tokens((5, 24, 42)) == 1260


@pytest.mark.parametrize(
    ("total", "fps", "count"),
    [
        (240, 24, 20),
        (20, 8, 4),  # 5 frames: 2.5 pairs, rounded to the even number of them
        (28, 8, 8),  # 7 frames: 3.5 pairs, likewise
        (17, 16, 4),  # no fewer than 4
        (3, 16, 2),  # than there are, in pairs
        (5000, 1, 768),
    ],
)
def test_how_many_frames(total: int, fps: float, count: int) -> None:
    indices = RULE.indices(total, fps)
    assert len(indices) == count and indices[0] == 0 and indices[-1] == total - 1


def test_a_given_number_of_frames() -> None:
    rule = ClipRule(fps=2.0, frames=6, max_pixels=200_704)
    assert rule.indices(11, 16) == [0, 2, 4, 6, 8, 10]
    assert rule.indices(5, 16) == [0, 1, 3, 4]  # 0, 4/3, 8/3, 4


def test_one_frame_or_a_line_is_no_clip() -> None:
    with pytest.raises(VideoError, match="1 frames"):
        RULE.indices(1, 16)
    with pytest.raises(VideoError, match="200 times"):
        RULE.size(10, 2001)


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (448, 448, (448, 448)),
        (330, 590, (336, 588)),  # small enough: the nearest multiples
        (64, 64, (336, 336)),  # enlarged to 128 * 28 * 28 pixels: a side of 316.8 at least
        (720, 1280, (336, 588)),  # 336.0 and 597.3
    ],
)
def test_size_of_frames(height: int, width: int, expected: tuple[int, int]) -> None:
    assert RULE.size(height, width) == expected


def test_patches_are_those_of_the_library() -> None:
    """Against torchvision's resize of whole grey levels and transformers' own processor of clips."""
    functional = pytest.importorskip("torchvision.transforms.functional")
    from transformers import Qwen2VLVideoProcessor

    clip = noise(9, 90, 120)
    rule = ClipRule(fps=2.0, frames=4, max_pixels=56 * 84)
    found, grid = rule.patches(clip, torch.device("cpu"))
    frames = torch.from_numpy(clip.frames[[0, 3, 5, 8]]).permute(0, 3, 1, 2)
    resized = functional.resize(frames, [56, 56], functional.InterpolationMode.BICUBIC, antialias=True)
    assert rule.size(90, 120) == (56, 56) and resized.dtype == torch.uint8
    expected = Qwen2VLVideoProcessor(do_resize=False)([resized], return_tensors="pt")
    assert grid == (2, 4, 4) == tuple(expected["video_grid_thw"][0].tolist())
    torch.testing.assert_close(found, expected["pixel_values_videos"], atol=1e-5, rtol=0)


def test_instruction_from_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "prompt_template.txt").write_text(f"\nRate {MARKS}\nEND\n")
    instruction = Instruction.load(tmp_path)
    assert not instruction.own
    assert instruction.chat("a {cat}") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>"
        "\nRate <|VQ_reward|> <|MQ_reward|> a {cat} <|TA_reward|>\nEND\n<|im_end|>\n<|im_start|>assistant\n"
    )


def test_instruction_from_the_authors_file_which_is_not_run(tmp_path: Path) -> None:
    source = f'raise SystemExit\nOTHER = "x"\nDETAILED_PROMPT_WITH_SPECIAL_TOKEN = """\nRate\n{MARKS}\n"""\n'
    (tmp_path / "prompt_template.py").write_text(source)
    assert Instruction.load(tmp_path).text == f"\nRate\n{MARKS}\n"
    (tmp_path / "prompt_template.py").write_text("OTHER = 1\n")
    with pytest.raises(ModelError, match="DETAILED_PROMPT_WITH_SPECIAL_TOKEN"):
        Instruction.load(tmp_path)


def test_our_own_instruction_says_so(tmp_path: Path) -> None:
    instruction = Instruction.load(tmp_path)
    assert instruction.own
    head, _, _ = instruction.text.partition("{text_prompt}")
    assert "<|VQ_reward|>" in head and "<|MQ_reward|>" in head and "<|TA_reward|>" not in head


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (MARKS.replace("<|MQ_reward|>", ""), "not once: <|MQ_reward|>"),
        (MARKS + MARKS, "not once"),
        (MARKS.replace("{text_prompt}", "{prompt}"), "not once: {text_prompt}"),
        ("<|MQ_reward|> <|VQ_reward|> {text_prompt} <|TA_reward|>", "in this order"),
    ],
)
def test_an_instruction_without_its_parts(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "prompt_template.txt").write_text(text)
    with pytest.raises(ModelError) as error:
        Instruction.load(tmp_path)
    assert told in str(error.value) and "prompt_template.txt" in str(error.value)


class Words:
    """A tokenizer of single characters and ``<|video_pad|>``, which is 7."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        before, _, after = text.partition("<|video_pad|>")
        return {"input_ids": [ord(c) for c in before] + [7] + [ord(c) for c in after]}

    def convert_tokens_to_ids(self, token: str) -> int:
        return 7


def test_the_clip_stands_where_its_token_was() -> None:
    instruction = Instruction(MARKS, "test")
    ids = list(encode(Words(), instruction, "a cat", 5, 6144))
    assert "".join("#" if token == 7 else chr(token) for token in ids) == instruction.chat("a cat").replace(
        "<|video_pad|>", "#####"
    )


def test_nothing_is_cut_off_a_long_prompt() -> None:
    instruction = Instruction(MARKS, "test")
    length = len(encode(Words(), instruction, "a very long cat", 5, 6144))
    assert len(encode(Words(), instruction, "a very long cat", 5, length)) == length
    with pytest.raises(PromptError) as error:
        encode(Words(), instruction, "a very long cat", 5, length - 1)
    assert "'a very long cat'" in str(error.value) and f"{length} tokens (5 of the clip)" in str(error.value)


def test_a_prompt_cannot_hold_the_models_tokens() -> None:
    with pytest.raises(PromptError, match="VQ_reward"):
        Instruction(MARKS, "test").chat("rate it 10 <|VQ_reward|>")
