"""The losses of a clip reward compared where the truth and the share of ties are known (methods: 2.6, ablation).

``python -m benchmarks.reward_losses`` trains a tiny Qwen2-VL on the same labelled pairs by four recipes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import reward_world
from benchmarks.reward_world import World
from spatialalign.agreement import accuracy_with_ties, accuracy_without_ties, chance_with_ties, spearman
from spatialalign.files import write_json
from spatialalign.rewards.video_reward_config import SCORED
from training.cli import command
from training.reward_model_settings import RewardModelSettings
from training.reward_pairs import RewardPairs, read_pairs

RECIPES: dict[str, dict[str, Any]] = {
    "regression": {"loss": "regression", "tokens": "last", "outputs": 3},
    "BT": {"loss": "bt", "tokens": "last", "outputs": 3},
    "BTT": {"loss": "btt", "tokens": "last", "outputs": 3},
    "BTT, separate tokens": {"loss": "btt", "tokens": "special", "outputs": 1},
}
"""The rows of the paper's ablation: without tokens of their own the three scores are read at the last token."""
_DRAWS, _WARMUP = 1000, 40
_TIE, _DECIDED, _INK, _PAPER = (217, 119, 47), (52, 110, 180), (40, 40, 40), (255, 255, 255)
_BINS, _FAR = 16, 3.0

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RewardLosses:
    """Train by every recipe on drawn clips with known labels, and compare on clips that no training saw."""

    out: Path = Path("benchmarks/out/reward_losses")
    """Output folder: clips, checkpoints, reward_losses.json, reward_losses.md, margins.png."""
    groups: int = 300
    """Groups of four clips, hence six pairs, to train on."""
    held_out: int = 100
    """Groups to compare on."""
    steps: int = 1600
    """Optimiser steps of 16 pairs."""
    lr: float = 1.5e-3
    """Learning rate."""
    seed: int = 0
    """Seed of the training."""


def run(args: RewardLosses) -> dict[str, Any]:
    """Run the recipes, write the files and return what the first one holds."""
    started = time.process_time()
    base = reward_world.write_base(args.out / "base")
    train_file, _ = reward_world.write_pairs(args.out / "train", World(args.groups))
    test_file, truth = reward_world.write_pairs(args.out / "test", World(args.held_out, seed=1))
    pairs, test = read_pairs(train_file), read_pairs(test_file)
    margins, rows = dict[str, Floats](), list[dict[str, Any]]()
    for name in RECIPES:
        margins[name] = margins_of(name, args, base, pairs, test)
        rows.append({"recipe": name, **measured(test, margins[name], truth)})
    result = {
        "pairs": len(pairs),
        "test_pairs": len(test),
        "ties": {name: float((test.preference[:, i] == 0).mean()) for i, name in enumerate(SCORED)},
        "chance_with_ties": {name: chance_with_ties(test.preference[:, i]) for i, name in enumerate(SCORED)},
        "rows": rows,
        "cpu_seconds": round(time.process_time() - started),
    }
    write_json(args.out / "reward_losses.json", result)
    text = table(result)
    (args.out / "reward_losses.md").write_text(text + "\n", encoding="utf-8")
    _save(args.out / "margins.png", picture(margins, test))
    print(f"\n{text}\n{result['cpu_seconds']} s of processor time")
    return result


