"""Train a patch reward on a teacher's scores of blocks: ``python -m training.patch_reward``."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spatialalign.agreement import spearman
from spatialalign.claims import exclusive
from spatialalign.errors import DataError
from spatialalign.files import write_json
from training.cli import command, options_of
from training.config import cosine_rate, fingerprint, require
from training.interrupt import stop_requests
from training.patch_scores import Clip, PatchScores, read_patches
from training.reward_loop import Look, RewardLoop
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
    held_out_every: int = 100
    """Steps between two looks at the prompts that are held out."""
    keep_checkpoints: int = 1
    """How many of the newest checkpoints are kept; 0: all."""
    max_bad_steps: int = 5
    """Steps in a row that may be skipped because loss or gradient is not finite before training stops."""

    def __post_init__(self) -> None:
        above = "steps batch_pairs lr trunk_lr max_grad_norm held_out_every checkpoint_every max_bad_steps".split()
        for name in above:
            require(0 < getattr(self, name) < math.inf, name, "above 0 and finite", getattr(self, name))
        for name in ("preference_weight", "margin", "weight_decay", "warmup_steps", "seed", "keep_checkpoints"):
            require(0 <= getattr(self, name) < math.inf, name, "0 or more and finite", getattr(self, name))
        for name in ("video_share", "held_out"):
            require(0 <= getattr(self, name) < 1, name, "in [0, 1)", getattr(self, name))
        require(self.warmup_steps < self.steps, "warmup_steps", f"below steps ({self.steps})", self.warmup_steps)

    def rate(self, step: int) -> float:
        """Factor of the learning rate at optimiser step ``step`` (from 0)."""
        return cosine_rate(step, self.warmup_steps, self.steps)


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


class PatchTrainer(RewardLoop):
    """Trains a patch reward.

    Labels are brought to mean 0 and deviation 1 over the blocks of the training clips. :meth:`rescale` takes the values
    back to the teacher's scale at the end.
    """

    def __init__(
        self,
        reward: PatchReward,
        store: Store,
        labels: PatchScores,
        settings: PatchSettings,
        out: Path,
        identity: dict[str, Any],
    ) -> None:
        """``reward`` is trainable; the labels are of clips of ``store``; ``out`` and ``identity`` are the loop's."""
        import torch

        super().__init__("patch reward", settings, settings.steps, out, identity)
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

    def _update(self) -> dict[str, float]:
        settings = self.settings
        self.reward.train()
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * group["factor"] * settings.rate(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        one, other, whole = self.draw(self.step)
        values, targets = self._judge(one + other, whole)
        loss = reward_loss(values, targets, settings.margin, settings.preference_weight)
        loss.backward()
        return self._apply({"loss": float(loss.detach()), "video": float(whole)})

    def _looks(self) -> Sequence[Look]:
        return [{"rank_correlation": self.measure()}]

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
        if not parts:
            return None
        found, wanted = (np.concatenate(side) for side in zip(*parts, strict=True))
        known = np.isfinite(found) & ~np.isnan(wanted)
        return spearman(found[known], wanted[known])

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


def reward_loss(values: Tensor, targets: Tensor, margin: float, preference_weight: float) -> Tensor:
    """Squared error to the labels, plus the weighted Bradley-Terry loss of the pairs, see :mod:`.label_losses`.

    Args:
        values, targets: ``(2 n, ...)`` of clips or their blocks and their labels, NaN for unknown; row ``k`` is
            compared with row ``n + k``.
        margin: pairs whose labels differ by no more count for the squared error alone.
        preference_weight: of the Bradley-Terry loss.
    """
    from training.label_losses import preference, regression

    (one, other), (first, second) = values.chunk(2), targets.chunk(2)
    return regression(values, targets) + preference_weight * preference(one, other, first - second, margin)


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
    from spatialalign.rewards.patch import save_patch_reward
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
        trainer = PatchTrainer(reward, store, labels, settings, out, identity)
        trainer.resume()
        if not trainer.fit(stop):
            return PatchResult(False, trainer.step)
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
