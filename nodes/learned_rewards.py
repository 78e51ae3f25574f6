"""Nodes that score finished clips by learned models: VideoReward, and a chat model that is asked what it sees."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ..spatialalign.dsr import DSR
from ..spatialalign.errors import ModelError
from . import host
from .bridges import fps_input
from .kept import NONE, file_times, model_folders
from .sockets import DSR_SOCKET, VIDEO_REWARD_SOCKET, VLM_SOCKET, clip_inputs, frames_of, to_uint8
from .values import Values, figure, joined, json_text, shown, values_input, values_output

if TYPE_CHECKING:
    from torch import Tensor

    from ..spatialalign.rewards.video_reward import LearnedVideoReward
    from ..spatialalign.rewards.vlm_judge import VlmJudge
    from ..spatialalign.video import Video

CATEGORY = "SpatialAlign/Score"
VIDEO_REWARDS, VLMS = "video_reward", "VLM"
"""Folders below ``models``."""
HUB = {VIDEO_REWARDS: "KwaiVGI/VideoReward", VLMS: "Qwen/Qwen2.5-VL-7B-Instruct"}
"""What is offered where nothing was put yet; it is not downloaded by the pack."""


@dataclass(frozen=True)
class LoadedVideoReward:
    """A reward and the host's patcher about its network, which is on the device only after ``host.load``."""

    reward: LearnedVideoReward
    patcher: Any


@dataclass(frozen=True)
class LoadedVlm:
    """A judge and the host's patcher about its model, likewise."""

    judge: VlmJudge
    patcher: Any


class LoadVideoReward(io.ComfyNode):
    """A VideoReward checkpoint from the models folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpatialAlignLoadVideoReward",
            display_name="Load VideoReward",
            category=CATEGORY,
            description=(
                "Loads VideoReward, a vision-language model that was trained on people's choices to score a clip's "
                "visual quality, motion quality and text alignment. Nothing is downloaded: put the whole of "
                "KwaiVGI/VideoReward, or what python -m training.reward_model wrote, into models/video_reward."
            ),
            inputs=[
                io.Combo.Input(
                    "model",
                    options=_choices(VIDEO_REWARDS),
                    tooltip="A folder in models/video_reward, with model_config.json and a checkpoint folder in it.",
                ),
                io.Combo.Input(
                    "base",
                    options=[NONE, *_folders(VLMS)],
                    default=NONE,
                    tooltip=(
                        "The base model, a folder in models/VLM, only for a checkpoint that holds adapters and no "
                        "whole model."
                    ),
                ),
                io.Combo.Input(
                    "precision",
                    options=["bfloat16", "float32"],
                    default="bfloat16",
                    tooltip="Number format of the weights; they were trained in bfloat16, float32 is twice as large.",
                ),
            ],
            outputs=[
                VIDEO_REWARD_SOCKET.Output(display_name="video_reward", tooltip="For VideoReward Score."),
                io.String.Output(
                    display_name="report", tooltip="Its name, and whether its scores compare with published ones."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model: str, base: str, precision: str) -> str:
        """Times of its files: trained anew, or with another instruction beside it, it is loaded anew."""
        return file_times(_located(VIDEO_REWARDS, model))

    @classmethod
    def execute(cls, model: str, base: str, precision: str) -> io.NodeOutput:
        import torch

        from ..spatialalign.rewards.video_reward import load_video_reward

        beside = None if base == NONE else host.model_path(VLMS, base)
        reward = load_video_reward(_located(VIDEO_REWARDS, model), beside, dtype=getattr(torch, precision), batch=1)
        loaded = LoadedVideoReward(reward, host.patcher(reward.network))
        return io.NodeOutput(loaded, "\n".join([reward.name, *reward.notes]))


class VideoRewardScore(io.ComfyNode):
    """The three scores of a clip and their sum."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpatialAlignVideoRewardScore",
            display_name="VideoReward Score",
            category=CATEGORY,
            description=(
                "Scores a clip by VideoReward: visual quality, motion quality, and how well it follows its prompt; "
                "higher is better. The scores say which of several clips is better. They have no fixed range and no "
                "threshold."
            ),
            inputs=[
                VIDEO_REWARD_SOCKET.Input("video_reward", tooltip="From Load VideoReward."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    tooltip="The sentence that the clip was made from, without the negative one.",
                ),
                *clip_inputs(),
                fps_input(),
                values_input(),
            ],
            outputs=[
                io.Float.Output(display_name="VQ", tooltip="Visual quality of the frames; NaN below two frames."),
                io.Float.Output(display_name="MQ", tooltip="Motion quality: stable, plausible, lively."),
                io.Float.Output(display_name="TA", tooltip="Text alignment: whether the clip shows its prompt."),
                io.Float.Output(display_name="overall", tooltip="The sum of the three."),
                io.String.Output(
                    display_name="report", tooltip="JSON: the scores, the model, and what to know of its scores."
                ),
                values_output(),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        video_reward: LoadedVideoReward,
        prompt: str,
        fps: float,
        images: Tensor | None = None,
        video: Any = None,
        values: Values | None = None,
    ) -> io.NodeOutput:
        clip, reward = _clip(images, video, fps), video_reward.reward
        host.check_interrupt()
        host.load([video_reward.patcher])
        scores = reward.score([clip], [prompt])[0].tolist()
        own = dict(zip(reward.dimensions, scores, strict=True))
        report = {"model": reward.name, "prompt": prompt, "scores": own, "notes": list(reward.notes)}
        lines = [", ".join(f"{name} {figure(value)}" for name, value in own.items()), *reward.notes]
        if math.isnan(scores[-1]):
            lines.insert(0, "not scored: VideoReward needs two frames, and sides that differ by 200 times at most")
        return io.NodeOutput(*scores, json_text(report), joined(values, own), ui=shown(cls, lines))


