"""Train a latent reward on the scored clips of a sample store: ``python -m training.latent_reward``."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import TYPE_CHECKING, Any

from spatialalign.claims import exclusive
from spatialalign.errors import ModelError
from spatialalign.files import write_json
from training.cli import command, options_of
from training.config import fingerprint
from training.interrupt import stop_requests
from training.latent_labels import Captions, read_labels
from training.latent_reward_settings import RewardSettings
from training.store import Store

if TYPE_CHECKING:
    from spatialalign.backbones.base import Backbone
    from spatialalign.rewards.latent import LatentReward
    from training.latent_reward_trainer import RewardTrainer

logger = logging.getLogger(__name__)

FILE = "latent_reward.safetensors"


@dataclass(frozen=True)
class TrainLatentReward:
    """Train a reward that judges noisy latents, for guidance at sampling time; run again to continue a stopped run.

    Its labels come from the tracks of the store, for each clip's own caption and for those of the other types.
    """

    model: str
    """Base model, whose first blocks the reward begins with: a diffusers Wan folder, a hub id, or "miniature"."""
    store: Path
    """Sample store with latents, tracks and scores."""
    out: Path
    """Output folder: latent_reward.safetensors, checkpoints, logs, text embeddings."""
    labels: Path | None = None
    """CSV file of further dimensions: prompt_id, seed and a column of numbers for each, larger being better."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: str = "auto"
    """Precision that CUDA computes in: auto (bfloat16 on CUDA, else float32), float32, bfloat16, float16."""
    allow_changes: bool = False
    """Continue a checkpoint although settings, model or labels differ from those it was made with."""
    options: dict[str, Any] = options_of(RewardSettings)

    def settings(self) -> RewardSettings:
        """The options given, on top of the defaults."""
        return RewardSettings(**self.options)


@dataclass(frozen=True)
class RewardResult:
    """What a training left behind.

    Attributes:
        finished: False when it was stopped before its last step.
        step: optimiser steps done.
        file: the reward, when finished.
        held_out: monitors by noise level at the end, when clips are held out.
        left_out: the reason of every clip that could not be used, by its name.
    """

    finished: bool
    step: int
    file: Path | None
    held_out: list[dict[str, float]]
    left_out: Mapping[str, str]


def train(
    backbone: Backbone,
    store: Store,
    out: Path,
    settings: RewardSettings,
    labels: Path | None = None,
    allow_changes: bool = False,
) -> RewardResult:
    """Train and export; the backbone is left as it was.

    Raises:
        DataError: no clip can be used, or the file of further labels cannot.
        ModelError: not a Wan text-to-video model, or the clips are of another latent space.
        ConfigError: ``out`` holds a checkpoint of other settings, model or labels.
        StoreError: another process is training into ``out``.
    """
    import torch

    from spatialalign.rewards.latent import save_reward
    from training.latent_reward_trainer import RewardTrainer

    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out / ".lock", f"the training folder {out}"):
        found, left_out = read_labels(store, labels)
        for name, reason in list(left_out.items())[:10]:
            logger.warning("clip %s is left out: %s", name, reason)
        if found.space != backbone.latent_space:
            raise ModelError(
                f"the clips of {store.root} are of latent space {found.space}, {backbone.model_id} has "
                f"{backbone.latent_space}; give the model that made them"
            )
        reward = new_reward(backbone, settings, found.names)
        captions = Captions(out / "texts", backbone.model_id)
        named = {name for name, _ in found.clips}
        captions.write(backbone, [prompt for prompt in store.prompts() if prompt.prompt_id in named], found.codes)
        identity = {
            **settings.to_dict(),
            "base_model": backbone.model_id,
            "latent_space": backbone.latent_space,
            "dtype": str(backbone.dtype),
            "labels_digest": found.digest,
        }
        dtype = backbone.dtype if backbone.device.type == "cuda" else torch.float32
        trainer = RewardTrainer(reward, store, found, captions, settings, out, identity, dtype)
        for change in trainer.resume(allow_changes):
            logger.warning("continuing although %s", change)
        write_json(out / "config.json", identity | {"config_digest": fingerprint(identity)})
        with stop_requests() as stop:
            finished = trainer.fit(stop)
        if not finished:
            return RewardResult(False, trainer.step, None, [], left_out)
        held_out = trainer.held_out()
        trainer.standardise()
        reward.info = dataclasses.replace(reward.info, statistics=_statistics(trainer, held_out))
        save_reward(out / FILE, reward)
    write_json(out / "summary.json", {"step": trainer.step, "held_out": _finite(held_out), "left_out": left_out})
    return RewardResult(True, trainer.step, out / FILE, held_out, left_out)


