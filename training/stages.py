"""What a stage over a store reports: how many samples were done, skipped, busy elsewhere, or failed, and why."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spatialalign.errors import ConfigError
from training.monitors import JsonlLog


@dataclass
class StageSummary:
    """The outcome of one stage of one run, filled as it goes.

    Attributes:
        stage: its name, which also names the log ``logs/<stage>.jsonl`` in the store.
        done: samples this run finished.
        skipped: samples that were finished before.
        busy: samples that another live process has claimed.
        failed: sample names and reasons; such a sample is tried again by the next run.
    """

    stage: str
    done: int = 0
    skipped: int = 0
    busy: int = 0
    failed: list[tuple[str, str]] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Seconds since the stage began."""
        return time.perf_counter() - self.started

    def fail(self, name: str, reason: str, log: JsonlLog) -> None:
        """Record that a sample failed, in the summary and in the log."""
        self.failed.append((name, reason))
        log.write({"event": "failed", "stage": self.stage, "sample": name, "reason": reason})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the log."""
        return {
            "done": self.done,
            "skipped": self.skipped,
            "busy": self.busy,
            "failed": len(self.failed),
            "seconds": round(self.seconds, 3),
        }

    def text(self) -> str:
        """The summary in words, each failure on its own line."""
        parts = [f"{self.done} done", f"{self.skipped} there before"]
        parts += [f"{self.busy} claimed by another process"] if self.busy else []
        parts += [f"{len(self.failed)} failed"] if self.failed else []
        lines = [f"{self.stage}: {', '.join(parts)} ({self.seconds:.1f} s)"]
        shown = 20
        lines += [f"  {name}: {reason}" for name, reason in self.failed[:shown]]
        if len(self.failed) > shown:
            kinds = Counter(reason.split(":")[0] for _, reason in self.failed[shown:])
            lines += [f"  and {count} more: {reason}" for reason, count in kinds.most_common(5)]
        return "\n".join(lines)


def stage_log(root: Path, stage: str) -> JsonlLog:
    """The log of a stage in a store."""
    return JsonlLog(root / "logs" / f"{stage}.jsonl")


def parse_seeds(text: str) -> list[int]:
    """``"0-4"``, ``"0,3,7"`` or ``"0-2,10"`` as a list of seeds; raises :class:`ConfigError` for anything else."""
    seeds: list[int] = []
    for part in text.replace(" ", "").split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise ConfigError(f"seeds must look like 0-4 or 0,3,7, found {text!r}")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    if len(set(seeds)) != len(seeds):
        raise ConfigError(f"seeds repeat in {text!r}")
    return seeds


def batches(items: Sequence[Any], size: int) -> list[list[Any]]:
    """Consecutive slices of at most ``size`` items."""
    if size < 1:
        raise ConfigError(f"the batch must hold at least 1, found {size}")
    return [list(items[start : start + size]) for start in range(0, len(items), size)]
