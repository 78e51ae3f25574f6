"""The sample store: prompts, latents, videos, tracks and scores as plain files.

Layout::

    store/<prompt_id>/prompt.json                  the DSR, the text, the generator's settings
    store/<prompt_id>/prompt.safetensors           cached text embedding
    store/<prompt_id>/<seed>/latents.safetensors   what the trainer reads
    store/<prompt_id>/<seed>/video.mp4             what a person and the tracker read
    store/<prompt_id>/<seed>/tracks.safetensors    boxes, confidences, packed masks
    store/<prompt_id>/<seed>/score.json            the DSR-Score

Every file appears whole or not at all, and its presence says that its stage is done.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .claims import release, try_claim
from .errors import DataError, PromptError, StoreError
from .files import atomic_path, read_json, write_json
from .prompts import Prompt
from .score import DsrScore

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "1"
WINNER_THRESHOLD = 0.7
"""A clip with at least this DSR-Score is a winner (methods: official train.py)."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def classify(score: float | None, threshold: float = WINNER_THRESHOLD) -> str | None:
    """``"winner"`` for a score >= threshold, ``"loser"`` for [-1, threshold), None for an INVALID clip.

    Methods: official train.py, dataset class; an INVALID clip (None here) takes no part.
    """
    if score is None or math.isnan(score) or score < -1:
        return None
    return "winner" if score >= threshold else "loser"


@dataclass(frozen=True)
class LatentsHeader:
    """What ``latents.safetensors`` says about itself.

    Attributes:
        space: the latent space (``Backbone.latent_space``).
        model: the model that made the clip, LoRA included.
        settings: sampling settings as JSON values.
        digest: ``SampleSettings.digest`` of them.
    """

    space: str
    model: str
    settings: dict[str, Any]
    digest: str

    def to_metadata(self) -> dict[str, str]:
        """As safetensors metadata, which holds strings only."""
        return {
            "format": f"spatialalign-latents-{FORMAT}",
            "space": self.space,
            "model": self.model,
            "settings": json.dumps(self.settings, sort_keys=True),
            "settings_digest": self.digest,
        }

    @classmethod
    def from_metadata(cls, metadata: dict[str, str], path: Path) -> LatentsHeader:
        """Parse; raises :class:`DataError` naming the file when the header is not ours."""
        if metadata.get("format") != f"spatialalign-latents-{FORMAT}":
            raise DataError(
                f"{path} does not state the latents format {FORMAT} (found {metadata.get('format')!r}); "
                "delete the sample and generate it again"
            )
        return cls(metadata["space"], metadata["model"], json.loads(metadata["settings"]), metadata["settings_digest"])


