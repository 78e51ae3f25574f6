"""VideoReward: visual quality, motion quality and text alignment, by a language model that sees (methods: 2)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from ..errors import ConfigError, VideoError
from ..video import Video
from .video_reward_checkpoint import Checkpoint, load_network
from .video_reward_clips import ClipRule
from .video_reward_config import SCORED, VideoRewardConfig
from .video_reward_network import RewardBatch, VideoRewardNetwork
from .video_reward_text import OFFICIAL_FILE, Instruction, encode

logger = logging.getLogger("spatialalign")


class LearnedVideoReward:
    """Scores clips with a VideoReward network; a :class:`.base.VideoReward`.

    Attributes:
        name: of the checkpoint; it tells when scores are not comparable with published ones.
        dimensions: VQ, MQ, TA and Overall, which is the sum of the three.
        notes: what a person should know of the scores, empty if all is as published.
    """

    dimensions: tuple[str, ...] = (*SCORED, "Overall")

    def __init__(
        self,
        network: VideoRewardNetwork,
        tokenizer: Any,
        instruction: Instruction,
        config: VideoRewardConfig,
        name: str = "VideoReward",
        batch: int = 2,
    ) -> None:
        """``batch`` clips go through the network at once; it changes the scores by rounding only."""
        if batch < 1:
            raise ConfigError(f"batch must be at least 1, found {batch}")
        self.network, self.tokenizer, self.instruction, self.config = network, tokenizer, instruction, config
        self.batch = batch
        self.name = f"{name} (instruction not the published one)" if instruction.own else name
        self.rule = _rule(network, config)
        self.notes = tuple(_notes(instruction, config))
        for note in self.notes:
            logger.warning("%s: %s", name, note)

    def score(self, videos: Sequence[Video], prompts: Sequence[str]) -> np.ndarray:
        """Scores ``(n, 4)`` float64 in the order of ``dimensions``; higher is better.

        A row is NaN where a clip has fewer than two frames or one side more than 200 times the other.

        Raises:
            ConfigError: not one prompt for each clip.
            PromptError: a prompt that with its clip is too long, or that holds one of the model's control tokens.
        """
        if len(videos) != len(prompts):
            raise ConfigError(f"each clip needs its prompt, found {len(videos)} clips and {len(prompts)} prompts")
        scores = np.full((len(videos), len(self.dimensions)), np.nan)
        usable = [row for row, video in enumerate(videos) if self._can_be_scored(row, video)]
        for start in range(0, len(usable), self.batch):
            rows = usable[start : start + self.batch]
            batch = self.collate([videos[row] for row in rows], [prompts[row] for row in rows])
            with torch.inference_mode():
                answers = self.network(batch).double().cpu().numpy()
            scores[rows, :-1] = self._normalised(answers)
        scores[:, -1] = scores[:, :-1].sum(axis=1)
        return scores

    def collate(self, videos: Sequence[Video], prompts: Sequence[str]) -> RewardBatch:
        """What the network takes, on its device; padded at the right.

        Raises:
            VideoError: a clip that cannot be scored.
            PromptError: see :meth:`score`.
        """
        device = self.network.rm_head.weight.device
        rows, patches, grids = [], [], []
        for video, prompt in zip(videos, prompts, strict=True):
            pixels, grid = self.rule.patches(video, device)
            tokens = encode(self.tokenizer, self.instruction, prompt, self.rule.tokens(grid), self.config.max_length)
            rows.append(torch.tensor(tokens))
            patches.append(pixels)
            grids.append(grid)
        # behind the mask any token will do, but no second one that is read or replaced
        ids = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id or 0)
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        return RewardBatch(ids, mask, torch.cat(patches), torch.tensor(grids)).to(device)

    def _can_be_scored(self, row: int, video: Video) -> bool:
        try:
            self.rule.indices(len(video.frames), video.fps)
            self.rule.size(*video.size)
        except VideoError as error:
            logger.warning("clip %d: %s; its scores are NaN", row, error)
            return False
        return True

    def _normalised(self, answers: np.ndarray) -> np.ndarray:
        if self.config.mean is None or self.config.std is None:
            return answers
        return np.asarray((answers - np.array(self.config.mean)) / np.array(self.config.std))


def load_video_reward(
    folder: str | Path,
    base: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 2,
    merge: bool = True,
) -> LearnedVideoReward:
    """Read a checkpoint in the layout of KwaiVGI/VideoReward; see :mod:`.video_reward_checkpoint`.

    Args:
        folder: with ``model_config.json``, ``checkpoint-<step>/`` and a file of :mod:`.video_reward_text`.
        base: folder of the base model; only for checkpoints that hold no more than what was trained.
        dtype: bfloat16, as the released weights are, or float32.
        batch: clips that go through the network at once.
        merge: add the adapters to the weights; False keeps them apart (peft is needed).

    Raises:
        ModelError: a part that is missing or does not fit, by name.
    """
    checkpoint = Checkpoint.find(folder, base)
    instruction = Instruction.load(checkpoint.folder)
    tokenizer = checkpoint.tokenizer()
    network = load_network(checkpoint, tokenizer, device, dtype, merge)
    name = f"{checkpoint.folder.resolve().name}/{checkpoint.step.name}"
    return LearnedVideoReward(network, tokenizer, instruction, checkpoint.config, name, batch)


def _rule(network: VideoRewardNetwork, config: VideoRewardConfig) -> ClipRule:
    vision = network.backbone.config.vision_config
    sizes = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
    return ClipRule(config.fps, config.frames, config.max_pixels, *sizes)


def _notes(instruction: Instruction, config: VideoRewardConfig) -> list[str]:
    notes = []
    if instruction.own:
        notes.append(
            "scored with an instruction of our own, so the scores are not comparable with published ones; copy "
            f"{OFFICIAL_FILE} of the authors' repository KwaiVGI/VideoAlign beside model_config.json"
        )
    if config.mean is None:
        notes.append("model_config.json has no inference_config: the scores are the network's bare answers")
    return notes
