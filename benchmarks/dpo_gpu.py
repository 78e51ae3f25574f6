"""The same pair on a CUDA card, one improvement after the other: ``python -m benchmarks.dpo_gpu``.

Random weights of the true shape (Wan2.1-T2V-1.3B, 81 frames of 832 x 480), so nothing is downloaded. Each stage is a
warm-up and some timed pairs by the trainer's own gradient function; a stage that does not run on this card is reported
with its reason and the next one goes on. Writes ``dpo_gpu.json`` and ``dpo_gpu.md``.
"""

from __future__ import annotations

import gc
import logging
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.dpo_cost import PAPER, cost, gradients, official_cost
from benchmarks.official import official_gradients, reference_copy
from benchmarks.wan_shapes import FULL, Shape, build, side
from spatialalign.errors import ConfigError
from spatialalign.files import write_json
from training.cli import command
from training.config import TrainSettings
from training.memory import set_up, take_down
from training.reference_cache import ReferenceCache
from training.trainer import add_adapter

logger = logging.getLogger(__name__)

_PLAIN = replace(PAPER, attention="native", passes="separate")
_SELECTIVE = replace(_PLAIN, attention="auto", checkpointing="selective")
STAGES: dict[str, tuple[TrainSettings, bool]] = {
    "adapter-off reference": (_PLAIN, False),
    "+ measured attention": (replace(_PLAIN, attention="auto"), False),
    "+ selective checkpointing": (_SELECTIVE, False),
    "+ compile": (replace(_SELECTIVE, compile=True), False),
    "+ cached reference": (replace(_SELECTIVE, compile=True), True),
    "selective, cached reference, no compile": (_SELECTIVE, True),
    "one sample at a time": (replace(_PLAIN, attention="auto", passes="one-sample"), False),
    "one sample, inputs on the host": (
        replace(_PLAIN, attention="auto", passes="one-sample", offload_inputs=True),
        False,
    ),
    "one sample, inputs on the host, fp8 base": (
        replace(_PLAIN, attention="auto", passes="one-sample", offload_inputs=True, base_dtype="fp8"),
        False,
    ),
}
"""The trainer's settings of each stage after the official recipe, and whether predictions of the reference are read."""


@dataclass(frozen=True)
class DpoGpu:
    """Time the training of one pair on a CUDA card, from the official recipe on, one improvement after the other."""

    out: Path = Path("benchmarks/out")
    """Folder for dpo_gpu.json and dpo_gpu.md."""
    pairs: int = 10
    """Timed pairs of each stage."""
    warm_up: int = 3
    """Pairs before them."""
    stages: str = "all"
    """Comma-separated words; a stage whose name contains one of them is run, and the official recipe always."""
    peak_tflops: float | None = None
    """Peak of the card that MFU refers to; null measures a large bfloat16 product."""
    device: str = "cuda"
    """cuda or cuda:1."""

    def chosen(self) -> dict[str, tuple[TrainSettings, bool]]:
        """The stages to run; raises :class:`ConfigError` when none has such a name."""
        words = self.stages.split(",")
        found = {name: s for name, s in STAGES.items() if self.stages == "all" or any(word in name for word in words)}
        if not found and self.stages != "official":
            raise ConfigError(f"stages {self.stages!r} fits none of: {'; '.join(STAGES)}")
        return found


@dataclass(frozen=True)
class Row:
    """One stage; times in seconds a pair, memory in bytes, None where it did not run or cannot be measured."""

    name: str
    median: float | None = None
    fastest: float | None = None
    slowest: float | None = None
    allocated: int | None = None
    reserved: int | None = None
    error: str = ""


def run(args: DpoGpu) -> list[Row]:
    """Run every stage on the card and write both files."""
    if not args.device.startswith("cuda") or not torch.cuda.is_available():
        raise ConfigError(f"a CUDA device is needed, found none for {args.device!r}; dpo_cost counts without one")
    return measure(args, FULL, torch.bfloat16)


