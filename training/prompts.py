"""Write prompt sets as CSV files with the official columns: ``python -m training.prompts``."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spatialalign.errors import ConfigError
from spatialalign.prompts import Prompt, generate, read_csv, split, write_csv
from training.cli import command


@dataclass(frozen=True)
class Prompts:
    """Generate prompts, the same for the same options, types balanced, no two alike."""

    out: Path
    """CSV file to write."""
    count: int | None = None
    """Prompts to generate in all; null for 600, or for every prompt of the miniature's world."""
    seed: int = 0
    """Seed of the draw."""
    types: str = "LR,LT,RL,RT,TL,TR"
    """Types, as initial and final letter of L, R, T and, beyond the paper, U, F, B."""
    held_out: Path | None = None
    """A second CSV file for evaluation; it shares no (subject, object, scene) with the first."""
    held_out_share: float = 0.2
    """Share of the prompts that goes to the second file; the miniature's world has its own split."""
    exclude: Path | None = None
    """CSV file of prompts whose (subject, object, scene) must not occur again, such as an official evaluation set."""
    model: str | None = None
    """The model that will draw them: miniature has a small world of its own, any other gets everyday words."""
    replace: bool = False
    """Overwrite existing files that hold other prompts."""


def run(args: Prompts) -> None:
    """Generate and write."""
    types = [kind.strip() for kind in args.types.split(",")]
    if args.model == "miniature":
        train, held_out = _miniature(types, args.count, args.seed)
    else:
        exclude = [] if args.exclude is None else read_csv(args.exclude)
        train, held_out = generate(args.count or 600, args.seed, types=types, exclude=exclude), []
        if args.held_out is not None:
            train, held_out = split(train, args.held_out_share, args.seed)
    if args.held_out is not None:
        _write(args.held_out, held_out, args.replace)
    _write(args.out, train, args.replace)


def _miniature(types: Sequence[str], count: int | None, seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts of the miniature's world, split once and for all; ``count`` thins the first."""
    from spatialalign.miniature.world import prompts

    train, held_out = (
        [prompt for prompt in prompts(part) if prompt.dsr.type_code in types] for part in ("train", "eval")
    )
    if count is not None and count < len(train):
        kept = set(random.Random(seed).sample(range(len(train)), count))
        train = [prompt for index, prompt in enumerate(train) if index in kept]
    return train, held_out


def _write(path: Path, prompts: Sequence[Prompt], replace: bool) -> None:
    if path.is_file() and not replace:
        if read_csv(path) == list(prompts):
            print(f"{path}: there before")
            return
        raise ConfigError(f"{path} exists and holds other prompts; name another file or set --replace true")
    write_csv(path, prompts)
    print(f"{path}: {len(prompts)} prompts")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m training.prompts``."""
    command(Prompts, run, argv)


if __name__ == "__main__":
    main()
