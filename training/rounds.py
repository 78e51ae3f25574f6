"""Align in rounds, each on clips of the model that the round before made: ``python -m training.rounds``.

A round samples training clips, scores them, sorts them into pairs and trains a LoRA. The first samples from the base
model, every other one from the base model with the last round's LoRA. Layout of the output folder::

    rounds.json             the plan and one entry per finished round
    table.md                Correct@0.7 by round
    round-01/store/         clips, tracks, scores, pairs.json
    round-01/lora/          the LoRA in both formats, checkpoints, logs
    evaluation/             clips of the held-out prompts, by the base model and after each round
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spatialalign.errors import ConfigError, DataError
from spatialalign.files import atomic_path, read_json, write_json
from spatialalign.prompts import Prompt, read_csv
from training.cli import command, options_of
from training.config import TrainSettings, describe_changes
from training.evaluate import read_prompts, spread
from training.presets import PRESETS, Preset
from training.rounds_table import table
from training.store import Store

if TYPE_CHECKING:
    from spatialalign.backbones.base import Backbone, SampleSettings
    from spatialalign.tracking.tracker import Tracker

logger = logging.getLogger(__name__)

FIRST_HELD_OUT_SEED = 500_000
"""Seeds of the held-out clips start here, so that no training clip of any round shares their noise."""


@dataclass(frozen=True)
class Rounds:
    """Sample, score, mine and train, then again with the LoRA just trained; the same command continues a stopped run.

    Options of the training that are not given take the value of the preset.
    """

    model: str
    """Base model: a diffusers folder (Wan 2.1, 2.2 or LTX-Video), a hub id, or "miniature"."""
    prompts: Path
    """CSV file of training prompts with the official columns."""
    out: Path
    """Output folder."""
    rounds: int = 2
    """How many rounds; a larger number continues finished ones."""
    clips: int = 5
    """Clips of each prompt in a round; every round has seeds of its own."""
    held_out_prompts: str | None = None
    """CSV file of prompts to measure every round on, or "miniature" for the miniature's own; null for none."""
    held_out_limit: int | None = None
    """Take only so many of them, spread evenly over the types; null for all."""
    held_out_clips: int = 2
    """Clips of each held-out prompt, from the same noise after every round."""
    preset: Preset = "spatialalign"
    """Training method, as in training.dpo."""
    threshold: float | None = None
    """A clip with at least this score wins; null for 0.7."""
    sampling_steps: int | None = None
    """Sampling steps of every clip; null for the model's own."""
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
    """Expert of Wan 2.2 A14B that is trained and carries the LoRA: high (also null) or low; both sample."""
    allow_changes: bool = False
    """Continue although settings, model or prompts differ from those of the rounds and checkpoints that are there."""
    options: dict[str, Any] = options_of(TrainSettings)

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("clips", 2), ("held_out_clips", 1), ("batch", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, found {getattr(self, name)}")
        if self.rounds * self.clips > FIRST_HELD_OUT_SEED:
            raise ConfigError(
                f"rounds ({self.rounds}) together with clips ({self.clips}) reach the seeds of the held-out clips; "
                "lower either"
            )

    def settings(self) -> TrainSettings:
        """The preset with the options given on top; its seed is that of the first round."""
        return dataclasses.replace(PRESETS[self.preset], **self.options)


@dataclass(frozen=True)
class Plan:
    """Everything that a round needs and that no round may change.

    Attributes:
        out: output folder.
        backbone: base model, without an adapter between the stages.
        tracker: finds subject and object.
        prompts, clips: the training clips of a round.
        held_out, held_out_clips: those to measure it on; no prompts, no measuring.
        sampling: how every clip is sampled.
        training: how a round is trained; the seed is that of the first.
        threshold: of winners; None for 0.7.
        batch: clips at once.
    """

    out: Path
    backbone: Backbone
    tracker: Tracker
    prompts: Sequence[Prompt]
    clips: int
    held_out: Sequence[Prompt]
    held_out_clips: int
    sampling: SampleSettings
    training: TrainSettings
    threshold: float | None = None
    batch: int = 4

    def identity(self) -> dict[str, Any]:
        """What must be the same when a run is continued, as plain values."""
        expert = {} if self.backbone.expert is None else {"expert": self.backbone.expert}
        return {
            **self.training.to_dict(),
            **expert,
            "base_model": self.backbone.model_id,
            "prompts": _digest(self.prompts),
            "clips": self.clips,
            "held_out_prompts": _digest(self.held_out),
            "held_out_clips": self.held_out_clips,
            "sampling": self.sampling.to_dict(),
            "threshold": self.threshold,
            "tracking_rule": self.tracker.rule,
        }

    def folder(self, number: int) -> Path:
        """Folder of a round, counted from 1."""
        return self.out / f"round-{number:02d}"

    def seeds(self, number: int) -> range:
        """Seeds of a round's training clips: no two rounds share one."""
        return range((number - 1) * self.clips, number * self.clips)

    def lora(self, number: int) -> Path | None:
        """The LoRA of a finished training; None for round 0, the base model."""
        return None if number == 0 else self.folder(number) / "lora" / "lora_comfyui.safetensors"


def run_rounds(plan: Plan, rounds: int, allow_changes: bool = False) -> list[dict[str, Any]] | None:
    """Run what is not there yet; ``allow_changes`` continues rounds and checkpoints of another plan with this one.

    Returns:
        The entries of rounds.json, or None when training was stopped by a signal.

    Raises:
        ConfigError: the folder holds rounds of another plan.
        DataError: a round found no pairs; its number is named.
    """
    entries = _entries(plan, allow_changes)
    for number in range(len(entries) + 1, rounds + 1):
        print(f"\nround {number} of {rounds}", flush=True)
        pairs = plan.folder(number) / "store" / "pairs.json"
        if not pairs.is_file():
            _make_pairs(plan, number)
        if not _train(plan, number, pairs, allow_changes):
            return None
        entries.append(_entry(plan, number, pairs, _measure(plan, number)))
        _write(plan, entries)
    return entries


def _entries(plan: Plan, allow_changes: bool) -> list[dict[str, Any]]:
    """The rounds finished before, in the folder of the same plan or, where changes are allowed, of another."""
    path = plan.out / "rounds.json"
    if not path.is_file():
        _write(plan, [])
    known = read_json(path)
    changes = describe_changes(known["plan"], plan.identity())
    if changes and not allow_changes:
        raise ConfigError(
            f"{path} belongs to another run: {'; '.join(changes)}. Restore these, choose another --out, or set "
            "--allow_changes true"
        )
    for change in changes:
        logger.warning("continuing although %s", change)
    return list(known["rounds"])


def _write(plan: Plan, entries: Sequence[Mapping[str, Any]]) -> None:
    write_json(plan.out / "rounds.json", {"version": 1, "plan": plan.identity(), "rounds": list(entries)})
    with atomic_path(plan.out / "table.md") as temporary:
        temporary.write_text(table(entries) + "\n", encoding="utf-8")


@contextmanager
def _generator(plan: Plan, lora: Path | None) -> Iterator[str | None]:
    """The base model with a LoRA on it; yields its name in the files, None for the base model."""
    from spatialalign.lora import unload_lora
    from training.generate import put_lora

    if lora is None:
        yield None
        return
    try:
        yield put_lora(plan.backbone, lora, 1.0)
    finally:
        unload_lora(plan.backbone.transformer)


def _make_pairs(plan: Plan, number: int) -> None:
    """Sample with the last round's model, score and mine. The pairs come last and say that all of it is done."""
    from training.generate import generate
    from training.mine import Mine
    from training.mine import run as mine
    from training.score import score

    store = Store(plan.folder(number) / "store", create=True)
    with _generator(plan, plan.lora(number - 1)) as name:
        made = generate(plan.backbone, store, plan.prompts, plan.seeds(number), plan.sampling, plan.batch, name)
    print(made.text(), flush=True)
    scored = score(store, plan.tracker)
    print(scored.text(), flush=True)
    if made.busy or scored.busy:
        raise DataError(
            f"round {number}: {made.busy + scored.busy} clips are claimed by another process; run the same command "
            "again when it is done"
        )
    try:
        mine(Mine(store=store.root, threshold=plan.threshold))
    except DataError as error:
        raise DataError(f"round {number}: {error}") from error


def _train(plan: Plan, number: int, pairs: Path, allow_changes: bool) -> bool:
    """Train the round's LoRA on the base model; False when stopped by a signal."""
    from training.dpo import train

    folder, lora = plan.folder(number), plan.lora(number)
    if lora is not None and lora.is_file() and (lora.parent / "summary.json").is_file():
        return True
    settings = dataclasses.replace(plan.training, seed=plan.training.seed + number - 1)
    return train(
        plan.backbone, Store(folder / "store"), pairs, folder / "lora", settings, allow_changes, tracker=plan.tracker
    ).finished


def _measure(plan: Plan, number: int) -> dict[str, Any] | None:
    """Evaluate the round's model on the held-out prompts, beside the base model; None without such prompts."""
    from training.evaluate import evaluate
    from training.measure import plain

    lora = plan.lora(number)
    if not plan.held_out or lora is None:
        return None
    seeds = range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + plan.held_out_clips)
    result = evaluate(
        plan.backbone,
        plan.tracker,
        plan.held_out,
        seeds,
        lora,
        plan.out / "evaluation",
        plan.sampling,
        plan.batch,
        name=f"round-{number:02d}",
    )
    return {
        "base": plain(result["base"]),
        "aligned": plain(result["aligned"]),
        "intervals": {arm: result[arm]["correct_at_0.7"] for arm in ("base", "aligned")},
        "difference": result["difference"]["correct_at_0.7"],
    }


