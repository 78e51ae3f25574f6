"""Search on the miniature with looks by the latent reward: what pruning and particles reach for how many passes.

``python -m benchmarks.search`` finishes pools of candidates of the unseen prompts, on which every way of pruning is
arithmetic, and then samples with the ways that were chosen, from other noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.search_pool import Floats, Look, Pool, fill, prune
from spatialalign.agreement import spearman
from spatialalign.errors import ConfigError
from spatialalign.files import read_json, write_json
from spatialalign.metrics import cluster_bootstrap, pass_at_k
from spatialalign.search import SearchSettings
from training.arms_measure import at_cost
from training.cli import command
from training.measure import TAU, cell, entry, markdown

if TYPE_CHECKING:
    from spatialalign.backbones.base import Backbone
    from spatialalign.prompts import Prompt
    from spatialalign.tracking.tracker import Tracker

PARTS = ("looks", "pruned", "particles")
N = 8
WAYS: tuple[tuple[Look, ...], ...] = (
    *(((0, kept),) for kept in range(1, N)),
    *(((step, N // 2),) for step in (1, 2, 4, 8)),
    ((2, 5), (8, 3)),
)
"""Ways of pruning the pool: steps done and candidates kept, for one look or two."""
PRUNED = (
    SearchSettings("pruned", N, keep=1.0, threshold=TAU, preview_by="reward"),
    SearchSettings("pruned", 4 * N, keep=0.125, preview_by="reward"),
    SearchSettings("pruned", 4 * N, keep=0.25, threshold=TAU, preview_by="reward"),
)
PARTICLES = (SearchSettings("particles", 4, preview_by="reward"),)
BATCH = 16


@dataclass(frozen=True)
class Search:
    """Search for the miniature's unseen prompts with a latent reward, and measure what it gains for its passes."""

    out: Path = Path("benchmarks/out/search")
    """Output folder: search.json, search.md, the pools, a store for every way of searching."""
    parts: str = "looks,pruned,particles"
    """What to measure: looks (ways of pruning, from the pool of the first seed); pruned and particles (sampled with the
    second seed, against best-of-N of its pool)."""
    reward: Path | None = None
    """Latent reward; null for the shipped one."""
    first_seed: int = 3000
    """Seed of the pool that ways are chosen by."""
    second_seed: int = 4000
    """Seed that they are measured with."""
    limit: int | None = None
    """Take only so many of the held-out prompts; null for all 96."""

    def chosen(self) -> list[str]:
        """The parts; raises :class:`ConfigError` for an unknown one."""
        parts = self.parts.split(",")
        if unknown := [part for part in parts if part not in PARTS]:
            raise ConfigError(f"parts must be among {', '.join(PARTS)}, found {unknown[0]!r}")
        return parts


@dataclass(frozen=True)
class Bench:
    """What the parts share."""

    args: Search
    backbone: Backbone
    tracker: Tracker
    reward: Path
    prompts: list[Prompt]

    @property
    def ids(self) -> list[str]:
        """Of the prompts."""
        return [prompt.prompt_id for prompt in self.prompts]

    def pool(self, seed: int) -> Pool:
        """The candidates of a seed, made as far as they are not there."""
        from spatialalign.rewards.latent import load_reward

        folder = self.args.out / "pools" / str(seed)
        return fill(self.backbone, self.tracker, load_reward(self.reward), self.prompts, seed, N, folder)

    def compared(self, search: SearchSettings, pool: Pool) -> dict[str, Any]:
        """Sample with a search what is not there, and compare it with best-of-n of the pool of the same seed."""
        from training.sample import sample_clips, sampling_path
        from training.store import Store

        seed, settings = self.args.second_seed, self.backbone.default_settings()
        store = Store(self.args.out / "stores" / search.name, create=True)
        made = sample_clips(
            self.backbone, store, self.prompts, [seed], settings, self.tracker, None, search, BATCH, None, self.reward
        )
        print(made.text(), flush=True)
        samples = [store.sample(name, seed) for name in self.ids]
        found = [sample.read_score() for sample in samples]
        robust = [None if one.robust is None else one.robust.score for one in found]
        clips = np.array([read_json(sampling_path(sample))["evaluations"] for sample in samples]) / pool.steps
        return {
            "robust": interval(reached(robust), self.ids),
            **against(reached([one.score for one in found]), clips, pool, self.ids),
        }


def run(args: Search) -> dict[str, Any]:
    """Run the parts, write both files and return what the first one holds."""
    from spatialalign.backbones import load_backbone
    from spatialalign.miniature import REWARD, world
    from spatialalign.tracking.load import load_tracker
    from training.evaluate import spread

    parts, prompts = args.chosen(), spread(world.prompts("eval"), args.limit)
    bench = Bench(args, load_backbone("miniature", "cpu"), load_tracker("miniature"), args.reward or REWARD, prompts)
    path = args.out / "search.json"
    result: dict[str, Any] = read_json(path) if path.is_file() else {}
    if "looks" in parts:
        seeds = (args.first_seed, args.second_seed)
        result["looks"] = {str(seed): looked(bench.pool(seed), bench.ids) for seed in seeds}
    for part, searches in (("pruned", PRUNED), ("particles", PARTICLES)):
        if part in parts:
            pool = bench.pool(args.second_seed)
            result[part] = [{"search": search.name, **bench.compared(search, pool)} for search in searches]
    write_json(path, result)
    text = report(result)
    (args.out / "search.md").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}")
    return result