class LoadVlm(io.ComfyNode):
    """A chat model that takes pictures, from the models folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpatialAlignLoadVLM",
            display_name="Load VLM",
            category=CATEGORY,
            description=(
                "Loads a vision-language chat model as a judge, such as Qwen2.5-VL or LLaVA in transformers' form. "
                "Nothing is downloaded: put the whole folder into models/VLM."
            ),
            inputs=[
                io.Combo.Input(
                    "model", options=_choices(VLMS), tooltip="A transformers folder in models/VLM, with config.json."
                ),
                io.Combo.Input(
                    "precision",
                    options=["bfloat16", "float16", "float32"],
                    default="bfloat16",
                    tooltip="Number format of the weights. 7 billion weights are 14 GB in 16 bits.",
                ),
            ],
            outputs=[VLM_SOCKET.Output(display_name="vlm", tooltip="For VLM Judge or Patch Reward Heatmap.")],
        )

    @classmethod
    def execute(cls, model: str, precision: str) -> io.NodeOutput:
        import torch

        from ..spatialalign.rewards.vlm_judge import VlmJudge

        judge = VlmJudge.from_pretrained(_located(VLMS, model), dtype=getattr(torch, precision))
        return io.NodeOutput(LoadedVlm(judge, host.patcher(judge.model)))


class JudgeByVlm(io.ComfyNode):
    """What a chat model says about both ends of a clip."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SpatialAlignVLMJudge",
            display_name="VLM Judge",
            category=CATEGORY,
            description=(
                "Asks a chat model two questions: whether the initial relation holds in the first frames, and whether "
                "the final one holds in the last. A reply that is neither yes nor no is unclear, and is not guessed at."
            ),
            inputs=[
                VLM_SOCKET.Input("vlm", tooltip="From Load VLM."),
                DSR_SOCKET.Input("dsr", tooltip="The relationship that is asked about."),
                *clip_inputs(video="A clip, instead of images."),
                io.Int.Input(
                    "frames", default=3, min=1, max=64, tooltip="How many frames at either end the model is shown."
                ),
                values_input(),
            ],
            outputs=[
                io.Boolean.Output(display_name="holds", tooltip="Whether both answers are yes."),
                io.Float.Output(
                    display_name="initial", tooltip="About the initial relation: 1 for yes, 0 for no, NaN when unclear."
                ),
                io.Float.Output(display_name="final", tooltip="About the final relation, likewise."),
                io.String.Output(display_name="report", tooltip="JSON: the model, the questions and its very words."),
                values_output(),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        vlm: LoadedVlm,
        dsr: DSR,
        frames: int,
        images: Tensor | None = None,
        video: Any = None,
        values: Values | None = None,
    ) -> io.NodeOutput:
        from ..spatialalign.rewards.vlm_judge import VlmJudge, question
        from ..spatialalign.rewards.vlm_judge import values as worth

        loaded = vlm.judge
        clip, judge = _clip(images, video), VlmJudge(loaded.model, loaded.processor, loaded.name, frames)
        host.check_interrupt()
        host.load([vlm.patcher])
        verdict = judge.judge(clip, dsr)
        initial, final = worth(verdict)
        report: dict[str, Any] = {"model": judge.name}
        lines = []
        count = min(frames, len(clip.frames))
        for end, relation, reply in (("initial", dsr.initial, verdict.initial), ("final", dsr.final, verdict.final)):
            asked = question(dsr, relation, count)
            report[end] = {"question": asked, "reply": reply.text, "answer": reply.answer}
            lines.append(f"{asked}\n{reply.answer}: {reply.text!r}")
        own = {"vlm_initial": initial, "vlm_final": final}
        both = initial == final == 1
        return io.NodeOutput(both, initial, final, json_text(report), joined(values, own), ui=shown(cls, lines))


def _clip(images: Tensor | None, video: Any, fps: float = 16.0) -> Video:
    from ..spatialalign.video import Video

    frames, rate = frames_of(images, video, fps)
    return Video(to_uint8(frames), rate)


def _folders(folder: str) -> list[str]:
    """Models in ``models/<folder>`` that are folders."""
    if folder != VIDEO_REWARDS:
        return model_folders(folder)
    names = host.model_names(folder)
    found = (parent.parent for name in names for parent in PurePosixPath(name).parents if _is_step(parent.name))
    return sorted({str(path) for path in found if path.parts})


def _is_step(name: str) -> bool:
    return name.startswith("checkpoint-")


def _choices(folder: str) -> list[str]:
    """What is there, the recommended one first under its hub id, whether it is there or not."""
    return [HUB[folder], *(name for name in _folders(folder) if name not in _aliases(folder))]


def _aliases(folder: str) -> tuple[str, str]:
    return HUB[folder], HUB[folder].rpartition("/")[2]


def _located(folder: str, name: str) -> Path:
    """The folder of a name from :func:`_choices`; a recommended one may lie there without its owner's name.

    Raises:
        ModelError: it is not there; how to get it is said.
    """
    if name != HUB[folder]:
        return host.model_path(folder, name)
    here = _folders(folder)
    for alias in _aliases(folder):
        if alias in here:
            return host.model_path(folder, alias)
    short = _aliases(folder)[1]
    raise ModelError(
        f"{name} is not in models/{folder}; download the whole of https://huggingface.co/{name}, with: hf download "
        f"{name} --local-dir models/{folder}/{short} in ComfyUI's folder, and run again"
    )
