"""Reward guidance on the miniature: what it gains, what noise in its training is worth, and two objectives weighed.

``python -m benchmarks.guidance`` guides unseen prompts with the shipped latent reward. The clips that rewards are
trained on are made when a part needs them and they are not there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from benchmarks import background_labels
from benchmarks.ablation import picture
from spatialalign.errors import ConfigError
from spatialalign.files import read_json, write_json
from training.cli import command
from training.latent_reward_settings import RewardSettings
from training.stages import parse_seeds
from training.store import Store

if TYPE_CHECKING:
    from spatialalign.backbones.base import Backbone
    from spatialalign.guidance import GuidanceSettings
    from spatialalign.prompts import Prompt
    from spatialalign.tracking.tracker import Tracker
    from training.guide import GuideSpec

FORMS: tuple[Literal["x0", "nrg"], ...] = ("x0", "nrg")
PARTS = ("time", "main", "clean", "blocks", "objectives")
OBJECTIVES = ((0.0, 1.0), (0.2, 0.8), (0.5, 0.5), (0.8, 0.2), (1.0, 0.0))
"""Weights of the two dimensions, DSR and quality, each in standard deviations (methods: VideoReward, Table 6)."""
BATCH = 16


@dataclass(frozen=True)
class Guidance:
    """Guide the miniature's unseen prompts by a latent reward, and measure score, picture and time."""

    out: Path = Path("benchmarks/out/guidance")
    """Output folder: guidance.json, guidance.md, a store for every arm, rewards that were trained."""
    parts: str = "time,main,clean,blocks,objectives"
    """What to measure: time; main (base, and guided in both forms); clean (main, and a reward that never saw noise);
    blocks (main, and a reward of one block); objectives (weights of two dimensions)."""
    reward: Path | None = None
    """Latent reward with the dimensions dsr, valid and quality; null for the shipped one."""
    clips: Path | None = None
    """Store of training clips; null for one in the output folder, filled as far as it is not."""
    train_seeds: str = "0-7"
    """Seeds of the training clips."""
    seeds: str = "4000-4002"
    """Seeds of the held-out prompts; all of them start from the same noise."""
    limit: int | None = None
    """Take only so many of the held-out prompts; null for all 96."""
    train_steps: int | None = None
    """Optimiser steps of rewards that are trained here; null for the default."""

    def chosen(self) -> list[str]:
        """The parts; raises :class:`ConfigError` for an unknown one."""
        parts = self.parts.split(",")
        if unknown := [part for part in parts if part not in PARTS]:
            raise ConfigError(f"parts must be among {', '.join(PARTS)}, found {unknown[0]!r}")
        return parts


@dataclass(frozen=True)
class Bench:
    """What the arms share."""

    args: Guidance
    backbone: Backbone
    tracker: Tracker
    prompts: list[Prompt]

    def arm(self, name: str, seeds: Sequence[int], guide: GuideSpec | None) -> dict[str, Any]:
        """Sample, track and score what is missing of an arm; its clips and pictures."""
        from training.evaluate import score_all
        from training.sample import sample_clips

        store = Store(self.args.out / "arms" / name.replace(" ", "-"), create=True)
        settings = self.backbone.default_settings()
        made = sample_clips(self.backbone, store, self.prompts, seeds, settings, guide=guide, batch=BATCH)
        clips = score_all(store, self.tracker, self.prompts, seeds, made)
        fidelity = background_labels.fidelity_of(store, self.prompts, seeds)
        look = picture(store, self.prompts, seeds) | {"fidelity": fidelity}
        known = {key: None if math.isnan(value) else value for key, value in look.items()}
        return {"arm": name, "clips": clips, "picture": known}


def guidance_settings(form: Literal["nrg", "x0"] = "x0", weights: dict[str, float] | None = None) -> GuidanceSettings:
    """The settings that guide the miniature well; other weights for the part objectives.

    With them the first three or four guided steps are as long as the step cap lets them, and later ones shorter.
    """
    from spatialalign.guidance import GuidanceSettings

    return GuidanceSettings(form, strength=1000.0, end=0.6, step_cap=0.5, weights=weights or {"dsr": 1.0})


def spec_of(file: Path, form: Literal["nrg", "x0"], weights: dict[str, float] | None = None) -> GuideSpec:
    """One reward with those settings."""
    from training.guide import GuideSpec

    return GuideSpec(((file, 1.0),), guidance_settings(form, weights))


def run(args: Guidance) -> dict[str, Any]:
    """Run the parts, write both files and return what the first one holds."""
    from spatialalign.backbones import load_backbone
    from spatialalign.miniature import REWARD, world
    from spatialalign.rewards.latent import load_reward
    from spatialalign.tracking.load import load_tracker
    from training.evaluate import spread

    parts, seeds = args.chosen(), parse_seeds(args.seeds)
    prompts = spread(world.prompts("eval"), args.limit)
    bench = Bench(args, load_backbone("miniature", "cpu"), load_tracker("miniature"), prompts)
    file = args.reward or REWARD
    path = args.out / "guidance.json"
    result: dict[str, Any] = read_json(path) if path.is_file() else {}
    if "time" in parts:
        result["time"] = seconds(bench.backbone, spec_of(file, "x0"), prompts)
    if {"main", "clean", "blocks"} & set(parts):
        arms = [bench.arm("base", seeds, None)]
        arms += [bench.arm(f"noisy {form}", seeds, spec_of(file, form)) for form in FORMS]
        if "clean" in parts:
            clean = train_reward(bench, "clean", RewardSettings(noisy=False))
            files = {"x0": clean, "nrg": as_if_it_knew_noise(clean)}
            arms += [bench.arm(f"clean {form}", seeds, spec_of(files[form], form)) for form in FORMS]
        if "blocks" in parts:
            one = spec_of(train_reward(bench, "one-block", RewardSettings(blocks=1)), "x0")
            arms.append(bench.arm("one block x0", seeds, one))
            result["time of one block"] = seconds(bench.backbone, one, prompts)
        result["main"] = [row_of(arm, arms[0]) for arm in arms]
    if "objectives" in parts:
        deviation = load_reward(file).info.statistics["score_deviation"]
        arms = [bench.arm("base", seeds, None)]
        for dsr, quality in OBJECTIVES:
            weights = {"dsr": dsr / deviation, background_labels.DIMENSION: quality}
            arms.append(bench.arm(f"dsr {dsr:g} quality {quality:g}", seeds, spec_of(file, "x0", weights)))
        result["objectives"] = [row_of(arm, arms[0]) for arm in arms]
    write_json(path, result)
    text = "\n\n".join(table(result[part]) for part in ("main", "objectives") if part in result)
    (args.out / "guidance.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n{result.get('time', '')}")
    return result


