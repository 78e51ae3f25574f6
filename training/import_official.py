"""Bring the official training data into a sample store: ``python -m training.import_official``.

The form is the one that the published ``train.py`` reads and ``calc_dsr_score.py`` writes. ``train_metadata.csv`` has a
row per prompt with ``prompt_id`` and ``reward``, a Python list of one score per clip (-100 where a clip is INVALID);
``tensors/<prompt_id>.tensors.pth`` holds ``prompt_id``, ``latents_data (N, c, f, h, w)`` and
``prompt_emb["context"] (1, 512, d)``. Reward k is that of latents k; the clips become the seeds 0 to N-1.
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
    """Folder with train_metadata.csv and the folder tensors, as the published run_train.sh has it."""
    store: Path
    """Sample store; made when missing."""
    metadata: Path | None = None
    """The CSV file; null for train_metadata.csv in the data folder."""
    tensors: Path | None = None
    """Folder of the files <prompt_id>.tensors.pth; null for tensors in the data folder."""
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
    tensors: Path,
    sentences: Mapping[str, Prompt],
    origin: Origin,
) -> StageSummary:
    """Import every row that has a tensor file; one that cannot be used becomes a failure with its reason.

    Args:
        store: to fill.
        rows: of the metadata, by column.
        tensors: folder of the tensor files.
        sentences: prompts by id, for rows without a sentence.
        origin: of the clips.

    Raises:
        DataError: no row has a file, or none could be used.
    """
    from tqdm import tqdm

    rows = _with_file(rows, tensors)
    log, summary = stage_log(store.root, "import_official"), StageSummary("import_official")
    log.write({"event": "start", "rows": len(rows), "model": origin.model, "space": origin.space})
    for values in tqdm(rows, desc="import", unit="prompt", disable=None):
        try:
            _import_row(store, _parse_row(values, tensors, sentences), origin, summary, log)
        except (SpatialAlignError, OSError) as error:
            summary.fail(values["prompt_id"], str(error), log)
    log.write({"event": "end", **summary.to_dict()})
    if summary.failed and not summary.done and not summary.skipped:
        raise DataError(f"none of {len(rows)} prompts could be imported; the first: {summary.failed[0][1]}")
    return summary


def _with_file(rows: Sequence[Mapping[str, str]], tensors: Path) -> list[Mapping[str, str]]:
    """The rows that have a tensor file; ``train.py`` leaves out the others, too."""
    found = [row for row in rows if _file(tensors, row["prompt_id"]).is_file()]
    if not found:
        raise DataError(
            f"{tensors} holds the file of none of the {len(rows)} prompts, such as {rows[0]['prompt_id']}{SUFFIX}; "
            "name their folder with --tensors"
        )
    if len(found) < len(rows):
        logger.warning(
            "%d of %d prompts have no file in %s and are left out", len(rows) - len(found), len(rows), tensors
        )
    return found


def _file(tensors: Path, prompt_id: str) -> Path:
    return tensors / f"{prompt_id}{SUFFIX}"


def read_metadata(path: Path) -> list[dict[str, str]]:
    """The rows of the metadata, the first of each id; raises :class:`DataError` when it is no such table."""
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
    by_id: dict[str, dict[str, str]] = {}
    for row in rows:
        values = {key: value or "" for key, value in row.items() if key is not None}
        by_id.setdefault(values["prompt_id"], values)
    return list(by_id.values())


def parse_rewards(text: str) -> tuple[float | None, ...]:
    """``"[0.9, -100, 0.25]"`` as scores in [0, 1], None for INVALID; raises :class:`DataError` for anything else.

    ``train.py`` takes a number from 0.7 for a winner, from -1 for a loser, below that for INVALID. A number that no
    DSR-Score can be, above 1 or from -1 to 0, becomes 1 or 0, which keeps it what it is there.
    """
    try:
        values = ast.literal_eval(text)
        if not isinstance(values, list):
            raise TypeError("no list")
        numbers = [float(value) for value in values]
    except (ValueError, SyntaxError, TypeError, RecursionError) as error:
        raise DataError(f"reward must be a list of numbers such as [0.9, -100, 0.25], found {text[:80]!r}") from error
    return tuple(None if value < -1 else min(max(value, 0.0), 1.0) for value in numbers)


def _parse_row(values: Mapping[str, str], tensors: Path, sentences: Mapping[str, Prompt]) -> Row:
    prompt_id = values["prompt_id"]
    if sentence := values.get("prompt"):
        prompt = Prompt.parse(prompt_id, sentence)
    elif prompt_id in sentences:
        prompt = sentences[prompt_id]
    else:
        raise PromptError("its sentence is not known: the metadata have no column prompt; name a file with --prompts")
    return Row(prompt, parse_rewards(values["reward"]), _file(tensors, prompt_id))


def _import_row(store: Store, row: Row, origin: Origin, summary: StageSummary, log: JsonlLog) -> None:
    """Write what the store lacks of a prompt. The tensors are only read when something of them is missing."""
    samples = [store.sample(row.prompt.prompt_id, seed) for seed in range(len(row.rewards))]
    complete = store.has_text(row.prompt.prompt_id) and all(sample.latents.is_file() for sample in samples)
    if complete and all(_same_score(s, r, row) for s, r in zip(samples, row.rewards, strict=True)):
        summary.skipped += len(samples)
        return
    latents, context = read_tensors(row.file, row.prompt.prompt_id, len(samples))
    samples, rewards = samples[: len(latents)], row.rewards[: len(latents)]
    store.add_prompt(row.prompt, {"model": origin.model, "source": SOURCE})
    if not store.has_text(row.prompt.prompt_id):
        store.write_text(row.prompt.prompt_id, context, origin.model)
    header = _header(origin, tuple(latents.shape[1:]))
    store.check_same_settings(samples, header)
    for sample, clip, reward in zip(samples, latents, rewards, strict=True):
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


def read_tensors(path: Path, prompt_id: str, rewards: int) -> tuple[Tensor, Tensor]:
    """Read one official tensor file, never running code in it.

    Returns:
        Latents ``(N, c, f, h, w)``, N at most ``rewards``; the text embedding ``(n, d)``, its zero padding taken off.

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
    _expect(path, "latents_data", latents, 5, "(clips, c, f, h, w)")
    if len(latents) > rewards:
        raise DataError(f"{path} holds {len(latents)} clips and the metadata {rewards} rewards; one for each is needed")
    _expect(path, "prompt_emb['context']", context, 3, "(1, tokens, width)")
    if len(context) != 1:
        raise DataError(f"{path} holds {len(context)} text embeddings; expected the one of its prompt")
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

    rows = read_metadata(args.metadata or args.data / "train_metadata.csv")
    sentences = {} if args.prompts is None else {prompt.prompt_id: prompt for prompt in read_csv(args.prompts)}
    store = Store(args.store, create=True)
    with exclusive(store.root / ".lock-import", f"the store {store.root}"):
        origin = Origin(args.model, args.latent_space or LatentSpace().name)
        summary = import_official(store, rows, args.tensors or args.data / "tensors", sentences, origin)
    print(f"{summary.text()}\n{store.root}")
    return summary


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m training.import_official``."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    command(ImportOfficial, run, argv)


if __name__ == "__main__":
    main()