def _entry(plan: Plan, number: int, pairs: Path, held_out: Mapping[str, Any] | None) -> dict[str, Any]:
    """What rounds.json says of a finished round."""
    mined, lora = read_json(pairs)["statistics"], plan.folder(number) / "lora"
    summary = read_json(lora / "summary.json")
    usable = mined["winners"] + mined["losers"] + mined["invalid"]
    return {
        "round": number,
        "seeds": list(plan.seeds(number)),
        "training_clips": {
            "generator": "base" if number == 1 else f"base + LoRA of round {number - 1}",
            "correct_at_0.7": mined["winners"] / usable if plan.threshold is None and usable else None,
            **{name: mined[name] for name in ("pairs", "prompts_with_pairs", "winners", "losers", "invalid")},
        },
        "training": {
            "step": summary["step"],
            "seed": summary["settings"]["seed"],
            "held_out_pairs": summary["held_out"],
        },
        "held_out": held_out,
        "lora": str((lora / "lora_comfyui.safetensors").relative_to(plan.out)),
    }


def _digest(prompts: Sequence[Prompt]) -> str:
    """Sixteen hexadecimal digits of a set of prompts, in its order."""
    text = json.dumps([[prompt.prompt_id, prompt.text] for prompt in prompts])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_apart(train: Sequence[Prompt], held_out: Sequence[Prompt]) -> None:
    """Refuse held-out prompts that share a (subject, object, scene) with a training prompt."""
    if shared := {prompt.triple for prompt in train} & {prompt.triple for prompt in held_out}:
        raise ConfigError(
            f"{len(shared)} held-out prompts have subject, object and scene of a training prompt, e.g. "
            f"{', '.join(sorted(shared)[0])}; a gain on them would prove nothing: take others"
        )


