"""How far scores of clips agree with people, and a judge with geometry: ``python -m training.reward_bench``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from spatialalign.errors import ConfigError
from spatialalign.files import write_json
from training.bench_measures import label_counts, measure
from training.bench_pairs import Benchmark, Clip, find_videos, read_pairs
from training.bench_scorers import ClipScore, ClipScorer, JudgeScorer, load_scorer, score_clips, slug
from training.cli import command
from training.store import Store

VERSION = 1


@dataclass(frozen=True)
class RewardBench:
    """Score every clip of a benchmark once, and compare the scores with what people preferred.

    With a store and a judge, also ask the judge about single frames, whose relation score is known.
    """

    out: Path
    """Output folder: the scores, bench.json, bench.md, bench.html and the charts. Run again to continue."""
    pairs: Path | None = None
    """CSV file of labelled pairs in the form of VideoGen-RewardBench or GenAI-Bench."""
    videos: Path | None = None
    """Folder that the clips' paths begin in; null for the folder of the CSV file."""
    scorers: str = "random"
    """Any of random, dsr, dsr:<tracker>, reward:<VideoReward folder>, judge:<model folder or hub id>, by commas."""
    overall: list[str] = field(default_factory=list)
    """Columns of a scorer that are summed for the label Overall, as ["TA"]; empty for its Overall, or all of them."""
    limit: int | None = None
    """Take only so many pairs, the first ones; null for all."""
    store: Path | None = None
    """Sample store with tracks, to ask the first judge about single frames."""
    frames: int = 5
    """Frames of each clip of the store that are asked about."""
    bins: int = 10
    """Bins of the relation score from -1 to +1."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Numbers that learned rewards and judges compute in."""
    batch: int = 8
    """Clips that a learned reward takes at once, and frames that the tracker does."""
    seed: int = 0
    """Seed of the random scorer."""

    def __post_init__(self) -> None:
        if self.pairs is None and self.store is None:
            raise ConfigError("there is nothing to compare; give --pairs, or --store with a judge")
        if self.store is not None and not any(spec.startswith("judge:") for spec in self.specs):
            raise ConfigError(f"--store needs a judge among the scorers, as judge:<model>; found {self.scorers}")
        if self.batch < 1 or self.frames < 1 or self.bins < 1 or (self.limit is not None and self.limit < 1):
            raise ConfigError("batch, frames, bins and limit must be at least 1")
        if len(set(self.specs)) != len(self.specs):
            raise ConfigError(f"a scorer is named twice in {self.scorers}")

    @property
    def specs(self) -> list[str]:
        """The scorers one by one."""
        return [part.strip() for part in self.scorers.split(",") if part.strip()]


def run(args: RewardBench) -> dict[str, Any]:
    """Score, compare and write the files; returns what ``bench.json`` holds.

    Raises:
        DataError: the pairs or the store cannot be read, or the folder holds scores of other scorers.
        ConfigError: there is no such scorer, or no scorer has the columns of ``overall``.
    """
    from spatialalign.backbones.loading import pick_device
    from training.versions import versions

    device = pick_device(args.device)
    benchmark = None if args.pairs is None else read_pairs(args.pairs, args.limit)
    scorers = {spec: load_scorer(spec, str(device), args.dtype, args.seed, args.batch) for spec in args.specs}
    if args.overall and not any(set(args.overall) <= set(scorer.dimensions) for scorer in scorers.values()):
        columns = "; ".join(f"{scorer.name}: {', '.join(scorer.dimensions)}" for scorer in scorers.values())
        raise ConfigError(f"no scorer has the columns {', '.join(args.overall)} of overall; there are {columns}")
    result: dict[str, Any] = {"version": VERSION, "benchmark": None, "scorers": [], "frames": None}
    if benchmark is not None:
        result.update(_compare(args, benchmark, scorers))
    if args.store is not None:
        judge = next(scorer for scorer in scorers.values() if isinstance(scorer, JudgeScorer))
        result["frames"] = _ask(args, args.store, judge)
    result["settings"] = {
        "pairs": None if args.pairs is None else args.pairs.name,
        "store": None if args.store is None else args.store.name,
        **{key: getattr(args, key) for key in ("specs", "overall", "limit", "frames", "bins", "dtype", "seed")},
    }
    result["versions"] = versions()
    _write(args.out, result)
    return result


def _compare(args: RewardBench, benchmark: Benchmark, scorers: dict[str, ClipScorer]) -> dict[str, Any]:
    assert args.pairs is not None
    files = find_videos(benchmark.clips, args.videos or args.pairs.parent)
    absent = [clip for clip in benchmark.clips if clip not in files]
    lost = sum(pair.first not in files or pair.second not in files for pair in benchmark.pairs)
    print(f"{args.pairs}: {len(benchmark.pairs)} pairs of {len(benchmark.clips)} clips; {len(absent)} have no file")
    entries = []
    for spec, scorer in scorers.items():
        scores, summary = score_clips(scorer, files, args.out / f"scores-{slug(spec)}.jsonl")
        print(summary.text())
        entries.append(
            {
                "scorer": spec,
                "name": scorer.name,
                "columns": list(scorer.dimensions),
                "unscored": _unscored(scores),
                **measure(benchmark, scores, scorer.dimensions, args.overall),
            }
        )
    told = {
        "form": benchmark.form,
        "pairs": len(benchmark.pairs),
        "clips": len(benchmark.clips),
        "prompts": len({clip.prompt for clip in benchmark.clips}),
        "absent": [clip.path for clip in absent],
        "pairs_without_video": lost,
        "labels": label_counts(benchmark),
    }
    return {"benchmark": told, "scorers": entries}


def _unscored(scores: dict[Clip, ClipScore]) -> list[dict[str, str]]:
    return [{"path": clip.path, "reason": score.reason} for clip, score in scores.items() if None in score.values]


def _ask(args: RewardBench, store: Path, judge: JudgeScorer) -> dict[str, Any]:
    from training.judge_curve import ask_frames, summarise

    rows, summary = ask_frames(Store(store), judge.judge, args.frames, args.out / f"frames-{slug(judge.name)}.jsonl")
    print(summary.text())
    failed = [{"sample": name, "reason": reason} for name, reason in summary.failed]
    return {"judge": judge.name, **summarise(rows, args.bins), "left_out": failed}


def _write(out: Path, result: dict[str, Any]) -> None:
    from spatialalign.files import atomic_path
    from spatialalign.plot import save_png
    from training.bench_report import accuracy_chart, page, text
    from training.judge_curve import curve_chart

    write_json(out / "bench.json", result)
    charts = []
    if result["benchmark"]:
        save_png(out / "bench.png", accuracy_chart(result))
        charts.append((out / "bench.png").read_bytes())
    if result["frames"]:
        save_png(out / "frames.png", curve_chart(result["frames"], result["frames"]["judge"]))
        charts.append((out / "frames.png").read_bytes())
    for name, content in (("bench.md", text(result)), ("bench.html", page(result, charts))):
        with atomic_path(out / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    print(text(result))


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m training.reward_bench``."""
    command(RewardBench, run, argv)


if __name__ == "__main__":
    main()
