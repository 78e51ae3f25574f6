"""Training of a latent reward: exact resume, pairs with the same noise, monitors by noise level."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from spatialalign.backbones.flow import add_noise, shift_sigma
from spatialalign.errors import DataError
from spatialalign.rewards.latent import LatentReward
from spatialalign.rewards.wan_trunk import EmbeddedText
from training.label_losses import correlation, pair_accuracy, preference, regression
from training.latent_labels import Captions, Labels
from training.latent_reward_settings import RewardSettings
from training.reward_loop import Look, RewardLoop
from training.store import Store

BINS = ((0.0, 0.3), (0.3, 0.6), (0.6, 0.8), (0.8, 0.9), (0.9, 1.0))
"""Noise levels that the monitors tell apart."""
FURTHER = "further."
"""What the names of further dimensions begin with in the log."""
_STANDARD_CLIPS = 256


@dataclass(frozen=True)
class Draw:
    """The pairs of one optimiser step: rows of the labels, caption columns, noise levels, and the noise's seed."""

    one: NDArray[np.int64]
    other: NDArray[np.int64]
    caption: NDArray[np.int64]
    sigma: NDArray[np.float32]
    noise_seed: int


class PairDraws:
    """What step ``k`` trains on, as a function of (seed, k): nothing has to be remembered for a run to continue."""

    def __init__(self, labels: Labels, rows: NDArray[np.int64], settings: RewardSettings) -> None:
        """Draw from these rows of the labels: two clips of one triple, any two that are not the same where it can."""
        self._labels, self._settings = labels, settings
        self._groups = [rows[labels.group[rows] == group] for group in np.unique(labels.group[rows])]

    def step(self, step: int) -> Draw:
        """The pairs of optimiser step ``step`` (from 0)."""
        settings, random = self._settings, np.random.default_rng([self._settings.seed, 11, step])
        count = settings.batch_pairs
        one, other = np.empty(count, np.int64), np.empty(count, np.int64)
        for index, group in enumerate(random.integers(len(self._groups), size=count)):
            rows = self._groups[group]
            first = int(random.integers(len(rows)))
            step_on = 1 + int(random.integers(len(rows) - 1)) if len(rows) > 1 else 0
            one[index], other[index] = rows[first], rows[(first + step_on) % len(rows)]
        any_type = random.integers(len(self._labels.codes), size=count)
        caption = np.where(random.random(count) < settings.own_caption, self._labels.own[one], any_type)
        levels = random.random(count)
        shifted = shift_sigma(torch.from_numpy(levels), settings.shift).numpy()
        sigma = np.where(random.random(count) < settings.even_levels, levels, shifted) * settings.noisy
        return Draw(one, other, caption, sigma.astype(np.float32), int(random.integers(2**62)))


