"""Measure what a LoRA or a way of sampling changes, on prompts and seeds shared: ``python -m training.evaluate``."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spatialalign.dsr import DSR, Relation
from spatialalign.errors import ConfigError, DataError
from spatialalign.files import write_json
from spatialalign.prompts import Prompt, read_csv
from spatialalign.score import dsr_score
from spatialalign.tracks import Tracks
from training.arms import check_given, compare_arms, parse_arms, with_looks
from training.cli import command, options_of
from training.generate import generate, put_lora
from training.guide import GuideOptions, guide_spec
from training.measure import Scored, chance, difference, plain, summarise, table
from training.metric_values import MetricOptions
from training.score import score
from training.stages import StageSummary, parse_seeds
from training.store import Sample, Store
from training.versions import versions

if TYPE_CHECKING:
    from spatialalign.backbones.base import Backbone, SampleSettings
    from spatialalign.tracking.tracker import Tracker

logger = logging.getLogger(__name__)

VERSION = 1
PAPER_TYPES = ("LR", "LT", "RL", "RT", "TL", "TR")


@dataclass(frozen=True)
class Evaluate:
    """Generate, track and score with the base model and with the LoRA, or with arms, same prompts and seeds."""

    model: str
    """Base model: a diffusers folder (Wan 2.1, 2.2 or LTX-Video), a hub id, or "miniature"."""
    out: Path
    """Output folder: the stores, metrics.json and table.md or the files of the arms. Run again to continue."""
    prompts: str
    """CSV file of held-out prompts with the official columns, or "miniature" for the miniature's own."""
    lora: Path | None = None
    """LoRA file of any dialect; needed without arms."""
    arms: str | None = None
    """Ways of sampling to compare: base, lora, guidance, best-of-<N>, pruned-<N>, particles-<N>, joined as in
    base,lora,best-of-4,lora+guidance+pruned-4; null for base against LoRA."""
    reward: str | None = None
    """Latent rewards of the arms with guidance, <file> or <file>:<weight>, several joined by commas; see also below."""
    preview_reward: Path | None = None
    """Latent reward by which the arms pruned-<N> and particles-<N> look at clips on the way; null for the tracker."""
    keep: float | None = None
    """Share of the candidates that the arms pruned-<N> take to the end; null for the default."""
    threshold: float | None = None
    """Score at which the arms pruned-<N> stop; null for never."""
    seeds: str = "0-4"
    """Seeds of each prompt, as 0-4 or 0,3,7; both models start from the same noise."""
    limit: int | None = None
    """Take only so many prompts, spread evenly over the file; null for all."""
    swapped: int = 0
    """Also let the base model draw so many prompts with both relations exchanged, scored for the original ones."""
    lora_scale: float = 1.0
    """Strength of the LoRA."""
    tracker: str = "miniature"
    """Tracking models: "miniature", a folder with detector/ and segmenter/, or <detector>+<segmenter> hub ids."""
    rule: Literal["robust", "paper"] = "robust"
    """Tracking rule."""
    batch: int = 4
    """Clips generated at once."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: str = "auto"
    """auto (bfloat16 on CUDA, else float32), float32, bfloat16, float16."""
    expert: Literal["high", "low"] | None = None
    """Expert of Wan 2.2 A14B that the LoRA is put on: high (also null) or low; both sample."""
    steps: int | None = None
    """Sampling steps; null for the model's own, as below."""
    guidance: float | None = None
    """Classifier-free guidance scale."""
    guidance_2: float | None = None
    """The same for the low-noise expert of Wan 2.2 A14B."""
    record: bool = True
    """Write the scores into the metadata of the LoRA file and of its twin in the other format, if they are files of
    this project; the tensors stay as they are."""
    guide_options: dict[str, Any] = options_of(GuideOptions)
    metric_options: dict[str, Any] = options_of(MetricOptions)

    def __post_init__(self) -> None:
        if self.arms is None and (self.lora is None or self.reward or self.guide_options):
            raise ConfigError("give a LoRA with --lora and no reward, or what to compare with --arms")
        if self.arms is not None and self.swapped:
            raise ConfigError(f"swapped is a control of base against LoRA and does not go with arms ({self.arms})")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit must be at least 1, found {self.limit}")
        if self.swapped < 0:
            raise ConfigError(f"swapped must be 0 or more, found {self.swapped}")
        MetricOptions(**self.metric_options)


