"""Train a VideoReward network on labelled pairs of clips: ``python -m training.reward_model``."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spatialalign.claims import exclusive
from spatialalign.errors import ConfigError, DataError, PromptError
from spatialalign.files import write_json
from training.cli import command, options_of
from training.config import fingerprint
from training.interrupt import stop_requests
from training.reward_model_settings import RewardModelSettings

if TYPE_CHECKING:
    from spatialalign.rewards.video_reward import LearnedVideoReward
    from training.reward_pairs import RewardPairs

logger = logging.getLogger(__name__)

BASE = "Qwen/Qwen2-VL-2B-Instruct"
_NAMED = 10


@dataclass(frozen=True)
class TrainRewardModel:
    """Train a reward of visual quality, motion quality and text alignment; run again to continue a stopped run."""

    pairs: Path
    """CSV file with path_A, path_B, prompt and the labels VQ, MQ, TA: A, B or same; ratings as MOS_A_VQ and so on."""
    out: Path
    """Output folder: the checkpoint in VideoReward's layout, checkpoints to continue from, logs."""
    model: str = BASE
    """Qwen2-VL model to start from: a folder or a hub id."""
    videos: Path | None = None
    """Folder that the paths of the CSV files are in; null for that of each file."""
    validation: Path | None = None
    """CSV file of pairs that are only watched; null to hold out some prompts."""
    instruction: Path | None = None
    """Folder with prompt_template.txt or the authors' prompt_template.py; null for the output folder, else our own."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: str = "auto"
    """Precision of the base model and of the checkpoint: auto (bfloat16 on CUDA, else float32), float32, bfloat16."""
    allow_changes: bool = False
    """Continue a checkpoint although settings, model or pairs differ from those it was made with."""
    options: dict[str, Any] = options_of(RewardModelSettings)

    def settings(self) -> RewardModelSettings:
        """The options given, on top of the defaults."""
        return RewardModelSettings(**self.options)


@dataclass(frozen=True)
class RewardModelResult:
    """What a training left behind.

    Attributes:
        finished: False when it was stopped before its last step.
        step: optimiser steps done.
        checkpoint: folder that ``load_video_reward`` reads, when finished: ``out``.
        held_out: accuracy on the validation pairs by dimension, without and with ties.
        left_out: the reason of everything that could not be used, by line, prompt or file.
    """

    finished: bool
    step: int
    checkpoint: Path | None
    held_out: Mapping[str, float | None]
    left_out: Mapping[str, str]


def train(
    judge: LearnedVideoReward,
    pairs: RewardPairs,
    validation: RewardPairs | None,
    out: Path,
    settings: RewardModelSettings,
    allow_changes: bool = False,
) -> RewardModelResult:
    """Train and export.

    Args:
        judge: of ``reward_network.new_judge``, with the same settings; trained in place.
        pairs: to train on; a share is held out if there is no ``validation``.

    Raises:
        DataError: the pairs teach the loss nothing, or no clip can be used.
        ConfigError: ``out`` holds a checkpoint of other settings, model or pairs.
        StoreError: another process is training into ``out``.
    """
    from training.reward_model_trainer import RewardModelTrainer
    from training.reward_network import export
    from training.reward_pairs import check_labels, counts

    usable = _readable(judge, pairs)
    kept, watched = usable.split(settings.held_out, settings.seed) if validation is None else (usable, validation)
    for warning in check_labels(kept, settings.loss):
        logger.warning("%s", warning)
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out / ".lock", f"the training folder {out}"):
        identity = {
            **settings.to_dict(),
            "base_model": judge.config.base,
            "dtype": str(judge.network.backbone.lm_head.weight.dtype),
            "instruction_digest": hashlib.sha256(judge.instruction.text.encode()).hexdigest()[:16],
            "pairs_digest": kept.digest,
        }
        trainer = RewardModelTrainer(judge, kept, watched, settings, out, identity)
        for change in trainer.resume(allow_changes):
            logger.warning("continuing although %s", change)
        about = {"pairs": len(kept), "validation_pairs": len(watched), "labels": counts(kept)}
        write_json(out / "config.json", identity | about | {"config_digest": fingerprint(identity)})
        with stop_requests() as stop:
            finished = trainer.fit(stop)
        left_out = {**usable.left_out, **watched.left_out, **trainer.reader.left_out}
        if not finished:
            return RewardModelResult(False, trainer.step, None, {}, left_out)
        held_out, (mean, std) = trainer.held_out(), trainer.statistics()
        judge.config = dataclasses.replace(judge.config, mean=tuple(mean.tolist()), std=tuple(std.tolist()))
        export(out, judge, settings, trainer.step)
        write_json(out / "summary.json", {"step": trainer.step, "held_out": held_out, "left_out": left_out})
    return RewardModelResult(True, trainer.step, out, held_out, left_out)


def _readable(judge: LearnedVideoReward, pairs: RewardPairs) -> RewardPairs:
    """The pairs without those whose prompt is too long already without a clip, or holds a token of the model's."""
    from spatialalign.rewards.video_reward_text import encode

    bad: dict[str, str] = {}
    for prompt in dict.fromkeys(pairs.prompts):
        try:
            encode(judge.tokenizer, judge.instruction, prompt, 1, judge.config.max_length)
        except PromptError as error:
            bad[prompt] = str(error)
    usable = pairs.without(bad)
    if not len(usable):
        raise DataError(f"none of {len(pairs)} pairs can be used; the first: {next(iter(bad.values()))}")
    return usable


def run(args: TrainRewardModel) -> RewardModelResult:
    """Read the pairs, load the base model and train."""
    import torch

    from spatialalign.backbones.loading import pick_device, pick_dtype
    from spatialalign.rewards.video_reward_text import Instruction
    from training.reward_network import new_judge
    from training.reward_pairs import read_pairs

    settings = args.settings()
    if args.instruction is not None and not args.instruction.is_dir():
        raise ConfigError(f"instruction: {args.instruction} is no folder; give the one that prompt_template.txt is in")
    pairs = read_pairs(args.pairs, args.videos)
    validation = None if args.validation is None else read_pairs(args.validation, args.videos)
    for name, reason in list(pairs.left_out.items())[:_NAMED]:
        logger.warning("%s is left out: %s", name, reason)
    device = pick_device(args.device)
    instruction = Instruction.load(args.instruction or args.out)
    result = train(
        new_judge(args.model, settings, instruction, torch.device(device), pick_dtype(args.dtype, device)),
        pairs,
        validation,
        args.out,
        settings,
        args.allow_changes,
    )
    if not result.finished:
        print(f"stopped after step {result.step}; run the same command again to continue", file=sys.stderr)
        return result
    for name, value in result.held_out.items():
        print(f"{name}: {'unknown' if value is None else f'{100 * value:.1f} %'}")
    left_out = f"; {len(result.left_out)} rows, prompts or clips were left out" if result.left_out else ""
    print(f"{result.checkpoint}{left_out}")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m training.reward_model``."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    command(TrainRewardModel, run, argv)


if __name__ == "__main__":
    main()
