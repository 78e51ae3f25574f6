"""What a pair costs, in operations, memory and seconds, against the official recipe on the same transformer.

``python -m benchmarks.dpo_cost`` counts the operations and the bytes alive of one pair at the full shape of
Wan2.1-T2V-1.3B (30 blocks, 32,760 tokens) on the meta device, where nothing is computed, and times the miniature. What
is counted is the trainer's own gradient function.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.meter import Meter, attention_in_one_operator
from benchmarks.official import official_gradients, reference_copy
from benchmarks.wan_shapes import FULL, Shape, build, side, tensors_of
from spatialalign.backbones.base import Backbone
from training.cli import command
from training.config import TrainSettings
from training.gradients import Loss, Pair, Side, pair_gradients
from training.losses import pair_loss
from training.memory import passes_on, set_up, take_down
from training.presets import PRESETS
from training.trainer import add_adapter

PAPER = PRESETS["spatialalign"]
LOW_MEMORY = replace(PAPER, passes="one-sample", offload_inputs=True)
RECIPES: dict[str, tuple[TrainSettings, bool]] = {
    "default": (PAPER, False),
    "selective": (replace(PAPER, checkpointing="selective"), False),
    "selective, cached reference": (replace(PAPER, checkpointing="selective"), True),
    "full, cached reference": (PAPER, True),
    "one sample": (replace(PAPER, passes="one-sample"), False),
    "one sample, selective": (replace(PAPER, passes="one-sample", checkpointing="selective"), False),
    "low memory: one sample, inputs on the host": (LOW_MEMORY, False),
    "low memory, base in 8 bits": (replace(LOW_MEMORY, base_dtype="fp8"), False),
    "nothing recomputed": (replace(PAPER, checkpointing="none"), False),
    "nothing recomputed, cached reference": (replace(PAPER, checkpointing="none"), True),
}
"""Settings of the trainer, and whether the reference's predictions are read from disk."""

REPORTED = {
    "flops_selective": ("selective", "flops"),
    "flops_cached_reference": ("selective, cached reference", "flops"),
    "peak_default": ("default", "peak"),
    "peak_low_memory": ("low memory: one sample, inputs on the host", "peak"),
}


@dataclass(frozen=True)
class Cost:
    """Operations of a pair and most bytes alive at once, weights included."""

    flops: int
    peak: int


@dataclass(frozen=True)
class DpoCost:
    """Count what a training pair costs and compare with the official recipe."""

    json: bool = False
    """Print one line of JSON with the ratios to the official recipe instead of the tables."""
    seconds: bool = True
    """Also time the miniature (tables only)."""
    rounds: int = 7
    """Timed rounds of either recipe, in turn."""


def run(args: DpoCost) -> None:
    """Count, and print."""
    names = {name for name, _ in REPORTED.values()} if args.json else set(RECIPES)
    official = official_cost(FULL)
    costs = {name: cost(FULL, *recipe) for name, recipe in RECIPES.items() if name in names}
    if args.json:
        print(json.dumps(ratios(official, costs)))
        return
    print(table(official, costs))
    if args.seconds:
        print("\n" + "\n".join(seconds_table(miniature_seconds(args.rounds))))


def ratios(official: Cost, costs: dict[str, Cost]) -> dict[str, float]:
    """The four numbers of ``--json``."""
    return {
        key: round(getattr(costs[name], what) / getattr(official, what), 4) for key, (name, what) in REPORTED.items()
    }


def official_cost(shape: Shape) -> Cost:
    """A pair by the official recipe: deep copy, four forward passes, every block checkpointed."""
    backbone = build(shape, "meta")
    reference = reference_copy(backbone.transformer)
    add_adapter(backbone, PAPER)
    backbone.transformer.enable_gradient_checkpointing()
    winner, loser = (side(shape, "meta") for _ in range(2))
    return _count(
        lambda: official_gradients(backbone.transformer, reference, winner, loser),
        [*tensors_of(backbone.transformer, reference), winner.noisy, winner.target, loser.noisy, loser.target],
    )


