"""Bring the official training data into a sample store: ``python -m training.import_official``.

Methods 1.3: ``train_metadata.csv`` has a row per prompt with ``prompt_id`` and ``reward``, a Python list of one score
per clip (-100 where a clip is INVALID); beside it lies one ``<name>.tensors.pth`` per prompt with ``prompt_id``,
``latents_data (N, c, f, h, w)`` and ``prompt_emb["context"] (1, 512, d)``. The clips become the seeds 0 to N-1.
"""

from __future__ import annotations

import ast
import csv
import logging
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spatialalign.claims import exclusive
from spatialalign.errors import DataError, PromptError, SpatialAlignError
from spatialalign.prompts import Prompt, read_csv
from training.cli import command
from training.monitors import JsonlLog
from training.stages import StageSummary, stage_log
from training.store import LatentsHeader, Sample, Store

if TYPE_CHECKING:
    from torch import Tensor

    from spatialalign.score import DsrScore

logger = logging.getLogger(__name__)

SUFFIX = ".tensors.pth"
SOURCE = "official train_metadata.csv"
OFFICIAL_MODEL = "Wan-AI/Wan2.1-T2V-1.3B"
LARGEST_DEVIATION = 1.7
"""Normalised latents deviate from 0 by about 1; those that a Wan VAE takes, by 2 and more."""


@dataclass(frozen=True)
class ImportOfficial:
    """Fill a store with the official training data; what is there already is skipped.

    The clips come without videos, so their scores are taken as they are and never computed again.
    """

    data: Path
    """Folder that holds the *.tensors.pth files, in itself or in folders below."""
    store: Path
    """Sample store; made when missing."""
    metadata: Path | None = None
    """The CSV file; null for train_metadata.csv in the data folder."""
    prompts: Path | None = None
    """CSV file with the official columns for the prompts' sentences, where the metadata has no column prompt."""
    model: str = OFFICIAL_MODEL
    """The model that made the clips, as the store records it."""
    latent_space: str | None = None
    """Name of the space that the latents are in; null for that of Wan 2.1's VAE, normalised."""


@dataclass(frozen=True)
class Row:
    """One row of the metadata: a prompt, its scores (None is INVALID), and the file of its clips."""

    prompt: Prompt
    rewards: tuple[float | None, ...]
    file: Path


@dataclass(frozen=True)
class Origin:
    """What is recorded of every clip: the model that made it and the space of its latents."""

    model: str
    space: str


def import_official(
    store: Store,
    rows: Sequence[Mapping[str, str]],
    files: Mapping[str, Path],
    sentences: Mapping[str, Prompt],
    origin: Origin,
) -> StageSummary:
    """Import every row; one that cannot be used becomes a failure with its reason.

    Args:
        store: to fill.
        rows: of the metadata, by column.
        files: tensor files by name without suffix.
        sentences: prompts by id, for rows without a sentence.
        origin: of the clips.

    Raises:
        DataError: no row could be used.
    """
    from tqdm import tqdm

    log, summary = stage_log(store.root, "import_official"), StageSummary("import_official")
    log.write({"event": "start", "rows": len(rows), "model": origin.model, "space": origin.space})
    for number, values in enumerate(tqdm(rows, desc="import", unit="prompt", disable=None), start=2):
        name = values.get("prompt_id") or f"row {number}"
        try:
            _import_row(store, _parse_row(values, files, sentences), origin, summary, log)
        except (SpatialAlignError, OSError) as error:
            summary.fail(name, str(error), log)
    log.write({"event": "end", **summary.to_dict()})
    if summary.failed and not summary.done and not summary.skipped:
        raise DataError(f"none of {len(rows)} prompts could be imported; the first: {summary.failed[0][1]}")
    return summary


