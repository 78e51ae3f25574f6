"""Train a preference LoRA on the winners and losers of a sample store: ``python -m training.dpo``."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spatialalign.claims import exclusive
from spatialalign.errors import DataError, LoraError
from spatialalign.files import write_json
from training.cli import command, options_of
from training.config import TrainSettings, fingerprint
from training.interrupt import stop_requests
from training.pairs import PromptPairs, read_pairs, scored_by, split_pairs
from training.presets import PRESETS, Preset, preset_of
from training.processes import ALONE, Processes, launched, launched_rank
from training.store import Store

if TYPE_CHECKING:
    from spatialalign.backbones.base import Backbone
    from spatialalign.tracking.tracker import Tracker
    from training.trainer import Trainer
    from training.weights import Weighting

logger = logging.getLogger(__name__)

FEW_EFFECTIVE = 0.2
"""Share of the clips below which the effective sample size of their weights is worth a warning."""


@dataclass(frozen=True)
class Dpo:
    """Train a LoRA that prefers winners to losers; run the same command again to continue a stopped run.

    Several processes share each step, started by torchrun --nproc_per_node 8 -m training.dpo or by accelerate launch.
    Options that are not given take the value of the preset.
    """

    model: str
    """Base model: a diffusers folder (Wan 2.1, 2.2 or LTX-Video), a hub id, or "miniature"."""
    store: Path
    """Sample store with latents and cached text."""
    out: Path
    """Output folder: the LoRA in both formats, checkpoints, logs."""
    pairs: Path | None = None
    """Pair manifest of training.mine; null for pairs.json in the store."""
    reference_folder: Path | None = None
    """Where reference_cache keeps predictions; null for reference in the output folder."""
    patches: Path | None = None
    """Block scores of training.patch_scores, which a granular_weight needs."""
    preset: Preset = "spatialalign"
    """Method: spatialalign (the paper's, also paper), flow-dpo, diffusion-dpo, flow-rwr, sft, gran-dpo, miniature."""
    tracker: str = "miniature"
    """Tracking models for the clips of sample_every, as training.score takes them in --model."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: str = "auto"
    """auto (bfloat16 on CUDA, else float32), float32, bfloat16, float16; the LoRA itself is always float32."""
    expert: Literal["high", "low"] | None = None
    """Expert of Wan 2.2 A14B that is trained, at its own noise levels: high (also null) or low; one LoRA each."""
    allow_changes: bool = False
    """Continue a checkpoint although settings, model or pairs differ from those it was made with."""
    dry_run: bool = False
    """Check every file the training would read, say what it would cost, and write nothing."""
    tflops: float | None = None
    """For dry_run: TFLOP/s that all processes reach together, to say how long the training would take."""
    processes: int | None = None
    """For dry_run: how many share a base with shard; null for those that a launcher started."""
    options: dict[str, Any] = options_of(TrainSettings)

    def settings(self) -> TrainSettings:
        """The preset with the options given on top."""
        return dataclasses.replace(PRESETS[self.preset], **self.options)


@dataclass(frozen=True)
class TrainResult:
    """What a training left behind.

    Attributes:
        finished: False when it was stopped before its last step.
        step: optimiser steps done; when finished, those of the exported weights (the best, or the last).
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
    references: Path | None = None,
    tracker: Tracker | None = None,
    processes: Processes = ALONE,
    patches: Path | None = None,
) -> TrainResult:
    """Train, export and verify; the backbone is left without any adapter.

    ``references`` is the folder of kept reference predictions, None for one below ``out``. Where several processes take
    part, each calls this with the same of everything but the backbone's device; the first one needs the tracker. With
    ``shard`` the backbone is one of :func:`training.sharding.load_sharded`, and stays in parts. ``patches`` is the file
    of block scores that a granular objective needs.

    Raises:
        DataError: pairs or samples cannot be used.
        ConfigError: ``out`` holds a checkpoint of other settings, model or pairs.
        StoreError: another process is training into ``out``.
    """
    from spatialalign.lora import unload_lora
    from training.trainer import ADAPTER, Trainer
    from training.trial import trial_of
    from training.weights import block_weights, weighting

    prompts, pairs_digest = read_pairs(pairs)
    processes.on_first(lambda: check_samples(backbone, store, prompts))
    chosen, held_out = split_pairs(prompts, settings.held_out, settings.seed)
    identity = {
        **settings.to_dict(),
        "base_model": backbone.model_id,
        "latent_space": backbone.latent_space,
        "dtype": str(backbone.dtype),
        "pairs_digest": pairs_digest,
    }
    if backbone.expert is not None:
        identity["expert"] = backbone.expert
    blocks = block_weights(settings, patches, prompts)
    if blocks is not None:
        identity["patches_digest"] = blocks.digest
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        with processes.together():
            if processes.first:
                stack.enter_context(exclusive(out / ".lock", f"the training folder {out}"))
        weights = weighting(store, chosen, held_out, settings, scored_by(pairs))
        if settings.arm == "rwr" and weights is not None:
            _report_weights(weights)
        trial = None
        if settings.sample_every and tracker is not None and processes.first:
            sampled = held_out or chosen
            trial = trial_of(backbone, tracker, store, sampled, settings.sample_prompts, settings.sample_seeds)
        with processes.together():
            trainer = Trainer(
                backbone,
                store,
                chosen,
                held_out,
                settings,
                out,
                identity,
                weights,
                references,
                trial,
                processes,
                blocks,
            )
        try:
            for change in trainer.resume(allow_changes):
                logger.warning("continuing although %s", change)
            if trainer.step:
                logger.info("continuing after step %d", trainer.step)
            if processes.first:
                write_json(out / "config.json", identity | {"config_digest": fingerprint(identity)})
            with stop_requests() as stop:
                finished = trainer.fit(stop)
            if not finished:
                return TrainResult(False, trainer.step)
            step, last = trainer.load_best(), trainer.held_out()
            if settings.shard:  # the files are checked with the model, which needs all processes
                return _export(trainer, store, chosen, pairs_digest, step, last, processes)
            return processes.on_first(lambda: _export(trainer, store, chosen, pairs_digest, step, last, ALONE))
        finally:
            unload_lora(backbone.transformer, ADAPTER)
            trainer.release()