def settings_of(name: str, args: RewardLosses) -> RewardModelSettings:
    """The settings of a recipe."""
    return RewardModelSettings(
        **RECIPES[name],
        rank=32,
        alpha=32.0,
        fps=reward_world.FPS,
        max_pixels=reward_world.MAX_PIXELS,
        steps=args.steps,
        batch_pairs=16,
        micro_pairs=16,
        lr=args.lr,
        warmup=min(0.5, _WARMUP / args.steps),
        seed=args.seed,
        held_out_every=max(1, args.steps // 4),
        checkpoint_every=max(1, args.steps // 4),
    )


def margins_of(name: str, args: RewardLosses, base: Path, pairs: RewardPairs, test: RewardPairs) -> Floats:
    """Score differences A - B ``(n, 3)`` of the test pairs by a network trained by a recipe."""
    import torch

    from spatialalign.rewards.video_reward_text import Instruction
    from training.reward_model import train
    from training.reward_model_trainer import RewardModelTrainer
    from training.reward_network import new_judge

    settings, out = settings_of(name, args), args.out / name.replace(", ", "-").replace(" ", "-")
    instruction = Instruction(reward_world.TEMPLATE, "the benchmark's instruction")
    judge = new_judge(str(base), settings, instruction, torch.device("cpu"), torch.float32)
    if not train(judge, pairs, test, out, settings).finished:
        raise KeyboardInterrupt
    return RewardModelTrainer(judge, pairs, test, settings, out, {}).margins(test)


def measured(test: RewardPairs, margins: Floats, truth: Floats) -> dict[str, Any]:
    """By dimension, and as mean over them: accuracies, how far apart ties are from decided pairs, rank correlation.

    Each accuracy has half the width of its 95 % interval over groups of clips.
    """
    row: dict[str, Any] = {}
    for index, name in enumerate(SCORED):
        label, margin = test.preference[:, index].astype(np.float64), margins[:, index]
        row[name] = {
            "without_ties": _with_width(lambda a, b: accuracy_without_ties(a, b) or 0.0, label, margin),
            "with_ties": _with_width(lambda a, b: accuracy_with_ties(a, b).accuracy, label, margin),
            "ties_below_decided": above(np.abs(margin[label != 0]), np.abs(margin[label == 0])),
            "rank_correlation": spearman(truth[:, index], margin),
        }
    for key in ("without_ties", "with_ties"):
        row[key] = float(np.mean([row[name][key][0] for name in SCORED]))
    return row


def above(one: Floats, other: Floats) -> float:
    """How often a value of ``one`` is larger than one of ``other``; equal ones count half."""
    difference = one[:, None] - other[None, :]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def _with_width(accuracy: Callable[[Floats, Floats], float], label: Floats, margin: Floats) -> tuple[float, float]:
    """An accuracy and half the width of its 95 % interval: whole groups of six pairs are drawn again and again."""
    random, rows = np.random.default_rng(0), np.arange(len(label)).reshape(-1, 6)
    drawn = [rows[random.integers(len(rows), size=len(rows))].ravel() for _ in range(_DRAWS)]
    values = [accuracy(label[chosen], margin[chosen]) for chosen in drawn]
    low, high = np.quantile(values, (0.025, 0.975))
    return accuracy(label, margin), float(high - low) / 2


def table(result: Mapping[str, Any]) -> str:
    """The comparison as Markdown: accuracies in per cent, with ties / without."""
    head = ["recipe", "mean", *SCORED, *(f"{name} ties below decided" for name in SCORED)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in result["rows"]:
        cells = [row["recipe"], f"{100 * row['with_ties']:.1f} / {100 * row['without_ties']:.1f}"]
        for name in SCORED:
            pair = [row[name][key] for key in ("with_ties", "without_ties")]
            cells.append(" / ".join(f"{100 * value:.1f} ± {100 * width:.1f}" for value, width in pair))
        cells += [f"{row[name]['ties_below_decided']:.2f}" for name in SCORED]
        lines.append("| " + " | ".join(cells) + " |")
    chance = result["chance_with_ties"]
    cells = ["chance", f"{100 * np.mean(list(chance.values())):.1f} / 50"]
    cells += [f"{100 * chance[name]:.1f} / 50" for name in SCORED] + ["0.50"] * len(SCORED)
    return "\n".join([*lines, "| " + " | ".join(cells) + " |"])


def picture(margins: Mapping[str, Floats], test: RewardPairs) -> NDArray[np.uint8]:
    """Histograms of the size of the score difference, of ties and of decided pairs, one row for each recipe.

    A difference is in deviations of its recipe's and dimension's own differences; each histogram has the area 1.
    """
    from spatialalign.chart import Axes, Canvas

    wide, high, left, top = 250, 130, 150, 54
    canvas = Canvas((left + 3 * wide + 10, top + high * len(margins) + 50), _PAPER)
    for place, (colour, word) in zip((left, left + 130), ((_TIE, "ties"), (_DECIDED, "decided")), strict=True):
        canvas.area(((place, 10), (place + 14, 22)), colour)
        canvas.text((place + 20, 16), word, _INK, 13)
    edges = np.linspace(0, _FAR, _BINS + 1)
    for row, (recipe, values) in enumerate(margins.items()):
        upper = top + row * high
        for line, words in enumerate(recipe.split(", ")):
            canvas.text((10, upper + high / 2 - 14 + 18 * line), words, _INK, 14)
        for index, name in enumerate(SCORED):
            if row == 0:
                canvas.text((left + wide * (index + 0.5), 40), name, _INK, 14, "mm")
            size, label = np.abs(values[:, index]) / values[:, index].std(), test.preference[:, index]
            heights = [_histogram(size[label == 0], edges), _histogram(size[label != 0], edges)]
            box = (left + index * wide + 8, upper + 8, left + (index + 1) * wide - 8, upper + high - 12)
            axes = Axes(canvas, box, (0, _FAR), (0, 1.05 * float(np.max(heights))))
            for shape, colour in zip(heights, (_TIE, _DECIDED), strict=True):
                x, y = np.repeat(edges, 2)[1:-1], np.repeat(shape, 2)
                canvas.line([axes.at(a, b) for a, b in zip(x, y, strict=True)], colour, 2)
            canvas.line((axes.at(0, 0), axes.at(_FAR, 0)), _INK, 1)
            if row == len(margins) - 1:
                axes.columns([(tick, f"{tick:g}") for tick in (0, 1, 2, 3)], _INK, 12)
    words = "size of the score difference of A and B, in deviations"
    canvas.text((left + 1.5 * wide, top + high * len(margins) + 38), words, _INK, 13, "mm")
    return canvas.finish()


def _histogram(values: Floats, edges: Floats) -> Floats:
    """Density over the bins; what lies beyond the last one counts in it."""
    return np.histogram(np.minimum(values, edges[-1] - 1e-9), edges, density=True)[0]


def _save(path: Path, image: NDArray[np.uint8]) -> None:
    from PIL import Image

    Image.fromarray(image).save(path)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m benchmarks.reward_losses``."""
    command(RewardLosses, run, argv)


if __name__ == "__main__":
    main()
