"""What a latent reward learns from: every clip of a store, judged by its tracks for its own caption and for others.

Tracks say how well a clip would have obeyed *any* caption about the same subject and object. So each clip gives a label
for each of the paper's six types ("counterfactual captions"), at no cost but the text embeddings: six times the data,
and a reward that looked at the picture alone would be wrong about five of them.
"""

from __future__ import annotations

import csv
import hashlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spatialalign.dsr import DSR, relations_of
from spatialalign.errors import DataError, SpatialAlignError
from spatialalign.files import atomic_path
from spatialalign.prompts import Prompt
from spatialalign.score import dsr_score
from spatialalign.tracks import Tracks

if TYPE_CHECKING:
    from torch import Tensor

    from spatialalign.backbones.base import Backbone
    from training.store import Sample, Store

PAPER_TYPES = ("LR", "LT", "RL", "RT", "TL", "TR")
_TEXT_BATCH = 16
_TEXTS_KEPT = 256
_KEYS = ("prompt_id", "seed")


@dataclass(frozen=True, eq=False)
class Labels:
    """Labels of n clips for C types; what is not known is NaN.

    Attributes:
        clips: prompt id and seed of each.
        codes: the types.
        own: ``(n,)`` int, the column of the type that the clip was asked for.
        group: ``(n,)`` int; clips with the same number share subject, object and scene.
        scores: ``(n, C)`` DSR-Score; NaN where the clip is INVALID, or was scored by others for its own type only.
        curves: ``(n, C, f, 2)`` SSR of the initial and the final relation, mean over the valid frames of each latent
            frame; NaN where it has none.
        valid: ``(n,)`` 1 or 0: whether the clip can be scored.
        names: further dimensions.
        further: ``(n, len(names))`` their labels.
        shape: ``(c, f, h, w)`` of every clip's latents.
        space: the space they live in.
    """

    clips: tuple[tuple[str, int], ...]
    codes: tuple[str, ...]
    own: NDArray[np.int64]
    group: NDArray[np.int64]
    scores: NDArray[np.float32]
    curves: NDArray[np.float32]
    valid: NDArray[np.float32]
    names: tuple[str, ...]
    further: NDArray[np.float32]
    shape: tuple[int, int, int, int]
    space: str

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that change with any clip or label."""
        digest = hashlib.sha256(repr((self.clips, self.codes, self.names, self.shape, self.space)).encode())
        for array in (self.own, self.group, self.scores, self.curves, self.valid, self.further):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()[:16]


def read_labels(store: Store, further: Path | None = None) -> tuple[Labels, dict[str, str]]:
    """Judge every scored clip of a store, from its tracks.

    Args:
        store: with latents, tracks and scores.
        further: CSV file of further labels, see :func:`read_further`.

    Returns:
        The labels, and the reason of every clip that is left out, by its name.

    Raises:
        DataError: no clip can be used, clips of several sizes or latent spaces, or a bad file of further labels.
    """
    names, values = ((), {}) if further is None else read_further(further)
    prompts = {prompt.prompt_id: prompt for prompt in store.prompts()}
    others = sorted({prompt.dsr.type_code for prompt in prompts.values()} - set(PAPER_TYPES))
    codes = (*PAPER_TYPES, *others)
    left_out: dict[str, str] = {}
    clips: list[tuple[str, int]] = []
    judged: list[tuple[NDArray[np.float32], NDArray[np.float32], float]] = []
    sizes: dict[tuple[tuple[int, ...], str], str] = {}
    for sample in store.samples():
        if not sample.scored:
            left_out[sample.name] = "it has no score; run training.score"
            continue
        try:
            shape, space = _header(sample)
            judged.append(_judge(sample, prompts[sample.prompt_id].dsr, codes, shape[1]))
        except SpatialAlignError as error:
            left_out[sample.name] = str(error)
            continue
        sizes.setdefault((shape, space), sample.name)
        clips.append((sample.prompt_id, sample.seed))
    if not clips:
        reason = f"; the first, {next(iter(left_out.items()))}" if left_out else ""
        raise DataError(f"no clip of {store.root} can be used{reason}; run training.generate and training.score")
    if len(sizes) > 1:
        listed = "; ".join(f"{name} has {shape} of {space}" for (shape, space), name in sizes.items())
        raise DataError(f"one reward needs clips of one size and latent space: {listed}; use a store for each")
    ((shape, space),) = sizes
    triples = {triple: i for i, triple in enumerate(sorted({prompt.triple for prompt in prompts.values()}))}
    unknown = (math.nan,) * len(names)
    labels = Labels(
        clips=tuple(clips),
        codes=codes,
        own=np.array([codes.index(prompts[name].dsr.type_code) for name, _ in clips]),
        group=np.array([triples[prompts[name].triple] for name, _ in clips]),
        scores=np.stack([scores for scores, _, _ in judged]),
        curves=np.stack([curves for _, curves, _ in judged]),
        valid=np.array([valid for _, _, valid in judged], dtype=np.float32),
        names=names,
        further=np.array([values.get(clip, unknown) for clip in clips], dtype=np.float32).reshape(len(clips), -1),
        shape=(shape[0], shape[1], shape[2], shape[3]),
        space=space,
    )
    for name, column in zip(names, labels.further.T, strict=True):
        if (~np.isnan(column)).sum() < 2 or np.nanstd(column) == 0:
            raise DataError(f"{further}: column {name!r} tells no two clips of {store.root} apart; check its ids")
    return labels, left_out


def read_further(
    path: Path, reserved: Sequence[str] = ("dsr", "valid")
) -> tuple[tuple[str, ...], dict[tuple[str, int], tuple[float, ...]]]:
    """Read labels made by others: a CSV file with prompt_id, seed and a column of numbers for each dimension.

    An empty cell is unknown. Larger is better. Columns may not have the ``reserved`` names.

    Raises:
        DataError: the file is missing, lacks a column, names a clip twice, or a cell is no number.
    """
    if not path.is_file():
        raise DataError(
            f"{path} does not exist; give a CSV file with the columns prompt_id, seed and one per dimension"
        )
    values: dict[tuple[str, int], tuple[float, ...]] = {}
    with path.open(encoding="utf-8-sig", newline="") as handle:
        reader = csv.DictReader(handle)
        columns = reader.fieldnames or []
        names = tuple(name for name in columns if name not in _KEYS)
        if not names or any(key not in columns for key in _KEYS) or len(set(columns)) != len(columns):
            raise DataError(f"{path}: expected the columns prompt_id, seed and one per dimension, found {columns}")
        taken = sorted(set(reserved) & set(names))
        if taken:
            raise DataError(f"{path}: {taken[0]!r} is learned from the tracks already; give the column another name")
        for number, row in enumerate(reader, start=2):
            try:
                key = row["prompt_id"], int(row["seed"])
                cells = tuple(float(row[name]) if row[name].strip() else math.nan for name in names)
            except (TypeError, ValueError, AttributeError) as error:
                raise DataError(f"{path}, line {number}: expected an id, a seed and numbers ({error})") from error
            if any(math.isinf(cell) for cell in cells):
                raise DataError(f"{path}, line {number}: expected finite numbers, found {cells}")
            if key in values:
                raise DataError(f"{path}, line {number}: clip {key[0]}/{key[1]} is there twice; keep one of its lines")
            values[key] = cells
    return names, values


def counterfactual(dsr: DSR, code: str) -> DSR:
    """The same subject, object, scene and motion with the relations of another type."""
    initial, final = relations_of(code)
    return replace(dsr, initial=initial, final=final)


def latent_curves(curves: NDArray[np.float64], latent_frames: int) -> NDArray[np.float32]:
    """Curves ``(T, k)`` by latent frame, ``(f, k)``: means over known values, NaN where there are none.

    The first frame is a latent frame of its own, each further one holds ``(T - 1) / (f - 1)`` frames, as the
    autoencoders of Wan and LTX have it.

    Raises:
        DataError: ``T - 1`` is no multiple of ``f - 1``.
    """
    frames, rest = len(curves), latent_frames - 1
    if (rest == 0) != (frames == 1) or (rest and (frames - 1) % rest):
        raise DataError(f"{frames} tracked frames do not fit {latent_frames} latent frames; track the clip again")
    groups = [curves[:1], *(np.split(curves[1:], rest) if rest else [])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a group in which no frame is valid: NaN is meant
        return np.stack([np.nanmean(group, axis=0) for group in groups]).astype(np.float32)


def _judge(
    sample: Sample, dsr: DSR, codes: Sequence[str], latent_frames: int
) -> tuple[NDArray[np.float32], NDArray[np.float32], float]:
    """Scores ``(C,)`` and curves ``(C, f, 2)`` of one clip, and 1 where it is valid, else 0."""
    scores = np.full(len(codes), np.nan, dtype=np.float32)
    curves = np.full((len(codes), latent_frames, 2), np.nan, dtype=np.float32)
    if sample.imported:
        score = sample.read_score().score
        scores[codes.index(dsr.type_code)] = np.nan if score is None else score
        return scores, curves, float(score is not None)
    tracks = Tracks.load(sample.tracks)
    for column, code in enumerate(codes):
        asked = counterfactual(dsr, code)
        if tracks.depth is None and (asked.initial.is_depth or asked.final.is_depth):
            continue
        value = dsr_score(tracks, asked)
        scores[column] = np.nan if value.score is None else value.score
        by_frame = np.full((tracks.frames, 2), np.nan)
        by_frame[value.frames_used] = np.stack([value.initial_ssr, value.final_ssr], axis=1)
        curves[column] = latent_curves(by_frame, latent_frames)
    return scores, curves, float(not np.isnan(scores[codes.index(dsr.type_code)]))


def _header(sample: Sample) -> tuple[tuple[int, ...], str]:
    """Shape of the latents and their space, without reading them; unusable latents raise :class:`DataError`."""
    from safetensors import SafetensorError, safe_open

    space = sample.read_header().space
    try:
        with safe_open(sample.latents, framework="pt") as file:
            shape = tuple(file.get_slice("latents").get_shape())
    except (OSError, SafetensorError) as error:
        raise DataError(f"{sample.latents} cannot be read ({error}); generate it again") from error
    if len(shape) != 4:
        raise DataError(f"{sample.latents} has shape {shape}, expected (c, f, h, w); generate the sample again")
    return shape, space


class Captions:
    """Text embeddings of every prompt of a store for every type, kept in a folder, one file for each prompt."""

    def __init__(self, folder: Path, model: str) -> None:
        """Embeddings of ``model`` in ``folder``."""
        self._folder, self._model = folder, model
        self._kept: dict[tuple[str, str], Tensor] = {}

    def write(self, backbone: Backbone, prompts: Sequence[Prompt], codes: Sequence[str]) -> None:
        """Embed what is missing; the text encoder is released afterwards."""
        missing = [prompt for prompt in prompts if not self._complete(prompt, codes)]
        per_pass = max(1, _TEXT_BATCH // len(codes))
        for start in range(0, len(missing), per_pass):
            group = missing[start : start + per_pass]
            texts = [counterfactual(prompt.dsr, code).prompt() for prompt in group for code in codes]
            rows = iter(backbone.encode_text(texts))
            for prompt in group:
                self._save(prompt, {code: next(rows) for code in codes})
        if missing:
            backbone.release_text_encoder()

    def of(self, prompt_id: str, code: str) -> Tensor:
        """The embedding ``(n, d)`` of a prompt with the relations of a type."""
        key = prompt_id, code
        if key not in self._kept:
            if len(self._kept) >= _TEXTS_KEPT:
                del self._kept[next(iter(self._kept))]
            from safetensors import safe_open

            with safe_open(self._path(prompt_id), framework="pt") as file:
                self._kept[key] = file.get_tensor(code)
        return self._kept[key]

    def _path(self, prompt_id: str) -> Path:
        return self._folder / f"{prompt_id}.safetensors"

    def _complete(self, prompt: Prompt, codes: Sequence[str]) -> bool:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._path(prompt.prompt_id), framework="pt") as file:
                return file.metadata() == self._about(prompt) and set(codes) <= set(file.keys())
        except (OSError, SafetensorError):
            return False

    def _save(self, prompt: Prompt, embeddings: dict[str, Tensor]) -> None:
        from safetensors.torch import save_file

        tensors = {code: embedding.detach().cpu().contiguous() for code, embedding in embeddings.items()}
        with atomic_path(self._path(prompt.prompt_id)) as temporary:
            save_file(tensors, temporary, metadata=self._about(prompt))

    def _about(self, prompt: Prompt) -> dict[str, str]:
        return {"model": self._model, "prompt": prompt.text}