def evaluate(
    backbone: Backbone,
    tracker: Tracker,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    lora: Path,
    out: Path,
    settings: SampleSettings,
    batch: int = 4,
    lora_scale: float = 1.0,
    swapped: int = 0,
    name: str = "aligned",
    record: bool = True,
) -> dict[str, Any]:
    """Evaluate and write ``metrics.json`` and ``table.md`` into ``out``; what its stores hold is not made again.

    A clip that cannot be made or scored (latents that are not finite, say) counts as INVALID with its reason.

    Args:
        backbone: the base model, without an adapter; it is left so.
        tracker: finds subject and object.
        prompts: held-out prompts.
        seeds: of each prompt, the same for both models.
        lora: LoRA file.
        out: output folder.
        settings: how to sample.
        batch: clips at once.
        lora_scale: strength of the LoRA.
        swapped: number of prompts of the swapped-caption control, 0 for none.
        name: folder of the aligned model's store in ``out``; several LoRAs can share one base that way.
        record: write the scores into the LoRA's own metadata as well, where it is a file of this project.

    Returns:
        The content of metrics.json.

    Raises:
        DataError: another process is still working on a sample.
        StoreError: ``out`` holds samples of another model, LoRA or other settings.
    """
    from spatialalign.lora import unload_lora

    if not prompts or not seeds:
        raise DataError(f"nothing to evaluate: {len(prompts)} prompts, {len(seeds)} seeds")
    clips = {"base": fill(Store(out / "base", create=True), backbone, tracker, prompts, seeds, settings, batch)}
    control = None
    if swapped:
        control = swapped_control(out, backbone, tracker, prompts, seeds, settings, batch, swapped, clips["base"])
    model = put_lora(backbone, lora, lora_scale)
    try:
        store = Store(out / name, create=True)
        clips["aligned"] = fill(store, backbone, tracker, prompts, seeds, settings, batch, model)
    finally:
        unload_lora(backbone.transformer)
    result: dict[str, Any] = {
        "version": VERSION,
        "prompts": len(prompts),
        "seeds": list(seeds),
        "stores": {"base": "base", "aligned": name},
        **{arm: summarise(rows) for arm, rows in clips.items()},
        "difference": difference(clips["base"], clips["aligned"]),
        "controls": {"chance": {arm: chance(rows) for arm, rows in clips.items()}, "swapped": control},
        "settings": {
            "model": backbone.model_id,
            "aligned": model,
            "tracker": {"rule": tracker.rule, "detector": type(tracker.detector).__name__},
            "sampling": settings.to_dict(),
        },
        "versions": versions(),
        "samples": [
            {
                "prompt_id": base.prompt_id,
                "seed": base.seed,
                "type": base.type_code,
                **{arm: scores_of(clip) for arm, clip in (("base", base), ("aligned", aligned))},
            }
            for base, aligned in zip(clips["base"], clips["aligned"], strict=True)
        ],
    }
    write_json(out / "metrics.json", result)
    (out / "table.md").write_text(table(result) + "\n", encoding="utf-8")
    if record:
        _record(lora, result, lora_scale)
    return result