@dataclass(frozen=True)
class Sample:
    """One generated clip: the files of one prompt and seed."""

    prompt_id: str
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """``<prompt_id>/<seed>``."""
        return f"{self.prompt_id}/{self.seed}"

    @property
    def latents(self) -> Path:
        """Path of the latents."""
        return self.folder / "latents.safetensors"

    @property
    def video(self) -> Path:
        """Path of the video."""
        return self.folder / "video.mp4"

    @property
    def tracks(self) -> Path:
        """Path of the tracks."""
        return self.folder / "tracks.safetensors"

    @property
    def score(self) -> Path:
        """Path of the score."""
        return self.folder / "score.json"

    @property
    def generated(self) -> bool:
        """Whether latents and video are both there; a sample with one of them was cut short."""
        return self.latents.is_file() and self.video.is_file()

    @property
    def scored(self) -> bool:
        """Whether tracks and score are both there; a score without tracks counts only where it was imported."""
        return self.score.is_file() and (self.tracks.is_file() or self.imported)

    @property
    def imported(self) -> bool:
        """Whether the score was given as a number by others, so that neither tracks nor a video belong to it."""
        try:
            return self.score.is_file() and bool(read_json(self.score).get("imported"))
        except (DataError, AttributeError):
            return False

    def write_latents(self, latents: Tensor, header: LatentsHeader) -> None:
        """Store latents ``(c, f, h, w)``; whatever was derived from former latents is removed first."""
        from safetensors.torch import save_file

        for path in (self.score, self.tracks, self.video):
            path.unlink(missing_ok=True)
        with atomic_path(self.latents) as temporary:
            save_file({"latents": latents.contiguous()}, temporary, metadata=header.to_metadata())

    def read_header(self) -> LatentsHeader:
        """Read what the latents say about themselves, without the latents."""
        with _open_tensors(self.latents) as file:
            return LatentsHeader.from_metadata(file.metadata() or {}, self.latents)

    def read_latents(self) -> Tensor:
        """Read latents ``(c, f, h, w)`` as float32; raises :class:`DataError` naming the file when unusable."""
        import torch

        with _open_tensors(self.latents) as file:
            LatentsHeader.from_metadata(file.metadata() or {}, self.latents)
            latents: Tensor = file.get_tensor("latents").float()
        if latents.ndim != 4:
            raise DataError(
                f"{self.latents} has shape {tuple(latents.shape)}, expected (c, f, h, w); generate the sample again"
            )
        if not torch.isfinite(latents).all():
            raise DataError(
                f"{self.latents} holds NaN or infinite values; delete {self.folder} and generate the sample again"
            )
        return latents

    def write_score(self, score: DsrScore, tracker: str) -> None:
        """Store the score; ``tracker`` says where its tracks come from (``Tracks.source``)."""
        write_json(self.score, {**score.to_dict(), "tracker": tracker})

    def write_imported_score(self, score: DsrScore, source: str) -> None:
        """Store a score that others computed, of which no tracks are known; ``source`` says who."""
        write_json(self.score, {**score.to_dict(), "tracker": source, "imported": True})

    def read_score(self) -> DsrScore:
        """The score; raises :class:`DataError` when it is missing, damaged, or has lost its tracks."""
        if self.score.is_file() and not self.scored:
            raise DataError(f"{self.score} has no tracks beside it; run training.score again")
        try:
            return DsrScore.from_dict(read_json(self.score))
        except DataError as error:
            raise DataError(f"{self.score}: {error}") from error

    @contextmanager
    def claim(self, stage: str) -> Iterator[bool]:
        """Claim this sample for a stage; yields False when another live process is working on it."""
        path = self.folder / f".claim-{stage}"
        held = try_claim(path)
        try:
            yield held
        finally:
            if held:
                release(path)


