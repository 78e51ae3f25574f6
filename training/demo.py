"""The whole loop on the shipped miniature, small enough for two processor cores: ``python -m training.demo``."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spatialalign.errors import ConfigError
from spatialalign.files import read_json, write_json
from training.cli import command

if TYPE_CHECKING:
    from spatialalign.backbones.base import Backbone, SampleSettings
    from spatialalign.prompts import Prompt
    from spatialalign.tracking.tracker import Tracker
    from training.config import TrainSettings

STAGES = ("prompts", "load", "generate", "score", "mine", "dpo", "evaluate", "report")
FIRST_HELD_OUT_SEED = 1000
"""Seeds of the evaluation start here, so that it shares no noise with the training clips either."""


@dataclass(frozen=True)
class Sizes:
    """How much of everything the demo does.

    Attributes:
        train_prompts, train_seeds: clips that pairs are mined from.
        held_out_prompts, held_out_seeds: clips that both models are measured on.
        swapped_prompts: held-out prompts of the swapped-caption control.
        sampling_steps: of every clip; None for the model's own.
        dpo_steps: optimiser steps; None for the preset's.
        batch: clips generated at once.
    """

    train_prompts: int
    train_seeds: int
    held_out_prompts: int
    held_out_seeds: int
    swapped_prompts: int
    sampling_steps: int | None = None
    dpo_steps: int | None = None
    batch: int = 16

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name == "swapped_prompts" else 1
            if value is not None and value < least:
                raise ConfigError(f"{field.name} must be at least {least}, found {value}")
        if self.train_seeds < 2:
            raise ConfigError("train_seeds must be at least 2: a pair needs two clips of one prompt")


FULL = Sizes(train_prompts=144, train_seeds=4, held_out_prompts=96, held_out_seeds=3, swapped_prompts=24)
SHORT = Sizes(train_prompts=24, train_seeds=4, held_out_prompts=12, held_out_seeds=2, swapped_prompts=6, dpo_steps=24)


@dataclass(frozen=True)
class Demo:
    """Align the miniature: prompts, clips, tracks, scores, pairs, LoRA, evaluation on unseen prompts, report.

    Stopped and started again it continues. Options left at null take the demo's own sizes.
    """

    out: Path = Path("demo")
    """Output folder: result.json, report.html, and everything they were made from."""
    short: bool = False
    """About two minutes instead of fifteen: too few clips for a conclusion, enough to see that every part works."""
    seed: int = 0
    """Seed of the training; other seeds in the same folder share its clips and its evaluation of the base model."""
    device: str = "cpu"
    """cpu, cuda, mps or auto."""
    train_prompts: int | None = None
    """Prompts that training clips are made for."""
    train_seeds: int | None = None
    """Clips of each of them."""
    held_out_prompts: int | None = None
    """Unseen prompts to evaluate on."""
    held_out_seeds: int | None = None
    """Clips of each of them, by either model."""
    swapped_prompts: int | None = None
    """Unseen prompts of the control with swapped captions."""
    sampling_steps: int | None = None
    """Sampling steps of every clip."""
    dpo_steps: int | None = None
    """Optimiser steps of the training."""
    batch: int | None = None
    """Clips generated at once."""

    def sizes(self) -> Sizes:
        """The demo's sizes with the options given on top."""
        names = [field.name for field in dataclasses.fields(Sizes)]
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return dataclasses.replace(SHORT if self.short else FULL, **given)


