"""Losses and gradients of pairs of clips: what the trainer asks of the model for each micro-batch."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from training.config import TrainSettings
from training.draws import Draw, draw
from training.fixed_draws import fixed_draw, fixed_draw_number
from training.gradients import Loss, Pair, Side, evaluate_pairs, pair_gradients, reference_predictions
from training.losses import PairLoss, Predictions, pair_loss
from training.memory import passes_on
from training.pairs import PreferencePair
from training.processes import ALONE, Processes
from training.reference_cache import ReferenceCache, reference_identity

if TYPE_CHECKING:
    from spatialalign.backbones.base import Backbone
    from training.samples import Clips
    from training.weights import BlockWeights, Weighting


class PairModel:
    """The model with its adapter, its reference, and the clips it learns from."""

    def __init__(
        self,
        backbone: Backbone,
        clips: Clips,
        settings: TrainSettings,
        weighting: Weighting | None,
        references: Path,
        meeting: Processes = ALONE,
        prompt: str = "",
        blocks: BlockWeights | None = None,
    ) -> None:
        """Take a backbone that carries the adapter already.

        Args:
            backbone: that model.
            clips: of the training.
            settings: see :class:`TrainSettings`.
            weighting: of pairs and clips, where the settings ask for it.
            references: folder of kept reference predictions.
            meeting: the processes that must all take part in a pass, where the base is sharded over them.
            prompt: any prompt, whose text they pass where they have no pairs.
            blocks: weights of the blocks of pairs, where the objective is granular.
        """
        self._backbone, self._clips, self._settings, self._weighting = backbone, clips, settings, weighting
        self._blocks = blocks
        self._passes = passes_on(settings, backbone.device)
        self._watched: dict[Hashable, Pair] = {}
        self._meeting = meeting
        if meeting.size > 1:
            nothing, level = torch.zeros(1, *clips.shape), torch.tensor([sum(backbone.sigma_range) / 2])
            self._stand_in = Side.of(nothing, nothing, level, level, [clips.text(prompt)], backbone.device)
        self._cache: ReferenceCache | None = None
        if settings.reference_cache != "off":
            identity = reference_identity(backbone.transformer, backbone.model_id, settings)
            self._cache = ReferenceCache(references, identity, settings.reference_cache)

    def gradients(self, pairs: Sequence[PreferencePair], indices: Sequence[int], beta: float) -> PairLoss:
        """Add the gradient of pairs of the training stream, over ``batch_pairs``, and return their losses.

        Without any pairs, take part in the passes of the other processes, and add nothing.
        """
        draws, names = self._draws(pairs, indices)
        winner, loser = self._sides(pairs, draws)
        reference = None
        if self._cache is not None:
            won, lost = ([(p.prompt_id, seed) for p, seed in zip(pairs, seeds, strict=True)] for seeds in _seeds(pairs))
            reference = (
                self._cache.predictions(self._backbone, won, names, winner),
                self._cache.predictions(self._backbone, lost, names, loser),
            )
        loss, batch_pairs = self._loss(pairs, draws, beta), self._settings.batch_pairs if pairs else math.inf
        return pair_gradients(self._backbone, winner, loser, loss, batch_pairs, self._passes, reference)

    def evaluate(self, pairs: Sequence[PreferencePair], draws: Sequence[Draw], beta: float, name: Hashable) -> PairLoss:
        """Losses of watched pairs without gradient; the reference's predictions are kept in memory under ``name``.

        Without any pairs, take part in the passes of the other processes.
        """
        winner, loser = self._sides(pairs, draws)
        if self._meeting.any(name not in self._watched):
            found = reference_predictions(self._backbone, winner, loser, self._passes)
            self._watched[name] = (found[0].cpu(), found[1].cpu())
        device = self._backbone.device
        reference = self._watched[name][0].to(device), self._watched[name][1].to(device)
        return evaluate_pairs(self._backbone, winner, loser, self._loss(pairs, draws, beta), self._passes, reference)

    def _draws(self, pairs: Sequence[PreferencePair], indices: Sequence[int]) -> tuple[list[Draw], list[str]]:
        """The randomness of pairs of the training stream, and a name for it among all that a clip is given."""
        settings, shape, levels = self._settings, self._clips.shape, self._backbone.sigma_range
        if not settings.reference_draws:
            draws = [draw(settings, "train", index, shape, None, levels) for index in indices]
            return draws, [f"train-{index}" for index in indices]
        numbers = [fixed_draw_number(settings, index) for index in indices]
        draws = [fixed_draw(settings, pair, number, shape, levels) for pair, number in zip(pairs, numbers, strict=True)]
        return draws, [f"fixed-{number}" for number in numbers]

    def _sides(self, pairs: Sequence[PreferencePair], draws: Sequence[Draw]) -> tuple[Side, Side]:
        if not pairs:
            return self._stand_in, self._stand_in
        clips, device = self._clips, self._backbone.device
        sigma, told = (torch.tensor(levels) for levels in ([d.sigma for d in draws], [d.told for d in draws]))
        text = [clips.text(pair.prompt_id) for pair in pairs]
        winner, loser = (
            Side.of(
                torch.stack([clips.latents(p.prompt_id, seed) for p, seed in zip(pairs, seeds, strict=True)]),
                torch.stack(noise),
                sigma,
                told,
                text,
                device,
            )
            for seeds, noise in zip(_seeds(pairs), ([d.winner for d in draws], [d.loser for d in draws]), strict=True)
        )
        return winner, loser

    def _loss(self, pairs: Sequence[PreferencePair], draws: Sequence[Draw], beta: float) -> Loss:
        objective = self._settings.objective(beta)
        sigma = torch.tensor([draw.sigma for draw in draws], device=self._backbone.device)
        weights = None if self._weighting is None else self._weighting.of(pairs)
        blocks = None if self._blocks is None else self._blocks.of(pairs)

        def loss(winner: Predictions, loser: Predictions) -> PairLoss:
            return pair_loss(winner, loser, objective, sigma, weights, blocks)

        return loss


def _seeds(pairs: Sequence[PreferencePair]) -> tuple[list[int], list[int]]:
    return [pair.winner for pair in pairs], [pair.loser for pair in pairs]
