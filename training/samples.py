"""The clips of a training, read when needed; one that cannot be used is named, counted and left out."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from spatialalign.errors import DataError, SpatialAlignError
from training.pairs import PreferencePair, PromptPairs

if TYPE_CHECKING:
    from torch import Tensor

    from training.store import Sample, Store

logger = logging.getLogger(__name__)

Key = tuple[str, int]
"""A clip: prompt id and seed."""

_SHAPES_LOOKED_AT = 32
_TEXTS_KEPT = 128
"""An embedding of Wan's text encoder takes up to 4 MB."""


class Clips:
    """Latents and text of a store.

    Latents are read one micro-batch at a time and not kept; of the texts, some are kept. The first pairs given to
    :meth:`usable` decide nothing: the shape every clip must have is the commonest among the first clips of the training
    prompts.

    Attributes:
        bad: why a clip was left out, by its name.
        shape: ``(c, f, h, w)`` of every clip.
    """

    def __init__(self, store: Store, prompts: Sequence[PromptPairs], limit: int) -> None:
        """Clips for the training ``prompts``, of which ``limit`` may turn out bad."""
        self.bad: dict[str, str] = {}
        self._store, self._limit = store, limit
        self._latents: dict[Key, Tensor] = {}
        self._texts: dict[str, Tensor] = {}
        keys = ((prompt.prompt_id, seed) for prompt in prompts for seed in (*prompt.winners, *prompt.losers))
        shapes = Counter(filter(None, (_shape_of(store.sample(*key)) for key in islice(keys, _SHAPES_LOOKED_AT))))
        if not shapes:
            raise DataError(f"none of the first clips in {store.root} can be read; run training.mine again")
        self.shape: tuple[int, ...] = shapes.most_common(1)[0][0]

    def usable(self, pairs: Sequence[PreferencePair]) -> list[bool]:
        """Read the clips of b pairs; False for a pair of which one cannot be used.

        Raises:
            DataError: more clips than the limit cannot be used; they are named.
        """
        self._latents.clear()
        return [self._read(p.prompt_id, p.winner) and self._read(p.prompt_id, p.loser) for p in pairs]

    def leave_out(self, bad: Mapping[str, str]) -> None:
        """Count clips that cannot be used, found here or by another process, with their reasons.

        Raises:
            DataError: they are more than the limit; they are named.
        """
        for name in sorted(bad.keys() - self.bad.keys()):
            self.bad[name] = bad[name]
            logger.warning("clip %s is left out of the training: %s", name, bad[name])
        if len(self.bad) > self._limit:
            reasons = "; ".join(self.bad.values())
            raise DataError(
                f"{len(self.bad)} clips cannot be used, more than max_bad_clips ({self._limit}): {reasons}. Repair "
                "the store and run training.mine again, or raise max_bad_clips"
            )

    def latents(self, prompt_id: str, seed: int) -> Tensor:
        """Latents ``(c, f, h, w)`` of a clip; raises :class:`DataError` naming its file when it cannot be used."""
        if (prompt_id, seed) in self._latents:
            return self._latents[prompt_id, seed]
        sample = self._store.sample(prompt_id, seed)
        latents = sample.read_latents()
        if tuple(latents.shape) != self.shape:
            raise DataError(
                f"{sample.latents} has shape {tuple(latents.shape)}, the other clips {self.shape}; one training needs "
                "clips of one size: generate it again with their settings"
            )
        return latents

    def text(self, prompt_id: str) -> Tensor:
        """Embedding ``(n, d)`` of a prompt."""
        if prompt_id not in self._texts:
            if len(self._texts) >= _TEXTS_KEPT:
                del self._texts[next(iter(self._texts))]
            self._texts[prompt_id] = self._store.read_text(prompt_id)
        return self._texts[prompt_id]

    def _read(self, prompt_id: str, seed: int) -> bool:
        name = f"{prompt_id}/{seed}"
        if name in self.bad:
            return False
        try:
            self.text(prompt_id)
            self._latents[prompt_id, seed] = self.latents(prompt_id, seed)
        except (SpatialAlignError, OSError) as error:
            self.leave_out({name: str(error)})
            return False
        return True


def _shape_of(sample: Sample) -> tuple[int, ...] | None:
    """The shape that a file states; None when it cannot be read."""
    try:
        with safe_open(sample.latents, framework="pt") as file:
            return tuple(file.get_slice("latents").get_shape())
    except (OSError, SafetensorError):
        return None