def read_metadata(path: Path) -> list[dict[str, str]]:
    """The rows of the metadata; raises :class:`DataError` naming file and column when it is no such table."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as handle:
            rows = list(csv.DictReader(handle))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; give the CSV file with --metadata") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a CSV file in UTF-8 ({error})") from error
    missing = [name for name in ("prompt_id", "reward") if not rows or name not in rows[0]]
    if missing:
        raise DataError(f"{path} needs rows with the column {missing[0]!r}; found {list(rows[0]) if rows else 'none'}")
    return [{key: value or "" for key, value in row.items() if key is not None} for row in rows]


def tensor_files(folder: Path) -> dict[str, Path]:
    """The tensor files below a folder, by name without suffix; raises :class:`DataError` when there are none."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob(f"*{SUFFIX}")):
        name = _plain(path.name)
        if name in found:
            raise DataError(f"{found[name]} and {path} have one name, so that their prompt is not certain; remove one")
        found[name] = path
    if not found:
        raise DataError(f"{folder} holds no *{SUFFIX}; name the folder of the official training data")
    return found


def _plain(name: str) -> str:
    """A file name without folder, the tensors' suffix, and the video's, as far as it has them."""
    return name.replace("\\", "/").rsplit("/", 1)[-1].removesuffix(SUFFIX).removesuffix(".mp4")


def parse_rewards(text: str) -> tuple[float | None, ...]:
    """``"[0.9, -100, 0.25]"`` as numbers in [0, 1], None for INVALID; raises :class:`DataError` for anything else."""
    try:
        values = ast.literal_eval(text)
        numbers = [float(value) for value in values]
    except (ValueError, SyntaxError, TypeError, RecursionError) as error:
        raise DataError(f"reward must be a list of numbers such as [0.9, -100, 0.25], found {text[:80]!r}") from error
    if wrong := [value for value in numbers if not (value == -100 or 0 <= value <= 1)]:
        raise DataError(f"reward holds {wrong[0]}; a DSR-Score is in [0, 1], or -100 for an INVALID clip")
    return tuple(None if value == -100 else value for value in numbers)


def _parse_row(values: Mapping[str, str], files: Mapping[str, Path], sentences: Mapping[str, Prompt]) -> Row:
    prompt_id = values["prompt_id"]
    sentence = values.get("prompt") or values.get("text")
    if sentence:
        prompt = Prompt.parse(prompt_id, sentence)
    elif prompt_id in sentences:
        prompt = sentences[prompt_id]
    else:
        raise PromptError("its sentence is not known: the metadata have no column prompt; name a file with --prompts")
    names = [_plain(values.get("file_name", "")), prompt_id]
    file = next((files[name] for name in names if name in files), None)
    if file is None:
        raise DataError(f"there is no file {prompt_id}{SUFFIX} in the data folder")
    return Row(prompt, parse_rewards(values["reward"]), file)


def _import_row(store: Store, row: Row, origin: Origin, summary: StageSummary, log: JsonlLog) -> None:
    """Write what the store lacks of a prompt. The tensors are only read when something of them is missing."""
    samples = [store.sample(row.prompt.prompt_id, seed) for seed in range(len(row.rewards))]
    complete = store.has_text(row.prompt.prompt_id) and all(sample.latents.is_file() for sample in samples)
    if complete and all(_same_score(s, r, row) for s, r in zip(samples, row.rewards, strict=True)):
        summary.skipped += len(samples)
        return
    latents, context = read_tensors(row.file, row.prompt.prompt_id, len(samples))
    store.add_prompt(row.prompt, {"model": origin.model, "source": SOURCE})
    if not store.has_text(row.prompt.prompt_id):
        store.write_text(row.prompt.prompt_id, context, origin.model)
    header = _header(origin, tuple(latents.shape[1:]))
    store.check_same_settings(samples, header)
    for sample, clip, reward in zip(samples, latents, row.rewards, strict=True):
        if sample.latents.is_file() and _same_score(sample, reward, row):
            summary.skipped += 1
        elif not clip.isfinite().all():
            summary.fail(sample.name, f"{row.file}: the latents hold NaN or infinite values", log)
        else:
            if not sample.latents.is_file():
                sample.write_latents(clip.clone(), header)
            sample.write_imported_score(_score(reward, row, latents.shape[2]), SOURCE)
            summary.done += 1


def _same_score(sample: Sample, reward: float | None, row: Row) -> bool:
    try:
        found = sample.read_score()
    except DataError:
        return False
    return found.score == reward and found.type_code == row.prompt.dsr.type_code


