"""Clips sampled and scored in the middle of a training, from the adapter as it is."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from spatialalign.backbones.base import SampleSettings
from training.evaluate import fill, spread
from training.pairs import PromptPairs
from training.store import Store

if TYPE_CHECKING:
    from torch import nn

    from spatialalign.backbones.base import Backbone
    from spatialalign.prompts import Prompt
    from spatialalign.tracking.tracker import Tracker

FIRST_SEED = 1_000_000
"""Of the noise the clips start from; training clips have small seeds."""


class Trial:
    """The same prompts and noise at every visit, so that scores of different steps can be compared."""

    def __init__(
        self, backbone: Backbone, tracker: Tracker, prompts: Sequence[Prompt], seeds: int, settings: SampleSettings
    ) -> None:
        """Sample ``seeds`` clips of each prompt; ``settings`` are those of the training clips."""
        self._backbone, self._tracker, self._prompts = backbone, tracker, list(prompts)
        self._seeds, self._settings = range(FIRST_SEED, FIRST_SEED + seeds), settings

    def measure(self, folder: Path, step: int, parameters: Mapping[str, nn.Parameter]) -> dict[str, float]:
        """Sample, track and score; the clips stay in ``folder``, under a name that changes with the adapter's weights.

        Returns:
            ``score``, the mean DSR-Score with INVALID clips as 0; ``correct_at_0.7``; ``invalid_rate``.
        """
        name = f"step-{step:06d}-{_digest(parameters)}"
        backbone, model = self._backbone, f"{self._backbone.model_id}+adapter:{name}"
        store = Store(folder / name, create=True)
        clips = fill(store, backbone, self._tracker, self._prompts, self._seeds, self._settings, 1, model)
        backbone.release_text_encoder()
        values = [0.0 if clip.score is None else clip.score for clip in clips]
        return {
            "score": sum(values) / len(values),
            "correct_at_0.7": sum(value >= 0.7 for value in values) / len(values),
            "invalid_rate": sum(clip.score is None for clip in clips) / len(clips),
        }


def trial_of(
    backbone: Backbone, tracker: Tracker, store: Store, pairs: Sequence[PromptPairs], count: int, seeds: int
) -> Trial:
    """A trial on at most ``count`` of the prompts of ``pairs``, evenly over their types, as their clips were made."""
    prompts = spread([store.prompt(entry.prompt_id) for entry in pairs], min(count, len(pairs)))
    made = store.sample(pairs[0].prompt_id, pairs[0].winners[0]).read_header().settings
    known = {field.name for field in fields(SampleSettings)}
    settings = SampleSettings(**{name: value for name, value in made.items() if name in known})
    return Trial(backbone, tracker, prompts, seeds, settings)


def _digest(parameters: Mapping[str, nn.Parameter]) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters.items()):
        digest.update(name.encode() + parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:8]