def train_reward(bench: Bench, name: str, settings: RewardSettings) -> Path:
    """A reward trained as the shipped one was, on the same clips, but for some settings; its file."""
    from training import latent_reward
    from training.generate import generate
    from training.score import score

    args, backbone = bench.args, bench.backbone
    folder = args.out / name
    if (folder / latent_reward.FILE).is_file():
        return folder / latent_reward.FILE
    store = Store(args.clips or args.out / "clips", create=True)
    if args.clips is None:
        from spatialalign.miniature import world

        seeds = parse_seeds(args.train_seeds)
        for summary in (
            generate(backbone, store, world.prompts("train"), seeds, backbone.default_settings(), BATCH),
            score(store, bench.tracker),
        ):
            print(summary.text(), flush=True)
    labels = args.out / "quality.csv"
    background_labels.run(background_labels.BackgroundLabels(store.root, labels))
    if args.train_steps is not None:
        settings = replace(settings, steps=args.train_steps)
    result = latent_reward.train(backbone, store, folder, settings, labels)
    if result.file is None:
        raise KeyboardInterrupt
    return result.file


def as_if_it_knew_noise(file: Path) -> Path:
    """A copy of a reward of clean clips that says it saw noisy ones, so that the form nrg does not refuse it.

    How badly it does is what is to be measured.
    """
    from spatialalign.rewards.latent import load_reward, save_reward

    reward, path = load_reward(file), file.with_name("as_if_it_knew_noise.safetensors")
    if not path.is_file():
        reward.info = replace(reward.info, trained_on="noisy")
        save_reward(path, reward)
    return path


def seconds(backbone: Backbone, guide: GuideSpec, prompts: Sequence[Prompt], rounds: int = 5) -> dict[str, float]:
    """Seconds of sampling a clip alone, without decoder and tracker, base and guided in turn; medians of the rounds.

    ``ratio`` is the median of the rounds' own ratios, ``evaluations`` the same by counted passes of the transformer.
    """
    from spatialalign.backbones.flow import sampling_sigmas

    settings = backbone.default_settings()
    chosen = list(prompts[:BATCH])
    text = backbone.encode_text([prompt.text for prompt in chosen])
    make = guide.load(backbone, text[0].shape[-1])
    sigmas = sampling_sigmas(settings.steps, settings.shift).tolist()
    noise = backbone.noise(range(len(chosen)), settings)
    took: dict[bool, list[float]] = {False: [], True: []}
    passes: dict[bool, float] = {}
    for number in range(rounds + 1):
        for guided in (False, True):
            started = time.perf_counter()
            with backbone.flow(text, text[0], settings, make(sigmas) if guided else None) as flow:
                flow.run(noise)
            if number:  # the first round warms up
                took[guided].append((time.perf_counter() - started) / len(chosen))
            passes[guided] = flow.evaluations
    ratios = [two / one for one, two in zip(took[False], took[True], strict=True)]
    return {
        "base": round(median(took[False]), 4),
        "guided": round(median(took[True]), 4),
        "ratio": round(median(ratios), 3),
        "evaluations": round(passes[True] / passes[False], 3),
    }


def row_of(arm: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """The numbers of one arm."""
    from training.measure import difference, summarise

    summary, change = summarise(arm["clips"]), difference(base["clips"], arm["clips"])
    names = ("videos", "correct_at_0.7", "invalid_rate", "mean_score", "robust_correct_at_0.7")
    return {
        "arm": arm["arm"],
        **{name: summary[name] for name in names},
        "difference": change["correct_at_0.7"],
        "invalid_difference": change["invalid_rate"],
        "picture": arm["picture"],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The arms as Markdown."""

    def share(value: dict[str, float], sign: str = "") -> str:
        return f"{100 * value['value']:{sign}.1f} [{100 * value['low']:{sign}.1f}, {100 * value['high']:{sign}.1f}]"

    def number(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    head = ["arm", "clips", "Correct@0.7, %", "against base, points", "INVALID, %", "against base, points"]
    head += ["mean score", "robust Correct@0.7, %", "background PSNR, dB", "of frames with both boxes"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for index, row in enumerate(rows):
        cells = [row["arm"], str(row["videos"]), share(row["correct_at_0.7"])]
        cells += [share(row["difference"], "+") if index else "", share(row["invalid_rate"])]
        cells += [share(row["invalid_difference"], "+") if index else "", number(row["mean_score"]["value"], ".3f")]
        cells += [share(row["robust_correct_at_0.7"]), number(row["picture"]["background_psnr"], ".2f")]
        cells.append(number(row["picture"]["fidelity"], ".2f"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m benchmarks.guidance``."""
    command(Guidance, run, argv)


if __name__ == "__main__":
    main()
