"""Labelled pairs of clips: the CSV files that VideoReward is trained with (methods: 2.1)."""

from __future__ import annotations

import csv
import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spatialalign.errors import DataError
from spatialalign.rewards.video_reward_config import SCORED
from training.reward_model_settings import RewardLoss

LABELS = {"A": 1.0, "B": -1.0, "same": 0.0}
_KEYS = ("path_A", "path_B", "prompt")
_RATINGS = (1.0, 5.0)

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class RewardPairs:
    """n pairs of clips of one prompt each, with what people said of them.

    Attributes:
        clips: the video files A and B of every pair.
        prompts: ``n`` texts.
        preference: ``(n, 3)``, by dimension +1 (A is better), -1, 0 (a tie) or NaN (unknown).
        ratings: ``(n, 2, 3)`` of A and B from 1 to 5, NaN where unknown.
        left_out: the reason of every row that could not be used, by its line.
    """

    clips: tuple[tuple[Path, Path], ...]
    prompts: tuple[str, ...]
    preference: Floats
    ratings: Floats
    left_out: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits of the pairs and their labels."""
        names = "\n".join(f"{a.name}|{b.name}|{text}" for (a, b), text in zip(self.clips, self.prompts, strict=True))
        content = names.encode() + self.preference.tobytes() + self.ratings.tobytes()
        return hashlib.sha256(content).hexdigest()[:16]

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> RewardPairs:
        """Some of the pairs, in the order given."""
        chosen = np.asarray(rows, dtype=np.int64)
        return replace(
            self,
            clips=tuple(self.clips[row] for row in chosen),
            prompts=tuple(self.prompts[row] for row in chosen),
            preference=self.preference[chosen],
            ratings=self.ratings[chosen],
        )

    def without(self, bad: Mapping[str, str]) -> RewardPairs:
        """Leave out the pairs of some prompts, for the reason given."""
        kept = [row for row, prompt in enumerate(self.prompts) if prompt not in bad]
        gone = {f"prompt {_short(prompt)}": reason for prompt, reason in bad.items()}
        return replace(self.take(kept), left_out={**self.left_out, **gone})

    def split(self, share: float, seed: int) -> tuple[RewardPairs, RewardPairs]:
        """(training, held-out) pairs; those of one prompt stay together.

        With a share above 0 at least one prompt is held out and at least one is trained on, if there are two.
        """
        names = sorted(set(self.prompts))
        count = min(max(1, round(share * len(names))), len(names) - 1) if share > 0 else 0
        held = {names[index] for index in np.random.default_rng([seed, 21]).permutation(len(names))[:count]}
        away = np.array([prompt in held for prompt in self.prompts], dtype=bool)
        return self.take(np.flatnonzero(~away)), replace(self.take(np.flatnonzero(away)), left_out={})


def read_pairs(path: Path, videos: Path | None = None) -> RewardPairs:
    """Read a CSV file with the official columns.

    ``path_A``, ``path_B`` (below ``videos``, by default the file's own folder), ``prompt``, and at least one of ``VQ``,
    ``MQ`` and ``TA`` with A, B or same; any other label is unknown. ``MOS_A_VQ`` and the like are ratings from 1 to 5,
    empty or 0 where unknown. Other columns are not read. A row whose video is absent is left out and named.

    Raises:
        DataError: no such file, a column that is missing, a cell that cannot be, or no row of use.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist; give a CSV file with the columns {', '.join(_KEYS)}, VQ, MQ, TA")
    root = path.parent if videos is None else videos
    clips: list[tuple[Path, Path]] = []
    prompts: list[str] = []
    preference: list[list[float]] = []
    ratings: list[list[list[float]]] = []
    left_out: dict[str, str] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle, restval="")
            _check_columns(path, reader.fieldnames or [])
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                pair = root / row["path_A"].strip(), root / row["path_B"].strip()
                labels = [LABELS.get((row.get(name) or "").strip(), math.nan) for name in SCORED]
                found = [[_rating(where, row, f"MOS_{side}_{name}") for name in SCORED] for side in "AB"]
                if reason := _unusable(row, pair, [*labels, *found[0], *found[1]]):
                    left_out[where] = reason
                    continue
                clips.append(pair)
                prompts.append(row["prompt"])
                preference.append(labels)
                ratings.append(found)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is no CSV file in UTF-8 ({error}); save it again") from error
    if not clips:
        reasons = next(iter(left_out.values()), "the file has no rows")
        raise DataError(f"{path}: none of {len(left_out)} rows can be used; the first: {reasons}")
    shape = np.array(preference, dtype=np.float32), np.array(ratings, dtype=np.float32)
    return RewardPairs(tuple(clips), tuple(prompts), *shape, left_out)


