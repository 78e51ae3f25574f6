"""Which attention kernel a diffusers transformer uses on CUDA: measured at start at the shape that will be trained.

No table is trusted: on Hopper cuDNN's kernel is published to train 1.6 times as fast as the one torch picks, on an A100
slower. Elsewhere than on CUDA torch's own choice is kept.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import ConfigError

logger = logging.getLogger(__name__)

Attention = Literal["auto", "native", "flash", "cudnn", "efficient", "math", "flash-2", "flash-3", "flash-3-hub"]

BACKENDS: dict[str, str] = {
    "native": "native",
    "flash": "_native_flash",
    "cudnn": "_native_cudnn",
    "efficient": "_native_efficient",
    "math": "_native_math",
    "flash-2": "flash",
    "flash-3": "_flash_3",
    "flash-3-hub": "_flash_3_hub",
}
"""Our names and those of diffusers. ``flash-2`` and ``flash-3`` need packages; ``flash-3-hub`` downloads a kernel."""

TOLERANCE = 0.02
"""Largest relative difference to torch's own choice, in output and gradients; bfloat16 resolves 0.004."""


@dataclass(frozen=True)
class Timing:
    """One kernel at one shape: seconds of a forward and backward pass, or why it cannot be used."""

    name: str
    seconds: float | None
    reason: str = ""


def candidates(capability: tuple[int, int], dtype: torch.dtype) -> list[str]:
    """What is worth measuring on a CUDA card of this compute capability; never anything that would be downloaded."""
    if dtype not in (torch.bfloat16, torch.float16) or capability < (8, 0):
        return ["native"]
    packages = ["flash-3", "flash-2"] if capability[0] == 9 else ["flash-2"]
    return ["native", "cudnn", *packages]


def set_attention(transformer: Any, wanted: Attention, tokens: int, measure: bool = True) -> str:
    """Choose the attention kernel of a diffusers transformer.

    Args:
        transformer: on its device, in the precision it will compute in.
        wanted: a kernel, or "auto": the fastest usable one on CUDA, torch's own choice elsewhere.
        tokens: length of the self-attention.
        measure: False takes "auto" as torch's own choice on CUDA too.

    Returns:
        The name of the kernel.

    Raises:
        ConfigError: the kernel asked for does not work here; the message says why.
    """
    parameter = next(p for p in transformer.parameters() if p.is_floating_point())
    device, dtype = parameter.device, transformer.proj_out.weight.dtype
    if device.type != "cuda":
        if wanted not in ("auto", "native"):
            raise ConfigError(f"attention {wanted!r} needs a CUDA device, found {device.type}; use auto or native")
        return "native"
    heads, width = transformer.config.num_attention_heads, transformer.config.attention_head_dim
    if wanted == "auto":
        names = candidates(torch.cuda.get_device_capability(device), dtype) if measure else ["native"]
        timings = time_attention(tuple(names), tokens, heads, width, dtype, device)
        for timing in timings:
            logger.info("attention %s: %s", timing.name, _describe(timing))
        wanted = fastest(timings)  # type: ignore[assignment]
    elif wanted != "native":
        (timing,) = time_attention((wanted,), tokens, heads, width, dtype, device)
        if timing.seconds is None:
            raise ConfigError(f"attention {wanted!r} cannot be used here: {timing.reason}; use auto or native")
    transformer.set_attention_backend(BACKENDS[wanted])
    return wanted


def reset_attention(transformer: Any) -> None:
    """Back to torch's own choice."""
    if any(processor._attention_backend is not None for processor in transformer.attn_processors.values()):
        transformer.set_attention_backend("native")  # also for what else runs through diffusers' dispatcher
        transformer.reset_attention_backend()


def fastest(timings: tuple[Timing, ...]) -> str:
    """The name of the fastest usable kernel; torch's own choice when there is none."""
    usable = [(timing.seconds, timing.name) for timing in timings if timing.seconds is not None]
    return min(usable)[1] if usable else "native"


@functools.cache
def time_attention(
    names: tuple[str, ...], tokens: int, heads: int, width: int, dtype: torch.dtype, device: torch.device
) -> tuple[Timing, ...]:
    """Measure forward and backward of self-attention ``(1, tokens, heads, width)`` with each kernel, once a process.

    A kernel that fails, cannot be differentiated or gives another result is reported as such.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    q, k, v, grad = (
        torch.randn(1, tokens, heads, width, generator=generator).to(device, dtype).requires_grad_(index < 3)
        for index in range(4)
    )
    expected = _pass("native", q, k, v, grad)
    timings = []
    for name in names:
        try:
            found = _pass(name, q, k, v, grad)
            distance = max(_distance(one, other) for one, other in zip(found, expected, strict=True))
            if not distance < TOLERANCE:
                timings.append(Timing(name, None, f"its result is {distance:.3f} away from torch's own"))
                continue
            seconds = _median_seconds(lambda name=name: _pass(name, q, k, v, grad), device)  # type: ignore[misc]
            timings.append(Timing(name, seconds))
        except Exception as error:  # packages fail in ways of their own: import, build, capability, shape, no backward
            timings.append(Timing(name, None, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"))
    return tuple(timings)


def _pass(name: str, q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Output and gradients of one attention by diffusers' dispatcher."""
    from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn

    with attention_backend(AttentionBackendName(BACKENDS[name])):  # also checks that its package is there
        out = dispatch_attention_fn(q, k, v)
    return (out.detach(), *torch.autograd.grad(out, (q, k, v), grad))


def _distance(one: Tensor, other: Tensor) -> float:
    value = float((one.float() - other.float()).norm() / other.float().norm())
    return math.inf if math.isnan(value) else value


def _median_seconds(work: Callable[[], object], device: torch.device, repeats: int = 5) -> float:
    seconds = []
    for _ in range(repeats):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[repeats // 2]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _describe(timing: Timing) -> str:
    return f"not usable, {timing.reason}" if timing.seconds is None else f"{1000 * timing.seconds:.1f} ms"
