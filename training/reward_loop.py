"""The loop of a reward's training: exact resume, a log, looks at held-out clips, and steps that are skipped."""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from spatialalign.errors import DataError
from training.monitors import JsonlLog

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

Look = Mapping[str, float | None]
"""What was found on held-out clips, by name."""


class LoopSettings(Protocol):
    """What the loop reads of a training's settings; their help says what each means."""

    @property
    def checkpoint_every(self) -> int: ...

    @property
    def held_out_every(self) -> int: ...

    @property
    def keep_checkpoints(self) -> int: ...

    @property
    def max_bad_steps(self) -> int: ...

    @property
    def max_grad_norm(self) -> float: ...


class RewardLoop(ABC):
    """Base of the trainings of rewards.

    What a step sees depends on (seed, step) alone, so a run that is stopped and continued ends with the same bits as
    one that was not (on one thread count or one GPU model).

    Attributes:
        parameters: what is trained, by name; set by the subclass.
        optimizer: of them; likewise.
        step: optimiser steps done.
        steps: all of them.
        out: output folder: ``train.jsonl``, ``checkpoints/``.
        identity: what must be equal for a checkpoint to be continued.
    """

    parameters: Mapping[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer

    def __init__(self, title: str, loop: LoopSettings, steps: int, out: Path, identity: dict[str, Any]) -> None:
        """``title`` is shown while it runs."""
        self._title, self._loop, self.steps = title, loop, steps
        self.out, self.identity = out, identity
        self.step = self._failed = 0

    @abstractmethod
    def _update(self) -> dict[str, float]:
        """Optimiser step ``self.step``: what it measured, or nothing when it was skipped; ends with :meth:`_apply`."""

    @abstractmethod
    def _looks(self) -> Sequence[Look]:
        """What is logged of the held-out clips."""

    def resume(self, allow_changes: bool = False) -> list[str]:
        """Continue from the newest complete checkpoint, if there is one; returns the changes that were allowed."""
        from training.checkpoint import latest_checkpoint, load_checkpoint

        checkpoint = latest_checkpoint(self.out / "checkpoints")
        if checkpoint is None:
            return []
        changes = checkpoint.check_identity(self.identity, allow_changes)
        load_checkpoint(checkpoint, self.parameters, self.optimizer)
        self.step, self._failed = checkpoint.step, int(checkpoint.progress.get("failed", 0))
        return changes

    def save(self) -> Path:
        """Write a checkpoint of the steps done so far."""
        from training.checkpoint import save_checkpoint

        keep, progress = self._loop.keep_checkpoints, {"failed": self._failed}
        folder = self.out / "checkpoints"
        return save_checkpoint(folder, self.step, self.parameters, self.optimizer, self.identity, keep, progress)

    def fit(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Train until the last step or until ``stop()`` is true after a step; then write a checkpoint.

        Returns:
            True when the training is over, False when it was stopped before.
        """
        from tqdm import tqdm

        log = JsonlLog(self.out / "train.jsonl")
        log.keep_until(self.step)
        with tqdm(total=self.steps, initial=self.step, desc=self._title, disable=None) as bar:
            while self.step < self.steps:
                row = self._train_step()
                bar.update()
                log.write({"event": "train" if row else "skipped_step", "step": self.step, **row})
                last, stopping = self.step == self.steps, stop()
                if last or self.step % self._loop.held_out_every == 0:
                    for look in self._looks():
                        log.write({"event": "held_out", "step": self.step, **look})
                if last or stopping or self.step % self._loop.checkpoint_every == 0:
                    self.save()
                if stopping and not last:
                    return False
        return True

    def _train_step(self) -> dict[str, float]:
        """One step, and the seconds it took; nothing when it was skipped."""
        started = time.perf_counter()
        row = self._update()
        self.step += 1
        if not row:
            return {}
        self._failed = 0
        return row | {"seconds": round(time.perf_counter() - started, 4)}

    def _apply(self, row: dict[str, float]) -> dict[str, float]:
        """Clip the gradients and step, unless they or ``row["loss"]`` are not finite; the row with ``grad_norm``."""
        import torch

        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), self._loop.max_grad_norm))
        if not (math.isfinite(row["loss"]) and math.isfinite(norm)):
            return self._skip(f"loss ({row['loss']}) or gradient norm ({norm}) is not finite", "lower lr")
        self.optimizer.step()
        return row | {"grad_norm": norm}

    def _skip(self, reason: str, remedy: str) -> dict[str, float]:
        """Leave the step out; raises :class:`DataError` when that is one too many in a row."""
        self._failed += 1
        if self._failed > self._loop.max_bad_steps:
            raise DataError(
                f"step {self.step + 1}: {reason}, more than max_bad_steps ({self._loop.max_bad_steps}) times in a row; "
                f"the newest checkpoint is unharmed: {remedy}"
            )
        logger.warning("step %d: %s; the step is skipped", self.step + 1, reason)
        return {}