class Clock:
    """Seconds by stage, summed over the runs that a stopped and continued demo took, in ``seconds.json``."""

    def __init__(self, path: Path) -> None:
        """Continue counting from ``path``, if it is there."""
        self.path = path
        self.seconds: dict[str, float] = dict(read_json(path)) if path.is_file() else {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage and count its time, also when it fails."""
        print(f"\n[{STAGES.index(name) + 1}/{len(STAGES)}] {name}", flush=True)
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - started, 2)
            write_json(self.path, self.seconds)


def run(args: Demo) -> dict[str, Any] | None:
    """Run the loop; returns the content of result.json, or None when training was stopped by a signal."""
    from training.report import Report
    from training.report import run as report

    sizes, out = args.sizes(), args.out
    clock = Clock(out / "seconds.json")
    with clock.stage("prompts"):
        train, held_out = choose_prompts(out, sizes)
    with clock.stage("load"):
        backbone, tracker, settings = load(args.device, sizes)
    with clock.stage("generate"):
        make_clips(out, backbone, train, sizes, settings)
    with clock.stage("score"):
        score_clips(out, tracker)
    with clock.stage("mine"):
        pairs = mine_pairs(out)
    with clock.stage("dpo"):
        lora = train_lora(out, backbone, pairs, training_settings(args.seed, sizes))
    if lora is None:
        print("stopped; run the same command again to continue")
        return None
    with clock.stage("evaluate"):
        metrics = compare(out, backbone, tracker, held_out, lora, sizes, settings)
    with clock.stage("report"):
        page = report(
            Report(
                evaluation=out / "evaluation",
                out=out / "report.html",
                training_log=lora.parent / "train.jsonl",
                seconds=clock.path,
                title="The miniature, before and after",
            )
        )
    result = outcome(metrics, clock.seconds, lora.parent, sizes, args.seed)
    write_json(out / "result.json", result)
    write_json(out / "results" / f"seed{args.seed}.json", result)
    print(conclusion(metrics, result, page))
    return result


def choose_prompts(out: Path, sizes: Sizes) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts, which share no (subject, object, scene), also as CSV files."""
    from spatialalign.miniature.world import prompts
    from spatialalign.prompts import write_csv
    from training.evaluate import spread

    train, held_out = spread(prompts("train"), sizes.train_prompts), spread(prompts("eval"), sizes.held_out_prompts)
    shared = {prompt.triple for prompt in train} & {prompt.triple for prompt in held_out}
    if shared:
        raise ConfigError(f"training and held-out prompts share {sorted(shared)}")
    for name, chosen in (("train", train), ("held_out", held_out)):
        write_csv(out / f"{name}.csv", chosen)
        print(f"{name}: {len(chosen)} prompts, for example: {chosen[0].text}")
    return train, held_out


def load(device: str, sizes: Sizes) -> tuple[Backbone, Tracker, SampleSettings]:
    """The miniature's generator and tracker, and how clips are sampled."""
    from spatialalign.backbones import load_backbone
    from spatialalign.backbones.loading import pick_device
    from spatialalign.tracking.load import load_tracker

    backbone = load_backbone("miniature", device, "float32")
    settings = backbone.default_settings()
    if sizes.sampling_steps is not None:
        settings = dataclasses.replace(settings, steps=sizes.sampling_steps)
    return backbone, load_tracker("miniature", pick_device(device), batch=settings.frames), settings


def make_clips(
    out: Path, backbone: Backbone, prompts: Sequence[Prompt], sizes: Sizes, settings: SampleSettings
) -> None:
    """Sample the training clips."""
    from training.generate import generate
    from training.store import Store

    store = Store(out / "store", create=True)
    print(generate(backbone, store, prompts, range(sizes.train_seeds), settings, sizes.batch).text())


def score_clips(out: Path, tracker: Tracker) -> None:
    """Track and score them."""
    from training.score import score
    from training.store import Store

    print(score(Store(out / "store"), tracker).text())


def mine_pairs(out: Path) -> Path:
    """Sort them into winners and losers; returns the manifest."""
    from training.mine import Mine
    from training.mine import run as mine

    mine(Mine(store=out / "store"))
    return out / "store" / "pairs.json"


def training_settings(seed: int, sizes: Sizes) -> TrainSettings:
    """The miniature's preset with this seed and the demo's number of steps."""
    from training.presets import PRESETS

    preset = PRESETS["miniature"]
    steps = sizes.dpo_steps or preset.steps
    return dataclasses.replace(preset, seed=seed, steps=steps, warmup_steps=min(preset.warmup_steps, steps // 4))


def train_lora(
    out: Path, backbone: Backbone, pairs: Path, settings: TrainSettings, folder: Path | None = None
) -> Path | None:
    """Train, or find the LoRA that the same settings and pairs gave before; None when stopped by a signal.

    ``folder`` takes the LoRA. By default it is named after the seed and a digest of settings and pairs, so that a demo
    with other sizes in the same ``out`` begins afresh.
    """
    from training.config import fingerprint
    from training.dpo import train
    from training.pairs import read_pairs
    from training.store import Store

    digest = read_pairs(pairs)[1]
    if folder is None:
        folder = out / "lora" / f"seed{settings.seed}-{fingerprint({**settings.to_dict(), 'pairs': digest})[:8]}"
    lora, summary = folder / "lora_comfyui.safetensors", folder / "summary.json"
    if lora.is_file() and summary.is_file():
        known = read_json(summary)
        if known["settings"] == settings.to_dict() and known["lora"]["pairs_digest"] == digest:
            print(f"there before: {lora}")
            return lora
    result = train(backbone, Store(out / "store"), pairs, folder, settings)
    if result.finished and result.held_out is not None:
        print(f"implicit accuracy on held-out pairs: {result.held_out['accuracy']:.3f}")
    return result.comfy


def compare(
    out: Path,
    backbone: Backbone,
    tracker: Tracker,
    prompts: Sequence[Prompt],
    lora: Path,
    sizes: Sizes,
    settings: SampleSettings,
) -> dict[str, Any]:
    """Evaluate base and aligned model on the held-out prompts, with the same noise."""
    from training.evaluate import evaluate

    return evaluate(
        backbone,
        tracker,
        prompts,
        range(FIRST_HELD_OUT_SEED, FIRST_HELD_OUT_SEED + sizes.held_out_seeds),
        lora,
        out / "evaluation",
        settings,
        sizes.batch,
        swapped=sizes.swapped_prompts,
        name=f"aligned-{lora.parent.name}",
    )


def outcome(metrics: dict[str, Any], seconds: dict[str, float], lora: Path, sizes: Sizes, seed: int) -> dict[str, Any]:
    """What result.json says."""
    from training.measure import plain

    training = read_json(lora / "summary.json")
    return {
        "base": plain(metrics["base"]),
        "aligned": plain(metrics["aligned"]),
        "difference": metrics["difference"],
        "chance": {arm: value["value"] for arm, value in metrics["controls"]["chance"].items()},
        "swapped_captions": metrics["controls"]["swapped"],
        "prompts": metrics["prompts"],
        "seeds": len(metrics["seeds"]),
        "videos": metrics["base"]["videos"],
        "training": {"seed": seed, "held_out": training["held_out"], "settings": training["settings"]},
        "sizes": dataclasses.asdict(sizes),
        "seconds": seconds,
        "versions": metrics["versions"],
    }


def conclusion(metrics: dict[str, Any], result: dict[str, Any], page: Path) -> str:
    """The last thing printed: the table, the times and where to look."""
    from training.measure import table

    stages = ", ".join(f"{name} {value:.0f}" for name, value in result["seconds"].items())
    head = f"{result['videos']} clips of {result['prompts']} unseen prompts by each model; [95 % interval over prompts]"
    total = f"{sum(result['seconds'].values()) / 60:.1f} minutes (seconds: {stages})"
    return f"\n{head}\n\n{table(metrics)}\n\n{total}\n{page}\n{page.parent / 'result.json'}"


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m training.demo``; ``--short`` alone means ``--short true``."""
    given = list(sys.argv[1:] if argv is None else argv)
    followed = [*given[1:], ""]
    bare = [k for k, word in enumerate(given) if word == "--short" and followed[k] not in ("true", "false")]
    command(Demo, run, ["--short=true" if k in bare else word for k, word in enumerate(given)])


if __name__ == "__main__":
    main()
