"""The micro-batches of a step or of an evaluation, shared by the processes of a training."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import compress

from spatialalign.errors import ConfigError
from training.config import TrainSettings
from training.losses import PairLoss
from training.memory import advice_when_full
from training.pairs import PairStream, PreferencePair
from training.processes import ALONE, Processes
from training.samples import Clips

logger = logging.getLogger(__name__)

Work = Callable[[list[PreferencePair], list[int]], PairLoss]
"""What is done with the usable pairs of a micro-batch and their indices in the stream."""


@dataclass(frozen=True)
class Part:
    """A micro-batch that was gone through: its first index in its stream, its usable pairs and their losses."""

    start: int
    pairs: list[PreferencePair]
    losses: PairLoss


class MicroBatches:
    """Divides the pairs of a stream into micro-batches and these among the processes."""

    def __init__(self, clips: Clips, settings: TrainSettings, processes: Processes, sharded: bool) -> None:
        """``sharded``: the work is a meeting of all processes, see :mod:`training.sharding`."""
        self._clips, self._settings, self._processes = clips, settings, processes
        self._meeting = processes if sharded else ALONE

    def run(self, stream: PairStream, indices: range, work: Work) -> list[Part]:
        """Do the work on the pairs of ``indices`` that can be used; returns what all processes did, in order.

        An error that a user can act on, raised by one process, is an error of all.

        Where the work is a meeting, the processes agree before each micro-batch that they have one; a process that has
        none takes part with no pairs, and what comes of that is dropped. An error in the middle of the work ends the
        process at once there, since the others wait in the work and not for a message.
        """
        parts, size = list[Part](), self._settings.micro_pairs
        batches = [range(start, min(start + size, indices.stop)) for start in indices[::size]]
        others = ALONE if self._meeting.size > 1 else self._processes
        with others.together(), advice_when_full(self._settings):
            for batch in self._processes.turns(batches):
                with self._meeting.together():
                    chosen = self._usable(stream, batch or range(0))
                if self._meeting.any(bool(chosen)):
                    pairs = [stream.pair(index) for index in chosen]
                    losses = work(pairs, chosen)
                    if pairs:
                        parts.append(Part(chosen[0], pairs, losses))
        return self._of_all(parts)

    def _usable(self, stream: PairStream, batch: Sequence[int]) -> list[int]:
        return list(compress(batch, self._clips.usable([stream.pair(index) for index in batch])))

    def _of_all(self, parts: list[Part]) -> list[Part]:
        """The parts of all processes in the order of their stream; clips that others could not use count here too."""
        if self._processes.size == 1:
            return parts
        sent = [Part(part.start, part.pairs, _on_host(part.losses)) for part in parts]
        found = self._processes.gather((sent, self._clips.bad))
        self._clips.leave_out({name: reason for _, bad in found for name, reason in bad.items()})
        return sorted((part for share, _ in found for part in share), key=lambda part: part.start)


def check_shares(settings: TrainSettings, processes: Processes) -> None:
    """Raise :class:`ConfigError` where a process would have nothing to do; warn where some wait for others."""
    shares = settings.batch_pairs // settings.micro_pairs
    if processes.size > shares:
        raise ConfigError(
            f"{processes.size} processes cannot share batch_pairs ({settings.batch_pairs}) in micro-batches of "
            f"micro_pairs ({settings.micro_pairs}); start at most {shares}, or lower micro_pairs"
        )
    if shares % processes.size and processes.first:
        logger.warning(
            "%d micro-batches a step over %d processes: some wait for the others; a number that divides %d wastes "
            "nothing",
            shares,
            processes.size,
            shares,
        )


def _on_host(losses: PairLoss) -> PairLoss:
    return PairLoss(*(getattr(losses, field.name).cpu() for field in fields(losses)))
