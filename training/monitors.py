"""Logs a person can follow and a program can read: JSONL always, TensorBoard beside it."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spatialalign.files import atomic_path

logger = logging.getLogger(__name__)

LINEAR_TOLERANCE = 0.01
SATURATED = 0.02
PATIENCE = 50


class JsonlLog:
    """One JSON object a line, flushed at once, so that a killed run keeps all but its last line."""

    def __init__(self, path: str | Path) -> None:
        """Append to ``path``; the folder is made when missing."""
        self.path = Path(path)
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
        clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(clean, ensure_ascii=False) + "\n")

    def keep_until(self, step: int) -> None:
        """Drop rows of later steps, which a run resumed at ``step`` will write again."""
        if self.path.is_file():
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


class RegimeWatch:
    """Notices when beta is wrong for the data.

    The gradient factor sigmoid(-m) starts at 1/2. Where it never leaves it, the sigmoid is a straight line and beta
    only scales the learning rate; where it is near 0, the pairs no longer teach anything.
    """

    def __init__(self, patience: int = PATIENCE) -> None:
        """Warn after ``patience`` steps in a row."""
        self._patience = patience
        self._linear = 0
        self._saturated = 0

    def update(self, step: int, gradient_factor: float) -> str | None:
        """Take the mean gradient factor of a step; returns a warning at most once per kind and stretch."""
        self._linear = self._linear + 1 if abs(gradient_factor - 0.5) < 0.5 * LINEAR_TOLERANCE else 0
        self._saturated = self._saturated + 1 if gradient_factor < SATURATED else 0
        if self._linear == self._patience:
            return (
                f"step {step}: the gradient factor has stayed within {LINEAR_TOLERANCE:.0%} of 1/2 for "
                f"{self._patience} steps: the loss is linear in the margin; a larger beta would let it bend"
            )
        if self._saturated == self._patience:
            return (
                f"step {step}: the gradient factor has stayed below {SATURATED} for {self._patience} steps: the "
                "training pairs are learnt and further steps only drift; use a smaller beta or stop here"
            )
        return None
