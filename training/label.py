"""Collect scores of every clip of a store, from any rewards, into one file: ``python -m training.label``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from spatialalign.errors import ConfigError, DataError, SpatialAlignError
from training.bench_pairs import Clip
from training.bench_scorers import load_scorer, score_clips, slug
from training.cli import command
from training.labels import LabelTable, join, read_table, write_table
from training.stages import batches, stage_log
from training.store import Sample, Store


@dataclass(frozen=True)
class Label:
    """Write what rewards say of every clip of a store into a CSV file, a column for each of their dimensions."""

    store: Path
    """Sample store."""
    sources: str = "dsr"
    """By commas: dsr, robust (scores in the store), csv:<file of labels>, latent:<latent reward file>,
    reward:<VideoReward folder>, judge:<model folder or hub id>."""
    out: Path | None = None
    """Where the labels go; null for labels.csv in the store. Scores of reward and judge are kept beside it."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Numbers that learned rewards and judges compute in; a latent reward computes in float32."""
    batch: int = 8
    """Clips that a learned reward takes at once."""

    def __post_init__(self) -> None:
        specs = self.specs
        if not specs or len(set(specs)) != len(specs):
            raise ConfigError(f"sources must name one or more different sources, found {self.sources!r}")
        if self.batch < 1:
            raise ConfigError(f"batch must be at least 1, found {self.batch}")

    @property
    def specs(self) -> list[str]:
        """The sources one by one."""
        return [part.strip() for part in self.sources.split(",") if part.strip()]

    @property
    def path(self) -> Path:
        """The file that is written."""
        return self.out or self.store / "labels.csv"


def stored(samples: Sequence[Sample], which: Literal["dsr", "robust"]) -> LabelTable:
    """The DSR-Score or the robust score of each clip as the store has it; unknown where INVALID or not scored."""
    values = []
    for sample in samples:
        try:
            score = sample.read_score()
        except DataError:
            values.append(np.nan)
            continue
        value = score.score if which == "dsr" else score.robust.score if score.robust is not None else None
        values.append(np.nan if value is None else value)
    return LabelTable(_clips(samples), (which,), np.array(values, dtype=np.float64).reshape(-1, 1))


def latent(store: Store, samples: Sequence[Sample], file: Path, device: str, batch: int) -> LabelTable:
    """What a latent reward says of the finished clips, at noise level 0; unknown where latents cannot be read.

    The columns are its dimensions with ``latent_`` before their names.

    Raises:
        ModelError: no latent reward, or one for other latents or texts.
    """
    import torch

    from spatialalign.rewards.latent import check_fits, load_reward

    reward = load_reward(file, device)
    values = np.full((len(samples), len(reward.dimensions)), np.nan)
    readable = [row for row, sample in enumerate(samples) if _readable(sample)]
    for rows in batches(readable, batch):
        some = [samples[row] for row in rows]
        texts = [store.read_text(sample.prompt_id).to(device) for sample in some]
        check_fits(reward, some[0].read_header().space, texts[0].shape[-1])
        x = torch.stack([sample.read_latents() for sample in some]).to(device)
        with torch.no_grad():
            values[rows] = reward(x, torch.zeros(len(rows), device=device), texts).values.double().cpu().numpy()
    return LabelTable(_clips(samples), tuple(f"latent_{name}" for name in reward.dimensions), values)


def learned(store: Store, samples: Sequence[Sample], spec: str, args: Label, device: str) -> LabelTable:
    """The columns of a scorer of the reward benchmark; its scores are kept in a file, and not computed again."""
    scorer = load_scorer(spec, device, args.dtype, 0, args.batch)
    texts = {prompt.prompt_id: prompt.text for prompt in store.prompts()}
    clips = [Clip(sample.name, texts[sample.prompt_id]) for sample in samples]
    files = dict(zip(clips, (sample.video for sample in samples), strict=True))
    scores, summary = score_clips(scorer, files, args.path.with_name(f"{args.path.stem}-{slug(spec)}.jsonl"))
    print(summary.text())
    rows = [[np.nan if value is None else value for value in scores[clip].values] for clip in clips]
    return LabelTable(_clips(samples), tuple(scorer.dimensions), np.array(rows, dtype=np.float64))


def collect(args: Label) -> LabelTable:
    """The labels of every clip of the store from every source.

    Raises:
        ConfigError: no such source.
        DataError: no clip at all, a source that knows none of them, or two that name a dimension alike.
        ModelError: a model lacks a part, or does not fit the store.
    """
    store = Store(args.store)
    samples = store.samples()
    if not samples:
        raise DataError(f"{args.store} holds no clips; run training.generate first")
    parts = [LabelTable(_clips(samples), (), np.empty((len(samples), 0)))]
    for spec in args.specs:
        parts.append(_source(args, store, samples, spec))
        known = join([parts[0], parts[-1]]).values
        if np.isnan(known).all():
            raise DataError(f"source {spec!r} has no label for any clip of {args.store}; see that it is for this store")
    return join(parts)


def _source(args: Label, store: Store, samples: Sequence[Sample], spec: str) -> LabelTable:
    kind, _, file = spec.partition(":")
    if spec == "dsr":
        return stored(samples, "dsr")
    if spec == "robust":
        return stored(samples, "robust")
    if kind == "csv" and file:
        return read_table(Path(file))
    if kind not in ("latent", "reward", "judge") or not file:
        raise ConfigError(
            f"source {spec!r}: expected dsr, robust, csv:<file>, latent:<file>, reward:<folder> or judge:<folder or "
            "hub id>"
        )
    from spatialalign.backbones.loading import pick_device

    device = pick_device(args.device)
    if kind == "latent":
        return latent(store, samples, Path(file), device, args.batch)
    return learned(store, samples, spec, args, device)


def _readable(sample: Sample) -> bool:
    try:
        sample.read_latents()
    except SpatialAlignError:
        return False
    return True


def _clips(samples: Sequence[Sample]) -> tuple[tuple[str, int], ...]:
    return tuple((sample.prompt_id, sample.seed) for sample in samples)


def text(table: LabelTable) -> str:
    """Each dimension in a line: how many clips have it, its mean, and :meth:`LabelTable.spread`."""
    lines = []
    for name in table.names:
        known = list(table.column(name).values())
        line = f"  {name}: {len(known)} of {len(table.clips)} clips"
        if known:
            line += f", mean {np.mean(known):.4g}, deviation within prompts {table.spread(name):.4g}"
        lines.append(line)
    return "\n".join(lines)


def run(args: Label) -> LabelTable:
    """Collect and write the file."""
    table = collect(args)
    write_table(args.path, table)
    known = {name: len(table.column(name)) for name in table.names}
    stage_log(args.store, "label").write({"event": "end", "sources": args.specs, "clips": len(table.clips), **known})
    print(f"label: {len(table.clips)} clips\n{text(table)}\n{args.path}")
    return table


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m training.label``."""
    command(Label, run, argv)


if __name__ == "__main__":
    main()
