"""Training of a VideoReward network on labelled pairs: exact resume, held-out accuracy, statistics of the scores."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from spatialalign.agreement import accuracy_with_ties, accuracy_without_ties
from spatialalign.errors import DataError, PromptError, VideoError
from spatialalign.rewards.video_reward import LearnedVideoReward
from spatialalign.rewards.video_reward_config import SCORED
from spatialalign.rewards.video_reward_network import RewardBatch
from spatialalign.video import read_video
from training.reward_loop import Look, RewardLoop
from training.reward_losses import PairLabels, pair_losses
from training.reward_model_settings import RewardModelSettings
from training.reward_network import TrainedNetwork, rate_of
from training.reward_pairs import RewardPairs

logger = logging.getLogger(__name__)

Clip = tuple[Path, str]
"""A video file and its prompt."""
_STATISTIC_CLIPS = 512


class ClipReader:
    """Clips and prompts as the network takes them, the newest kept in memory.

    Attributes:
        left_out: why a clip cannot be used, by its file and prompt.
    """

    def __init__(self, judge: LearnedVideoReward, last: bool, cache_mb: int) -> None:
        """``last``: without the tokens at which scores are read."""
        self._judge, self._last, self._room = judge, last, cache_mb * 2**20
        self._kept: dict[Clip, RewardBatch] = {}
        self._size = 0
        self.left_out: dict[str, str] = {}

    def read(self, clip: Clip) -> RewardBatch | None:
        """A batch of one, in host memory; None for a clip that cannot be used, which is named once."""
        if clip in self._kept:
            self._kept[clip] = self._kept.pop(clip)  # the newest
            return self._kept[clip]
        name = f"{clip[0]} of {clip[1]!r}"
        if name in self.left_out:
            return None
        try:
            found = self._judge.collate([read_video(clip[0])], [clip[1]]).to("cpu")
        except (VideoError, PromptError) as error:
            logger.warning("%s is left out: %s", name, error)
            self.left_out[name] = str(error)
            return None
        if self._last:
            found = _without(found, self._judge.network.marks)
        self._keep(clip, found)
        return found

    def _keep(self, clip: Clip, batch: RewardBatch) -> None:
        self._kept[clip] = batch
        self._size += batch.patches.nbytes
        while self._size > self._room:
            self._size -= self._kept.pop(next(iter(self._kept))).patches.nbytes


def _without(batch: RewardBatch, marks: tuple[int, ...]) -> RewardBatch:
    kept = ~torch.isin(batch.ids[0], torch.tensor(marks))
    return dataclasses.replace(batch, ids=batch.ids[:, kept], mask=batch.mask[:, kept])


def joined(batches: Sequence[RewardBatch], padding: int) -> RewardBatch:
    """Several batches of one as one, with the token ``padding`` at the right."""
    return RewardBatch(
        pad_sequence([batch.ids[0] for batch in batches], batch_first=True, padding_value=padding),
        pad_sequence([batch.mask[0] for batch in batches], batch_first=True),
        torch.cat([batch.patches for batch in batches]),
        torch.cat([batch.grid for batch in batches]),
    )


class PairOrder:
    """Which pairs step ``k`` trains on, as a function of (seed, k): every pair once in an epoch."""

    def __init__(self, pairs: int, batch: int, seed: int) -> None:
        self._pairs, self._batch, self._seed = pairs, batch, seed

    def step(self, step: int) -> NDArray[np.int64]:
        """The rows ``(batch,)`` of optimiser step ``step`` (from 0)."""
        places = np.arange(step * self._batch, (step + 1) * self._batch)
        epochs = {int(epoch): self._epoch(int(epoch)) for epoch in np.unique(places // self._pairs)}
        return np.array([epochs[int(place // self._pairs)][place % self._pairs] for place in places], dtype=np.int64)

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        return np.random.default_rng([self._seed, 22, epoch]).permutation(self._pairs)


class RewardModelTrainer(RewardLoop):
    """Trains what of a network learns.

    Attributes:
        reader: prepares clips; its ``left_out`` names those that could not be used.
    """

    def __init__(
        self,
        judge: LearnedVideoReward,
        pairs: RewardPairs,
        validation: RewardPairs,
        settings: RewardModelSettings,
        out: Path,
        identity: dict[str, Any],
    ) -> None:
        """Prepare.

        Args:
            judge: of ``reward_network.new_judge``.
            pairs: to train on.
            validation: only watched; may be empty.
            settings: see :class:`RewardModelSettings`.
            out, identity: see :class:`RewardLoop`.
        """
        super().__init__("reward model", settings, settings.total_steps(len(pairs)), out, identity)
        assert isinstance(judge.network, TrainedNetwork)
        self.judge, self.network, self.pairs, self.validation = judge, judge.network, pairs, validation
        self.settings = settings
        self.reader = ClipReader(judge, settings.tokens == "last", settings.cache_mb)
        self._order = PairOrder(len(pairs), settings.batch_pairs, settings.seed)
        self._known: dict[Clip, NDArray[np.float64]] = {}
        self._padding = judge.tokenizer.pad_token_id or 0
        self.parameters = self.network.trainable
        groups = [{"params": [p], "full_lr": rate_of(name, settings)} for name, p in self.parameters.items()]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)

    def _looks(self) -> Sequence[Look]:
        return [self.held_out()]

    def _update(self) -> dict[str, float]:
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_lr"] * settings.rate(self.step, self.steps)
        self.optimizer.zero_grad(set_to_none=True)
        self.network.train()
        self._known.clear()
        rows, found = self._order.step(self.step), []
        device = self.network.rm_head.weight.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(settings.seed * 1_000_003 + self.step)  # of dropout
            for start in range(0, len(rows), settings.micro_pairs):
                if part := self._backward(rows[start : start + settings.micro_pairs]):
                    found.append(part)
        if not found:
            return self._skip("none of its clips can be used", "look at the clips that were left out")
        row = self._apply({name: sum(part[name] for part in found) for name in found[0]})
        if not row:
            return {}
        decided = row.pop("decided")
        row |= {"loss": row["loss"] / len(rows), "margin": row["margin"] / row["pairs"]}
        return row | {"accuracy": row["accuracy"] / decided if decided else math.nan}

    def _backward(self, rows: NDArray[np.int64]) -> dict[str, float]:
        """Gradients of some pairs; sums over them: loss, accuracy, margin, and how many count. Empty without any."""
        batches, usable = list[RewardBatch](), list[int]()
        for row in rows.tolist():
            pair = [self.reader.read((clip, self.pairs.prompts[row])) for clip in self.pairs.clips[row]]
            if all(batch is not None for batch in pair):
                batches += [batch for batch in pair if batch is not None]
                usable.append(row)
        if not usable:
            return {}
        scores = self._answers(batches)
        first, second = scores[::2], scores[1::2]
        labels = self._labels(usable)
        losses = pair_losses(self.settings.loss, first, second, labels, self.settings.theta, self.settings.margin)
        total = losses.mean(dim=1).sum()
        (total / self.settings.batch_pairs).backward()
        difference = (first - second).detach()
        decided = labels.preference.abs() > 0
        return {
            "loss": float(total.detach()),
            "accuracy": float(((difference * labels.preference > 0) & decided).sum()),
            "decided": float(decided.sum()),
            "margin": float(difference.abs().mean(dim=1).sum()),
            "pairs": float(len(usable)),
        }

    def _labels(self, rows: Sequence[int]) -> PairLabels:
        device, pairs = self.network.rm_head.weight.device, self.pairs
        ratings = torch.from_numpy(pairs.ratings[list(rows)]).to(device)
        return PairLabels(torch.from_numpy(pairs.preference[list(rows)]).to(device), ratings[:, 0], ratings[:, 1])

    def _answers(self, batches: Sequence[RewardBatch]) -> Tensor:
        """The network's answers ``(b, 3)`` to batches of one."""
        device = self.network.rm_head.weight.device
        answers: Tensor = self.network(joined(batches, self._padding).to(device))
        return answers

    @torch.no_grad()
    def answers(self, clips: Iterable[Clip]) -> dict[Clip, NDArray[np.float64]]:
        """The bare answers ``(3,)`` to clips, without those that cannot be used; kept until the next step."""
        self.network.eval()
        wanted, found = list(dict.fromkeys(clips)), self._known
        names = [name for name in wanted if name not in found]
        for start in range(0, len(names), 2 * self.settings.micro_pairs):
            some = [(name, self.reader.read(name)) for name in names[start : start + 2 * self.settings.micro_pairs]]
            usable = [(name, batch) for name, batch in some if batch is not None]
            if usable:
                answers = self._answers([batch for _, batch in usable]).double().cpu().numpy()
                found.update((name, answer) for (name, _), answer in zip(usable, answers, strict=True))
        return {name: found[name] for name in wanted if name in found}

    def margins(self, pairs: RewardPairs) -> NDArray[np.float64]:
        """Answers to A less those to B ``(n, 3)``; NaN where a clip cannot be used."""
        found = self.answers(_clips_of(pairs))
        nothing = np.full(len(SCORED), np.nan)
        sides = [
            np.array(
                [
                    found.get((pair[side], prompt), nothing)
                    for pair, prompt in zip(pairs.clips, pairs.prompts, strict=True)
                ]
            )
            for side in (0, 1)
        ]
        return np.asarray(sides[0] - sides[1]).reshape(-1, len(SCORED))

    def held_out(self) -> dict[str, float | None]:
        """Accuracy on the validation pairs by dimension, without and with ties (methods: 2.7)."""
        if not len(self.validation):
            return {}
        return accuracies(self.validation, self.margins(self.validation))

    def statistics(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and deviation ``(3,)`` of the answers to validation clips; to training clips where there are none.

        Raises:
            DataError: no clip can be used, or all have one answer.
        """
        clips = list(dict.fromkeys(_clips_of(self.validation if len(self.validation) else self.pairs)))
        values = np.array(list(self.answers(clips[:: math.ceil(len(clips) / _STATISTIC_CLIPS)]).values()))
        if len(values) < 2 or (values.std(axis=0) == 0).any():
            raise DataError(f"the scores of {len(values)} validation clips do not vary; give other clips, or train on")
        return values.mean(axis=0), values.std(axis=0)


def accuracies(pairs: RewardPairs, margins: NDArray[np.float64]) -> dict[str, float | None]:
    """``VQ`` and the like without ties, ``VQ_with_ties`` with them, over pairs with a label and a margin ``(n, 3)``."""
    row: dict[str, float | None] = {}
    for index, name in enumerate(SCORED):
        label, margin = pairs.preference[:, index], margins[:, index]
        known = ~(np.isnan(label) | np.isnan(margin))
        if known.any():
            row[name] = accuracy_without_ties(label[known], margin[known])
            row[f"{name}_with_ties"] = accuracy_with_ties(label[known], margin[known]).accuracy
    return row


def _clips_of(pairs: RewardPairs) -> list[Clip]:
    return [(clip, prompt) for pair, prompt in zip(pairs.clips, pairs.prompts, strict=True) for clip in pair]