def cost(shape: Shape, settings: TrainSettings, cached_reference: bool) -> Cost:
    """A pair by the trainer's own gradient function."""
    backbone = build(shape, "meta")
    add_adapter(backbone, settings)
    set_up(backbone, settings, shape.latents)
    winner, loser = (side(shape, "meta") for _ in range(2))
    reference = (torch.empty_like(winner.target), torch.empty_like(loser.target)) if cached_reference else None
    return _count(
        lambda: gradients(backbone, winner, loser, settings, reference),
        [
            *tensors_of(backbone.transformer),
            *(winner.noisy, winner.target, loser.noisy, loser.target),
            *(reference or ()),
        ],
    )


def gradients(backbone: Backbone, winner: Side, loser: Side, settings: TrainSettings, reference: Pair | None) -> None:
    """The trainer's gradient function, called as the trainer calls it."""
    passes = passes_on(settings, backbone.device)
    pair_gradients(backbone, winner, loser, loss_of(settings), len(winner.noisy), passes, reference)


def loss_of(settings: TrainSettings) -> Loss:
    """The trainer's loss."""
    objective = settings.objective()
    return lambda winner, loser: pair_loss(winner, loser, objective)


def _count(work: Callable[[], object], alive: Sequence[torch.Tensor]) -> Cost:
    with attention_in_one_operator(), Meter(alive) as meter:
        work()
    return Cost(meter.flops, meter.peak)


def table(official: Cost, costs: dict[str, Cost]) -> str:
    """Operations and bytes as Markdown."""
    lines = ["| recipe | TFLOP a pair | to official | peak, GB | to official |", "|---|---|---|---|---|"]
    for name, found in {"official": official, **costs}.items():
        lines.append(
            f"| {name} | {found.flops / 1e12:,.1f} | {found.flops / official.flops:.3f} "
            f"| {found.peak / 1e9:.2f} | {found.peak / official.peak:.3f} |"
        )
    return "\n".join(lines)


def miniature_seconds(rounds: int, pairs: int = PRESETS["miniature"].micro_pairs) -> dict[str, list[float]]:
    """Seconds a pair on the miniature: the official recipe, and the trainer with its settings for it; in turn.

    ``pairs`` are taken in one micro-batch by the trainer, one after the other by the official recipe.
    """
    from spatialalign.backbones import load_backbone

    settings = PRESETS["miniature"]
    official, ours = (load_backbone("miniature", "cpu") for _ in range(2))
    transformer: Any = official.transformer
    shape = Shape(dict(transformer.config), ours.latent_shape(ours.default_settings()))
    reference = reference_copy(official.transformer)
    for backbone in (official, ours):
        add_adapter(backbone, settings)
    transformer.enable_gradient_checkpointing()
    set_up(ours, settings, shape.latents)
    winners, losers = (side(shape, "cpu", pairs, seed, text_tokens=MINIATURE_TOKENS) for seed in (0, 1))

    def official_step() -> None:
        for index in range(pairs):
            official_gradients(official.transformer, reference, winners.part(index), losers.part(index))

    found: dict[str, list[float]] = {"official": [], "trainer": []}
    steps: dict[str, Callable[[], None]] = {
        "official": official_step,
        "trainer": lambda: gradients(ours, winners, losers, settings, None),
    }
    for turn in range(rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if turn:  # the first round warms up
                found[name].append((time.perf_counter() - started) / pairs)
    take_down(ours)
    return found


MINIATURE_TOKENS = 28
"""Text tokens of a prompt of the miniature's kind, about."""


def seconds_table(seconds: dict[str, list[float]]) -> list[str]:
    """Medians as Markdown."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    lines = ["| miniature | median s a pair | fastest | slowest | to official |", "|---|---|---|---|---|"]
    for name, values in seconds.items():
        ratio = medians[name] / medians["official"]
        lines.append(f"| {name} | {medians[name]:.4f} | {min(values):.4f} | {max(values):.4f} | {ratio:.3f} |")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m benchmarks.dpo_cost``; ``--json`` may stand alone."""
    given = list(sys.argv[1:] if argv is None else argv)
    command(DpoCost, run, ["--json=true" if is_flag(given, index) else word for index, word in enumerate(given)])


def is_flag(argv: Sequence[str], index: int) -> bool:
    """Whether the word at ``index`` is ``--json`` without a value."""
    return argv[index] == "--json" and (index + 1 == len(argv) or argv[index + 1].startswith("--"))


if __name__ == "__main__":
    main()
