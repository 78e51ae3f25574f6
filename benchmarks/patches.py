"""Local defects on the miniature: whether the patch reward finds them, and whether Gran-DPO removes more than DPO.

Defects are black squares, which the world and its base model hardly ever draw, so that they can be counted by colour.
``python -m benchmarks.patches`` needs a store of the base model's clips, such as the demo's, and a latent reward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.background_labels import fidelity_of
from spatialalign.agreement import spearman
from spatialalign.blocks import BlockGrid, crops
from spatialalign.errors import DataError
from spatialalign.files import write_json
from spatialalign.prompts import Prompt
from spatialalign.video import read_video, write_video
from training.cli import command
from training.pairs import PromptPairs, manifest
from training.patch_scores import PatchScores, judge_blocks, teach, write_patches
from training.store import Sample, Store

if TYPE_CHECKING:
    from spatialalign.backbones.base import Backbone
    from spatialalign.rewards.patch import PatchReward

Damage = Literal["black", "mixed", "corners"]
GRID = BlockGrid(2, 4, 4)
DARK, RADIUS = (83, 52, 56), 37
"""RGB that a black square has after a round trip through the miniature's autoencoder (median), and how far 80 % of its
pixels are from that in any channel."""
DEFECT = 0.3
"""Share of dark pixels from which a block counts as defective; outlines of drawn things stay below."""
VISIBLE = 32
"""A pixel that is changed by more than this in any channel, of 255, counts as defective."""
CORNERS = ((0, 0), (0, 3), (3, 0), (3, 3))
FIRST_EVAL_SEED = 9000


@dataclass(frozen=True)
class Patches:
    """Plant defects, train a patch reward on them, and remove them from a generator by DPO and by Gran-DPO."""

    clips: Path = Path("demo/store")
    """Store of the base model's clips with latents."""
    reward: Path = Path("spatialalign/miniature/weights/reward/latent_reward.safetensors")
    """Video reward that the patch reward begins with."""
    out: Path = Path("benchmarks/out/patches")
    """Output folder: patches.json, patches.md, a heat map, and the folders of every stage; run again to continue."""
    damage: Literal["black", "mixed"] = "black"
    """Squares that the patch reward is trained on: black, or also of one colour, of noise, or of their mean colour."""
    prompts: int = 48
    """Prompts whose clips are used."""
    seeds: int = 3
    """Clips of each of them that are damaged, once for the reward and once for the generator."""
    own_seeds: int = 4
    """Clips of each of them by the damaged generator, for the pairs."""
    eval_prompts: int = 24
    """Held-out prompts."""
    eval_seeds: int = 2
    """Clips of each of them by every model."""
    reward_steps: int = 200
    """Optimiser steps of the patch reward."""
    defect_steps: int = 80
    """Optimiser steps in which the generator learns to draw defects."""
    dpo_steps: int = 20
    """Optimiser steps of every arm."""
    batch_pairs: int = 8
    """Pairs of each of their steps."""
    arms: str = "dpo@50,gran-dpo@50,dpo@5,gran-dpo@5"
    """dpo, dpo+sft, gran-dpo or gran-dpo+sft, and after @ their beta; blocks have the weight 1. None: stop when the
    patch reward is trained."""
    seed: int = 0
    """Seed of all trainings."""


def dark_share(frames: NDArray[np.uint8], prompt: str = "") -> float:
    """The share of black pixels, as the autoencoder gives them back; a teacher is one less it."""
    return float((np.abs(frames.astype(int) - np.array(DARK)).max(-1) <= RADIUS).mean())


def cleanness(frames: NDArray[np.uint8], prompt: str) -> float:
    """A teacher: the share of pixels that are not black."""
    return 1 - dark_share(frames)


def defects(store: Store, samples: Sequence[Sample]) -> NDArray[np.int64]:
    """Defective blocks of each sample's video."""
    shares = teach(store, samples, GRID, cleanness, "colour").values
    return np.array([int((1 - shares[s.prompt_id, s.seed] >= DEFECT).sum()) for s in samples], np.int64)


