"""The processes of one training, on one machine or several: what they tell each other, and nothing else.

They share the pairs of a step and add up the LoRA's gradients; each holds the whole model and takes the same optimiser
step. What travels is small (12 MB of gradients a step for the paper's LoRA), so it goes through host memory by gloo,
the same way on every device. ``torchrun`` and ``accelerate launch`` start the processes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from spatialalign.errors import ConfigError, DataError, SpatialAlignError

if TYPE_CHECKING:
    from torch import nn
    from torch.distributed import Store

T = TypeVar("T")

_PARTING = 20.0
"""Seconds that the first process waits at the end for the others to be done, too."""
_PATIENCE = timedelta(hours=6)
"""How long the others wait for a process, which may be sampling clips; one that ended is noticed at once."""


@dataclass(frozen=True)
class Processes:
    """This process among those of a training. Alone, it sends nothing, and every method is the plain thing.

    All processes must call the methods in the same order.

    Attributes:
        rank: number of this one, from 0.
        size: how many there are.
        local_rank: number among those of this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ConfigError(f"process {self.rank} of {self.size} cannot be; start them with torchrun")

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Every ``size``-th item from this process's number on, so that all items are taken once."""
        return items[self.rank :: self.size]

    def turns(self, items: Sequence[T]) -> list[T | None]:
        """The share, with None at its end where other processes have one item more: as many turns for each."""
        share, turns = self.share(items), -(-len(items) // self.size)
        return [*share, *[None] * (turns - len(share))]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[T | None] = [None] * self.size
        dist.all_gather_object(found, value)
        return found  # type: ignore[return-value]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return any(self.gather(flag))

    def agree(self, values: Mapping[str, object]) -> None:
        """Raise :class:`ConfigError` with the name of a value that is not the same in all processes, and with both."""
        first, *others = self.gather(dict(values))
        for rank, other in enumerate(others, 1):
            odd = [name for name in first if other.get(name) != first[name]]
            if odd:
                raise ConfigError(
                    f"{odd[0]} is {other.get(odd[0])!r} in process {rank} and {first[odd[0]]!r} in process 0; start "
                    "all with the same options, on folders that every machine sees"
                )

    @contextmanager
    def together(self) -> Iterator[None]:
        """Make an error that a user can act on, raised inside the block by one process, an error of all of them."""
        error: Exception | None = None
        try:
            yield
        except (SpatialAlignError, OSError) as raised:
            error = raised
        messages = self.gather(None if error is None else str(error))
        if error is not None:
            raise error
        for rank, message in enumerate(messages):
            if message is not None:
                raise DataError(f"process {rank} of {self.size}: {message}")

    def on_first(self, work: Callable[[], T]) -> T:
        """Do something in the first process alone; every process returns what it returned, or raises its error."""
        with self.together():
            value = work() if self.first else None
        return self.gather(value)[0]  # type: ignore[return-value]

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its sum over the processes; one without any counts as 0.

        The sum has the same bits in every process.
        """
        if self.size == 1:
            return
        import torch
        import torch.distributed as dist

        chosen = list(parameters)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in chosen]
        flat = torch.cat([gradient.flatten().cpu() for gradient in gradients])
        dist.all_reduce(flat)
        parts = flat.split([parameter.numel() for parameter in chosen])
        for parameter, part in zip(chosen, parts, strict=True):
            parameter.grad = part.view_as(parameter).to(parameter)

    def device(self, wanted: str) -> str:
        """The device of this process: where several share a machine, ``auto`` and ``cuda`` mean a card for each.

        Raises:
            ConfigError: there are fewer cards than processes, or all were given one and the same.
        """
        if self.size == 1 or not (wanted == "auto" or wanted.startswith("cuda")):
            return wanted
        import torch

        if wanted == "auto" and not torch.cuda.is_available():
            return wanted
        if wanted not in ("auto", "cuda"):
            raise ConfigError(f"--device {wanted} would put {self.size} processes on one card; use --device cuda")
        if self.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"process {self.rank} is number {self.local_rank} of its machine, which has "
                f"{torch.cuda.device_count()} cards; start one process for each card"
            )
        return f"cuda:{self.local_rank}"


ALONE = Processes()
"""The only process of a training."""


def launched_rank() -> int:
    """The number that a launcher gave this process; 0 without one."""
    return _number("RANK", 0)


def launched_size() -> int:
    """How many processes a launcher started; 1 without one."""
    return _number("WORLD_SIZE", 1)


@contextmanager
def launched(backend: str = "gloo") -> Iterator[Processes]:
    """Meet the other processes that ``torchrun`` or ``accelerate launch`` started, as their environment says.

    Raises:
        ConfigError: the environment is incomplete, or the others cannot be reached.
        DataError: one of them has ended.
    """
    size = launched_size()
    if size == 1:
        yield ALONE
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(f"WORLD_SIZE is {size}, but {', '.join(missing)} not set; start the processes with torchrun")
    import torch.distributed as dist

    rank = launched_rank()
    try:
        store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=_PATIENCE))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConfigError(f"process {rank} of {size} cannot meet the others at {where}: {error}") from error
    try:
        yield Processes(rank, size, _number("LOCAL_RANK", rank))
    except RuntimeError as error:
        if "gloo" not in str(error):  # torch has no type of its own for a connection that broke
            raise
        raise DataError(
            f"process {rank} of {size} lost another one, which says why if it could ({str(error).splitlines()[0]}); "
            "the newest checkpoint is unharmed: run the same command again to continue"
        ) from error
    finally:
        dist.destroy_process_group()
        _part(store, rank, size)


def _part(store: Store, rank: int, size: int) -> None:
    """Wait in the first process until all are done: it may hold what they meet by, and without that they abort."""
    with suppress(RuntimeError):  # the first process died, and its error or signal is what should be seen
        left, until = store.add("left", 1), time.monotonic() + _PARTING
        while rank == 0 and left < size and time.monotonic() < until:
            time.sleep(0.05)
            left = store.add("left", 0)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise ConfigError(f"the environment variable {name} must be a number, found {text!r}")
    return int(text)