def _record(lora: Path, result: Mapping[str, Any], strength: float) -> None:
    """Write the headline numbers into the LoRA's metadata; a folder that cannot be written to is no failure."""
    from spatialalign.lora_record import record_scores

    scores = {"prompts": result["prompts"], "seeds": result["seeds"], "strength": strength}
    scores |= {arm: plain(result[arm]) for arm in ("base", "aligned")}
    try:
        files = record_scores(lora, scores)
    except OSError as error:
        logger.warning("the scores could not be written into the metadata of %s: %s", lora, error)
        return
    if files:
        print(f"scores written into the metadata of {', '.join(map(str, files))}", flush=True)


def fill(
    store: Store,
    backbone: Backbone,
    tracker: Tracker,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    settings: SampleSettings,
    batch: int,
    model: str | None = None,
) -> list[Scored]:
    """Generate, track and score what the store lacks, and read every score, by prompt and seed."""
    return score_all(store, tracker, prompts, seeds, generate(backbone, store, prompts, seeds, settings, batch, model))


def score_all(
    store: Store, tracker: Tracker, prompts: Sequence[Prompt], seeds: Sequence[int], made: StageSummary
) -> list[Scored]:
    """Track and score what the store lacks after the stage ``made``, and read every score, by prompt and seed."""
    scored = score(store, tracker)
    for summary in (made, scored):
        print(summary.text(), flush=True)
    wanted = [(prompt, store.sample(prompt.prompt_id, seed)) for prompt in prompts for seed in seeds]
    generated = {sample.name for _, sample in wanted if sample.generated}
    # What another process is still generating cannot be scored yet: that is no verdict about the model.
    failures = dict(made.failed) | {name: reason for name, reason in scored.failed if name in generated}
    check_complete([sample for _, sample in wanted], failures, [made, scored])
    return [read_scored(sample, prompt.dsr, failures.get(sample.name)) for prompt, sample in wanted]


def check_complete(samples: Sequence[Sample], failures: dict[str, str], summaries: Sequence[StageSummary]) -> None:
    """Every sample is scored or has failed with a reason; raises :class:`DataError` otherwise."""
    missing = [sample.name for sample in samples if not sample.scored and sample.name not in failures]
    if missing:
        busy = sum(summary.busy for summary in summaries)
        raise DataError(
            f"{len(missing)} of {len(samples)} clips have no score yet (first {missing[0]}); {busy} were claimed by "
            "another process: run the same command again when it is done"
        )


def read_scored(sample: Sample, dsr: DSR, failure: str | None) -> Scored:
    """The scores of one clip, for its own type and for the paper's other types."""
    if failure is not None:
        return Scored(sample.prompt_id, sample.seed, dsr.type_code, None, None, None, f"failed: {failure}", (None,) * 5)
    value, tracks = sample.read_score(), Tracks.load(sample.tracks)
    others = tuple(
        dsr_score(tracks, dataclasses.replace(dsr, initial=Relation(code[0]), final=Relation(code[1]))).score
        for code in PAPER_TYPES
        if code != dsr.type_code
    )
    robust = None if value.robust is None else value.robust.score
    return Scored(
        sample.prompt_id, sample.seed, dsr.type_code, value.score, value.normalised, robust, value.reason, others
    )


def swapped_control(
    out: Path,
    backbone: Backbone,
    tracker: Tracker,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    settings: SampleSettings,
    batch: int,
    count: int,
    base: Sequence[Scored],
) -> dict[str, Any]:
    """What the base model scores for a relation when its caption asks for the reverse, beside the true caption."""
    chosen = spread(prompts, count)
    reversed_prompts = [Prompt.of(f"{prompt.prompt_id}-reversed", prompt.dsr.reversed()) for prompt in chosen]
    store = Store(out / "swapped", create=True)
    fill(store, backbone, tracker, reversed_prompts, seeds, settings, batch)
    clips = []
    for prompt, other in zip(chosen, reversed_prompts, strict=True):
        for seed in seeds:
            sample = store.sample(other.prompt_id, seed)
            value = dsr_score(Tracks.load(sample.tracks), prompt.dsr) if sample.tracks.is_file() else None
            robust = None if value is None or value.robust is None else value.robust.score
            scores = (None, None) if value is None else (value.score, value.normalised)
            reason = "failed" if value is None else value.reason
            clips.append(Scored(prompt.prompt_id, seed, prompt.dsr.type_code, *scores, robust, reason))
    names = {prompt.prompt_id for prompt in chosen}
    return {
        "prompts": len(chosen),
        "plain": summarise([clip for clip in base if clip.prompt_id in names])["correct_at_0.7"],
        "swapped": summarise(clips)["correct_at_0.7"],
    }