def measure(args: DpoGpu, shape: Shape, dtype: torch.dtype) -> list[Row]:
    """The stages at a given shape; also runs on a CPU, where memory is not measured."""
    peak = args.peak_tflops or product_tflops(args.device, 8192 if args.device.startswith("cuda") else 256)
    needed = cost(shape, replace(PAPER, checkpointing="none"), False).flops
    facts = {
        "card": torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else args.device,
        "torch": torch.__version__,
        "tokens": shape.tokens,
        "peak_tflops": peak,
        "needed_tflop_a_pair": needed / 1e12,
        "official_tflop_a_pair": official_cost(shape).flops / 1e12,
    }
    rows = [_attempt("official", args, lambda: official_stage(args, shape, dtype))]
    for name, (settings, cached) in args.chosen().items():
        rows.append(
            _attempt(name, args, lambda s=settings, c=cached: trainer_stage(args, shape, dtype, s, c))  # type: ignore[misc]
        )
        write_json(args.out / "dpo_gpu.json", facts | {"rows": [asdict(row) for row in rows]})
    text = table(facts, rows)
    write_json(args.out / "dpo_gpu.json", facts | {"rows": [asdict(row) for row in rows]})
    (args.out / "dpo_gpu.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return rows


@contextmanager
def official_stage(args: DpoGpu, shape: Shape, dtype: torch.dtype) -> Iterator[Callable[[], object]]:
    """A step of the official recipe."""
    backbone = build(shape, args.device, dtype)
    reference = reference_copy(backbone.transformer)
    add_adapter(backbone, PAPER)
    backbone.transformer.enable_gradient_checkpointing()
    winner, loser = (side(shape, args.device, seed=seed) for seed in (0, 1))
    yield lambda: official_gradients(backbone.transformer, reference, winner, loser)


@contextmanager
def trainer_stage(
    args: DpoGpu, shape: Shape, dtype: torch.dtype, settings: TrainSettings, cached: bool
) -> Iterator[Callable[[], object]]:
    """A step of the trainer; a kept reference is read from disk at every step, as in a training."""
    backbone = build(shape, args.device, dtype)
    add_adapter(backbone, settings)
    set_up(backbone, settings, shape.latents)
    winner, loser = (side(shape, args.device, seed=seed) for seed in (0, 1))
    with tempfile.TemporaryDirectory() as folder:
        cache = ReferenceCache(Path(folder), {}, "bfloat16") if cached else None

        def step() -> None:
            reference = None
            if cache is not None:
                won = cache.predictions(backbone, [("benchmark", 0)], ["0"], winner)
                reference = won, cache.predictions(backbone, [("benchmark", 1)], ["0"], loser)
            gradients(backbone, winner, loser, settings, reference)

        yield step
    take_down(backbone)


def _attempt(name: str, args: DpoGpu, stage: Callable[[], Any]) -> Row:
    """Warm up and time a stage; a failure becomes its row, and its memory is free for the next."""
    logger.info("%s", name)
    row = _row(name, args, stage)
    torch._dynamo.reset()
    gc.collect()
    if args.device.startswith("cuda"):
        torch.cuda.empty_cache()
    return row


def _row(name: str, args: DpoGpu, stage: Callable[[], Any]) -> Row:
    try:
        with stage() as step:
            return _time(name, args, step)
    except Exception as error:  # out of memory, a kernel or a compiler that this card or torch does not have
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        logger.warning("%s: %s", name, reason)
        return Row(name, error=reason)


def _time(name: str, args: DpoGpu, step: Callable[[], object]) -> Row:
    cuda = args.device.startswith("cuda")
    for _ in range(args.warm_up):
        step()
    if cuda:
        torch.cuda.reset_peak_memory_stats(args.device)
    seconds = [seconds_of(step, args.device) for _ in range(args.pairs)]
    allocated = torch.cuda.max_memory_allocated(args.device) if cuda else None
    reserved = torch.cuda.max_memory_reserved(args.device) if cuda else None
    return Row(name, statistics.median(seconds), min(seconds), max(seconds), allocated, reserved)


def seconds_of(step: Callable[[], object], device: str) -> float:
    """How long a step takes, by the card's own clock where there is one."""
    if not device.startswith("cuda"):
        started = time.perf_counter()
        step()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end)) / 1000


def product_tflops(device: str, size: int) -> float:
    """TFLOP/s of a ``size x size`` bfloat16 product, the median of 10 after 3."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = [seconds_of(lambda: a @ b, device) for _ in range(13)][3:]
    return 2 * size**3 / statistics.median(seconds) / 1e12


def table(facts: dict[str, Any], rows: Sequence[Row]) -> str:
    """The outcome as Markdown. MFU counts the operations that are needed: nothing recomputed, a live reference."""
    lines = [
        f"{facts['card']}, torch {facts['torch']}, {facts['tokens']:,} tokens; a pair needs "
        f"{facts['needed_tflop_a_pair']:,.1f} TFLOP; MFU refers to {facts['peak_tflops']:,.1f} TFLOP/s.",
        "",
        "| stage | median s a pair | fastest | slowest | faster than official | peak GB | reserved GB | MFU |",
        "|---|---|---|---|---|---|---|---|",
    ]
    official = rows[0].median
    for row in rows:
        if row.median is None or row.fastest is None or row.slowest is None:
            lines.append(f"| {row.name} | did not run: {row.error} | | | | | | |")
            continue
        speed = f"{official / row.median:.2f}x" if official else ""
        memory = [f"{value / 1e9:.1f}" if value else "" for value in (row.allocated, row.reserved)]
        mfu = facts["needed_tflop_a_pair"] / row.median / facts["peak_tflops"]
        lines.append(
            f"| {row.name} | {row.median:.3f} | {row.fastest:.3f} | {row.slowest:.3f} | {speed} | {memory[0]} | "
            f"{memory[1]} | {100 * mfu:.0f} % |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m benchmarks.dpo_gpu``."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    command(DpoGpu, run, argv)


if __name__ == "__main__":
    main()