def run(args: Rounds) -> list[dict[str, Any]] | None:
    """Load the models, run the rounds and print the table."""
    from spatialalign.claims import exclusive

    prompts = read_csv(args.prompts)
    held_out = [] if args.held_out_prompts is None else spread(read_prompts(args.held_out_prompts), args.held_out_limit)
    check_apart(prompts, held_out)
    settings = args.settings()

    args.out.mkdir(parents=True, exist_ok=True)
    with exclusive(args.out / ".lock", f"the folder of rounds {args.out}"):
        backbone, tracker, sampling = load(args)
        plan = Plan(
            args.out,
            backbone,
            tracker,
            prompts,
            args.clips,
            held_out,
            args.held_out_clips,
            sampling,
            settings,
            args.threshold,
            args.batch,
        )
        entries = run_rounds(plan, args.rounds, args.allow_changes)
    if entries is None:
        print("stopped; run the same command again to continue", file=sys.stderr)
        return None
    print(f"\n{table(entries)}\n{args.out / 'rounds.json'}")
    return entries


def load(args: Rounds) -> tuple[Backbone, Tracker, SampleSettings]:
    """Generator, tracker, and how clips are sampled."""
    from spatialalign.backbones import load_backbone
    from spatialalign.backbones.loading import pick_device
    from spatialalign.tracking.load import load_tracker

    backbone = load_backbone(args.model, args.device, args.dtype, args.expert)
    sampling = backbone.default_settings()
    if args.sampling_steps is not None:
        sampling = dataclasses.replace(sampling, steps=args.sampling_steps)
    return backbone, load_tracker(args.tracker, pick_device(args.device), args.rule), sampling


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m training.rounds``."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    command(Rounds, run, argv)


if __name__ == "__main__":
    main()