def read_tensors(path: Path, prompt_id: str, clips: int) -> tuple[Tensor, Tensor]:
    """Read one official tensor file, never running code in it.

    Returns:
        Latents ``(clips, c, f, h, w)`` and the text embedding ``(n, d)``, its zero padding taken off.

    Raises:
        DataError: it holds code, is damaged, is another prompt's, or its shapes are not those expected.
    """
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise DataError(
            f"{path} is damaged, or holds more than tensors ({str(error).splitlines()[0]}); code in data files is "
            "never run: save it again with tensors, text and numbers alone"
        ) from error
    try:
        latents, context, found = content["latents_data"], content["prompt_emb"]["context"], content["prompt_id"]
    except (KeyError, TypeError, IndexError) as error:
        raise DataError(f"{path} lacks {error}; expected prompt_id, latents_data and prompt_emb['context']") from error
    if str(found) != prompt_id:
        raise DataError(f"{path} is of the prompt {found!r}, the metadata says {prompt_id!r}")
    _expect(path, "latents_data", latents, 5, f"({clips}, c, f, h, w): one clip for each of {clips} rewards")
    if len(latents) != clips:
        raise DataError(
            f"{path} holds {len(latents)} clips and the metadata {clips} rewards; which belongs to which is not known"
        )
    _expect(path, "prompt_emb['context']", context, 3, "(1, tokens, width)")
    if latents.float().std() > LARGEST_DEVIATION:
        logger.warning("%s: the latents deviate by %.1f; are they normalised?", path, latents.float().std())
    return latents, _trimmed(path, context[0])


def _expect(path: Path, name: str, value: Any, dimensions: int, expected: str) -> None:
    import torch

    if not isinstance(value, torch.Tensor) or value.ndim != dimensions:
        found = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise DataError(f"{path}: {name} must be a tensor {expected}, found {found}")


def _trimmed(path: Path, context: Tensor) -> Tensor:
    """An embedding without the zero rows behind it."""
    used = context.float().abs().sum(dim=1).nonzero()
    if not len(used) or not context.isfinite().all():
        raise DataError(f"{path}: the text embedding is all zeros or not finite")
    return context[: int(used.max()) + 1].clone()


def _header(origin: Origin, shape: tuple[int, ...]) -> LatentsHeader:
    """The paper's sampling settings at the size of these latents."""
    from spatialalign.backbones.base import SampleSettings

    _, frames, height, width = shape
    settings = SampleSettings(frames=4 * (frames - 1) + 1, height=8 * height, width=8 * width)
    values = {**settings.to_dict(), "fps": 16.0, "source": SOURCE}
    return LatentsHeader(origin.space, origin.model, values, settings.digest)


def _score(reward: float | None, row: Row, latent_frames: int) -> DsrScore:
    """A score of which only the number is known."""
    import numpy as np

    from spatialalign.score import DsrScore, Limits

    frames = 4 * (latent_frames - 1) + 1
    nothing = np.zeros(0)
    return DsrScore(
        score=reward,
        reason=None if reward is not None else f"tracker: {SOURCE} says -100",
        type_code=row.prompt.dsr.type_code,
        frames=frames,
        frames_used=nothing.astype(np.int64),
        initial_ssr=nothing,
        final_ssr=nothing,
        initial_mean=None,
        initial_gap=None,
        final_mean=None,
        final_gap=None,
        limits=Limits.for_frames(frames),
    )


def run(args: ImportOfficial) -> StageSummary:
    """Read the metadata and import."""
    from spatialalign.backbones.latent_space import LatentSpace

    rows, files = read_metadata(args.metadata or args.data / "train_metadata.csv"), tensor_files(args.data)
    sentences = {} if args.prompts is None else {prompt.prompt_id: prompt for prompt in read_csv(args.prompts)}
    store = Store(args.store, create=True)
    with exclusive(store.root / ".lock-import", f"the store {store.root}"):
        origin = Origin(args.model, args.latent_space or LatentSpace().name)
        summary = import_official(store, rows, files, sentences, origin)
    print(f"{summary.text()}\n{store.root}")
    return summary


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m training.import_official``."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    command(ImportOfficial, run, argv)


if __name__ == "__main__":
    main()
