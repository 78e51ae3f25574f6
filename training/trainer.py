"""Preference training of a LoRA on a flow model: one process, exact resume, the base model as its own reference."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from spatialalign.backbones.flow import add_noise, training_sigmas, velocity_target
from spatialalign.errors import DataError
from training.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from training.config import TrainSettings
from training.losses import PairLoss, Predictions, pair_loss
from training.monitors import JsonlLog, RegimeWatch, Scalars
from training.pairs import PairStream, PreferencePair, PromptPairs
from training.store import Store

if TYPE_CHECKING:
    from spatialalign.backbones.base import Backbone

logger = logging.getLogger(__name__)

ADAPTER = "spatialalign"


@dataclass(frozen=True)
class Draw:
    """The randomness of one pair: its noise level ``sigma`` and the noise of winner and loser, ``(c, f, h, w)``."""

    sigma: float
    winner: Tensor
    loser: Tensor


def draw(settings: TrainSettings, stream: str, index: int, shape: Sequence[int], level: int | None = None) -> Draw:
    """Noise level and noise of pair ``index`` of a stream: a function of (seed, stream, index), on the CPU.

    ``level`` fixes the noise level to an entry of the 1000-step schedule instead of drawing it.
    """
    key = hashlib.sha256(f"{settings.seed}/{stream}/{index}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
    sigmas = training_sigmas(settings.shift)
    drawn = int(torch.randint(len(sigmas), (1,), generator=generator))
    winner = torch.randn(tuple(shape), generator=generator)
    loser = winner if settings.noise == "shared" else torch.randn(tuple(shape), generator=generator)
    return Draw(float(sigmas[drawn if level is None else level]), winner, loser)


class Trainer:
    """Trains the adapter ``spatialalign`` on ``backbone.transformer``.

    The reference is the same transformer with the adapter switched off. Text comes from the store's cache, latents are
    read when needed, and pair, noise and learning rate of a step depend on (seed, step) alone, so a run that is killed
    and continued ends with the same bits as one that was not (on one CPU thread count or one GPU model).
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
        """
        self.backbone, self.store, self.settings, self.out = backbone, store, settings, out
        self.identity = identity
        self._train = PairStream(train, settings.seed)
        self._held_out = PairStream(held_out, settings.seed, "held-out") if held_out else None
        self._held_out_reference: dict[int, Tensor] = {}
        self._texts: dict[str, Tensor] = {}
        self._shape: tuple[int, ...] | None = None
        self.step = 0
        self.parameters = _add_adapter(backbone, settings)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=settings.lr, weight_decay=settings.weight_decay)
        if settings.gradient_checkpointing:
            backbone.transformer.enable_gradient_checkpointing()  # type: ignore[operator]

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.out / "checkpoints"

    def resume(self, allow_changes: bool = False) -> list[str]:
        """Continue from the newest complete checkpoint, if there is one; returns the changes that were allowed."""
        checkpoint = latest_checkpoint(self.checkpoints)
        if checkpoint is None:
            return []
        changes = checkpoint.check_identity(self.identity, allow_changes)
        load_checkpoint(checkpoint, self.parameters, self.optimizer)
        self.step = checkpoint.step
        return changes

    def fit(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Train until the last step or until ``stop()`` is true after a step; a checkpoint is written either way.

        Returns:
            True when all steps are done, False when stopped before.
        """
        settings = self.settings
        log, scalars = JsonlLog(self.out / "train.jsonl"), Scalars(self.out / "tensorboard", settings.tensorboard)
        log.keep_until(self.step)
        watch = RegimeWatch()
        bar = tqdm(total=settings.steps, initial=self.step, desc=f"dpo ({settings.arm})", disable=None)
        try:
            if self.step == 0:
                self._watch_held_out(log, scalars)
            while self.step < settings.steps:
                row = self._train_step()
                bar.update()
                bar.set_postfix(loss=f"{row['loss']:.4f}", acc=f"{row['accuracy']:.2f}", refresh=False)
                log.write({"event": "train", "step": self.step, **row})
                scalars.write("train", self.step, row)
                warning = watch.update(self.step, row["gradient_factor"])
                if warning and settings.arm != "sft":
                    logger.warning("%s", warning)
                    log.write({"event": "warning", "step": self.step, "message": warning})
                last = self.step == settings.steps
                if last or self.step % settings.held_out_every == 0:
                    self._watch_held_out(log, scalars)
                stopping = not last and stop()
                if last or stopping or self.step % settings.checkpoint_every == 0:
                    self.save()
                if stopping:
                    return False
        finally:
            bar.close()
            scalars.close()
        return True

    def save(self) -> Path:
        """Write a checkpoint of the steps done so far."""
        return save_checkpoint(
            self.checkpoints, self.step, self.parameters, self.optimizer, self.identity, self.settings.keep_checkpoints
        )

    def release(self) -> None:
        """Switch off what only training needs, so that sampling is as fast as before."""
        self.backbone.transformer.disable_gradient_checkpointing()  # type: ignore[operator]

    def held_out(self) -> dict[str, float] | None:
        """Mean monitors over the held-out pairs at fixed noise and evenly spread noise levels; None without any."""
        if self._held_out is None:
            return None
        settings, losses = self.settings, []
        with torch.no_grad():
            for start in range(0, settings.held_out_pairs, settings.micro_pairs):
                chosen = range(start, min(start + settings.micro_pairs, settings.held_out_pairs))
                pairs = [self._held_out.pair(index) for index in chosen]
                levels = [(2 * index + 1) * 500 // settings.held_out_pairs for index in chosen]
                draws = [
                    draw(settings, "held-out", index, self._latent_shape(pair), level)
                    for index, pair, level in zip(chosen, pairs, levels, strict=True)
                ]
                losses.append(self._losses(pairs, draws, remember=start))
        return {"loss": _mean([loss.total for loss in losses]), **_monitors(losses)}

    def _watch_held_out(self, log: JsonlLog, scalars: Scalars) -> None:
        values = self.held_out()
        if values is not None:
            log.write({"event": "held_out", "step": self.step, **values})
            scalars.write("held_out", self.step, values)

    def _train_step(self) -> dict[str, float]:
        settings, started = self.settings, time.perf_counter()
        rate = settings.learning_rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        first, losses = self.step * settings.batch_pairs, []
        for start in range(first, first + settings.batch_pairs, settings.micro_pairs):
            indices = range(start, start + settings.micro_pairs)
            pairs = [self._train.pair(index) for index in indices]
            draws = [
                draw(settings, "train", index, self._latent_shape(pair))
                for index, pair in zip(indices, pairs, strict=True)
            ]
            loss = self._losses(pairs, draws)
            (loss.total.sum() / settings.batch_pairs).backward()
            losses.append(PairLoss(*(getattr(loss, field.name).detach() for field in fields(loss))))
        limit = float("inf") if settings.max_grad_norm is None else settings.max_grad_norm
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit))
        total = _mean([loss.total for loss in losses])
        if not (torch.isfinite(torch.tensor([total, norm])).all()):
            raise DataError(
                f"step {self.step + 1}: loss {total} and gradient norm {norm} are not finite; the newest checkpoint is "
                "unharmed. Lower lr or beta, or compute in float32"
            )
        self.optimizer.step()
        self.step += 1
        seconds = time.perf_counter() - started
        return {"loss": total, **_monitors(losses), "grad_norm": norm, "lr": rate, "seconds": round(seconds, 4)}

    def _losses(self, pairs: Sequence[PreferencePair], draws: Sequence[Draw], remember: int | None = None) -> PairLoss:
        """Losses of b pairs; with ``remember``, the reference's predictions are kept under this key."""
        settings, count = self.settings, len(pairs)
        clean = torch.stack(
            [self._latents(p.prompt_id, p.winner) for p in pairs] + [self._latents(p.prompt_id, p.loser) for p in pairs]
        )
        noise = torch.stack([d.winner for d in draws] + [d.loser for d in draws])
        sigma = torch.tensor([d.sigma for d in draws] * 2)
        text = [self._text(p.prompt_id) for p in pairs] * 2
        device = self.backbone.device
        noisy = add_noise(clean, noise, sigma).to(device)
        target = velocity_target(clean, noise).to(device)
        reference = self._held_out_reference.get(remember) if remember is not None else None
        if reference is None:
            with torch.no_grad(), adapter_off(self.backbone.transformer):
                reference = self.backbone.velocity(noisy, sigma, text)
            if remember is not None:
                self._held_out_reference[remember] = reference.cpu()
        reference = reference.to(device)
        model = self.backbone.velocity(noisy, sigma, text)
        winner, loser = (
            Predictions(model[side], reference[side], target[side]) for side in (slice(count), slice(count, None))
        )
        return pair_loss(
            winner,
            loser,
            arm=settings.arm,
            beta=settings.beta,
            clip=settings.clip,
            anchor_weight=settings.anchor_weight,
            sft_weight=settings.sft_weight,
            reduction=settings.reduction,
        )

    def _latents(self, prompt_id: str, seed: int) -> Tensor:
        sample = self.store.sample(prompt_id, seed)
        latents = sample.read_latents()
        self._shape = self._shape or tuple(latents.shape)
        if tuple(latents.shape) != self._shape:
            raise DataError(
                f"{sample.latents} has shape {tuple(latents.shape)}, the clips before it {self._shape}; "
                "one training needs clips of one size"
            )
        return latents

    def _latent_shape(self, pair: PreferencePair) -> tuple[int, ...]:
        return self._shape or tuple(self._latents(pair.prompt_id, pair.winner).shape)

    def _text(self, prompt_id: str) -> Tensor:
        if prompt_id not in self._texts:
            self._texts[prompt_id] = self.store.read_text(prompt_id)
        return self._texts[prompt_id]


@contextmanager
def adapter_off(transformer: Any) -> Iterator[None]:
    """Inside the ``with`` block the transformer is the base model, bit for bit."""
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()


def _add_adapter(backbone: Backbone, settings: TrainSettings) -> dict[str, torch.nn.Parameter]:
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


def _mean(values: Sequence[Tensor]) -> float:
    return float(torch.cat([value.detach().float().cpu() for value in values]).mean())


def _monitors(losses: Sequence[PairLoss]) -> dict[str, float]:
    """Means over pairs; errors of winner and loser apart, since both can grow while their difference improves."""
    return {
        "dpo": _mean([loss.dpo for loss in losses]),
        "anchor": _mean([loss.anchor for loss in losses]),
        "sft": _mean([loss.sft for loss in losses]),
        "accuracy": _mean([loss.accuracy for loss in losses]),
        "margin": _mean([loss.margin for loss in losses]),
        "winner_gain": _mean([loss.winner_gain for loss in losses]),
        "loser_gain": _mean([loss.loser_gain for loss in losses]),
        "norm_ratio": _mean([loss.norm_ratio for loss in losses]),
        "gradient_factor": _mean([loss.gradient_factor for loss in losses]),
    }
