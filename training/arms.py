"""Ways of sampling on the same prompts and seeds, side by side: ``python -m training.evaluate --arms ...``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spatialalign.errors import ConfigError, DataError
from spatialalign.files import read_json, write_json
from spatialalign.prompts import Prompt
from spatialalign.search import SearchSettings
from training.arms_measure import ArmClips, Cost, Pool, compare
from training.generate import put_lora
from training.sample import sample_clips, sampling_path
from training.store import Sample, Store
from training.versions import versions

if TYPE_CHECKING:
    from spatialalign.backbones.base import Backbone, SampleSettings
    from spatialalign.tracking.tracker import Tracker
    from training.guide import GuideSpec

VERSION = 1
EXAMPLES = 3
"""Prompts whose clips are on the page."""

_SEARCHES = ("best-of", "pruned", "particles")


@dataclass(frozen=True)
class Arm:
    """One way of sampling: with or without the LoRA, with or without reward guidance, and how clips are searched."""

    lora: bool = False
    guidance: bool = False
    search: SearchSettings = SearchSettings()

    @property
    def name(self) -> str:
        """Its parts in the order LoRA, guidance, search: ``lora+guidance+best-of-4``; ``base`` where there are none."""
        searched = [] if self.search.kind == "none" else [self.search.text]
        return "+".join(["lora"] * self.lora + ["guidance"] * self.guidance + searched) or "base"

    @classmethod
    def parse(cls, text: str) -> Arm:
        """Parse ``lora+best-of-4``, the parts in any order.

        Raises:
            ConfigError: a part that does not exist, with the nearest that does, or one that is given twice.
        """
        parts = [part.strip() for part in text.split("+")]
        searches = [part for part in parts if part not in ("base", "lora", "guidance")]
        for part in searches:
            if part.rpartition("-")[0] not in _SEARCHES:
                raise ConfigError(f"there is no arm {part!r}{_nearest(part)}")
        if len(searches) > 1 or len(set(parts)) < len(parts) or ("base" in parts and len(parts) > 1):
            raise ConfigError(
                f"an arm is base, or lora, guidance and one search joined by +, each at most once; found {text!r}"
            )
        search = SearchSettings.parse(searches[0]) if searches else SearchSettings()
        return cls("lora" in parts, "guidance" in parts, search)


def parse_arms(text: str) -> list[Arm]:
    """Parse a list such as ``base,lora,lora+pruned-4``; the base comes first and is added when it is not there.

    Raises:
        ConfigError: an arm that does not exist or is there twice, however its parts are ordered.
    """
    arms = [Arm.parse(part) for part in text.split(",") if part.strip()]
    names = [arm.name for arm in arms]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"the arm {name!r} is given {names.count(name)} times in {text!r}; once is enough")
    return [Arm(), *(arm for arm in arms if arm != Arm())]


def _nearest(part: str) -> str:
    """The nearest arm, with the number that was given."""
    number = re.search(r"\d+", part)
    known = ["base", "lora", "guidance", *(f"{search}-{number[0] if number else 4}" for search in _SEARCHES)]
    near = difflib.get_close_matches(part, known, n=1, cutoff=0.4)
    return f"; the nearest is {near[0]!r}" if near else f"; expected {', '.join(known)}, or several joined by +"


def check_given(arms: Sequence[Arm], lora: object | None, guidance: object | None) -> None:
    """Raises :class:`ConfigError` for an arm with a LoRA or guidance when none was given."""
    for arm in arms:
        if arm.lora and lora is None:
            raise ConfigError(f"the arm {arm.name!r} needs a LoRA; give its file with --lora")
        if arm.guidance and guidance is None:
            raise ConfigError(f"the arm {arm.name!r} needs a latent reward; give its file with --reward")


def with_looks(
    arms: Sequence[Arm], by_reward: bool, keep: float | None = None, threshold: float | None = None
) -> list[Arm]:
    """The arms, those that look at clips on the way doing so by a reward; ``keep`` and ``threshold`` are of pruning."""
    changed = []
    for arm in arms:
        changes: dict[str, Any] = {"preview_by": "reward"} if by_reward and arm.search.looks else {}
        if arm.search.kind == "pruned":
            given = {"keep": keep, "threshold": threshold}
            changes |= {name: value for name, value in given.items() if value is not None}
        changed.append(replace(arm, search=replace(arm.search, **changes)))
    return changed


def compare_arms(
    backbone: Backbone,
    tracker: Tracker,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    arms: Sequence[Arm],
    out: Path,
    settings: SampleSettings,
    batch: int = 4,
    lora: Path | None = None,
    lora_scale: float = 1.0,
    guide: GuideSpec | None = None,
    preview_reward: Path | None = None,
) -> dict[str, Any]:
    """Sample every arm and write ``arms.json``, ``arms.md``, ``arms.png`` and ``arms.html`` into ``out``.

    What the arms' stores hold is not made again. A clip that cannot be made or scored counts as INVALID.

    Args:
        backbone: the base model, without an adapter; it is left so.
        tracker: finds subject and object, for the search and for the score.
        prompts: held-out prompts.
        seeds: of each prompt, the same for every arm.
        arms: of :func:`parse_arms`, the base first.
        out: output folder, with one store per arm under its name.
        settings: how to sample.
        batch: clips at once.
        lora: LoRA file, for the arms with one.
        lora_scale: its strength.
        guide: the guidance, for the arms with it.
        preview_reward: file of the latent reward, for the arms that look by one.

    Returns:
        The content of arms.json.

    Raises:
        ConfigError: an arm needs a LoRA or guidance and there is none.
        DataError: another process is still working on a sample.
        StoreError: ``out`` holds samples of another model, LoRA or other settings.
    """
    from spatialalign.lora import unload_lora
    from training.arms_chart import arms_chart
    from training.arms_report import table, write_page
    from training.evaluate import scores_of

    if not prompts or not seeds:
        raise DataError(f"nothing to evaluate: {len(prompts)} prompts, {len(seeds)} seeds")
    check_given(arms, lora, guide)
    found: dict[str, ArmClips] = {}
    for with_lora in (False, True):
        todo = [arm for arm in arms if arm.lora is with_lora]
        model = put_lora(backbone, lora, lora_scale) if todo and with_lora and lora is not None else None
        try:
            for arm in todo:
                used = guide if arm.guidance else None
                look = preview_reward if arm.search.looks else None
                found[arm.name] = fill_arm(
                    arm, out, backbone, tracker, prompts, seeds, settings, used, batch, model, look
                )
        finally:
            if model is not None:
                unload_lora(backbone.transformer)
    ordered = [found[arm.name] for arm in arms]
    result: dict[str, Any] = {
        "version": VERSION,
        "prompts": len(prompts),
        "seeds": list(seeds),
        "stores": {arm.name: arm.name for arm in arms},
        **compare(ordered, reference(arms)),
        "settings": {
            "model": backbone.model_id,
            "lora": None if lora is None else {"file": lora.name, "scale": lora_scale},
            "guidance": None if guide is None else guide.to_dict(),
            "search": {arm.name: arm.search.to_dict() for arm in arms},
            "tracker": {"rule": tracker.rule, "detector": type(tracker.detector).__name__},
            "sampling": settings.to_dict(),
        },
        "versions": versions(),
        "samples": [
            {
                "prompt_id": clips[0].prompt_id,
                "seed": clips[0].seed,
                "type": clips[0].type_code,
                **{arm.name: scores_of(clip) for arm, clip in zip(arms, clips, strict=True)},
            }
            for clips in zip(*(arm.clips for arm in ordered), strict=True)
        ],
    }
    write_json(out / "arms.json", result)
    (out / "arms.md").write_text(table(result) + "\n", encoding="utf-8")
    write_page(out, result, arms_chart(result), EXAMPLES)
    print(f"{table(result)}\n{out / 'arms.html'}")
    return result


def reference(arms: Sequence[Arm]) -> str | None:
    """The largest best-of-N of the base among the arms; None when there is none."""
    plain = [arm for arm in arms if arm.search.kind == "best-of-n" and not arm.lora and not arm.guidance]
    return max(plain, key=lambda arm: arm.search.candidates).name if plain else None


def fill_arm(
    arm: Arm,
    out: Path,
    backbone: Backbone,
    tracker: Tracker,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    settings: SampleSettings,
    guide: GuideSpec | None,
    batch: int,
    model: str | None,
    preview_reward: Path | None = None,
) -> ArmClips:
    """Sample, track and score what the arm's store lacks, and read all of it, by prompt and seed."""
    from training.evaluate import score_all

    store = Store(out / arm.name, create=True)
    made = sample_clips(
        backbone, store, prompts, seeds, settings, tracker, guide, arm.search, batch, model, preview_reward
    )
    clips = score_all(store, tracker, prompts, seeds, made)
    samples = [store.sample(clip.prompt_id, clip.seed) for clip in clips]
    records = [read_json(path) for path in map(sampling_path, samples) if path.is_file()]
    costs = [Cost(record["evaluations"], record["scorings"], record["seconds"]) for record in records]
    return ArmClips(arm.name, clips, costs, [pool_of(sample, arm.search) for sample in samples])


def pool_of(sample: Sample, search: SearchSettings) -> Pool:
    """The scores of all candidates of a best-of-N, the plain clip's first; none for other searches.

    A clip that could not be made counts as INVALID, and so do its candidates.
    """
    if search.kind != "best-of-n":
        return ()
    path = sampling_path(sample)
    if not path.is_file():
        return [None] * search.candidates
    record = read_json(path)
    scores = dict(zip(record["candidates"], record["scores"], strict=True))
    return [scores[candidate] for candidate in range(search.candidates)]