def _report_weights(weights: Weighting) -> None:
    share = weights.effective_share
    logger.info("the weights of the clips have an effective sample size of %.0f %% of their number", 100 * share)
    if share < FEW_EFFECTIVE:
        logger.warning(
            "a few clips carry the training: the effective sample size of the weights is %.0f %% of the clips; raise "
            "rwr_temperature or lower rwr_clip",
            100 * share,
        )


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


def _export(
    trainer: Trainer,
    store: Store,
    prompts: Sequence[PromptPairs],
    pairs_digest: str,
    step: int,
    held_out: dict[str, float] | None,
    processes: Processes,
) -> TrainResult:
    """Write both files, load each back into the same transformer and compare velocities.

    ``processes`` are those that call this; the first one writes.
    """
    import torch

    from spatialalign.backbones.flow import add_noise
    from spatialalign.lora import load_lora, save_lora, unload_lora
    from training.draws import draw
    from training.memory import plain_base
    from training.reference_cache import weights_digest
    from training.trainer import ADAPTER

    backbone, settings, out = trainer.backbone, trainer.settings, trainer.out
    transformer: Any = backbone.transformer
    comfy, diffusers = out / "lora_comfyui.safetensors", out / "lora_diffusers.safetensors"
    metadata = {
        "method": f"SpatialAlign {settings.arm}",
        "base_model": backbone.model_id,
        "base_digest": weights_digest(transformer),
        "latent_space": backbone.latent_space,
        "preset": preset_of(settings),
        "rank": settings.rank,
        "alpha": settings.rank,  # folded into B
        "trained_alpha": settings.alpha,
        "step": step,
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
    if backbone.expert is not None:
        metadata["expert"] = backbone.expert
    plain_base(backbone)
    processes.on_first(lambda: save_lora(transformer, comfy, diffusers, metadata, adapter=ADAPTER))

    prompt = prompts[0]
    with processes.together():
        clean = store.sample(prompt.prompt_id, prompt.winners[0]).read_latents()
        text = store.read_text(prompt.prompt_id)
    noise = draw(settings, "verify", 0, clean.shape).winner
    sigma = torch.tensor([sum(backbone.sigma_range) / 2])
    inputs = add_noise(clean[None], noise[None], sigma), sigma, [text]
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
    result = TrainResult(True, step, comfy, diffusers, held_out, worst)
    summary = {
        "step": step,
        "steps_done": trainer.step,
        "stopped_early": trainer.progress.stopped,
        "bad_clips": trainer.clips.bad,
        "held_out": held_out,
        "verified": worst,
        "lora": metadata,
    }
    if processes.first:
        write_json(out / "summary.json", summary | {"settings": settings.to_dict()})
    return result


def run(args: Dpo) -> None:
    """Load the model, train, and say where the LoRA is."""
    if args.dry_run:
        if launched_rank() == 0:
            from training.dry_run import look

            look(args)
        return
    from training.sharding import backend, with_launcher

    settings = with_launcher(args.settings())
    with launched(backend(settings, args.device)) as processes:
        _run(args, settings, processes)


def _run(args: Dpo, settings: TrainSettings, processes: Processes) -> None:
    import sys

    from training.sharding import check_sharding, load_sharded

    check_sharding(settings, processes)
    store = Store(args.store)
    pairs = args.pairs or args.store / "pairs.json"
    read_pairs(pairs)  # a missing manifest should not wait for the model to load

    from spatialalign.backbones import load_backbone

    with processes.together():
        device = processes.device(args.device)
        if settings.shard:
            backbone = load_sharded(args.model, device, args.dtype, args.expert, processes)
        else:
            backbone = load_backbone(args.model, device, args.dtype, args.expert)
        tracker = None
        if settings.sample_every and processes.first:
            from spatialalign.backbones.loading import pick_device
            from spatialalign.tracking.load import load_tracker

            tracker = load_tracker(args.tracker, pick_device(device))
    folder = args.reference_folder
    try:
        result = train(
            backbone, store, pairs, args.out, settings, args.allow_changes, folder, tracker, processes, args.patches
        )
    except OSError as error:
        raise DataError(
            f"a file of the training in {args.out} cannot be read or written ({error}); repair that or make room, and "
            "run the same command again to continue from the newest checkpoint"
        ) from error
    if not processes.first:
        return
    if result.finished:
        print(f"{result.comfy} (ComfyUI)\n{result.diffusers} (diffusers)")
    else:
        print(f"stopped after step {result.step}; run the same command again to continue", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m training.dpo``."""
    level = logging.INFO if launched_rank() == 0 else logging.ERROR
    logging.basicConfig(level=level, format="%(levelname)s %(message)s")
    command(Dpo, run, argv)


if __name__ == "__main__":
    main()
