"""Train a preference LoRA on the winners and losers of a sample store: ``python -m training.dpo``."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spatialalign.claims import exclusive
from spatialalign.errors import DataError, LoraError
from spatialalign.files import write_json
from training.cli import command
from training.config import PRESETS, TrainSettings, fingerprint
from training.interrupt import stop_requests
from training.pairs import PromptPairs, read_pairs, split_pairs
from training.store import Store

if TYPE_CHECKING:
    from spatialalign.backbones.base import Backbone
    from training.trainer import Trainer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dpo:
    """Train a LoRA that prefers winners to losers; run the same command again to continue a stopped run.

    Options left at null take the value of the preset.
    """

    model: str
    """Base model: a diffusers WanPipeline folder, a hub id, or "miniature"."""
    store: Path
    """Sample store with latents and cached text."""
    out: Path
    """Output folder: the LoRA in both formats, checkpoints, logs."""
    pairs: Path | None = None
    """Pair manifest of training.mine; null for pairs.json in the store."""
    preset: Literal["paper", "miniature"] = "paper"
    """The paper's constants, or values for the miniature."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: str = "auto"
    """auto (bfloat16 on CUDA, else float32), float32, bfloat16, float16; the LoRA itself is always float32."""
    allow_changes: bool = False
    """Continue a checkpoint although settings, model or pairs differ from those it was made with."""
    arm: Literal["dpo", "dpo+sft", "dpo+zo", "sft"] | None = None
    """Objective: dpo, dpo+zo (the paper's, with the output anchor), dpo+sft, or sft (winners only, a control)."""
    seed: int | None = None
    """Seed of the LoRA's initial values, the pairs, the noise and the noise levels."""
    steps: int | None = None
    """Optimiser steps."""
    batch_pairs: int | None = None
    """Pairs per optimiser step."""
    micro_pairs: int | None = None
    """Pairs in memory at once; batch_pairs must be a multiple."""
    rank: int | None = None
    """LoRA rank."""
    alpha: float | None = None
    """LoRA alpha; the update is scaled by alpha / rank."""
    targets: Literal["spatialalign", "cross-kv", "all-linear"] | None = None
    """Linears that carry the LoRA; spatialalign is text embedding and cross-attention k, v."""
    beta: float | None = None
    """Weight of the error differences in the margin."""
    clip: float | None = None
    """The margin is clipped to plus or minus this."""
    reduction: Literal["mean", "sum"] | None = None
    """Mean or sum of squared errors over a clip's latent elements."""
    anchor_weight: float | None = None
    """Weight of the anchor in dpo+zo."""
    sft_weight: float | None = None
    """Weight of the winner's flow-matching error in dpo+sft and sft."""
    noise: Literal["independent", "shared"] | None = None
    """Noise of winner and loser of a pair."""
    shift: float | None = None
    """Timestep shift of the training noise levels."""
    lr: float | None = None
    """Peak learning rate."""
    weight_decay: float | None = None
    """Weight decay of AdamW."""
    warmup_steps: int | None = None
    """Steps of linear warm-up, before the cosine to 0."""
    max_grad_norm: float | None = None
    """Gradient clipping."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass."""
    held_out: float | None = None
    """Share of the prompts that is only watched."""
    held_out_pairs: int | None = None
    """Held-out pairs, each with fixed noise and noise level."""
    held_out_every: int | None = None
    """Steps between evaluations on them."""
    checkpoint_every: int | None = None
    """Steps between checkpoints."""
    keep_checkpoints: int | None = None
    """Newest checkpoints that are kept; 0 for all."""
    tensorboard: bool | None = None
    """Also write TensorBoard files, when it is installed."""

    def settings(self) -> TrainSettings:
        """The preset with the options given on top."""
        names = {field.name for field in dataclasses.fields(TrainSettings)}
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return dataclasses.replace(PRESETS[self.preset], **given)


@dataclass(frozen=True)
class TrainResult:
    """What a training left behind.

    Attributes:
        finished: False when it was stopped before its last step.
        step: optimiser steps done.
        comfy: LoRA in ComfyUI's names, when finished.
        diffusers: LoRA in diffusers' names, when finished.
        held_out: monitors on the held-out pairs at the end, when there are any.
        verified: largest relative difference between the trained model's velocity and that of the files loaded back.
    """

    finished: bool
    step: int
    comfy: Path | None = None
    diffusers: Path | None = None
    held_out: dict[str, float] | None = None
    verified: float | None = None