def new_reward(backbone: Backbone, settings: RewardSettings, further: Sequence[str]) -> LatentReward:
    """The first blocks of a Wan transformer, copied, with a new head; on the backbone's device, in float32."""
    import torch

    from spatialalign.backbones.wan import WanBackbone
    from spatialalign.rewards.latent import LatentReward, RewardInfo
    from spatialalign.rewards.wan_trunk import WanTrunk

    if not isinstance(backbone, WanBackbone):
        raise ModelError(
            f"a latent reward begins with blocks of a Wan transformer; {backbone.model_id} is no Wan model"
        )
    trained_on = "noisy" if settings.noisy else "clean"
    info = RewardInfo(backbone.model_id, backbone.latent_space, trained_on, tuple(further))  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        trunk = WanTrunk.from_transformer(backbone.transformer, settings.blocks)
        return LatentReward(trunk, info, settings.head_width)


def _statistics(trainer: RewardTrainer, held_out: list[dict[str, float]]) -> dict[str, Any]:
    """What the file says about the training."""
    labels, rows = trainer.labels, trainer.train_rows
    scores = [float(score) for score in labels.scores[rows, labels.own[rows]] if score == score]
    return {
        "steps": trainer.step,
        "clips": len(rows),
        "score_mean": round(fmean(scores), 4) if scores else None,
        "score_deviation": round(pstdev(scores), 4) if scores else None,
        "held_out_clips": len(trainer.held_out_rows),
        "labels_digest": labels.digest,
        "held_out": _finite(held_out),
    }


def _finite(rows: list[dict[str, float]]) -> list[dict[str, float | None]]:
    """Rounded, with null for what could not be measured (NaN is no JSON)."""
    return [{key: None if value != value else round(value, 4) for key, value in row.items()} for row in rows]


def table(rows: Sequence[Mapping[str, float]]) -> str:
    """The monitors by noise level as Markdown."""
    further = [key for key in rows[0] if key.startswith("further.")]
    head = ["noise level", "pairs", "pair accuracy", "correlation", "valid above INVALID"]
    head += [f"pair accuracy of {key.removeprefix('further.')}" for key in further]
    keys = ["accuracy", "correlation", "valid", *further]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [f"{row['from']:g} to {row['to']:g}", f"{row['pairs']:g}", *(f"{row[key]:.3f}" for key in keys)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run(args: TrainLatentReward) -> RewardResult:
    """Load the model and train."""
    settings, store = args.settings(), Store(args.store)

    from spatialalign.backbones import load_backbone

    backbone = load_backbone(args.model, args.device, args.dtype)
    result = train(backbone, store, args.out, settings, args.labels, args.allow_changes)
    if not result.finished:
        print(f"stopped after step {result.step}; run the same command again to continue", file=sys.stderr)
        return result
    if result.held_out:
        print(table(result.held_out))
    left_out = f"; {len(result.left_out)} clips were left out" if result.left_out else ""
    print(f"{result.file}{left_out}")
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m training.latent_reward``."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    command(TrainLatentReward, run, argv)


if __name__ == "__main__":
    main()