def scores_of(clip: Scored) -> dict[str, Any]:
    """What metrics.json keeps of one clip."""
    return {"score": clip.score, "normalised": clip.normalised, "robust": clip.robust, "reason": clip.reason}


def spread(prompts: Sequence[Prompt], count: int | None) -> list[Prompt]:
    """At most ``count`` prompts: types in turn, and within a type spread evenly over the sequence."""
    if count is None or count >= len(prompts):
        return list(prompts)
    by_type: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_type.setdefault(prompt.dsr.type_code, []).append(prompt)
    chosen: list[Prompt] = []
    for index, group in enumerate(by_type.values()):
        share = min(len(group), count // len(by_type) + (index < count % len(by_type)))
        start = (index + 0.5) / len(by_type)  # types begin at different places, so that they share few triples
        chosen += [group[int((k + start) * len(group) / share)] for k in range(share)]
    places = {id(prompt): place for place, prompt in enumerate(prompts)}
    return sorted(chosen, key=lambda prompt: places[id(prompt)])


def read_prompts(source: str) -> list[Prompt]:
    """The prompts of a CSV file, or the miniature's held-out ones."""
    if source == "miniature":
        from spatialalign.miniature.world import prompts

        return prompts("eval")
    return read_csv(source)


def run(args: Evaluate) -> dict[str, Any]:
    """Load model and tracker, evaluate, and print the table."""
    prompts, seeds = spread(read_prompts(args.prompts), args.limit), parse_seeds(args.seeds)
    rewards = args.reward.split(",") if args.reward else []
    arms, guide = parse_arms(args.arms or ""), guide_spec(rewards, args.guide_options)
    arms = with_looks(arms, args.preview_reward is not None, args.keep, args.threshold)
    check_given(arms, args.lora, guide)

    from spatialalign.backbones import load_backbone
    from spatialalign.backbones.loading import pick_device
    from spatialalign.tracking.load import load_tracker

    backbone = load_backbone(args.model, args.device, args.dtype, args.expert)
    tracker = load_tracker(args.tracker, pick_device(args.device), args.rule)
    given = {name: value for name in ("steps", "guidance", "guidance_2") if (value := getattr(args, name)) is not None}
    settings = dataclasses.replace(backbone.default_settings(), **given)
    if args.arms is not None:
        compared = compare_arms(
            backbone,
            tracker,
            prompts,
            seeds,
            arms,
            args.out,
            settings,
            args.batch,
            args.lora,
            args.lora_scale,
            guide,
            args.preview_reward,
        )
        measure_beside(args, compared)
        return compared
    assert args.lora is not None, "without arms there is a LoRA"
    result = evaluate(
        backbone,
        tracker,
        prompts,
        seeds,
        args.lora,
        args.out,
        settings,
        args.batch,
        args.lora_scale,
        args.swapped,
        record=args.record,
    )
    print(f"{table(result)}\n{args.out / 'metrics.json'}")
    measure_beside(args, result)
    return result


def measure_beside(args: Evaluate, result: dict[str, Any]) -> None:
    """The metrics beside the score, if any was asked for, over the clips of the result, into ``out/metrics``."""
    if args.metric_options:
        from training.metrics import measure_evaluation

        measure_evaluation(args.out, result, MetricOptions(**args.metric_options), args.device)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m training.evaluate``."""
    command(Evaluate, run, argv)


if __name__ == "__main__":
    main()
