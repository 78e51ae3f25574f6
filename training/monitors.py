"""Logs a person can follow and a program can read: JSONL always, TensorBoard beside it."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spatialalign.files import atomic_path

logger = logging.getLogger(__name__)

LINEAR_TOLERANCE = 0.01
SATURATED = 0.02
INFLATED = 1.05
LOST_ACCURACY = 0.4
PATIENCE = 50


class JsonlLog:
    """One JSON object a line, flushed at once, so that a killed run keeps all but its last line."""

    def __init__(self, path: str | Path, wanted: bool = True) -> None:
        """Append to ``path``; the folder is made when missing. A log that is not wanted writes nothing."""
        self.path, self._wanted = Path(path), wanted
        if not wanted:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_file() and not (b"\n" + self.path.read_bytes()).endswith(b"\n"):
            with self.path.open("a", encoding="utf-8") as handle:
                handle.write("\n")  # the last line was cut by a kill; it must not swallow the next

    def rows(self) -> list[dict[str, Any]]:
        """The rows written so far; a line cut by a kill is left out."""
        if not self.path.is_file():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row; a number that is not finite is written as null."""
        if not self._wanted:
            return
        clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(clean, ensure_ascii=False) + "\n")

    def keep_until(self, step: int) -> None:
        """Drop rows of later steps, which a run resumed at ``step`` will write again."""
        if self._wanted and self.path.is_file():
            kept = [json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows() if row.get("step", 0) <= step]
            with atomic_path(self.path) as temporary:
                temporary.write_text("".join(kept), encoding="utf-8")


class Scalars:
    """TensorBoard scalars, or nothing when TensorBoard is not installed or not wanted."""

    def __init__(self, folder: Path, wanted: bool) -> None:
        """Write event files to ``folder``."""
        self._writer: Any = None
        if not wanted:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            logger.info("TensorBoard is not installed; the JSONL log is written alone")
            return
        self._writer = SummaryWriter(str(folder))

    def write(self, group: str, step: int, values: Mapping[str, float]) -> None:
        """Add scalars ``group/name`` at a step."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        """Flush and close."""
        if self._writer is not None:
            self._writer.close()


@dataclass
class RegimeWatch:
    """Notices when a training goes wrong in one of four known ways, and says so once each, with the remedy.

    The gradient factor sigmoid(-m) starts at 1/2. Where it never leaves it, the sigmoid is a straight line and beta
    only scales the learning rate (``linear``); where it is near 0, the pairs no longer teach anything (``saturated``).
    Velocities that grow beyond the reference's show as over-saturated colours (``inflated``). And the implicit accuracy
    can fall while the loss does too, when a few pairs are pushed far (``accuracy``). A checkpoint holds the counters.

    Attributes:
        patience: steps in a row before a warning.
        linear, saturated, inflated, lost: steps (for ``lost``, evaluations) in a row so far.
        accuracy: moving average over training pairs.
        best_accuracy: the best on held-out pairs so far.
        said: warnings that were given.
    """

    patience: int = PATIENCE
    linear: int = 0
    saturated: int = 0
    inflated: int = 0
    lost: int = 0
    accuracy: float = 0.5
    best_accuracy: float = 0.0
    said: list[str] = field(default_factory=list)

    def update(self, step: int, row: Mapping[str, float], *, preference: bool = True, bends: bool = True) -> list[str]:
        """Take the monitors of a step; returns the warnings that are due.

        Args:
            step: optimiser steps done.
            row: ``gradient_factor``, ``norm_ratio`` and ``accuracy``.
            preference: False for an objective without preference term, which only the norm can be said about.
            bends: False for a preference term to which the gradient factor means nothing.
        """
        factor, warnings = row["gradient_factor"], []
        self.inflated = self.inflated + 1 if row["norm_ratio"] > INFLATED else 0
        if self.inflated == self.patience:
            warnings += self._say(
                "inflated",
                f"step {step}: the model's velocities have been more than {INFLATED - 1:.0%} longer than the "
                f"reference's for {self.patience} steps, which shows as over-saturated pictures; use arm dpo+zo or a "
                "larger anchor_weight, a smaller lr, or an earlier checkpoint",
            )
        if not preference:
            return warnings
        self.linear = self.linear + 1 if abs(factor - 0.5) < 0.5 * LINEAR_TOLERANCE else 0
        self.saturated = self.saturated + 1 if factor < SATURATED else 0
        if bends and self.linear == self.patience:
            warnings += self._say(
                "linear",
                f"step {step}: the gradient factor has stayed within {LINEAR_TOLERANCE:.0%} of 1/2 for "
                f"{self.patience} steps: the loss is linear in the margin; a larger beta or auto_beta lets it bend",
            )
        if bends and self.saturated == self.patience:
            warnings += self._say(
                "saturated",
                f"step {step}: the gradient factor has stayed below {SATURATED} for {self.patience} steps: the "
                "training pairs are learnt and further steps only drift; use a smaller beta or stop here",
            )
        self.accuracy += (row["accuracy"] - self.accuracy) / self.patience
        if self.accuracy < LOST_ACCURACY:
            warnings += self._say(
                "accuracy",
                f"step {step}: over the last {self.patience} steps the model prefers the loser in most training pairs "
                f"(implicit accuracy {self.accuracy:.2f}); use a smaller lr or larger batch_pairs, and see that "
                "winners and losers were not exchanged",
            )
        return warnings

    def update_held_out(self, step: int, accuracy: float, pairs: int) -> list[str]:
        """Take the implicit accuracy on so many held-out pairs; returns the warning when it has been lost.

        Lost is more than two standard errors, and more than 0.1, below its best, in two evaluations in a row.
        """
        self.best_accuracy = max(self.best_accuracy, accuracy)
        fallen = self.best_accuracy - accuracy > max(0.1, 2 * math.sqrt(0.25 / pairs))
        self.lost = self.lost + 1 if fallen else 0
        if self.lost < 2:
            return []
        return self._say(
            "accuracy",
            f"step {step}: the implicit accuracy on held-out pairs fell from {self.best_accuracy:.2f} to {accuracy:.2f}"
            ": the model forgets the preference or learns its training pairs by heart; use a smaller lr, fewer steps, "
            "early_stop with keep_best, or more prompts",
        )

    def _say(self, kind: str, message: str) -> list[str]:
        if kind in self.said:
            return []
        self.said.append(kind)
        return [message]
