"""Which clips of a prompt win and which lose: rules on their scores alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from training.pairs import PromptPairs, Scores

Rule = Literal["threshold", "margin", "best-worst"]
Sides = tuple[tuple[int, ...], tuple[int, ...]]
"""Seeds of winners and of losers."""


@dataclass(frozen=True)
class Judged:
    """A clip of a prompt: its seed, its score, and the score from which on it wins by the rule ``threshold``."""

    seed: int
    score: float
    threshold: float


def choose(clips: Sequence[Judged], rule: Rule, margin: float) -> Sides:
    """Winners and losers of one prompt by a rule; every winner is to be paired with every loser."""
    if rule == "threshold":
        return by_threshold(clips)
    return by_margin(clips, margin) if rule == "margin" else best_worst(clips, margin)


def by_threshold(clips: Sequence[Judged]) -> Sides:
    """Clips at or above their threshold win, the others lose (methods: official train.py)."""
    winners = tuple(clip.seed for clip in clips if clip.score >= clip.threshold)
    return winners, tuple(clip.seed for clip in clips if clip.score < clip.threshold)


def by_margin(clips: Sequence[Judged], margin: float) -> Sides:
    """The best and the worst clips, such that every winner is at least ``margin`` > 0 above every loser.

    Of all such choices it is the one with most pairs, and among these the one with the widest gap. Clips in between
    take no part. Empty on both sides where no two clips are so far apart.
    """
    ordered, most = sorted(clips, key=lambda clip: clip.score), (0, 0.0)
    found: Sides = ((), ())
    for count in range(1, len(ordered)):
        losers, worst = ordered[:count], ordered[count - 1].score
        winners = [clip for clip in ordered if clip.score - worst >= margin]
        if winners and (size := (len(winners) * count, winners[0].score - worst)) > most:
            most, found = size, (_seeds(winners), _seeds(losers))
    return found


def best_worst(clips: Sequence[Judged], margin: float = 0.0) -> Sides:
    """The best clip against the worst one, if they differ at all and by ``margin``; of equal ones, the lower seed."""
    if not clips:
        return (), ()
    best = min(clips, key=lambda clip: (-clip.score, clip.seed))
    worst = min(clips, key=lambda clip: (clip.score, clip.seed))
    gap = best.score - worst.score
    return ((best.seed,), (worst.seed,)) if gap > 0 and gap >= margin else ((), ())


def agreement(prompts: Sequence[PromptPairs], scores: Scores) -> float | None:
    """How often the winner has the better of these scores, over pairs as they are drawn; equal ones count half.

    Pairs with an unknown score, and prompts with no other, do not count; None where nothing is left.
    """
    shares = []
    for prompt in prompts:
        won, lost = (
            np.array([scores.get((prompt.prompt_id, seed), math.nan) for seed in seeds])
            for seeds in (prompt.winners, prompt.losers)
        )
        signs = np.sign(won[:, None] - lost[None, :])
        if not np.isnan(signs).all():
            shares.append(float(np.nanmean(0.5 + 0.5 * signs)))
    return float(np.mean(shares)) if shares else None


def _seeds(clips: Sequence[Judged]) -> tuple[int, ...]:
    return tuple(sorted(clip.seed for clip in clips))