def train(
    backbone: Backbone,
    store: Store,
    pairs: Path,
    out: Path,
    settings: TrainSettings,
    allow_changes: bool = False,
) -> TrainResult:
    """Train, export and verify; the backbone is left without any adapter.

    Raises:
        DataError: pairs or samples cannot be used.
        ConfigError: ``out`` holds a checkpoint of other settings, model or pairs.
        StoreError: another process is training into ``out``.
    """
    from spatialalign.lora import unload_lora
    from training.trainer import ADAPTER, Trainer

    prompts, pairs_digest = read_pairs(pairs)
    check_samples(backbone, store, prompts)
    chosen, held_out = split_pairs(prompts, settings.held_out, settings.seed)
    identity = {
        **settings.to_dict(),
        "base_model": backbone.model_id,
        "latent_space": backbone.latent_space,
        "dtype": str(backbone.dtype),
        "pairs_digest": pairs_digest,
    }
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out / ".lock", f"the training folder {out}"):
        trainer = Trainer(backbone, store, chosen, held_out, settings, out, identity)
        try:
            for change in trainer.resume(allow_changes):
                logger.warning("continuing although %s", change)
            if trainer.step:
                logger.info("continuing after step %d", trainer.step)
            write_json(out / "config.json", identity | {"config_digest": fingerprint(identity)})
            with stop_requests() as stop:
                finished = trainer.fit(stop)
            if not finished:
                return TrainResult(False, trainer.step)
            return _export(trainer, store, chosen, pairs_digest)
        finally:
            unload_lora(backbone.transformer, ADAPTER)
            trainer.release()


def check_samples(backbone: Backbone, store: Store, prompts: Sequence[PromptPairs]) -> None:
    """See before the first step that every sample is there and in the model's latent space."""
    for prompt in prompts:
        store.read_text(prompt.prompt_id)
        for seed in (*prompt.winners, *prompt.losers):
            sample = store.sample(prompt.prompt_id, seed)
            space = sample.read_header().space
            if space != backbone.latent_space:
                raise DataError(
                    f"{sample.latents} is in the latent space {space}, {backbone.model_id} has "
                    f"{backbone.latent_space}; train with the model that made the samples"
                )


def _export(trainer: Trainer, store: Store, prompts: Sequence[PromptPairs], pairs_digest: str) -> TrainResult:
    """Write both files, load each back into the same transformer and compare velocities."""
    import torch

    from spatialalign.lora import load_lora, save_lora, unload_lora
    from training.trainer import ADAPTER, draw

    backbone, settings, out = trainer.backbone, trainer.settings, trainer.out
    transformer: Any = backbone.transformer
    held_out = trainer.held_out()
    comfy, diffusers = out / "lora_comfyui.safetensors", out / "lora_diffusers.safetensors"
    metadata = {
        "method": f"SpatialAlign {settings.arm}",
        "base_model": backbone.model_id,
        "latent_space": backbone.latent_space,
        "rank": settings.rank,
        "alpha": settings.rank,  # folded into B
        "trained_alpha": settings.alpha,
        "step": trainer.step,
        "seed": settings.seed,
        "beta": settings.beta,
        "targets": settings.targets,
        "prompts": len(prompts),
        "pairs": sum(len(prompt.winners) * len(prompt.losers) for prompt in prompts),
        "config_digest": fingerprint(trainer.identity),
        "pairs_digest": pairs_digest,
        "license": "Apache-2.0",
        "date": time.strftime("%Y-%m-%d"),
    }
    save_lora(transformer, comfy, diffusers, metadata, adapter=ADAPTER)

    prompt = prompts[0]
    clean = store.sample(prompt.prompt_id, prompt.winners[0]).read_latents()
    noise = draw(settings, "verify", 0, clean.shape).winner
    inputs = (0.5 * clean + 0.5 * noise)[None], torch.tensor([0.5]), [store.read_text(prompt.prompt_id)]
    transformer.eval()
    with torch.no_grad():
        trained = backbone.velocity(*inputs)
        unload_lora(transformer, ADAPTER)
        worst = 0.0
        # ours for the ComfyUI names, diffusers' own loader for its names: neither file is judged by its writer alone
        for path in (comfy, diffusers):
            if path == comfy:
                load_lora(transformer, path, adapter="verify")
            else:
                transformer.load_lora_adapter(
                    str(out), prefix="transformer", weight_name=diffusers.name, adapter_name="verify"
                )
            loaded = backbone.velocity(*inputs)
            unload_lora(transformer, "verify")
            difference = float((loaded - trained).norm() / trained.norm())
            worst = max(worst, difference)
            if not difference < (1e-4 if backbone.dtype == torch.float32 else 2e-2):
                raise LoraError(f"{path} loaded back gives another velocity (relative difference {difference:.2e})")
    result = TrainResult(True, trainer.step, comfy, diffusers, held_out, worst)
    summary = {"step": trainer.step, "held_out": held_out, "verified": worst, "lora": metadata}
    write_json(out / "summary.json", summary | {"settings": settings.to_dict()})
    return result


def run(args: Dpo) -> None:
    """Load the model, train, and say where the LoRA is."""
    import sys

    settings = args.settings()
    store = Store(args.store)
    pairs = args.pairs or args.store / "pairs.json"
    read_pairs(pairs)  # a missing manifest should not wait for the model to load

    from spatialalign.backbones import load_backbone

    backbone = load_backbone(args.model, args.device, args.dtype)
    result = train(backbone, store, pairs, args.out, settings, args.allow_changes)
    if result.finished:
        print(f"{result.comfy} (ComfyUI)\n{result.diffusers} (diffusers)")
    else:
        print(f"stopped after step {result.step}; run the same command again to continue", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m training.dpo``."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    command(Dpo, run, argv)


if __name__ == "__main__":
    main()
