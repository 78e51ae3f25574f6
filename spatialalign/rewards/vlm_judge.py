"""A vision-language model as a judge: it is asked whether a relation holds, and says yes, no, or neither.

The protocol is that of VBench-2.0's dynamic spatial relationship, for any chat model of transformers that takes
pictures: one question about the initial relation on the first frames, one about the final relation on the last.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from ..dsr import DSR, Relation
from ..errors import ConfigError, ModelError, PromptError
from ..tracking.parts import PROCESSOR, WEIGHTS, guarded, require_local
from ..video import Video, check_frames

Answer = Literal["yes", "no", "unclear"]

WINDOW = 3
"""Frames at either end that a question is about: the window of the DSR-Score."""

_ANSWER = re.compile(r"\W*(?:(?:the )?answer(?: is)?\W+)?(yes|no)\b(?!\W*(?:or\W+)?(?:yes|no)\b)")


def read_answer(text: str) -> Answer:
    """What a reply says: it must begin with yes or no, with "answer:" before it at most.

    Anything else is "unclear": a "no" further on may belong to "there is no cat", and "yes or no" repeats the question.
    """
    match = _ANSWER.match(text.lower())
    if match is None:
        return "unclear"
    return "yes" if match[1] == "yes" else "no"


def question(dsr: DSR, relation: Relation, frames: int) -> str:
    """Whether ``relation`` holds between the things of ``dsr``, asked about some consecutive frames."""
    shown = "this picture" if frames == 1 else f"these {frames} consecutive frames of a video"
    return f"Is the {dsr.subject} {relation.initial_phrase} the {dsr.object} in {shown}? Answer with yes or no only."


@dataclass(frozen=True)
class Reply:
    """What the model wrote, and how it is read."""

    text: str
    answer: Answer


@dataclass(frozen=True)
class Verdict:
    """The replies about both ends of a clip."""

    initial: Reply
    final: Reply

    @property
    def unclear(self) -> str:
        """The unclear replies in words; empty when there is none."""
        ends = (("initial", self.initial), ("final", self.final))
        return "; ".join(f"unclear about the {end} relation: {r.text!r}" for end, r in ends if r.answer == "unclear")


class VlmJudge:
    """Asks an image-text-to-text model; a :class:`.base.VideoReward` whose columns are 1 for yes and 0 for no.

    Attributes:
        name: of the model.
        dimensions: the initial and the final relation. Their sum is 2 when both are said to hold.
    """

    dimensions: tuple[str, ...] = ("initial", "final")

    def __init__(self, model: Any, processor: Any, name: str, window: int = WINDOW, most_tokens: int = 8) -> None:
        """``window`` frames at either end are shown; a reply is cut after ``most_tokens`` tokens."""
        if window < 1 or most_tokens < 1:
            raise ConfigError(f"window and most_tokens must be at least 1, found {window} and {most_tokens}")
        # LLaVA's processor keeps it itself, others leave it to the tokenizer.
        if not (processor.chat_template or processor.tokenizer.chat_template):
            raise ModelError(f"{name}: no chat template; a judge must be a chat model that takes pictures")
        self.model, self.processor, self.name = model, processor, name
        self.window, self.most_tokens = window, most_tokens

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        window: int = WINDOW,
    ) -> VlmJudge:
        """Load a folder or hub id such as ``Qwen/Qwen2.5-VL-7B-Instruct``.

        Raises:
            ModelError: a part is missing, or the model takes no pictures or no chat.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        require_local(name, ["config.json", WEIGHTS, PROCESSOR])
        processor = guarded(str(name), lambda: AutoProcessor.from_pretrained(str(name)))
        model = guarded(str(name), lambda: AutoModelForImageTextToText.from_pretrained(str(name), dtype=dtype))
        return cls(model.to(device).eval(), processor, Path(name).name, window)

    @torch.inference_mode()
    def ask(self, frames: NDArray[np.uint8], asked: str) -> Reply:
        """The reply to a question about ``frames``, uint8 ``(T, H, W, 3)``, without sampling."""
        from PIL import Image

        check_frames(frames)
        pictures = [{"type": "image", "image": Image.fromarray(frame)} for frame in frames]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": [*pictures, {"type": "text", "text": asked}]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device, self.model.dtype)
        tokens = self.model.generate(**inputs, do_sample=False, max_new_tokens=self.most_tokens)
        written = tokens[0, inputs["input_ids"].shape[1] :]
        text = str(self.processor.tokenizer.decode(written, skip_special_tokens=True)).strip()
        return Reply(text, read_answer(text))

    def __call__(self, frames: NDArray[np.uint8], asked: str) -> Answer:
        """The answer of :meth:`ask` alone."""
        return self.ask(frames, asked).answer

    def judge(self, video: Video, dsr: DSR) -> Verdict:
        """Ask about the initial relation on the first frames and about the final one on the last."""
        first, last = video.frames[: self.window], video.frames[-self.window :]
        return Verdict(
            self.ask(first, question(dsr, dsr.initial, len(first))), self.ask(last, question(dsr, dsr.final, len(last)))
        )

    def score(self, videos: Sequence[Video], prompts: Sequence[str]) -> np.ndarray:
        """Columns ``(n, 2)``: 1 for yes, 0 for no, NaN where a reply is unclear or a prompt outside the grammar."""
        if len(videos) != len(prompts):
            raise ConfigError(f"each clip needs its prompt, found {len(videos)} clips and {len(prompts)} prompts")
        rows = np.full((len(videos), 2), np.nan)
        for row, video, prompt in zip(rows, videos, prompts, strict=True):
            try:
                row[:] = values(self.judge(video, DSR.parse(prompt)))
            except PromptError:
                continue
        return rows


def values(verdict: Verdict) -> tuple[float, float]:
    """The columns of a verdict: 1 for yes, 0 for no, NaN for unclear."""
    worth = {"yes": 1.0, "no": 0.0, "unclear": float("nan")}
    return worth[verdict.initial.answer], worth[verdict.final.answer]