def check_labels(pairs: RewardPairs, loss: RewardLoss) -> list[str]:
    """See that a loss can learn from the training pairs; returns a warning for each dimension that teaches nothing.

    Raises:
        DataError: no dimension teaches anything.
    """
    silent = {}
    for index, name in enumerate(SCORED):
        if reason := _teaches_nothing(loss, pairs.preference[:, index], pairs.ratings[:, :, index]):
            silent[name] = reason
    if len(silent) == len(SCORED):
        told = "; ".join(f"{name}: {reason}" for name, reason in silent.items())
        raise DataError(f"the loss {loss} has nothing to learn from {len(pairs)} pairs: {told}. Label other pairs")
    return [f"{name} is not learnt: {reason}" for name, reason in silent.items()]


def counts(pairs: RewardPairs) -> dict[str, dict[str, int]]:
    """How often each label stands in each dimension."""
    words = {value: word for word, value in LABELS.items()}
    table = {}
    for index, name in enumerate(SCORED):
        found = Counter(words.get(float(value), "unknown") for value in pairs.preference[:, index])
        table[name] = {word: found[word] for word in (*LABELS, "unknown")}
    return table


def _teaches_nothing(loss: RewardLoss, preference: Floats, ratings: Floats) -> str:
    """Why a dimension teaches a loss nothing; empty if it does."""
    known = ratings[~np.isnan(ratings)]
    if loss == "regression":
        if not len(known):
            return "no ratings (columns MOS_A_ and MOS_B_)"
        return f"every rating is {known[0]:g}" if (known == known[0]).all() else ""
    decided = np.abs(preference) > 0
    if loss in ("bt-ratings", "bt-scaled"):
        decided &= ~np.isnan(ratings).any(axis=1)
    if decided.any():
        return ""
    if loss in ("bt-ratings", "bt-scaled") and not len(known):
        return "no ratings (columns MOS_A_ and MOS_B_)"
    return "every label is a tie" if (preference == 0).any() else "no labels"


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    missing = [name for name in _KEYS if name not in columns]
    if missing or not any(name in columns for name in SCORED):
        wanted = f"{', '.join(_KEYS)} and at least one of {', '.join(SCORED)}"
        raise DataError(f"{path}: expected the columns {wanted}, found {', '.join(columns) or 'none'}")


def _rating(where: str, row: Mapping[str, str | None], column: str) -> float:
    text = (row.get(column) or "").strip()
    try:
        value = float(text or 0)
    except ValueError:
        value = math.nan
    if value == 0:
        return math.nan
    if not _RATINGS[0] <= value <= _RATINGS[1]:
        raise DataError(f"{where}: {column} must be a rating from 1 to 5, or 0 where there is none; found {text!r}")
    return value


def _unusable(row: Mapping[str, str], pair: tuple[Path, Path], known: Sequence[float]) -> str:
    """Why a row cannot be used; empty if it can."""
    if not row["prompt"].strip():
        return "the prompt is empty"
    if all(math.isnan(value) for value in known):
        return "no label in any dimension"
    absent = [str(path) for path in pair if not path.is_file()]
    return f"there is no video {absent[0]}" if absent else ""


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
