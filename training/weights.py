"""How much a pair or a clip counts, from the scores of the clips: pair weights and Flow-RWR's weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from spatialalign.errors import ConfigError, DataError
from training.config import TrainSettings
from training.losses import Weights, block_preferences
from training.pairs import PreferencePair, PromptPairs, Scores
from training.patch_scores import PatchScores, read_patches

if TYPE_CHECKING:
    from torch import Tensor

    from training.store import Store

BIN = 0.1
"""Width of the bins in which scores count as equally rare."""


def advantages(scores: Sequence[float]) -> NDArray[np.float64]:
    """Scores of one prompt's clips, normalised to mean 0 and standard deviation 1; all 0 when they are equal."""
    values = np.asarray(scores, dtype=np.float64)
    spread = values.std()
    return np.zeros_like(values) if spread < 1e-12 else (values - values.mean()) / spread


def reward_weights(advantage: NDArray[np.float64], temperature: float, limit: float) -> NDArray[np.float64]:
    """``min(exp(advantage / temperature), limit)`` (methods: Flow-RWR, eq. 9, whose reward is the advantage here)."""
    return np.minimum(np.exp(advantage / temperature), limit)


def effective_sample_size(weights: Sequence[float] | NDArray[np.float64]) -> float:
    """Kish's ``(sum w)^2 / sum w^2``: the number of equal weights that would give the same variance."""
    values = np.asarray(weights, dtype=np.float64)
    return float(values.sum() ** 2 / np.square(values).sum())


class Weighting:
    """The weights of pairs and clips for one training.

    A pair's weight (``pair_weight``) is the difference of its two scores, or the product of the clips' rarities, over
    its mean over all training pairs as they are drawn: prompts uniformly, then winner and loser of it. A clip's rarity
    is the share of the training clips whose score lies in the same tenth, to the power ``-rarity_power``.

    A clip's weight (arm ``rwr``) is that of its advantage among its prompt's clips. Pairs hold a winner and a loser
    each, however few a prompt has of either; the factor ``2 n_winners / n`` on winners, and alike on losers, makes the
    expected loss that of clips drawn uniformly within a prompt.

    Attributes:
        effective_share: effective sample size of the training clips' weights over the number of these clips.
    """

    def __init__(
        self, train: Sequence[PromptPairs], held_out: Sequence[PromptPairs], scores: Scores, settings: TrainSettings
    ) -> None:
        """``scores`` holds every clip of both sets of prompts; the training set alone gives means and shares."""
        self._scores, self._settings = scores, settings
        bins = Counter(_bin(scores[key]) for prompt in train for key in _clips(prompt))
        self._share = {name: count / bins.total() for name, count in bins.items()}
        self._rarest = 1 / bins.total()
        self._mean = float(np.mean([self._mean_of(prompt) for prompt in train]))
        weights = [self._clip_weights(prompt) for prompt in train]
        mean, square = (float(np.mean([np.mean(w**power) for w in weights])) for power in (1, 2))
        self.effective_share = mean**2 / square
        self._clip: dict[tuple[str, int], float] = {}
        for prompt in (*train, *held_out):
            keys, winners = _clips(prompt), len(prompt.winners)
            sides = np.repeat([winners, len(keys) - winners], [winners, len(keys) - winners])
            self._clip.update(zip(keys, self._clip_weights(prompt) * 2 * sides / len(keys), strict=True))

    def of(self, pairs: Sequence[PreferencePair]) -> Weights:
        """The weights of b pairs, ``(b,)`` each."""
        return Weights(
            pair=torch.tensor([self._raw(p.prompt_id, p.winner, p.loser) / self._mean for p in pairs]),
            winner=torch.tensor([self._clip[p.prompt_id, p.winner] for p in pairs], dtype=torch.float32),
            loser=torch.tensor([self._clip[p.prompt_id, p.loser] for p in pairs], dtype=torch.float32),
        )

    def _clip_weights(self, prompt: PromptPairs) -> NDArray[np.float64]:
        values = advantages([self._scores[key] for key in _clips(prompt)])
        return reward_weights(values, self._settings.rwr_temperature, self._settings.rwr_clip)

    def _mean_of(self, prompt: PromptPairs) -> float:
        return float(np.mean([self._raw(prompt.prompt_id, w, lost) for w in prompt.winners for lost in prompt.losers]))

    def _raw(self, prompt_id: str, winner: int, loser: int) -> float:
        won, lost = self._scores[prompt_id, winner], self._scores[prompt_id, loser]
        if self._settings.pair_weight == "margin":
            return won - lost
        if self._settings.pair_weight == "rarity":
            share = self._share.get(_bin(won), self._rarest) * self._share.get(_bin(lost), self._rarest)
            return float(share**-self._settings.rarity_power)
        return 1.0