def interval(values: Floats, ids: Sequence[str]) -> dict[str, float]:
    """The mean with its interval over prompts."""
    return entry(cluster_bootstrap(values, ids))


def reached(scores: Sequence[float | None]) -> Floats:
    """1 for a score of at least 0.7, else 0."""
    return np.array([score is not None and score >= TAU for score in scores], dtype=np.float64)


def chances_of(pool: Pool) -> Floats:
    """The chance that best-of-n, of any n candidates of the pool, is correct, ``(prompts, N)`` for n = 1 ... N.

    Other than in ``training.evaluate`` the first candidate has no special place: with one seed all prompts share its
    noise, and a pool would stand or fall with that.
    """
    counts = pool.correct.sum(1)
    return np.array([[pass_at_k([count], [N], n) for n in range(1, N + 1)] for count in counts])


def until_correct(pool: Pool) -> Floats:
    """Mean number of clips to the first correct one, over their orders, ``(prompts,)``; N where there is none."""
    counts = pool.correct.sum(1)
    return np.where(counts > 0, (N + 1) / (counts + 1), float(N))


def against(correct: Floats, clips: Floats, pool: Pool, ids: Sequence[str]) -> dict[str, Any]:
    """A way, by prompt, against best-of-N of the pool, and best-of-n for as many passes; ``clips`` is its cost."""
    chances = chances_of(pool)
    equal = at_cost(chances, float(clips.mean()))
    return {
        "correct": interval(correct, ids),
        "clips": interval(clips, ids),
        "against_best_of_N": interval(correct - chances[:, -1], ids),
        "equal": None if equal is None else interval(equal, ids),
        "against_equal": None if equal is None else interval(correct - equal, ids),
    }


def looked(pool: Pool, ids: Sequence[str]) -> dict[str, Any]:
    """What a pool tells: best-of-n, how well looks rank, what stopping costs with and without them, and pruning."""
    final, when = np.nan_to_num(pool.scores), []  # INVALID counts as 0, as in the reward's training
    for step, expected in pool.looks.items():
        within = [spearman(one, other) for one, other in zip(expected, final, strict=True)]
        _, cost = prune(pool, [(step, N)], stop=True)
        when.append(
            {
                "steps": step,
                "all": spearman(expected.ravel(), final.ravel()),
                "within": float(np.mean([value for value in within if value is not None])),
                "until_correct": interval(N * cost, ids),
            }
        )
    ways = []
    for way in WAYS:
        found, cost = prune(pool, way)
        ways.append({"looks": way, **against(found, N * cost, pool, ids)})
    return {
        "best_of": [interval(column, ids) for column in chances_of(pool).T],
        "until_correct": interval(until_correct(pool), ids),
        "when": when,
        "ways": ways,
    }


def report(result: dict[str, Any]) -> str:
    """Everything as Markdown tables."""
    parts = []
    for seed, found in result.get("looks", {}).items():
        rows = [["n", "Correct@0.7 of best-of-n, %"]]
        rows += [[str(n), cell(one, True)] for n, one in enumerate(found["best_of"], 1)]
        until = cell(found["until_correct"], False)
        parts += [f"Seed {seed}. Best-of-{N} until one is correct: {until} clips", markdown(rows)]
        rows = [["steps", "correlation, all", "within a prompt", "clips until one is correct"]]
        for row in found["when"]:
            numbers = [f"{row['all']:.2f}", f"{row['within']:.2f}"]
            rows.append([str(row["steps"]), *numbers, cell(row["until_correct"], False)])
        parts.append(markdown(rows))
        named = {", ".join(f"{step}: {kept}" for step, kept in row["looks"]): row for row in found["ways"]}
        parts.append(markdown([["steps: kept", *HEAD], *([name, *cells(row)] for name, row in named.items())]))
    searched = [row for part in ("pruned", "particles") for row in result.get(part, [])]
    if searched:
        rows = [[row["search"], *cells(row), cell(row["robust"], True)] for row in searched]
        parts.append(markdown([["search", *HEAD, "robust Correct@0.7, %"], *rows]))
    return "\n\n".join(parts)


HEAD = ["Correct@0.7, %", "clips", f"against best-of-{N}", "best-of-n, same passes, %", "against that"]


def cells(row: dict[str, Any]) -> list[str]:
    """What :func:`against` found, below the head of that name."""
    equal = ["–"] * 2 if row["equal"] is None else [cell(row["equal"], True), cell(row["against_equal"], True, True)]
    return [cell(row["correct"], True), cell(row["clips"], False), cell(row["against_best_of_N"], True, True), *equal]


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m benchmarks.search``."""
    command(Search, run, argv)


if __name__ == "__main__":
    main()