class RewardTrainer(RewardLoop):
    """Trains a latent reward on the labels of a store. Latents are read when needed."""

    def __init__(
        self,
        reward: LatentReward,
        store: Store,
        labels: Labels,
        captions: Captions,
        settings: RewardSettings,
        out: Path,
        identity: dict[str, Any],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Prepare.

        Args:
            reward: trainable, float32, on the device to train on, with ``labels.names`` as further dimensions.
            store: holds the clips' latents.
            labels: of the clips.
            captions: embeddings of every prompt for every type.
            settings: see :class:`RewardSettings`.
            out, identity: see :class:`RewardLoop`.
            dtype: that CUDA computes in; weights stay float32.
        """
        super().__init__("latent reward", settings, settings.steps, out, identity)
        self.reward, self.store, self.labels, self.captions = reward, store, labels, captions
        self.settings, self._dtype = settings, dtype
        self.train_rows, self.held_out_rows = split_rows(labels, settings.held_out, settings.seed)
        self._draws = PairDraws(labels, self.train_rows, settings)
        self.parameters = dict(reward.named_parameters())
        width = reward.trunk.config.width
        groups = [
            {"params": [parameter], "factor": rate_factor(name, parameter, width, settings.trunk_lr)}
            for name, parameter in self.parameters.items()
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)
        self._means, self._stds = further_statistics(labels, self.train_rows)

    @property
    def device(self) -> torch.device:
        """Where the reward is."""
        return self.reward.trunk.patch_embedding.weight.device

    def _looks(self) -> Sequence[Look]:
        return self.held_out()

    def _update(self) -> dict[str, float]:
        settings = self.settings
        self.reward.train()
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * group["factor"] * settings.rate(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        draw, generator = self._draws.step(self.step), torch.Generator()
        generator.manual_seed(draw.noise_seed)
        parts = settings.batch_pairs // settings.micro_pairs
        row: dict[str, float] = {}
        for start in range(0, settings.batch_pairs, settings.micro_pairs):
            losses = self._losses(draw, slice(start, start + settings.micro_pairs), generator)
            (losses["loss"] / parts).backward()
            for name, value in losses.items():
                row[name] = row.get(name, 0.0) + float(value.detach()) / parts
        return self._apply(row)

    def _losses(self, draw: Draw, part: slice, generator: torch.Generator) -> dict[str, Tensor]:
        """The losses of some of a step's pairs; both clips of a pair have the same noise, level and caption."""
        labels, settings = self.labels, self.settings
        one, other, caption = draw.one[part], draw.other[part], draw.caption[part]
        rows, captions = np.concatenate([one, other]), np.concatenate([caption, caption])
        noise = torch.randn((len(one), *labels.shape), generator=generator).repeat(2, 1, 1, 1, 1)
        sigma = torch.from_numpy(draw.sigma[part]).repeat(2)
        texts = [self._text(row, column) for row, column in zip(one, caption, strict=True)]
        values, curves = self._judge(rows, noise, sigma, texts, twice=True)

        def known(array: NDArray[np.float32]) -> Tensor:
            return torch.from_numpy(array).to(self.device)

        scores = known(labels.scores[rows, captions])
        losses = {
            "curves": settings.curve_weight * regression(curves, known(labels.curves[rows, captions])),
            "score": settings.score_weight * regression(values[:, 0], scores),
            "valid": settings.valid_weight
            * torch.nn.functional.binary_cross_entropy_with_logits(values[:, 1], known(labels.valid[rows])),
            "preference": settings.preference_weight * self._preference(values[:, 0], scores, settings.sharpness),
        }
        for index, name in enumerate(labels.names):
            target = known((labels.further[rows, index] - self._means[index]) / self._stds[index])
            loss = self._preference(values[:, 2 + index], target, 1.0)
            if settings.regress:
                loss = loss + regression(values[:, 2 + index], target)
            losses[FURTHER + name] = settings.preference_weight * loss
        return losses | {"loss": torch.stack(list(losses.values())).sum()}

    def _preference(self, predicted: Tensor, target: Tensor, sharpness: float) -> Tensor:
        (one, other), (first, second) = predicted.chunk(2), target.chunk(2)
        return preference(one, other, first - second, self.settings.margin, sharpness)

    def _text(self, row: int, column: int) -> Tensor:
        return self.captions.of(self.labels.clips[row][0], self.labels.codes[column])

    def _judge(
        self, rows: Sequence[int] | NDArray[np.int64], noise: Tensor, sigma: Tensor, texts: list[Tensor], twice: bool
    ) -> tuple[Tensor, Tensor]:
        """Values and curves of clips with noise; ``twice``: the texts are those of either half of the clips."""
        latents = torch.stack([self._latents(int(row)) for row in rows])
        x, level = add_noise(latents, noise, sigma).to(self.device), sigma.to(self.device)
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32):
            text = self.reward.prepare(texts)
            if twice:
                text = EmbeddedText(*(torch.cat([part, part]) for part in (text.rows, text.bias, text.real)))
            found = self.reward(x, level, text)
        return found.values.float(), found.curves.float()

    def _latents(self, row: int) -> Tensor:
        return self.store.sample(*self.labels.clips[row]).read_latents()

    @torch.no_grad()
    def standardise(self) -> None:
        """Give every further dimension mean 0 and deviation 1 over training clips without noise, their own captions."""
        rows = self.train_rows[:: max(1, len(self.train_rows) // _STANDARD_CLIPS)]
        if not self.labels.names:
            return
        self.reward.eval()
        parts = []
        for start in range(0, len(rows), 2 * self.settings.micro_pairs):
            some = rows[start : start + 2 * self.settings.micro_pairs]
            texts = [self._text(row, column) for row, column in zip(some, self.labels.own[some], strict=True)]
            noise = torch.zeros(len(some), *self.labels.shape)
            parts.append(self._judge(some, noise, torch.zeros(len(some)), texts, twice=False)[0])
        values = torch.cat(parts)
        for index, name in enumerate(self.labels.names):
            column = values[:, 2 + index]
            self.reward.standardise(name, float(column.mean()), float(column.std(correction=0)))

    @torch.no_grad()
    def held_out(self) -> list[dict[str, float]]:
        """Monitors on the held-out clips with their own captions, one row for each bin of noise levels.

        All clips of a prompt share noise and level, both fixed, so that their order is the clips' own.

        Each row: ``from``, ``to`` (noise levels), ``clips``, ``pairs``, ``accuracy`` (of the order by DSR-Score within
        a prompt, beyond the margin), ``correlation`` and ``error`` (of the DSR-Score, squared), ``valid`` (how often a
        valid clip is thought likelier to be valid than an invalid one), and the same accuracy by further dimension.
        """
        rows = self.held_out_rows
        if not len(rows):
            return []
        labels, found = self.labels, list[dict[str, float]]()
        names = [labels.clips[row][0] for row in rows]
        prompts = {name: index for index, name in enumerate(dict.fromkeys(names))}
        group = torch.tensor([prompts[name] for name in names])
        own, valid = labels.own[rows], torch.from_numpy(labels.valid[rows])
        scores = torch.from_numpy(labels.scores[rows, own])
        self.reward.eval()
        for number, (low, high) in enumerate(BINS):
            draws = [_fixed_draw(self.settings.seed, number, name, labels.shape) for name in prompts]
            parts = []
            for start in range(0, len(rows), 2 * self.settings.micro_pairs):
                some = slice(start, start + 2 * self.settings.micro_pairs)
                chosen = [draws[index] for index in group[some]]
                sigma = torch.tensor([low + (high - low) * place for place, _ in chosen])
                texts = [self._text(row, column) for row, column in zip(rows[some], own[some], strict=True)]
                noise = torch.stack([noise for _, noise in chosen])
                parts.append(self._judge(rows[some], noise, sigma, texts, twice=False)[0].cpu())
            values, margin = torch.cat(parts), self.settings.margin
            accuracy, pairs = pair_accuracy(values[:, 0], scores, group, margin)
            row = {"from": low, "to": high, "clips": len(rows), "pairs": pairs, "accuracy": accuracy}
            row |= {"correlation": correlation(values[:, 0], scores), "error": float(regression(values[:, 0], scores))}
            row["valid"] = pair_accuracy(values[:, 1], valid, torch.zeros_like(group), 0.5)[0]
            for index, name in enumerate(labels.names):
                target = torch.from_numpy((labels.further[rows, index] - self._means[index]) / self._stds[index])
                row[FURTHER + name] = pair_accuracy(values[:, 2 + index], target, group, margin)[0]
            found.append(row)
        return found


def _fixed_draw(seed: int, number: int, name: str, shape: Sequence[int]) -> tuple[float, Tensor]:
    """Where in bin ``number`` a prompt's held-out clips are looked at, in [0, 1), and their noise ``(c, f, h, w)``."""
    key = hashlib.sha256(f"{seed}/held-out/{number}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))
    return float(torch.rand((), generator=generator)), torch.randn(tuple(shape), generator=generator)


def rate_factor(name: str, parameter: Tensor, width: int, trunk: float) -> float:
    """Factor of a parameter's learning rate.

    One Adam step moves an output by the rate times the number of inputs. So a matrix with more inputs than the trunk is
    wide, such as the first one of the text, gets less by as much.
    """
    inputs = parameter[0].numel() if parameter.ndim > 1 else 1
    return (trunk if name.startswith("trunk.") else 1.0) * min(1.0, width / inputs)


def split_rows(labels: Labels, share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(training, held-out) rows of the labels; clips of one triple stay together.

    With a share above 0 at least one triple is held out and at least one is trained on, if there are two.
    """
    groups = np.unique(labels.group)
    count = min(max(1, round(share * len(groups))), len(groups) - 1) if share > 0 else 0
    held = np.random.default_rng([seed, 12]).permutation(groups)[:count]
    away = np.isin(labels.group, held)
    return np.flatnonzero(~away), np.flatnonzero(away)


def further_statistics(labels: Labels, rows: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and standard deviation ``(len(names),)`` of the further labels in some rows; raises :class:`DataError`
    where a dimension does not vary there."""
    known = labels.further[rows]
    for name, column in zip(labels.names, known.T, strict=True):
        if (~np.isnan(column)).sum() < 2 or np.nanstd(column) == 0:
            raise DataError(f"dimension {name!r} tells no two training clips apart; label more clips, or leave it out")
    return np.nanmean(known, axis=0), np.nanstd(known, axis=0)
