"""Human preferences between clips, as the published reward benchmarks write them down."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from spatialalign.errors import DataError

DIMENSIONS = ("VQ", "MQ", "TA", "Overall")
"""Columns of labels: visual quality, motion quality, text alignment, and all in all."""

REWARD_BENCH = ("path_A", "path_B", "prompt")
GENAI_BENCH = ("left_video", "right_video", "prompt", "vote_type")
_LABELS = {"A": 1, "B": -1, "same": 0}
_VOTES = {"leftvote": 1, "rightvote": -1, "tievote": 0, "bothbad_vote": 0}


class Clip(NamedTuple):
    """A clip as the file names it, and the prompt it was made for."""

    path: str
    prompt: str


@dataclass(frozen=True)
class Pair:
    """Two clips, the models that made them (empty where unknown), and the labels that there are.

    A label is +1 where the first clip is better, -1 where the second is, 0 for a tie; a dimension without is absent.
    """

    first: Clip
    second: Clip
    models: tuple[str, str]
    labels: Mapping[str, int]


@dataclass(frozen=True)
class Benchmark:
    """The pairs of a file, in its order; ``form`` says how it was written, ``dimensions`` which labels it has."""

    form: str
    dimensions: tuple[str, ...]
    pairs: Sequence[Pair]

    @property
    def clips(self) -> list[Clip]:
        """Every clip once, in the order of its first pair."""
        return list(dict.fromkeys(clip for pair in self.pairs for clip in (pair.first, pair.second)))


def read_pairs(path: str | Path, limit: int | None = None) -> Benchmark:
    """Read a file of pairs, or the first ``limit`` of them.

    Two forms are known, by their columns: that of VideoGen-RewardBench (``path_A``, ``path_B``, ``prompt``, any of
    ``VQ``, ``MQ``, ``TA`` and ``Overall`` with A, B or same; ``A_model`` and ``B_model`` may be there), which training
    files of VideoReward share, and that of GenAI-Bench's video part (``left_video``, ``right_video``, ``prompt`` and
    ``vote_type``; ``left_model`` and ``right_model`` may be there), whose ``tievote`` and ``bothbad_vote`` are ties.
    Any other word, such as "invalid", is no label.

    Raises:
        DataError: the file cannot be read, has other columns or no pairs, or a row lacks a clip or its prompt.
    """
    path = Path(path)
    try:
        with open(path, encoding="utf-8-sig", newline="") as handle:
            reader = csv.DictReader(handle, restval="", strict=True)
            columns, rows = list(reader.fieldnames or []), list(reader)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV file in UTF-8 ({error})") from error
    rows = rows[:limit]
    if not rows:
        raise DataError(f"{path} holds no pairs")
    dimensions = tuple(name for name in DIMENSIONS if name in columns)
    if set(columns).issuperset(REWARD_BENCH) and dimensions:
        form, names, models = "VideoGen-RewardBench", REWARD_BENCH[:2], ("A_model", "B_model")
        labels = [
            {name: _LABELS[row[name].strip()] for name in dimensions if row[name].strip() in _LABELS} for row in rows
        ]
    elif set(columns).issuperset(GENAI_BENCH):
        form, names, models, dimensions = "GenAI-Bench", GENAI_BENCH[:2], ("left_model", "right_model"), ("Overall",)
        labels = [{"Overall": _VOTES[row["vote_type"]]} if row["vote_type"] in _VOTES else {} for row in rows]
    else:
        raise DataError(
            f"{path}: expected the columns {', '.join(REWARD_BENCH)} and one of {', '.join(DIMENSIONS)}, or "
            f"{', '.join(GENAI_BENCH)}; found {', '.join(columns)}"
        )
    pairs = []
    for number, (row, label) in enumerate(zip(rows, labels, strict=True), start=2):
        empty = [name for name in (*names, "prompt") if not row[name].strip()]
        if empty:
            raise DataError(f"{path}, row {number}: {empty[0]} is empty")
        first, second = (Clip(row[name], row["prompt"]) for name in names)
        pairs.append(Pair(first, second, (row.get(models[0], ""), row.get(models[1], "")), label))
    return Benchmark(form, dimensions, pairs)


def find_videos(clips: Sequence[Clip], root: Path) -> dict[Clip, Path]:
    """Where the clips are below ``root``, by their path or else by their name alone; absent ones are left out."""
    found = {}
    for clip in clips:
        for file in (root / clip.path, root / Path(clip.path).name):
            if file.is_file():
                found[clip] = file
                break
    return found
