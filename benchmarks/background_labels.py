"""Labels of a second dimension whose truth is known: how faithful the background of the miniature's clips is.

``python -m benchmarks.background_labels --store demo/store --out quality.csv`` writes the file that
``python -m training.latent_reward --labels quality.csv`` takes. The world is drawn, so the scene's true picture is
known; the label is the PSNR in dB between it and the frames, away from the boxes. Frames in which the tracker lost an
animal or object do not count: the lost one would be taken for a flaw of the background.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.ablation import background_psnr
from spatialalign.errors import DataError
from spatialalign.files import atomic_path
from spatialalign.prompts import Prompt
from spatialalign.tracks import Tracks
from spatialalign.video import read_video
from training.cli import command
from training.store import Store

DIMENSION = "quality"


@dataclass(frozen=True)
class BackgroundLabels:
    """Write the background's PSNR of every tracked clip of a store of the miniature."""

    store: Path
    """Sample store with videos and tracks."""
    out: Path
    """CSV file: prompt_id, seed, quality."""


def fidelity(frames: NDArray[np.uint8], tracks: Tracks, scene: str) -> float:
    """:func:`~benchmarks.ablation.background_psnr` of the frames with both boxes; NaN where there is none."""
    seen = np.flatnonzero(tracks.present)
    if not len(seen):
        return math.nan
    kept = replace(tracks, boxes=tracks.boxes[seen], confidence=tracks.confidence[seen], masks=None)
    return background_psnr(frames[seen], kept, scene)


def fidelity_of(store: Store, prompts: Sequence[Prompt], seeds: Sequence[int]) -> float:
    """Mean fidelity of the clips of a store for which it is known."""
    samples = [(prompt, store.sample(prompt.prompt_id, seed)) for prompt in prompts for seed in seeds]
    values = [
        fidelity(read_video(sample.video).frames, Tracks.load(sample.tracks), prompt.dsr.scene)
        for prompt, sample in samples
        if sample.video.is_file() and sample.tracks.is_file()
    ]
    return round(float(np.nanmean(values)), 4)


def run(args: BackgroundLabels) -> int:
    """Measure and write; returns the number of clips."""
    store, rows = Store(args.store), list[tuple[str, int, float]]()
    scenes = {prompt.prompt_id: prompt.dsr.scene for prompt in store.prompts()}
    for sample in store.samples():
        if sample.video.is_file() and sample.tracks.is_file():
            value = fidelity(read_video(sample.video).frames, Tracks.load(sample.tracks), scenes[sample.prompt_id])
            if not math.isnan(value):
                rows.append((sample.prompt_id, sample.seed, round(value, 4)))
    if not rows:
        raise DataError(f"no clip of {store.root} has a video and tracks; run training.score")
    with atomic_path(args.out) as temporary, temporary.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerows([("prompt_id", "seed", DIMENSION), *rows])
    print(f"{args.out}: {len(rows)} clips")
    return len(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m benchmarks.background_labels``."""
    command(BackgroundLabels, run, argv)


if __name__ == "__main__":
    main()
