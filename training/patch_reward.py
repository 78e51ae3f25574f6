"""Train a patch reward on a teacher's scores of blocks: ``python -m training.patch_reward``."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spatialalign.claims import exclusive
from spatialalign.errors import ConfigError, DataError
from spatialalign.files import write_json
from training.cli import command, options_of
from training.config import fingerprint
from training.interrupt import stop_requests
from training.patch_losses import rank_correlation, reward_loss
from training.patch_scores import Clip, PatchScores, read_patches
from training.store import Store

if TYPE_CHECKING:
    from torch import Tensor

    from spatialalign.rewards.patch import PatchReward

FILE = "patch_reward.safetensors"


@dataclass(frozen=True)
class PatchSettings:
    """Everything the weights of a patch reward depend on, besides the video reward it begins with and the labels."""

    steps: int = 400
    """Optimiser steps."""
    batch_pairs: int = 8
    """Pairs of clips of one prompt per optimiser step."""
    video_share: float = 0.25
    """Share of the steps that train on whole clips, whose label is the mean of their blocks'."""
    preference_weight: float = 0.5
    """Weight of the Bradley-Terry loss between co-located blocks beside the squared error."""
    margin: float = 0.25
    """Blocks whose labels differ by no more are no pair; in standard deviations of the labels of blocks."""
    lr: float = 1e-3
    """Peak learning rate of AdamW for the head."""
    trunk_lr: float = 0.5
    """Learning rate of the trunk, in parts of lr."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    warmup_steps: int = 20
    """Steps of linear warm-up; a cosine to 0 follows."""
    max_grad_norm: float = 1.0
    """Gradient clipping."""
    seed: int = 0
    """Seed of the pairs and of the prompts that are held out."""
    held_out: float = 0.1
    """Share of the prompts that is kept out of training and only watched."""
    checkpoint_every: int = 100
    """Steps between two checkpoints."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_pairs", "lr", "trunk_lr", "max_grad_norm", "checkpoint_every"):
            _require(0 < getattr(self, name) < math.inf, name, "above 0 and finite", getattr(self, name))
        for name in ("preference_weight", "margin", "weight_decay", "warmup_steps", "seed"):
            _require(0 <= getattr(self, name) < math.inf, name, "0 or more and finite", getattr(self, name))
        for name in ("video_share", "held_out"):
            _require(0 <= getattr(self, name) < 1, name, "in [0, 1)", getattr(self, name))
        _require(self.warmup_steps < self.steps, "warmup_steps", f"below steps ({self.steps})", self.warmup_steps)

    def rate(self, step: int) -> float:
        """Factor of the learning rate at optimiser step ``step`` (from 0)."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup_steps) / (self.steps - self.warmup_steps)))


def _require(holds: bool, name: str, expected: str, found: object) -> None:
    if not holds:
        raise ConfigError(f"{name} must be {expected}, found {found}")


@dataclass(frozen=True)
class TrainPatchReward:
    """Continue the training of a video reward on a teacher's scores of blocks; run again to continue a stopped run."""

    store: Path
    """Sample store with latents and cached texts."""
    labels: Path
    """Block scores of a teacher, as training.patch_scores writes them; their grid becomes the reward's."""
    reward: Path
    """The video reward that it begins with: a latent reward."""
    out: Path
    """Output folder: patch_reward.safetensors, checkpoints, summary.json."""
    dimension: str = "dsr"
    """Dimension of the video reward whose output layer it begins with."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    options: dict[str, Any] = options_of(PatchSettings)


@dataclass(frozen=True)
class PatchResult:
    """What a training left behind.

    Attributes:
        finished: False when it was stopped before its last step.
        step: optimiser steps done.
        file: the patch reward, when finished.
        rank_correlation: of values and labels over the blocks of held-out clips; None without any or without variation.
    """

    finished: bool
    step: int
    file: Path | None = None
    rank_correlation: float | None = None


class PatchTrainer:
    """Trains a patch reward; what a step sees depends on (seed, step) alone, so a run can be stopped and continued.

    Labels are brought to mean 0 and deviation 1 over the blocks of the training clips. :meth:`rescale` takes the values
    back to the teacher's scale at the end.
    """

    def __init__(self, reward: PatchReward, store: Store, labels: PatchScores, settings: PatchSettings) -> None:
        """``reward`` is trainable; the labels are of clips of ``store``."""
        import torch

        self.reward, self.store, self.labels, self.settings = reward, store, labels, settings
        self.train, self.held_out = split_clips(labels, settings.held_out, settings.seed)
        self._pairs = [clips for clips in by_prompt(self.train).values() if len(clips) > 1]
        if not self._pairs:
            raise DataError("no prompt has two labelled clips to compare; label more clips of each prompt")
        known = np.concatenate([labels.values[clip].ravel() for clip in self.train])
        self.mean, self.std = float(np.nanmean(known)), float(np.nanstd(known))
        if not self.std > 0:
            raise DataError(f"all blocks are labelled {self.mean:g} by {labels.source}; there is nothing to learn")
        self.parameters = dict(reward.named_parameters())
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [parameter], "factor": settings.trunk_lr if name.startswith("trunk.") else 1.0}
                for name, parameter in self.parameters.items()
            ],
            lr=settings.lr,
            weight_decay=settings.weight_decay,
        )

    def step(self, step: int) -> dict[str, float]:
        """One optimiser step; returns loss and gradient norm. Raises :class:`DataError` when they are not finite."""
        import torch

        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * group["factor"] * settings.rate(step)
        self.optimizer.zero_grad(set_to_none=True)
        one, other, whole = self.draw(step)
        values, targets = self._judge(one + other, whole)
        (first, second), (wanted, wanted_other) = values.chunk(2), targets.chunk(2)
        labels = wanted.flatten(), wanted_other.flatten()
        loss = reward_loss(first.flatten(), second.flatten(), labels, settings.margin, settings.preference_weight)
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), settings.max_grad_norm))
        value = float(loss.detach())
        if not (math.isfinite(value) and math.isfinite(norm)):
            raise DataError(
                f"step {step}: loss ({value}) or gradient norm ({norm}) is not finite; the newest checkpoint is "
                "unharmed: lower lr"
            )
        self.optimizer.step()
        return {"loss": value, "grad_norm": norm, "video": float(whole)}

    def draw(self, step: int) -> tuple[list[Clip], list[Clip], bool]:
        """The pairs of a step, two clips of one prompt each, and whether it trains on whole clips."""
        random = np.random.default_rng([self.settings.seed, 21, step])
        one, other = [], []
        for group in random.integers(len(self._pairs), size=self.settings.batch_pairs):
            clips = self._pairs[group]
            first, second = random.choice(len(clips), size=2, replace=False)
            one.append(clips[first])
            other.append(clips[second])
        return one, other, bool(random.random() < self.settings.video_share)

    def measure(self) -> float | None:
        """Rank correlation of values and labels over the blocks of the held-out clips; None without a number."""
        import torch

        self.reward.eval()
        parts = list[tuple[NDArray[np.float32], NDArray[np.float32]]]()
        with torch.no_grad():
            for start in range(0, len(self.held_out), 16):
                values, targets = self._judge(self.held_out[start : start + 16], whole=False)
                parts.append((values.cpu().numpy().ravel(), targets.cpu().numpy().ravel()))
        self.reward.train()
        if not parts:
            return None
        found = rank_correlation(*(np.concatenate(side) for side in zip(*parts, strict=True)))
        return None if math.isnan(found) else found

    def rescale(self) -> None:
        """Bring the reward's values from standardised labels to the teacher's scale."""
        import torch

        with torch.no_grad():
            layer = self.reward.head.to_values
            layer.weight.mul_(self.std)
            layer.bias.mul_(self.std).add_(self.mean)

    def _judge(self, clips: Sequence[Clip], whole: bool) -> tuple[Tensor, Tensor]:
        """Values and standardised labels of clips ``(b,)``, or of their blocks ``(b, F, R, C)``."""
        import torch

        device = self.reward.trunk.patch_embedding.weight.device
        latents = torch.stack([self.store.sample(*clip).read_latents() for clip in clips]).to(device)
        found = self.reward(latents, [self.store.read_text(prompt_id) for prompt_id, _ in clips])
        labels = (torch.from_numpy(np.stack([self.labels.of(*clip) for clip in clips])) - self.mean) / self.std
        targets = labels.flatten(1).nanmean(1) if whole else labels
        return found.video if whole else found.blocks, targets.to(device)


def by_prompt(clips: Sequence[Clip]) -> dict[str, list[Clip]]:
    """Clips by prompt id."""
    groups: dict[str, list[Clip]] = {}
    for clip in clips:
        groups.setdefault(clip[0], []).append(clip)
    return groups


def split_clips(labels: PatchScores, fraction: float, seed: int) -> tuple[list[Clip], list[Clip]]:
    """Labelled clips to train on and to hold out, by prompt; a fraction above 0 holds out at least one prompt."""
    groups = by_prompt(sorted(labels.values))
    names = sorted(groups)
    count = min(max(1, round(fraction * len(names))), len(names) - 1) if fraction > 0 else 0
    chosen = {names[i] for i in np.random.default_rng([seed, 22]).permutation(len(names))[:count]}
    sides: tuple[list[Clip], list[Clip]] = ([], [])
    for name in names:
        sides[name in chosen].extend(groups[name])
    return sides


def train(
    reward: PatchReward,
    store: Store,
    labels: PatchScores,
    out: Path,
    settings: PatchSettings,
    stop: Callable[[], bool] = lambda: False,
) -> PatchResult:
    """Train and export; a run that was stopped is continued.

    Raises:
        DataError: the labels cannot be used, or a loss is not finite.
        ConfigError: ``out`` holds a checkpoint of other settings or labels.
    """
    from tqdm import tqdm

    from spatialalign.rewards.patch import save_patch_reward
    from training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
    from training.monitors import JsonlLog
    from training.reference_cache import weights_digest

    identity = {
        **dataclasses.asdict(settings),
        "base_model": reward.info.base_model,
        "latent_space": reward.info.latent_space,
        "video_reward": weights_digest(reward),
        "labels_digest": labels.digest,
    }
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out / ".lock", f"the training folder {out}"):
        trainer, done = PatchTrainer(reward, store, labels, settings), 0
        checkpoint = latest_checkpoint(out / "checkpoints")
        if checkpoint is not None:
            checkpoint.check_identity(identity, False)
            load_checkpoint(checkpoint, trainer.parameters, trainer.optimizer)
            done = checkpoint.step
        log = JsonlLog(out / "train.jsonl")
        log.keep_until(done)
        reward.train()
        for step in tqdm(range(done, settings.steps), desc="patch reward", disable=None):
            started = time.perf_counter()
            row = trainer.step(step)
            log.write({"event": "train", "step": step + 1, **row, "seconds": round(time.perf_counter() - started, 4)})
            last, stopping = step + 1 == settings.steps, stop()
            if last or stopping or (step + 1) % settings.checkpoint_every == 0:
                save_checkpoint(out / "checkpoints", step + 1, trainer.parameters, trainer.optimizer, identity, 1)
            if stopping and not last:
                return PatchResult(False, step + 1)
        found = trainer.measure()
        trainer.rescale()
        statistics = {
            "steps": settings.steps,
            "clips": len(trainer.train),
            "held_out_clips": len(trainer.held_out),
            "rank_correlation": found,
            "config_digest": fingerprint(identity),
        }
        reward.info = dataclasses.replace(reward.info, teacher=labels.source, statistics=statistics)
        save_patch_reward(out / FILE, reward)
        write_json(out / "summary.json", statistics)
    return PatchResult(True, settings.steps, out / FILE, found)


def run(args: TrainPatchReward) -> PatchResult:
    """Load the video reward and train."""
    settings, labels, store = PatchSettings(**args.options), read_patches(args.labels), Store(args.store)

    from spatialalign.backbones.loading import pick_device
    from spatialalign.rewards.latent import load_reward
    from spatialalign.rewards.patch import PatchReward

    video = load_reward(args.reward, pick_device(args.device))
    with stop_requests() as stop:
        reward = PatchReward.from_video(video, labels.grid, args.dimension)
        result = train(reward, store, labels, args.out, settings, stop)
    if result.finished:
        correlation = result.rank_correlation
        measured = "" if correlation is None else f", rank correlation with the teacher {correlation:.3f}"
        print(f"{result.file}: {labels.grid} blocks{measured}")
    else:
        print(f"stopped after step {result.step}; run the same command again to continue", file=sys.stderr)
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m training.patch_reward``."""
    command(TrainPatchReward, run, argv)


if __name__ == "__main__":
    main()
