"""Preference training of a LoRA on a flow model: exact resume, the base model as its own reference, any number of
processes."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from spatialalign.errors import ConfigError, DataError
from training.checkpoint import checkpoint_folder, latest_checkpoint, load_checkpoint, load_weights, save_checkpoint
from training.config import TrainSettings
from training.draws import draw
from training.losses import PairLoss, averages
from training.memory import advice_when_full, set_up, take_down
from training.micro_batches import MicroBatches, Part, check_shares
from training.monitors import JsonlLog, Scalars
from training.pair_model import PairModel
from training.pairs import PairStream, PreferencePair, PromptPairs
from training.processes import ALONE, Processes
from training.progress import Progress
from training.samples import Clips
from training.sharding import check_sharding, is_sharded
from training.store import Store
from training.weights import effective_sample_size

if TYPE_CHECKING:
    from spatialalign.backbones.base import Backbone
    from training.trial import Trial
    from training.weights import BlockWeights, Weighting

logger = logging.getLogger(__name__)

ADAPTER = "spatialalign"


class Trainer:
    """Trains the adapter ``spatialalign`` on ``backbone.transformer``.

    The reference is the same transformer with the adapter switched off. Text comes from the store's cache, latents are
    read when needed. Pair, noise and learning rate of a step depend on (seed, step) alone, and what else it depends on
    is in the checkpoint, so a run that is killed and continued ends with the same bits as one that was not (on one CPU
    thread count or one GPU model).

    Several processes share the micro-batches of a step and add up their gradients. Whatever their number, a step sees
    the same pairs with the same noise, so it changes the result by rounding only. All of them hold the same state and
    decide alike; the first one writes.
    """

    def __init__(
        self,
        backbone: Backbone,
        store: Store,
        train: Sequence[PromptPairs],
        held_out: Sequence[PromptPairs],
        settings: TrainSettings,
        out: Path,
        identity: dict[str, Any],
        weighting: Weighting | None = None,
        references: Path | None = None,
        trial: Trial | None = None,
        processes: Processes = ALONE,
        blocks: BlockWeights | None = None,
    ) -> None:
        """Put a fresh adapter on the transformer.

        Args:
            backbone: carries no adapter yet.
            store: holds latents and text embeddings of every pair.
            train: prompts to draw training pairs from.
            held_out: prompts that are only watched; may be empty.
            settings: see :class:`TrainSettings`.
            out: output folder: ``train.jsonl``, ``checkpoints/``.
            identity: what must be equal for a checkpoint to be continued.
            weighting: of pairs and clips, where the settings ask for it.
            trial: samples and scores clips where ``sample_every`` asks for it.
            references: folder of the reference predictions that ``reference_cache`` keeps; None for one below ``out``.
            processes: that take part; all are given the same of everything else, but the trial, which the first needs.
            blocks: weights of the blocks of pairs, where the objective is granular.
        """
        check_shares(settings, processes)
        check_sharding(settings, processes)
        if settings.shard and not is_sharded(backbone.transformer):
            raise ConfigError("shard (True) needs a model of training.sharding.load_sharded, found a whole one")
        if settings.sample_every and trial is None and processes.first:
            raise ConfigError(f"sample_every ({settings.sample_every}) needs a tracker to score the sampled clips")
        self.backbone, self.store, self.settings, self.out = backbone, store, settings, out
        self.identity, self._weighting, self._trial = identity, weighting, trial
        self.processes = processes
        self._train = PairStream(train, settings.seed)
        self._held_out = PairStream(held_out, settings.seed, "held-out") if held_out else None
        self.clips = Clips(store, train, settings.max_bad_clips)
        self.progress = Progress(processes=processes.size)
        self.step = 0
        self.parameters = add_adapter(backbone, settings)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=settings.lr, weight_decay=settings.weight_decay)
        set_up(backbone, settings, self.clips.shape)
        self.pair_model = PairModel(
            backbone,
            self.clips,
            settings,
            weighting,
            references or out / "reference",
            processes if settings.shard else ALONE,
            train[0].prompt_id,
            blocks,
        )
        self._micro_batches = MicroBatches(self.clips, settings, processes, settings.shard)

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.out / "checkpoints"

    def resume(self, allow_changes: bool = False) -> list[str]:
        """Continue from the newest complete checkpoint, if there is one; returns the changes that were allowed.

        Another number of processes always is: it changes no more than rounding.
        """
        checkpoint = latest_checkpoint(self.checkpoints)
        self.processes.agree(
            {**self.identity, "the newest checkpoint": None if checkpoint is None else checkpoint.step}
        )
        if checkpoint is None:
            return []
        changes = checkpoint.check_identity(self.identity, allow_changes)
        load_checkpoint(checkpoint, self.parameters, self.optimizer)
        self.step, self.progress = checkpoint.step, Progress.from_dict(checkpoint.progress)
        if self.progress.processes != self.processes.size:
            changes.append(f"processes: {self.progress.processes} -> {self.processes.size} (other rounding only)")
            self.progress.processes = self.processes.size
        return changes

    def fit(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Train until the last step, an early stop, or ``stop()`` being true after a step; then write a checkpoint.

        Among several processes, one whose ``stop()`` is true stops all of them after the same step.

        Returns:
            True when the training is over, False when it was stopped before.
        """
        settings, writes = self.settings, self.processes.first
        log = JsonlLog(self.out / "train.jsonl", writes)
        scalars = Scalars(self.out / "tensorboard", settings.tensorboard and writes)
        log.keep_until(self.step)
        hidden = None if writes else True
        bar = tqdm(total=settings.steps, initial=self.step, desc=f"dpo ({settings.arm})", disable=hidden)
        named = len(self.clips.bad)
        try:
            if self.step == 0:
                self._watch_held_out(log, scalars)
            while self.step < settings.steps and self.progress.stopped is None:
                row = self._train_step()
                bar.update()
                if row is None:
                    log.write({"event": "skipped_step", "step": self.step, "in_a_row": self.progress.failed})
                else:
                    bar.set_postfix(loss=f"{row['loss']:.4f}", acc=f"{row['accuracy']:.2f}", refresh=False)
                    log.write({"event": "train", "step": self.step, **row})
                    scalars.write("train", self.step, row)
                    preference, bends = settings.arm not in ("sft", "rwr"), settings.form == "sigmoid"
                    self._warn(log, self.progress.watch.update(self.step, row, preference=preference, bends=bends))
                last, is_best = self.step == settings.steps, False
                if last or self.step % settings.held_out_every == 0:
                    is_best = self._watch_held_out(log, scalars)
                if settings.sample_every and (last or self.step % settings.sample_every == 0):
                    is_best = self._watch_samples(log, scalars) or is_best
                for clip, reason in list(self.clips.bad.items())[named:]:
                    log.write({"event": "bad_clip", "step": self.step, "clip": clip, "reason": reason})
                named = len(self.clips.bad)
                stopping = not last and self.progress.stopped is None and self.processes.any(stop())
                over = last or self.progress.stopped is not None
                if over or stopping or is_best or self.step % settings.checkpoint_every == 0:
                    self.save()
                if stopping:
                    return False
        finally:
            bar.close()
            scalars.close()
        return True

    def save(self) -> Path:
        """Write a checkpoint of the steps done so far."""
        best = self.progress.best.step if self.settings.keep_best else None
        return self.processes.on_first(
            lambda: save_checkpoint(
                self.checkpoints,
                self.step,
                self.parameters,
                self.optimizer,
                self.identity,
                self.settings.keep_checkpoints,
                self.progress.to_dict(),
                best,
            )
        )

    def load_best(self) -> int:
        """Take the weights that are to be exported: the best checkpoint's where it is asked for; returns their step."""
        best = self.progress.best
        if not self.settings.keep_best or best.value is None:
            return self.step
        load_weights(checkpoint_folder(self.checkpoints, best.step), self.parameters)
        return best.step

    def release(self) -> None:
        """Switch off what only training needs, so that sampling is as fast as before."""
        take_down(self.backbone)

    def held_out(self) -> dict[str, float] | None:
        """Mean monitors over the held-out pairs at fixed noise and evenly spread noise levels; None without any.

        Beta is the setting even where it is tuned, so that losses of different steps can be compared.
        """
        if self._held_out is None:
            return None
        settings, stream = self.settings, self._held_out

        def evaluate(pairs: list[PreferencePair], indices: list[int]) -> PairLoss:
            levels = [(2 * index + 1) * 500 // settings.held_out_pairs for index in indices]
            draws = [
                draw(settings, "held-out", index, self.clips.shape, level, self.backbone.sigma_range)
                for index, level in zip(indices, levels, strict=True)
            ]
            return self.pair_model.evaluate(pairs, draws, settings.beta, tuple(indices))

        parts = self._micro_batches.run(stream, range(settings.held_out_pairs), evaluate)
        if not parts:
            raise DataError("none of the held-out pairs can be used; run training.mine again, or set held_out to 0")
        values = averages([part.losses for part in parts])
        del values["difference"]
        return values

    def _watch_held_out(self, log: JsonlLog, scalars: Scalars) -> bool:
        """Evaluate on the held-out pairs; True when the weights are the best so far and are to be kept."""
        settings, values = self.settings, self.held_out()
        if values is None:
            return False
        log.write({"event": "held_out", "step": self.step, **values})
        scalars.write("held_out", self.step, values)
        if settings.arm not in ("sft", "rwr"):
            watch = self.progress.watch
            self._warn(log, watch.update_held_out(self.step, values["accuracy"], settings.held_out_pairs))
        return self._follow(log, values)

    def _watch_samples(self, log: JsonlLog, scalars: Scalars) -> bool:
        """Sample and score clips; True when the weights are the best so far and are to be kept."""
        values = self.processes.on_first(self._sample)
        log.write({"event": "samples", "step": self.step, **values})
        scalars.write("samples", self.step, values)
        return self._follow(log, values)

    def _sample(self) -> dict[str, float]:
        assert self._trial is not None
        with advice_when_full(self.settings):
            return self._trial.measure(self.out / "samples", self.step, self.parameters)

    def _follow(self, log: JsonlLog, values: dict[str, float]) -> bool:
        """Early stopping and the choice of the best checkpoint; True when this is the best one and is to be kept."""
        settings, best = self.settings, self.progress.best
        if not settings.decides_by_monitor or settings.monitor not in values or self.step == 0:
            return False
        if best.update(settings, self.step, values):
            return settings.keep_best
        if settings.early_stop and best.stale >= settings.early_stop and self.progress.stopped is None:
            self.progress.stopped = (
                f"step {self.step}: {settings.monitor} has not improved on {best.value:.4g} of step {best.step} in "
                f"{best.stale} evaluations"
            )
            logger.warning("early stop: %s", self.progress.stopped)
            log.write({"event": "early_stop", "step": self.step, "message": self.progress.stopped})
        return False

    def _warn(self, log: JsonlLog, messages: Sequence[str]) -> None:
        for message in messages:
            logger.warning("%s", message)
            log.write({"event": "warning", "step": self.step, "message": message})

    def _train_step(self) -> dict[str, float] | None:
        """One optimiser step; returns its monitors, or None when it was skipped as loss or gradient was not finite."""
        settings, started = self.settings, time.perf_counter()
        rate, beta = settings.learning_rate(self.step), self.progress.tuner.beta(settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        parts = self._gradients(beta)
        losses, trained = [part.losses for part in parts], [pair for part in parts for pair in part.pairs]
        if trained:
            self.processes.add_gradients(self.parameters.values())
        skipped = settings.batch_pairs - len(trained)
        if skipped and trained:  # the mean over the pairs that are left
            for parameter in self.parameters.values():
                if parameter.grad is not None:
                    parameter.grad *= settings.batch_pairs / len(trained)
        limit = float("inf") if settings.max_grad_norm is None else settings.max_grad_norm
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit))
        row = averages(losses) if losses else {"loss": math.nan}
        self.step += 1
        if not (math.isfinite(row["loss"]) and math.isfinite(norm)):
            self._skip_step(trained, losses, norm)
            return None
        with advice_when_full(settings):
            self.optimizer.step()
        self.progress.failed = 0
        self.progress.tuner.update(row.pop("difference"))
        row |= {"grad_norm": norm, "lr": rate, "skipped_pairs": skipped}
        if settings.auto_beta is not None:
            row["beta"] = beta
        if settings.arm == "rwr" and self._weighting is not None:
            weights = self._weighting.of(trained)
            row["effective_sample_size"] = effective_sample_size([*weights.winner.tolist(), *weights.loser.tolist()])
        return row | {"seconds": round(time.perf_counter() - started, 4)}

    def _gradients(self, beta: float) -> list[Part]:
        """Add the gradients of this process's share of the step's pairs; returns the parts of all processes."""
        first = self.step * self.settings.batch_pairs

        def work(pairs: list[PreferencePair], indices: list[int]) -> PairLoss:
            return self.pair_model.gradients(pairs, indices, beta)

        return self._micro_batches.run(self._train, range(first, first + self.settings.batch_pairs), work)

    def _skip_step(self, pairs: Sequence[PreferencePair], losses: Sequence[PairLoss], norm: float) -> None:
        """Forget a step whose loss or gradient is not finite; raises :class:`DataError` when it cannot go on like this.

        Weights and optimiser stay as they were; the next step takes the next pairs.
        """
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.failed += 1
        totals = torch.cat([loss.total.cpu() for loss in losses]).tolist() if losses else []
        names = [
            f"{pair.prompt_id} ({pair.winner} over {pair.loser})"
            for pair, total in zip(pairs, totals, strict=True)
            if not math.isfinite(total)
        ]
        what = f"the loss of {', '.join(names)} is" if names else f"the gradient norm ({norm}) is"
        what = f"step {self.step}: {what} not finite" if losses else f"step {self.step}: none of its pairs can be used"
        remedy = "lower lr or beta, or compute in float32" if losses else "repair the store and run training.mine again"
        remedy = f"the newest checkpoint is unharmed; {remedy}"
        if not all(torch.isfinite(parameter).all() for parameter in self.parameters.values()):
            raise DataError(f"{what}, and neither are the weights; {remedy}")
        if self.progress.failed > self.settings.max_bad_steps:
            raise DataError(
                f"{what}; that is more than max_bad_steps ({self.settings.max_bad_steps}) steps in a row; {remedy}"
            )
        logger.warning("%s; the step is skipped", what)


def add_adapter(backbone: Backbone, settings: TrainSettings) -> dict[str, torch.nn.Parameter]:
    """Add the LoRA (A random, B zero) and return its parameters in float32, by name."""
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    transformer: Any = backbone.transformer
    transformer.requires_grad_(False)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=0.0,
        target_modules=backbone.lora_targets(settings.targets),
        init_lora_weights=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        transformer.add_adapter(config, adapter_name=ADAPTER)
    cast_training_params(transformer, dtype=torch.float32)
    return {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}
