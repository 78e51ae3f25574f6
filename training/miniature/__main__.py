"""``python -m training.miniature``: rebuild every weight of the miniature from seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from spatialalign.errors import ConfigError
from spatialalign.miniature import WEIGHTS
from training.cli import command

STAGES = ("vae", "text", "wan", "detector", "segmenter")


@dataclass(frozen=True)
class Arguments:
    """Rebuild the miniature's weights from seeds, stage by stage; run the same command again to resume."""

    out: Path = WEIGHTS
    """Folder that receives ``wan/``, ``detector/`` and ``segmenter/``."""
    work: Path = Path("miniature-work")
    """Folder for checkpoints, logs and encoded clips."""
    stages: str = ",".join(STAGES)
    """Which stages to run, comma-separated; a stage whose result exists already is skipped."""
    threads: int = 2
    """CPU threads."""


def run(arguments: Arguments) -> None:
    """Run the chosen stages in order; a stage whose result is there is skipped."""
    import torch

    chosen = [name.strip() for name in arguments.stages.split(",")]
    if unknown := [name for name in chosen if name not in STAGES]:
        raise ConfigError(f"unknown stage {unknown[0]!r}; the stages are {', '.join(STAGES)}")
    torch.set_num_threads(arguments.threads)
    wan, work = arguments.out / "wan", arguments.work

    from training.miniature import detector, segmenter, text, vae
    from training.miniature import wan as transformer

    stages: dict[str, tuple[Path, Callable[[], None]]] = {
        "vae": (wan / "vae/config.json", lambda: vae.build(wan / "vae", work)),
        "text": (wan / "text_encoder/config.json", lambda: text.build(wan, work)),
        "wan": (wan / "transformer/config.json", lambda: transformer.build(wan, work)),
        "detector": (
            arguments.out / "detector/config.json",
            lambda: detector.build(arguments.out / "detector", wan, work),
        ),
        "segmenter": (
            arguments.out / "segmenter/config.json",
            lambda: segmenter.build(arguments.out / "segmenter", wan, work),
        ),
    }
    for name in STAGES:
        mark, build = stages[name]
        if name in chosen and not mark.exists():
            build()


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    command(Arguments, run, argv)


if __name__ == "__main__":
    main()