def paint(
    frames: NDArray[np.uint8], latent_frames: int, damage: Damage, random: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """A damaged clip, and the share of each block ``(F, R, C)`` whose pixels are not visibly changed.

    Squares of any size in half of all blocks, black or mixed (:func:`spoil`); with "corners" whole blocks in black, and
    each of those in the corners with a chance of one half.
    """
    painted = frames.copy()
    clean = np.ones(GRID.shape, np.float32)
    before, after = (crops(clip, GRID, latent_frames) for clip in (frames, painted))  # views of the clips
    for index, was, block in zip(np.ndindex(*GRID.shape), before, after, strict=True):
        struck = random.random() < 0.5
        height, width = block.shape[1:3]
        size = max(height, width) if damage == "corners" else int(random.integers(3, min(height, width) + 1))
        top, left = (int(random.integers(max(1, side - size + 1))) for side in (height, width))
        if struck and (damage != "corners" or index[1:] in CORNERS):
            square = block[:, top : top + size, left : left + size]
            square[:] = spoil(square, random) if damage == "mixed" else 0
            clean[index] = 1 - (np.abs(block.astype(int) - was).max(-1) > VISIBLE).mean()
    return painted, clean


def spoil(square: NDArray[np.uint8], random: np.random.Generator) -> NDArray[np.uint8]:
    """The pixels ``(t, h, w, 3)`` with one of four defects: black, one colour, noise, or their mean over the square."""
    kind = random.integers(4)
    if kind == 2:
        return random.integers(256, size=square.shape, dtype=np.uint8)
    colour = (np.zeros(3), random.integers(256, size=3), None, square.mean((0, 1, 2)))[kind]
    return np.broadcast_to(np.asarray(colour).round().astype(np.uint8), square.shape)


def plant(
    backbone: Backbone, source: Store, prompts: Sequence[Prompt], seeds: Sequence[int], out: Path, damage: Damage
) -> tuple[Store, PatchScores]:
    """Damage clips of ``source`` into the store ``out``, as far as they are missing; returns it and the truth."""
    import torch

    store, values = Store(out, create=True), {}
    for prompt in prompts:
        store.add_prompt(prompt)
        if not store.has_text(prompt.prompt_id):
            store.write_text(prompt.prompt_id, source.read_text(prompt.prompt_id), backbone.model_id)
        samples = [source.sample(prompt.prompt_id, seed) for seed in seeds]
        latents = torch.stack([sample.read_latents() for sample in samples])
        missing = not all(store.sample(prompt.prompt_id, seed).generated for seed in seeds)
        frames = backbone.decode(latents)
        number = int.from_bytes(prompt.prompt_id.encode(), "little")
        painted = []
        for seed, clip in zip(seeds, frames, strict=True):
            random = np.random.default_rng([number, seed, damage != "corners"])
            found, clean = paint(clip, latents.shape[2], damage, random)
            painted.append(found)
            values[prompt.prompt_id, seed] = clean
        if missing:
            for sample, clip, coded in zip(samples, painted, backbone.encode(np.stack(painted)), strict=True):
                new = store.sample(sample.prompt_id, sample.seed)
                new.write_latents(coded, sample.read_header())
                write_video(new.video, clip, backbone.fps)
    return store, PatchScores(GRID, f"planted squares ({damage})", values)


def found_by(scores: PatchScores, truth: PatchScores, clips: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """How well scores order the blocks of clips: rank correlation, its ceiling, how often a damaged block is lower.

    The ceiling is what a perfect order reaches that cannot know which of equally clean blocks is called the cleaner.
    """
    value, true = (np.concatenate([side.of(*clip).ravel() for clip in clips]) for side in (scores, truth))
    perfect = true + 1e-6 * np.random.default_rng(0).random(len(true))
    damaged = true < 1
    clean, pairs = int((~damaged).sum()), int(damaged.sum()) * int((~damaged).sum())
    above = int(np.argsort(np.argsort(value))[~damaged].sum()) - clean * (clean - 1) // 2
    return {
        "blocks": int(true.size),
        "damaged": int(damaged.sum()),
        "rank_correlation": agreement(value, true),
        "ceiling": agreement(perfect, true),
        "rank_correlation_of_damaged": agreement(value[damaged], true[damaged]),
        "auc": above / pairs if pairs else None,
    }


def agreement(one: NDArray[np.floating], other: NDArray[np.floating]) -> float | None:
    """The rank correlation; None where either does not vary."""
    found = spearman(one, other)
    return None if found is None else round(found, 4)


def train_reward(args: Patches, store: Store, truth: PatchScores) -> tuple[PatchReward, dict[str, Any]]:
    """The patch reward, and what it and the video reward's own blocks find in clips that were held out."""
    from spatialalign.rewards.latent import load_reward
    from spatialalign.rewards.patch import PatchReward, load_patch_reward
    from training.patch_reward import PatchSettings, split_clips, train

    warmup = min(20, args.reward_steps // 2)
    settings = PatchSettings(steps=args.reward_steps, warmup_steps=warmup, seed=args.seed, held_out=0.2)
    start = PatchReward.from_video(load_reward(args.reward), GRID)
    _, held_out = split_clips(truth, settings.held_out, settings.seed)
    samples = [store.sample(*clip) for clip in held_out]
    before = found_by(judge_blocks(store, samples, start, "start"), truth, held_out)
    result = train(start, store, truth, args.out / "reward", settings)
    if result.file is None:
        raise KeyboardInterrupt
    reward = load_patch_reward(result.file)
    after = found_by(judge_blocks(store, samples, reward, "patch reward"), truth, held_out)
    heat_map(args.out / "heat_map.png", reward, store, samples[0])
    return reward, {"held_out_clips": len(held_out), "video reward": before, "patch reward": after}


def heat_map(path: Path, reward: PatchReward, store: Store, sample: Sample) -> None:
    """A contact sheet of a damaged clip, plain and under its scores."""
    from spatialalign.patch_plot import draw_patches
    from spatialalign.plot import contact_sheet, save_png

    frames = read_video(sample.video).frames
    values = judge_blocks(store, [sample], reward, "patch reward").of(sample.prompt_id, sample.seed)
    drawn = draw_patches(frames, values, sample.read_latents().shape[1], (0.0, 1.0))
    sheet = contact_sheet([("damaged", frames), ("patch reward, veil from 1 down to 0", drawn)], 4, 240)
    save_png(path, sheet)


def train_lora(
    args: Patches, backbone: Backbone, store: Store, pairs: Path, name: str, out: Path, patches: Path | None = None
) -> Path:
    """A LoRA on the backbone: of the damaged clips themselves (defects), or of an arm."""
    from training.dpo import train
    from training.presets import PRESETS

    arm, _, beta = name.partition("@")
    defect = arm == "defects"
    settings = dataclasses.replace(
        PRESETS["miniature"],
        arm="sft" if defect else arm.removeprefix("gran-"),  # type: ignore[arg-type]
        steps=args.defect_steps if defect else args.dpo_steps,
        batch_pairs=args.batch_pairs,
        micro_pairs=args.batch_pairs,
        warmup_steps=1,
        beta=PRESETS["miniature"].beta if defect else float(beta),
        sft_weight=1.0 if defect else PRESETS["miniature"].sft_weight,
        granular_weight=0.0 if patches is None else 1.0,
        held_out=0.0,
        seed=args.seed,
        tensorboard=False,
    )
    result = train(backbone, store, pairs, out, settings, patches=patches)
    if result.comfy is None:
        raise KeyboardInterrupt
    return result.comfy


def fuse(backbone: Backbone, lora: Path) -> None:
    """Add a LoRA to the weights themselves, so that it is part of the reference of whatever is trained next."""
    from spatialalign.lora import load_lora, unload_lora

    load_lora(backbone.transformer, lora)
    backbone.transformer.fuse_lora()  # type: ignore[operator]
    unload_lora(backbone.transformer)


def own_pairs(args: Patches, store: Store, prompts: Sequence[Prompt], scores: PatchScores) -> Path:
    """Pairs of the generator's clips: of each prompt the clip with the best mean of its blocks over the worst."""
    rows = []
    for prompt in prompts:
        means = {s.seed: float(scores.of(s.prompt_id, s.seed).mean()) for s in store.samples(prompt.prompt_id)}
        best, worst = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
        if means[best] > means[worst]:
            rows.append(PromptPairs(prompt.prompt_id, (best,), (worst,)))
    if not rows:
        raise DataError("the patch reward tells no two clips of a prompt apart; train it longer")
    write_json(store.root / "pairs.json", manifest(rows, {}))
    return store.root / "pairs.json"


def interval(values: NDArray[np.float64], rounds: int = 2000) -> list[float]:
    """Mean, and its 95 % interval from a bootstrap over rows (prompts) of ``(prompts, clips)``."""
    rows = values.mean(1)
    drawn = rows[np.random.default_rng(0).integers(len(rows), size=(rounds, len(rows)))].mean(1)
    return [round(float(value), 4) for value in (rows.mean(), *np.quantile(drawn, [0.025, 0.975]))]


def run(args: Patches) -> dict[str, Any]:
    """Run what is missing, write the results and return them."""
    from spatialalign.backbones import load_backbone
    from spatialalign.lora import load_lora, unload_lora
    from spatialalign.miniature import world
    from spatialalign.tracking.load import load_tracker
    from training.generate import generate
    from training.score import score

    backbone, source = load_backbone("miniature", "cpu"), Store(args.clips)
    prompts = source.prompts()[:: max(1, len(source.prompts()) // args.prompts)][: args.prompts]
    graded, truth = plant(backbone, source, prompts, range(args.seeds), args.out / "graded", args.damage)
    reward, results = train_reward(args, graded, truth)
    results = {"reward": results}
    write_json(args.out / "patches.json", results)
    print(results, flush=True)
    if not args.arms:
        return results

    damaged, _ = plant(backbone, source, prompts, range(args.seeds), args.out / "damaged", "corners")
    # the arm sft trains on the winners alone; a loser is needed to make a pair
    rows = [PromptPairs(p.prompt_id, tuple(range(1, args.seeds)), (0,)) for p in prompts]
    write_json(damaged.root / "pairs.json", manifest(rows, {}))
    pairs = damaged.root / "pairs.json"
    fuse(backbone, train_lora(args, backbone, damaged, pairs, "defects", args.out / "defects"))

    sampling = backbone.default_settings()
    own = Store(args.out / "own", create=True)
    print(generate(backbone, own, prompts, range(args.own_seeds), sampling, 16, "miniature+defects").text(), flush=True)
    scores, counted = (
        judge_blocks(own, own.samples(), reward, "patch reward"),
        teach(own, own.samples(), GRID, cleanness, "colour"),
    )
    write_patches(args.out / "blocks.safetensors", scores)
    clips = list(scores.values)
    results["own clips"] = {
        "defects": interval(defects(own, own.samples()).reshape(-1, args.own_seeds).astype(float)),
        "agreement": agreement(*(np.concatenate([s.of(*c).ravel() for c in clips]) for s in (scores, counted))),
    }
    pairs, held_out = own_pairs(args, own, prompts, scores), world.prompts("eval")[: args.eval_prompts]
    tracker = load_tracker("miniature", "cpu")
    counts: dict[str, NDArray[np.float64]] = {}
    for name in ("before", *args.arms.split(",")):
        folder = args.out / (name if name == "before" else f"{name}-{args.dpo_steps}")
        if name != "before":
            patches = args.out / "blocks.safetensors" if name.startswith("gran-") else None
            lora = train_lora(args, backbone, own, pairs, name, folder / "lora", patches)
            load_lora(backbone.transformer, lora)
        store = Store(folder / "clips", create=True)
        seeds = range(FIRST_EVAL_SEED, FIRST_EVAL_SEED + args.eval_seeds)
        print(generate(backbone, store, held_out, seeds, sampling, 16, f"miniature+{name}").text(), flush=True)
        if name != "before":
            unload_lora(backbone.transformer)
        score(store, tracker)
        samples = [store.sample(prompt.prompt_id, seed) for prompt in held_out for seed in seeds]
        counts[name] = defects(store, samples).reshape(-1, args.eval_seeds).astype(float)
        results[name] = {
            "steps": args.dpo_steps,
            "defects": interval(counts[name]),
            "change": interval(counts[name] - counts["before"]),
            "background_psnr": fidelity_of(store, held_out, seeds),
        }
        rival = name.removeprefix("gran-")
        if rival != name and rival in counts:
            results[name]["against_dpo"] = interval(counts[name] - counts[rival])
        write_json(args.out / "patches.json", results)
        print(name, results[name], flush=True)
    (args.out / "patches.md").write_text(table(results) + "\n", encoding="utf-8")
    print(table(results))
    return results


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""

    def cell(values: Sequence[float]) -> str:
        return "{:.2f} [{:.2f}, {:.2f}]".format(*values)

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    names = ("rank_correlation", "ceiling", "rank_correlation_of_damaged", "auc")
    lines = ["| blocks judged by | " + " | ".join(name.replace("_", " ") for name in names) + " |", "|---" * 5 + "|"]
    for judge in ("video reward", "patch reward"):
        lines.append(f"| {judge} | " + " | ".join(number(results["reward"][judge][name]) for name in names) + " |")
    head = ["model", "steps", "defective blocks per clip", "change", "against dpo", "background PSNR, dB"]
    lines += ["", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, row in results.items():
        if "change" in row:
            against = cell(row["against_dpo"]) if "against_dpo" in row else ""
            cells = [name, str(row["steps"]), cell(row["defects"]), cell(row["change"]), against]
            lines.append("| " + " | ".join([*cells, f"{row['background_psnr']:.2f}"]) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m benchmarks.patches``."""
    command(Patches, run, argv)


if __name__ == "__main__":
    main()