class Store:
    """A folder of samples. Several processes and machines may fill one store at once."""

    def __init__(self, root: str | Path, create: bool = False) -> None:
        """Open a store.

        Args:
            root: its folder.
            create: make the folder when it is missing; otherwise a missing or foreign folder is a :class:`StoreError`.
        """
        self.root = Path(root)
        if self.root.exists() and not self.root.is_dir():
            raise StoreError(f"the store {self.root} is a file; give a folder")
        if create:
            self.root.mkdir(parents=True, exist_ok=True)
        elif not self.root.is_dir():
            raise StoreError(f"the store {self.root} does not exist; fill it with python -m training.generate")
        elif not any(self.root.glob("*/prompt.json")):
            raise StoreError(f"{self.root} holds no <prompt_id>/prompt.json, so it is not a sample store")

    def prompt_folder(self, prompt_id: str) -> Path:
        """Folder of a prompt; raises :class:`StoreError` for an id that is no safe file name."""
        if not _NAME.fullmatch(prompt_id) or len(prompt_id) > 120:
            raise StoreError(
                f"prompt id {prompt_id!r} cannot name a folder; use letters, digits, '.', '_' and '-', "
                "a letter or digit first, at most 120 characters"
            )
        return self.root / prompt_id

    def add_prompt(self, prompt: Prompt, generator: dict[str, Any] | None = None) -> None:
        """Record a prompt; raises :class:`StoreError` when its id is already there with another text."""
        path = self.prompt_folder(prompt.prompt_id) / "prompt.json"
        if path.is_file():
            found = read_json(path)["text"]
            if found != prompt.text:
                raise StoreError(
                    f"prompt id {prompt.prompt_id!r} is already in {self.root} with another text: {found!r} there, "
                    f"{prompt.text!r} now; rename the prompt or use another store"
                )
            return
        write_json(path, {"format": FORMAT, **prompt.to_dict(), "generator": generator or {}})

    def prompt(self, prompt_id: str) -> Prompt:
        """Read a prompt back; raises :class:`DataError` naming the file when it is damaged."""
        path = self.prompt_folder(prompt_id) / "prompt.json"
        try:
            return Prompt.from_dict(read_json(path))
        except (PromptError, TypeError) as error:
            raise DataError(f"{path} is damaged ({error}); delete it and run training.generate again") from error

    def prompts(self) -> list[Prompt]:
        """All prompts, by id."""
        return [self.prompt(path.parent.name) for path in sorted(self.root.glob("*/prompt.json"))]

    def sample(self, prompt_id: str, seed: int) -> Sample:
        """The sample of a prompt and seed, whether or not it exists yet."""
        if seed < 0:
            raise StoreError(f"seeds must not be negative, found {seed}")
        return Sample(prompt_id, seed, self.prompt_folder(prompt_id) / str(seed))

    def samples(self, prompt_id: str | None = None) -> list[Sample]:
        """Every sample with a folder, by prompt id and seed, complete or not."""
        ids = [prompt_id] if prompt_id is not None else [p.parent.name for p in self.root.glob("*/prompt.json")]
        found = [
            self.sample(name, int(folder.name))
            for name in ids
            for folder in self.prompt_folder(name).glob("*/")
            if folder.name.isascii() and folder.name.isdigit()
        ]
        return sorted(found, key=lambda sample: (sample.prompt_id, sample.seed))

    def write_text(self, prompt_id: str, embedding: Tensor, model: str) -> None:
        """Cache the text embedding ``(n, d)`` of a prompt, made by ``model``."""
        from safetensors.torch import save_file

        with atomic_path(self.prompt_folder(prompt_id) / "prompt.safetensors") as temporary:
            save_file({"text": embedding.detach().cpu().contiguous()}, temporary, metadata={"model": model})

    def has_text(self, prompt_id: str, model: str | None = None) -> bool:
        """Whether the text embedding of a prompt is cached, made by ``model`` if given."""
        path = self.prompt_folder(prompt_id) / "prompt.safetensors"
        if not path.is_file() or model is None:
            return path.is_file()
        with _open_tensors(path) as file:
            return bool((file.metadata() or {}).get("model") == model)

    def read_text(self, prompt_id: str) -> Tensor:
        """The cached text embedding ``(n, d)``; raises :class:`DataError` naming the file when unusable."""
        import torch

        path = self.prompt_folder(prompt_id) / "prompt.safetensors"
        with _open_tensors(path) as file:
            text: Tensor = file.get_tensor("text")
        if text.ndim != 2 or not torch.isfinite(text).all():
            raise DataError(f"{path} is not a finite (tokens, width) embedding; delete it and run training.generate")
        return text

    def check_same_settings(self, samples: Sequence[Sample], header: LatentsHeader) -> list[Sample]:
        """Refuse to mix: raises :class:`StoreError` when an existing sample was made otherwise than ``header`` says.

        Returns the samples whose latents are there but unreadable.
        """
        damaged = []
        for sample in samples:
            if not sample.latents.is_file():
                continue
            try:
                found = sample.read_header()
            except DataError:
                damaged.append(sample)
                continue
            keys = {**header.settings, **found.settings}
            changes = [
                f"{what} {_stated(here)} there, {_stated(now)} now"
                for what, here, now in (
                    ("latent space", found.space, header.space),
                    ("model", found.model, header.model),
                    *((key, found.settings.get(key), header.settings.get(key)) for key in keys),
                )
                if here != now
            ]
            if changes or found.digest != header.digest:
                raise StoreError(
                    f"{sample.latents} was made otherwise ({'; '.join(changes) or 'settings'}); use another store, "
                    "or delete the samples made before"
                )
        return damaged


def _stated(value: Any) -> str:
    return "not stated" if value is None else str(value)


@contextmanager
def _open_tensors(path: Path) -> Iterator[Any]:
    """A safetensors file opened for reading; any damage becomes a :class:`DataError` that names it."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise DataError(f"{path} does not exist; run training.generate")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise DataError(f"{path} cannot be read ({error}); delete it and run training.generate again") from error
