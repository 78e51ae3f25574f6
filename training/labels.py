"""Labels of clips: a column of scores for each dimension, standardised, and mixed into the one score that decides."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spatialalign.errors import ConfigError, DataError
from spatialalign.files import atomic_path
from training.latent_labels import read_further
from training.pairs import Key


@dataclass(frozen=True, eq=False)
class LabelTable:
    """Scores of n clips in several dimensions; larger is better, NaN where a score is not known.

    Attributes:
        clips: prompt id and seed of each.
        names: the dimensions.
        values: ``(n, len(names))``.
    """

    clips: tuple[Key, ...]
    names: tuple[str, ...]
    values: NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.values.shape != (len(self.clips), len(self.names)):
            raise DataError(
                f"labels have shape {self.values.shape}, expected {(len(self.clips), len(self.names))}: a row for each "
                "clip, a column for each dimension"
            )
        if twice := sorted({name for name in self.names if self.names.count(name) > 1}):
            raise DataError(f"two sources have a dimension {twice[0]!r}; leave one of them out or rename its column")

    def column(self, name: str) -> dict[Key, float]:
        """The labels of one dimension, where they are known."""
        return _known(self.clips, self.values[:, self.names.index(name)])

    def spread(self, name: str) -> float:
        """How far clips of one prompt lie apart in a dimension: root of the mean square about their prompt's mean."""
        known = self.column(name)
        groups: dict[str, list[float]] = {}
        for (prompt_id, _), value in known.items():
            groups.setdefault(prompt_id, []).append(value)
        squares = [np.square(np.array(group) - np.mean(group)).sum() for group in groups.values()]
        return math.sqrt(sum(squares) / len(known)) if known else 0.0

    def mixed(self, weights: Mapping[str, float]) -> dict[Key, float]:
        """One score for every clip whose labels are known in all dimensions with a weight.

        It is the weighted mean of the dimensions (methods 2.5: 1:1:1 is the mean of three), each less its mean over
        all clips and divided by :meth:`spread`. So a weight says how much its dimension counts between two clips of
        one prompt, whatever its unit and however much prompts differ.

        Raises:
            ConfigError: no weight above 0, one below 0, or one for a dimension that there is not.
            DataError: a dimension with a weight is the same for all clips of each prompt, or not known at all.
        """
        used = {name: weight for name, weight in weights.items() if weight}
        if unknown := sorted(set(weights) - set(self.names)):
            raise ConfigError(f"there are no labels {unknown[0]!r}; there are {', '.join(self.names)}")
        if not used or not all(0 < weight < math.inf for weight in used.values()):
            raise ConfigError(f"weights must be 0 or more, finite, and one of them above 0, found {dict(weights)}")
        total = np.zeros(len(self.clips))
        for name, weight in used.items():
            column, spread = self.values[:, self.names.index(name)], self.spread(name)
            if not spread > 1e-12:
                raise DataError(f"labels {name!r} tell no two clips of one prompt apart; leave the dimension out")
            total += weight / sum(used.values()) * (column - np.nanmean(column)) / spread
        return _known(self.clips, total)


def join(parts: Sequence[LabelTable]) -> LabelTable:
    """The dimensions of several tables side by side, for the clips of the first one; unknown elsewhere."""
    clips = parts[0].clips
    columns = []
    for part in parts:
        rows = dict(zip(part.clips, part.values, strict=True))
        unknown = np.full(len(part.names), np.nan)
        columns.append(np.array([rows.get(clip, unknown) for clip in clips]).reshape(len(clips), -1))
    return LabelTable(clips, tuple(name for part in parts for name in part.names), np.hstack(columns))


def read_table(path: Path) -> LabelTable:
    """Read a file of labels, in the form of :func:`~training.latent_labels.read_further`; any names of dimensions."""
    names, values = read_further(path, reserved=())
    return LabelTable(tuple(values), names, np.array(list(values.values())).reshape(-1, len(names)))


def write_table(path: Path, table: LabelTable) -> None:
    """Write a CSV file: prompt_id, seed, and a column for each dimension, empty where a label is not known."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(("prompt_id", "seed", *table.names))
        for clip, row in zip(table.clips, table.values.tolist(), strict=True):
            writer.writerow((*clip, *("" if math.isnan(value) else f"{value:.9g}" for value in row)))


def _known(clips: Iterable[Key], values: NDArray[np.float64]) -> dict[Key, float]:
    pairs = zip(clips, values.tolist(), strict=True)
    return {clip: value for clip, value in pairs if not math.isnan(value)}
