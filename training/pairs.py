"""Winners and losers, and the stream of pairs drawn from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spatialalign.errors import ConfigError, DataError
from spatialalign.files import read_json

Key = tuple[str, int]
"""A clip: prompt id and seed."""
Scores = Mapping[Key, float]
"""Scores of clips."""

FORMAT = "1"
_STREAMS = {"train": 0, "held-out": 1}


@dataclass(frozen=True)
class PreferencePair:
    """Two clips of one prompt, of which the first is preferred; winner and loser are seeds."""

    prompt_id: str
    winner: int
    loser: int


@dataclass(frozen=True)
class PromptPairs:
    """The winners and losers of one prompt, as seeds; at least one of each, none in both."""

    prompt_id: str
    winners: tuple[int, ...]
    losers: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.winners or not self.losers:
            raise DataError(f"prompt {self.prompt_id} needs at least one winner and one loser to make a pair")
        if set(self.winners) & set(self.losers):
            raise DataError(f"prompt {self.prompt_id} has seeds that are both winner and loser; mine the pairs again")


def read_pairs(path: str | Path) -> tuple[tuple[PromptPairs, ...], str]:
    """Read the manifest that ``training.mine`` wrote.

    Returns:
        The prompts with their winners and losers, and a digest of them.

    Raises:
        DataError: the file is missing, damaged, or of another format.
    """
    value = read_json(path)
    try:
        if value["format"] != FORMAT:
            raise DataError(f"{path} has format {value['format']!r}, expected {FORMAT!r}; mine the pairs again")
        prompts = tuple(
            PromptPairs(entry["prompt_id"], tuple(entry["winners"]), tuple(entry["losers"]))
            for entry in value["prompts"]
        )
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} is not a pair manifest ({error!r}); write it with python -m training.mine") from error
    if not prompts:
        raise DataError(f"{path} lists no prompts; mine again from a store with winners and losers")
    return prompts, digest(prompts, value.get("scores"))


def scored_by(path: str | Path) -> str | Scores:
    """What decided about the winners of a manifest: the store's ``"official"`` or ``"robust"`` score, or labels.

    Labels stand in the manifest itself, and come back as the scores of its clips.

    Raises:
        DataError: the manifest's scores are damaged.
    """
    value = read_json(path)
    if "scores" not in value:
        return str(value.get("statistics", {}).get("score", "official"))
    try:
        rows = value["scores"].items()
        return {(name, int(seed)): float(score) for name, row in rows for seed, score in row.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise DataError(f"{path} has damaged scores ({error}); write it with python -m training.mine") from error


def digest(prompts: Sequence[PromptPairs], scores: Mapping[str, Mapping[str, float]] | None = None) -> str:
    """Sixteen hexadecimal digits that change with any prompt, winner, loser, or score in the manifest."""
    rows: list[Any] = [[entry.prompt_id, entry.winners, entry.losers] for entry in prompts]
    rows += [] if scores is None else [scores]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def manifest(
    prompts: Sequence[PromptPairs], statistics: Mapping[str, Any], scores: Scores | None = None
) -> dict[str, Any]:
    """The JSON value of a pair manifest; ``scores`` where labels decided, and not a score of the store."""
    rows = [{"prompt_id": p.prompt_id, "winners": list(p.winners), "losers": list(p.losers)} for p in prompts]
    kept = None
    if scores is not None:
        kept = {p.prompt_id: {str(s): scores[p.prompt_id, s] for s in (*p.winners, *p.losers)} for p in prompts}
    value = {"format": FORMAT, "digest": digest(prompts, kept), "statistics": dict(statistics), "prompts": rows}
    return value if kept is None else {**value, "scores": kept}


class PairStream:
    """An endless sequence of pairs in which pair ``index`` depends on (seed, index) and on nothing else.

    A prompt is drawn uniformly, then a winner and a loser of it uniformly: the official sampling. Because no state is
    kept, a resumed run continues the sequence exactly, and any number of processes can share it.
    """

    def __init__(self, prompts: Sequence[PromptPairs], seed: int, stream: str = "train") -> None:
        """Draw from ``prompts``; ``stream`` ("train" or "held-out") separates sequences of the same seed."""
        if not prompts:
            raise DataError("there are no prompts to draw pairs from")
        self._prompts = tuple(prompts)
        self._key = [seed, _STREAMS[stream]]

    def pair(self, index: int) -> PreferencePair:
        """The pair at ``index`` >= 0."""
        random = np.random.default_rng([*self._key, index])
        prompt = self._prompts[int(random.integers(len(self._prompts)))]
        return PreferencePair(
            prompt.prompt_id,
            prompt.winners[int(random.integers(len(prompt.winners)))],
            prompt.losers[int(random.integers(len(prompt.losers)))],
        )


def split_pairs(
    prompts: Sequence[PromptPairs], fraction: float, seed: int
) -> tuple[tuple[PromptPairs, ...], tuple[PromptPairs, ...]]:
    """Split into training and held-out prompts, so that no held-out pair shares its prompt with a training pair.

    With a fraction above 0 at least one prompt is held out and at least one is trained on, if there are two.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"the held-out fraction must be in [0, 1), found {fraction}")
    if fraction == 0 or len(prompts) < 2:
        return tuple(prompts), ()
    count = min(max(1, round(fraction * len(prompts))), len(prompts) - 1)
    held = set(np.random.default_rng([seed, 2]).permutation(len(prompts))[:count].tolist())
    kept = tuple(entry for index, entry in enumerate(prompts) if index not in held)
    return kept, tuple(prompts[index] for index in sorted(held))
