"""Flow-DPO, Flow-RWR and SFT on one and on two rewards: the miniature's version of VideoReward's tables 4 and 5.

``python -m benchmarks.alignment`` uses the training clips of the demo's folder, and makes them when they are not there.
The second reward is the background's fidelity, whose truth is known. Where a training raises the reward that its pairs
were labelled by and lowers the other one, or the robust score, the reward was hacked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import background_labels
from spatialalign.errors import ConfigError
from spatialalign.files import read_json, write_json
from spatialalign.tracks import Tracks
from spatialalign.video import read_video
from training import demo
from training.cli import command
from training.config import TrainSettings
from training.store import Sample, Store

if TYPE_CHECKING:
    from spatialalign.backbones.base import Backbone, SampleSettings
    from spatialalign.prompts import Prompt
    from spatialalign.tracking.tracker import Tracker
    from training.measure import Scored

QUALITY = background_labels.DIMENSION
OBJECTIVES = {"dsr": {"dsr": 1.0}, "dsr+quality": {"dsr": 1.0, QUALITY: 1.0}}
"""What the pairs are labelled by: the analogues of table 5, one dimension, and of table 4, all of them 1:1."""
ARMS = ("sft", "rwr", "dpo-level", "dpo-constant")


@dataclass(frozen=True)
class Alignment:
    """Train every arm on pairs of every objective, and measure both rewards on unseen prompts."""

    demo: Path = Path("demo")
    """Folder of the demo, whose training clips are used; what is missing is made."""
    out: Path = Path("benchmarks/out/alignment")
    """Output folder: alignment.json, alignment.md, labels, pairs, and a folder for every arm."""
    arms: str = "sft,rwr,dpo-level,dpo-constant"
    """sft; rwr; dpo-level: Flow-DPO with beta (1 - t)^2; dpo-constant: with beta alone."""
    objectives: str = "dsr,dsr+quality"
    """What pairs are labelled by: dsr, dsr+quality (1:1)."""
    steps: int = 200
    """Optimiser steps of each training."""
    batch_pairs: int = 16
    """Pairs in a step."""
    beta: float = 500.0
    """Of both Flow-DPO arms."""
    lr: float = 5e-4
    """Peak learning rate."""
    margin: float = 1.0
    """Least difference between winner and loser, in standard deviations within a prompt."""
    held_out_prompts: int | None = None
    """Unseen prompts; null for all 96."""
    seeds: int = 1
    """Clips of each of them."""
    seed: int = 0
    """Seed of the trainings."""

    def plan(self) -> list[tuple[str, str]]:
        """Every objective with every arm; raises :class:`ConfigError` for an unknown one."""
        arms, objectives = self.arms.split(","), self.objectives.split(",")
        unknown = [arm for arm in arms if arm not in ARMS] + [name for name in objectives if name not in OBJECTIVES]
        if unknown:
            known = f"arms must be among {', '.join(ARMS)} and objectives among {', '.join(OBJECTIVES)}"
            raise ConfigError(f"{known}, found {unknown[0]!r}")
        return [(objective, arm) for objective in objectives for arm in arms]

    def settings(self, arm: str) -> TrainSettings:
        """The miniature's preset, with the loss, the noise levels and the margin of Flow-DPO (methods 2.5)."""
        from training.presets import PRESETS

        common = replace(
            PRESETS["miniature"],
            seed=self.seed,
            steps=self.steps,
            warmup_steps=min(20, self.steps // 4),
            batch_pairs=self.batch_pairs,
            micro_pairs=self.batch_pairs,
            lr=self.lr,
            beta=self.beta,
            half_beta=True,
            clip=None,
            shift=1.0,
        )
        if arm in ("sft", "rwr"):
            return replace(common, arm=arm)  # type: ignore[arg-type]
        return replace(common, arm="dpo", error_of="noise" if arm == "dpo-level" else "velocity")


@dataclass(frozen=True)
class Measured:
    """An evaluated clip: its score, and its picture's fidelity in dB, NaN where the tracker never saw both things."""

    scored: Scored
    quality: float


@dataclass(frozen=True)
class Bench:
    """What the arms share."""

    args: Alignment
    backbone: Backbone
    tracker: Tracker
    sampling: SampleSettings
    prompts: list[Prompt]

    def measure(self, folder: Path, lora: Path | None) -> list[Measured]:
        """Sample, track and score what is missing of a model's clips, by prompt and seed."""
        from spatialalign.lora import unload_lora
        from training.evaluate import fill
        from training.generate import put_lora

        store = Store(folder, create=True)
        seeds = range(demo.FIRST_HELD_OUT_SEED, demo.FIRST_HELD_OUT_SEED + self.args.seeds)
        name = None if lora is None else put_lora(self.backbone, lora, 1.0)
        try:
            clips = fill(store, self.backbone, self.tracker, self.prompts, seeds, self.sampling, demo.FULL.batch, name)
        finally:
            if lora is not None:
                unload_lora(self.backbone.transformer)
        scenes = {prompt.prompt_id: prompt.dsr.scene for prompt in self.prompts}
        samples = [store.sample(clip.prompt_id, clip.seed) for clip in clips]
        return [
            Measured(clip, quality_of(sample, scenes[clip.prompt_id]))
            for clip, sample in zip(clips, samples, strict=True)
        ]


def run(args: Alignment) -> list[dict[str, Any]]:
    """Run what is missing, write both files and return the rows: the base first, then every objective and arm."""
    plan = args.plan()
    sizes = replace(demo.FULL, held_out_prompts=args.held_out_prompts or demo.FULL.held_out_prompts)
    train, held_out = demo.choose_prompts(args.out, sizes)
    backbone, tracker, sampling = demo.load("cpu", sizes)
    if not (args.demo / "store").is_dir():
        demo.make_clips(args.demo, backbone, train, sizes, sampling)
        demo.score_clips(args.demo, tracker)
    labels = label(args)
    bench = Bench(args, backbone, tracker, sampling, held_out)
    base = bench.measure(args.out / "base", None)
    rows = [row_of("", "base", base, base, None)]
    for objective, arm in plan:
        print(f"\n{objective}, {arm}", flush=True)
        pairs = mine(args, labels, objective)
        folder = args.out / f"{objective}-{arm}-{args.steps}-seed{args.seed}"
        lora = demo.train_lora(args.demo, backbone, pairs, args.settings(arm), folder / "lora")
        if lora is None:
            print("stopped; run the same command again to continue")
            break
        clips = bench.measure(folder / "clips", lora)
        rows.append(row_of(objective, arm, base, clips, read_json(lora.parent / "summary.json")["held_out"]))
        write_json(args.out / "alignment.json", rows)
        (args.out / "alignment.md").write_text(table(rows) + "\n", encoding="utf-8")
    print(f"\n{table(rows)}")
    return rows


def label(args: Alignment) -> Path:
    """Label the training clips in both dimensions, once."""
    from training.label import Label
    from training.label import run as collect

    quality, labels = args.out / "quality.csv", args.out / "labels.csv"
    if not labels.is_file():
        background_labels.run(background_labels.BackgroundLabels(args.demo / "store", quality))
        collect(Label(args.demo / "store", f"dsr,csv:{quality}", labels))
    return labels


def mine(args: Alignment, labels: Path, objective: str) -> Path:
    """The pairs of an objective; mined once."""
    from training.mine import Mine
    from training.mine import run as find

    path = args.out / f"pairs-{objective}.json"
    if not path.is_file():
        weights = OBJECTIVES[objective]
        find(Mine(args.demo / "store", path, rule="margin", margin=args.margin, labels=labels, weights=weights))
    return path


def quality_of(sample: Sample, scene: str) -> float:
    """Fidelity of a clip's background; NaN where it is not known."""
    if not (sample.video.is_file() and sample.tracks.is_file()):
        return math.nan
    return background_labels.fidelity(read_video(sample.video).frames, Tracks.load(sample.tracks), scene)


def win_rate(base: Sequence[float], values: Sequence[float]) -> list[float | None]:
    """1 where a value is above the base's, 1/2 where equal, 0 below, None where either is NaN."""
    signs = np.sign(np.asarray(values, dtype=np.float64) - np.asarray(base, dtype=np.float64))
    return [None if math.isnan(sign) else float(0.5 + 0.5 * sign) for sign in signs]


def row_of(
    objective: str, arm: str, base: Sequence[Measured], clips: Sequence[Measured], training: dict[str, float] | None
) -> dict[str, Any]:
    """The numbers of one model. An INVALID clip has the score -1 where models are compared: it loses to any other."""
    from training.measure import mean_entry, summarise

    prompts = [clip.scored.prompt_id for clip in clips]
    summary = summarise([clip.scored for clip in clips])
    scores = [[-1.0 if c.scored.score is None else c.scored.score for c in some] for some in (base, clips)]
    quality = [[c.quality for c in some] for some in (base, clips)]
    return {
        "objective": objective,
        "arm": arm,
        **{n: summary[n] for n in ("videos", "correct_at_0.7", "invalid_rate", "mean_score", "robust_correct_at_0.7")},
        QUALITY: mean_entry(quality[1], prompts),
        "wins": mean_entry(win_rate(*scores), prompts),
        f"{QUALITY}_wins": mean_entry(win_rate(*quality), prompts),
        "held_out_pairs": training,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The outcome as Markdown."""

    def interval(value: dict[str, float], unit: float = 100.0, form: str = ".1f") -> str:
        return f"{unit * value['value']:{form}} [{unit * value['low']:{form}}, {unit * value['high']:{form}}]"

    head = ["pairs by", "arm", "Correct@0.7, %", "INVALID, %", "mean score", "robust Correct@0.7, %"]
    head += ["background PSNR, dB", "wins by score, %", "wins by PSNR, %", "norm of v"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        trained = row["held_out_pairs"]
        cells = [row["objective"], row["arm"], interval(row["correct_at_0.7"]), interval(row["invalid_rate"])]
        cells += [interval(row["mean_score"], 1, ".3f"), interval(row["robust_correct_at_0.7"])]
        cells += [interval(row[QUALITY], 1, ".2f")]
        wins = ("wins", f"{QUALITY}_wins")
        cells += ["" if row["arm"] == "base" else interval(row[name]) for name in wins]
        cells += [f"{trained['norm_ratio']:.3f}" if trained else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m benchmarks.alignment``."""
    command(Alignment, run, argv)


if __name__ == "__main__":
    main()
