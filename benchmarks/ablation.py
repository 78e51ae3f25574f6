"""The paper's ablation on the miniature: what each loss does to the score and to the picture as training goes on.

``python -m benchmarks.ablation`` uses the clips and pairs of the demo's folder, and makes them when they are not there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spatialalign.errors import ConfigError
from spatialalign.files import read_json, write_json
from spatialalign.prompts import Prompt
from spatialalign.tracks import Tracks
from spatialalign.video import read_video
from training import demo
from training.cli import command
from training.config import TrainSettings
from training.store import Store

ARMS = ("dpo", "dpo+sft", "dpo+zo", "sft")
BORDER = 3
"""Pixels about a box that are not counted as background: outlines and the blur of the decoder."""


@dataclass(frozen=True)
class Ablation:
    """Train every arm for every length on the demo's pairs, and measure score and picture on unseen prompts."""

    demo: Path = Path("demo")
    """Folder of the demo, whose clips, pairs and base evaluation are used; what is missing is made."""
    out: Path = Path("benchmarks/out")
    """Output folder: ablation.json, ablation.md, and a folder for every arm and length."""
    arms: str = "dpo,dpo+sft,dpo+zo"
    """Arms, of dpo, dpo+sft, dpo+zo and sft (winners alone, a control)."""
    steps: str = "200,800"
    """Lengths of training in optimiser steps; each has its own learning-rate schedule."""
    seed: int = 0
    """Seed of the training."""
    held_out_prompts: int | None = None
    """Unseen prompts; null for the demo's."""
    held_out_seeds: int | None = None
    """Clips of each of them."""
    device: str = "cpu"
    """cpu, cuda, mps or auto."""

    def plan(self) -> list[tuple[str, int]]:
        """Every arm with every length; raises :class:`ConfigError` for an unknown arm or a length that is no number."""
        arms, lengths = self.arms.split(","), self.steps.split(",")
        unknown = [arm for arm in arms if arm not in ARMS] + [n for n in lengths if not n.isdigit() or int(n) < 1]
        if unknown:
            raise ConfigError(f"arms must be among {', '.join(ARMS)} and steps whole numbers, found {unknown}")
        return [(arm, int(steps)) for arm in arms for steps in lengths]


def run(args: Ablation) -> list[dict[str, Any]]:
    """Run what is missing, write both files and return the rows: the base first, then every arm and length."""
    from spatialalign.lora import load_lora, unload_lora
    from training.evaluate import fill
    from training.generate import lora_model_name

    plan = args.plan()
    sizes = demo.Demo(held_out_prompts=args.held_out_prompts, held_out_seeds=args.held_out_seeds).sizes()
    train, held_out = demo.choose_prompts(args.demo, sizes)
    backbone, tracker, sampling = demo.load(args.device, sizes)
    demo.make_clips(args.demo, backbone, train, sizes, sampling)
    demo.score_clips(args.demo, tracker)
    pairs = demo.mine_pairs(args.demo)
    seeds = range(demo.FIRST_HELD_OUT_SEED, demo.FIRST_HELD_OUT_SEED + sizes.held_out_seeds)
    store = Store(args.demo / "evaluation" / "base", create=True)
    base = fill(store, backbone, tracker, held_out, seeds, sampling, sizes.batch)
    rows = [row_of("base", 0, base, base, picture(store, held_out, seeds), None)]
    for arm, steps in plan:
        print(f"\n{arm}, {steps} steps", flush=True)
        folder = args.out / f"{arm.replace('+', '-')}-{steps}-seed{args.seed}"
        lora = demo.train_lora(args.demo, backbone, pairs, settings_of(arm, steps, args.seed, sizes), folder / "lora")
        if lora is None:
            print("stopped; run the same command again to continue")
            break
        load_lora(backbone.transformer, lora)
        try:
            store = Store(folder / "clips", create=True)
            name = lora_model_name(backbone.model_id, lora, 1.0)
            clips = fill(store, backbone, tracker, held_out, seeds, sampling, sizes.batch, name)
        finally:
            unload_lora(backbone.transformer)
        training = read_json(lora.parent / "summary.json")["held_out"]
        rows.append(row_of(arm, steps, base, clips, picture(store, held_out, seeds), training))
        write_json(args.out / "ablation.json", rows)
        (args.out / "ablation.md").write_text(table(rows) + "\n", encoding="utf-8")
    print(f"\n{table(rows)}")
    return rows


