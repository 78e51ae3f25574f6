"""The instruction that VideoReward reads after a clip.

Scores are comparable with published ones only if the instruction is the one of the training, to the letter. It is
not part of the weights; one of these files belongs beside ``model_config.json``:

* ``prompt_template.py`` of the authors' repository (KwaiVGI/VideoAlign), as it is; it is read, never run;
* ``prompt_template.txt``: the instruction alone, UTF-8, with ``{text_prompt}`` where the prompt goes.

Where neither is, an instruction of our own is used.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelError, PromptError
from .video_reward_config import SCORED

MARKS = tuple(f"<|{name}_reward|>" for name in SCORED)
VIDEO = "<|video_pad|>"
PLACEHOLDER = "{text_prompt}"
TEXT_FILE, OFFICIAL_FILE = "prompt_template.txt", "prompt_template.py"
_OFFICIAL_NAME = "DETAILED_PROMPT_WITH_SPECIAL_TOKEN"
_START, _END = "<|im_start|>", "<|im_end|>"
_CONTROL = (*MARKS, VIDEO, _START, _END, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|endoftext|>")
# One turn in the chat format of Qwen2-VL: the clip, the instruction, and the answer about to begin.
_HEAD = f"{_START}system\nYou are a helpful assistant.{_END}\n{_START}user\n<|vision_start|>{VIDEO}<|vision_end|>"
_TAIL = f"{_END}\n{_START}assistant\n"

_OWN = """
You see a video made by a text-to-video model. Rate it from 0 to 10 in each of three respects, independently.

Visual quality, of the single frames: are they plausible, sharp, rich in detail, pleasing and fit for everyone?
Rating of visual quality: <|VQ_reward|>
END

Motion quality, of the change between frames: is it steady, natural, smooth, clearly seen and large enough, and do
moving things blend with their surroundings?
Rating of motion quality: <|MQ_reward|>
END

Text alignment: do the subjects, their movements, the surroundings, the style and the camera agree with the prompt?
Prompt - {text_prompt}
Rating of text alignment: <|TA_reward|>
END
"""


@dataclass(frozen=True)
class Instruction:
    """The text with ``{text_prompt}`` once and the tokens of VQ, MQ and TA once each, in this order.

    VQ and MQ cannot depend on a prompt that stands behind their tokens.
    """

    text: str
    source: str

    def __post_init__(self) -> None:
        wanted = (*MARKS, PLACEHOLDER)
        wrong = [part for part in wanted if self.text.count(part) != 1]
        places = [self.text.find(mark) for mark in MARKS]
        if wrong or places != sorted(places):
            raise ModelError(
                f"{self.source}: the instruction must hold each of {', '.join(wanted)} once, the tokens in this order"
                + (f"; not once: {', '.join(wrong)}" if wrong else "")
            )

    @property
    def own(self) -> bool:
        """Whether it is ours and not the one of the training."""
        return self.text == _OWN

    @classmethod
    def load(cls, folder: Path) -> Instruction:
        """Of the first of the files above that ``folder`` has, or our own.

        Raises:
            ModelError: a file that cannot be read, or an instruction without its tokens.
        """
        for name, read in ((TEXT_FILE, str), (OFFICIAL_FILE, _official)):
            path = folder / name
            if path.is_file():
                try:
                    return cls(read(path.read_text(encoding="utf-8")), str(path))
                except (OSError, UnicodeDecodeError, SyntaxError, LookupError) as error:
                    raise ModelError(f"{path} cannot be read ({error}); copy it again") from error
        return cls(_OWN, "our own instruction")

    def chat(self, prompt: str) -> str:
        """The whole text for ``prompt``, with one ``<|video_pad|>`` in place of the clip.

        Raises:
            PromptError: the prompt holds one of the model's control tokens.
        """
        control = [token for token in _CONTROL if token in prompt]
        if control:
            raise PromptError(f"the prompt {prompt!r} must not hold the model's own token {control[0]}; take it out")
        return _HEAD + self.text.replace(PLACEHOLDER, prompt) + _TAIL


def encode(tokenizer: Any, instruction: Instruction, prompt: str, clip_tokens: int, max_length: int) -> Sequence[int]:
    """Tokens of clip and text; the clip's are ``clip_tokens`` times that of ``<|video_pad|>``.

    Nothing is cut off: a cut would fall on the tokens at which the scores are read.

    Raises:
        PromptError: more than ``max_length`` tokens, or a control token in the prompt.
    """
    ids = list(tokenizer(instruction.chat(prompt), add_special_tokens=False)["input_ids"])
    length = len(ids) - 1 + clip_tokens
    if length > max_length:
        raise PromptError(
            f"the prompt {_short(prompt)} and its clip make {length} tokens ({clip_tokens} of the clip), the reward "
            f"reads {max_length}: shorten the prompt or the clip"
        )
    place = ids.index(tokenizer.convert_tokens_to_ids(VIDEO))
    return ids[:place] + [ids[place]] * clip_tokens + ids[place + 1 :]


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 80 else prompt[:77] + "...")


def _official(source: str) -> str:
    """The string that the authors' file assigns to the name of the released template."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == [_OFFICIAL_NAME]:
            if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                return node.value.value
    raise LookupError(f"no string {_OFFICIAL_NAME} in it")