class BlockWeights:
    """What each block of a pair counts in a granular objective, from the scores of the blocks of both clips.

    Attributes:
        digest: of the scores.
    """

    def __init__(self, scores: PatchScores, prompts: Sequence[PromptPairs], tie: float) -> None:
        """Raises :class:`DataError` naming a clip of these prompts whose blocks are not scored."""
        self._scores, self._tie, self.digest = scores, tie, scores.digest
        for prompt in prompts:
            for key in _clips(prompt):
                scores.of(*key)

    def of(self, pairs: Sequence[PreferencePair]) -> Tensor:
        """Signed weights ``(b, F, R, C)``, see :func:`training.losses.block_preferences`."""
        if not pairs:
            return torch.zeros(0, *self._scores.grid.shape)
        won, lost = (
            torch.from_numpy(
                np.stack([self._scores.of(p.prompt_id, seed) for p, seed in zip(pairs, seeds, strict=True)])
            )
            for seeds in ([p.winner for p in pairs], [p.loser for p in pairs])
        )
        return block_preferences(won, lost, self._tie)


def block_weights(settings: TrainSettings, patches: Path | None, prompts: Sequence[PromptPairs]) -> BlockWeights | None:
    """The weights of blocks that the settings ask for, if any, from a file of block scores.

    Raises:
        ConfigError: the objective is granular and there is no file, or the other way round.
        DataError: the file cannot be used, or lacks a clip.
    """
    if (settings.granular_weight > 0) != (patches is not None):
        raise ConfigError(
            f"granular_weight ({settings.granular_weight}) above 0 and patches ({patches}) belong together: give both, "
            "or neither"
        )
    return None if patches is None else BlockWeights(read_patches(patches), prompts, settings.granular_tie)


def weighting(
    store: Store,
    train: Sequence[PromptPairs],
    held_out: Sequence[PromptPairs],
    settings: TrainSettings,
    which: str | Scores,
) -> Weighting | None:
    """The weighting that the settings ask for, if any; ``which`` is :func:`~training.pairs.scored_by` of the pairs."""
    if settings.pair_weight == "none" and settings.arm != "rwr":
        return None
    return Weighting(train, held_out, read_scores(store, [*train, *held_out], which), settings)


def read_scores(store: Store, prompts: Sequence[PromptPairs], which: str | Scores) -> dict[tuple[str, int], float]:
    """The scores of the prompts' clips, of the store or as given; raises :class:`DataError` naming a clip without."""
    scores = {}
    if not isinstance(which, str):
        if missing := [key for prompt in prompts for key in _clips(prompt) if key not in which]:
            raise DataError(f"the pairs hold no score of clip {missing[0][0]}/{missing[0][1]}; run training.mine again")
        return dict(which)
    for prompt in prompts:
        for key in _clips(prompt):
            sample = store.sample(*key)
            score = sample.read_score()
            value = score.score if which == "official" else score.robust.score if score.robust is not None else None
            if value is None:
                raise DataError(
                    f"{sample.score} has no {which} score, which weights of pairs and clips need; run training.score "
                    "and training.mine again"
                )
            scores[key] = float(value)
    return scores


def _clips(prompt: PromptPairs) -> list[tuple[str, int]]:
    return [(prompt.prompt_id, seed) for seed in (*prompt.winners, *prompt.losers)]


def _bin(score: float) -> int:
    return int(np.floor(score / BIN + 1e-9))