def settings_of(arm: str, steps: int, seed: int, sizes: demo.Sizes) -> TrainSettings:
    """The demo's settings for another arm and length."""
    settings = demo.training_settings(seed, dataclasses.replace(sizes, dpo_steps=steps))
    return dataclasses.replace(settings, arm=arm)  # type: ignore[arg-type]


def row_of(
    arm: str,
    steps: int,
    base: Sequence[Any],
    clips: Sequence[Any],
    look: dict[str, float],
    training: dict[str, float] | None,
) -> dict[str, Any]:
    """The numbers of one arm and length."""
    from training.measure import difference, summarise

    summary, change = summarise(clips), difference(base, clips)
    names = ("correct_at_0.7", "invalid_rate", "mean_score", "robust_correct_at_0.7")
    return {
        "arm": arm,
        "steps": steps,
        "videos": summary["videos"],
        **{name: summary[name] for name in names},
        "difference": change["correct_at_0.7"],
        "picture": look,
        "held_out_pairs": training,
    }


def picture(store: Store, prompts: Sequence[Prompt], seeds: Sequence[int]) -> dict[str, float]:
    """How good the pictures of a store are, means over its clips.

    * ``background_psnr``: dB between the scene as the world draws it and the frames, away from the boxes: the world is
      drawn, so the true background is known;
    * ``saturation``, ``contrast``: mean of max - min over the colour channels, standard deviation of the luminance, in
      0 to 1;
    * ``confidence``: the detector's, over all boxes, 0 where one is absent.
    """
    values: dict[str, list[float]] = {"background_psnr": [], "saturation": [], "contrast": [], "confidence": []}
    for prompt in prompts:
        for seed in seeds:
            sample = store.sample(prompt.prompt_id, seed)
            if not (sample.generated and sample.tracks.is_file()):
                continue
            frames, tracks = read_video(sample.video).frames, Tracks.load(sample.tracks)
            unit = frames.astype(np.float64) / 255
            values["background_psnr"].append(background_psnr(frames, tracks, prompt.dsr.scene))
            values["saturation"].append(float((unit.max(-1) - unit.min(-1)).mean()))
            values["contrast"].append(float((unit @ [0.299, 0.587, 0.114]).std(axis=(1, 2)).mean()))
            values["confidence"].append(float(tracks.confidence.mean()))
    return {name: round(float(np.nanmean(numbers)), 4) for name, numbers in values.items()}


def background_psnr(frames: NDArray[np.uint8], tracks: Tracks, scene: str) -> float:
    """PSNR in dB between frames ``(T, H, W, 3)`` and the drawn scene where no box is within three pixels."""
    from spatialalign.miniature.sprites import background

    away = np.ones(frames.shape[:3], dtype=bool)
    for frame, pair in zip(away, tracks.boxes, strict=True):
        for box in pair[~np.isnan(pair[:, 0])]:
            x1, y1, x2, y2 = box.round().astype(int)
            frame[max(0, y1 - BORDER) : y2 + BORDER, max(0, x1 - BORDER) : x2 + BORDER] = False
    truth = np.broadcast_to(background(scene, frames.shape[1]), frames.shape)
    if not away.any():
        return float("nan")
    error = float(np.square(frames[away] / 255.0 - truth[away]).mean())
    return 10 * float(np.log10(1 / max(error, 1e-10)))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The outcome as Markdown."""

    def share(value: dict[str, float], sign: str = "") -> str:
        return f"{100 * value['value']:{sign}.1f} [{100 * value['low']:{sign}.1f}, {100 * value['high']:{sign}.1f}]"

    head = ["arm", "steps", "Correct@0.7, %", "against base, points", "INVALID, %", "robust Correct@0.7, %"]
    head += ["background PSNR, dB", "saturation", "detector confidence", "norm of v"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        held_out = row["held_out_pairs"]
        cells = [row["arm"], str(row["steps"]), share(row["correct_at_0.7"])]
        cells.append("" if row["arm"] == "base" else share(row["difference"], "+"))
        cells += [share(row["invalid_rate"]), share(row["robust_correct_at_0.7"])]
        cells += [f"{row['picture']['background_psnr']:.2f}", f"{row['picture']['saturation']:.4f}"]
        cells += [f"{row['picture']['confidence']:.3f}", f"{held_out['norm_ratio']:.3f}" if held_out else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m benchmarks.ablation``."""
    command(Ablation, run, argv)


if __name__ == "__main__":
    main()
