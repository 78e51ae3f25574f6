"""The settings of memory and speed put to work, and what to do when a device's memory is full."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from spatialalign.backbones.attention import reset_attention, set_attention
from spatialalign.backbones.checkpointing import disable_checkpointing, enable_checkpointing, stop_compiling
from spatialalign.backbones.storage import restore_linears, store_in_fp8
from spatialalign.errors import ConfigError
from training.config import TrainSettings
from training.gradients import Passes

if TYPE_CHECKING:
    from spatialalign.backbones.base import Backbone

logger = logging.getLogger(__name__)


def set_up(backbone: Backbone, settings: TrainSettings, shape: Sequence[int]) -> None:
    """Prepare a transformer that carries its adapter for training on clips of ``shape (c, f, h, w)``."""
    transformer: Any = backbone.transformer
    if settings.base_dtype == "fp8":
        logger.info("the base is stored in 8 bits: %.2f GB less", store_in_fp8(transformer) / 1e9)
    kernel = set_attention(transformer, settings.attention, backbone.tokens(shape))
    logger.info("attention: %s", kernel)
    enable_checkpointing(transformer, settings.checkpointing, settings.offload_inputs, settings.compile)


def plain_base(backbone: Backbone) -> None:
    """Undo what no LoRA file can be loaded onto: compiled blocks, and 8-bit linears, which stay rounded."""
    stop_compiling(backbone.transformer)
    restore_linears(backbone.transformer)


def take_down(backbone: Backbone) -> None:
    """Undo :func:`set_up`, so that sampling is as fast as before."""
    disable_checkpointing(backbone.transformer)
    reset_attention(backbone.transformer)
    plain_base(backbone)


def passes_on(settings: TrainSettings, device: torch.device) -> Passes:
    """The forward passes of a pair. Batching is faster on a CPU; elsewhere it costs memory and gains nothing."""
    if settings.passes == "auto":
        return "batched" if device.type == "cpu" else "separate"
    return settings.passes


@contextmanager
def advice_when_full(settings: TrainSettings) -> Iterator[None]:
    """Turn a device's out-of-memory error into a :class:`ConfigError` with the three options that help most."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the memory of the device is full ({str(error).splitlines()[0]}). What helps most, in this order: "
            f"{'; '.join(remedies(settings)[:3])}. The newest checkpoint is unharmed: run the same command with the "
            "option and --allow_changes true to continue"
        ) from error


def remedies(settings: TrainSettings) -> list[str]:
    """Options that lower the peak, those that save most first and those already in use left out."""
    options = [
        (settings.micro_pairs > 1, "--micro_pairs 1 (one pair in memory; the steps stay the same)"),
        (settings.checkpointing != "full", "--checkpointing full (keeps only the inputs of the blocks)"),
        (
            settings.passes != "one-sample",
            "--passes one-sample (one clip's graph at a time, for one more forward pass)",
        ),
        (not settings.offload_inputs, "--offload_inputs true (keeps the inputs of the blocks in host memory)"),
        (
            settings.base_dtype == "model" and not settings.shard,
            "--base_dtype fp8 (stores the frozen base in 8 bits)",
        ),
        (settings.targets == "all-linear", "--targets spatialalign (a LoRA on fewer linears)"),
        (True, "clips of fewer frames or pixels (training.generate --frames, --height, --width)"),
    ]
    return [text for helps, text in options if helps]
