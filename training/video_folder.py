"""Videos of any generator in one folder, brought into a sample store and scored, so that they can be compared."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from spatialalign.errors import DataError, SpatialAlignError
from spatialalign.files import atomic_path
from spatialalign.prompts import Prompt, read_csv
from spatialalign.score import dsr_score
from spatialalign.tracks import Tracks
from spatialalign.video import read_video
from training.stages import StageSummary, stage_log
from training.store import Sample, Store

if TYPE_CHECKING:
    from spatialalign.tracking.tracker import Tracker

_SEED = re.compile(r"_seed(\d+)\.mp4$")


def is_video_folder(folder: Path) -> bool:
    """Whether a folder holds videos named as by the official program, ``<prompt_id>_..._seed<number>.mp4``."""
    return folder.is_dir() and any(_SEED.search(path.name) for path in folder.glob("*.mp4"))


def find_videos(folder: Path, prompts: list[Prompt]) -> dict[tuple[str, int], Path]:
    """The videos by prompt id and seed; the id is the longest one that a name begins with.

    Raises:
        DataError: a name that begins with no id of ``prompts``, or two videos of one prompt and seed.
    """
    ids = sorted((prompt.prompt_id for prompt in prompts), key=len, reverse=True)
    found: dict[tuple[str, int], Path] = {}
    for path in sorted(folder.glob("*.mp4")):
        seed = _SEED.search(path.name)
        if seed is None:
            continue
        owner = next((name for name in ids if path.name.startswith(f"{name}_")), None)
        if owner is None:
            raise DataError(f"{path} begins with none of the {len(ids)} prompt ids; give the prompts it was made for")
        if (owner, int(seed[1])) in found:
            raise DataError(f"{path} and {found[owner, int(seed[1])].name} are of one prompt and seed; remove one")
        found[owner, int(seed[1])] = path
    return found


def import_videos(folder: Path, prompts: Path, store: Store, tracker: Tracker) -> StageSummary:
    """Bring the videos of ``folder`` into ``store``, track and score them; what is there already stays.

    A video that cannot be read or tracked gets no score, is listed with its reason, and counts as INVALID later. A
    video that has changed in the folder is taken again.

    Raises:
        DataError: as :func:`find_videos`; prompts of ``prompts`` without any video are not asked for.
    """
    from tqdm import tqdm

    known = read_csv(prompts)
    by_id = {prompt.prompt_id: prompt for prompt in known}
    log, summary = stage_log(store.root, "import"), StageSummary("import")
    for (prompt_id, seed), path in tqdm(find_videos(folder, known).items(), desc="track", unit="clip", disable=None):
        store.add_prompt(by_id[prompt_id], {"videos": str(folder)})
        sample = store.sample(prompt_id, seed)
        _take(path, sample)
        if sample.scored:
            summary.skipped += 1
            continue
        try:
            _score(sample, by_id[prompt_id], tracker)
        except SpatialAlignError as error:
            summary.fail(sample.name, str(error), log)
        else:
            summary.done += 1
    return summary


def _take(source: Path, sample: Sample) -> None:
    """The video under the store's name; a copy only where the disk has no hard links."""
    if sample.video.is_file():
        now, before = source.stat(), sample.video.stat()
        if (now.st_size, now.st_mtime_ns) == (before.st_size, before.st_mtime_ns):
            return
        for path in (sample.score, sample.tracks, sample.video):
            path.unlink(missing_ok=True)
    with atomic_path(sample.video) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copy2(source, temporary)


def _score(sample: Sample, prompt: Prompt, tracker: Tracker) -> None:
    if not sample.tracks.is_file():
        video = read_video(sample.video)
        tracker.track(video.frames, prompt.dsr.subject, prompt.dsr.object, video.fps).save(sample.tracks)
    tracks = Tracks.load(sample.tracks)
    sample.write_score(dsr_score(tracks, prompt.dsr), tracks.source)
