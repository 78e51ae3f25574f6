"""A frozen base model spread over the processes of a training (FSDP2), for one that no card holds beside its work.

Each process keeps a part of every weight. The weights of a transformer block are put together when it runs and given up
behind it; those outside the blocks are one more unit. A LoRA is added afterwards and stays out of this: every process
holds all of it, and its gradients are added up as without sharding.

A forward or backward pass is then a meeting of all processes: each must make as many, in the same order.
"""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from spatialalign.errors import ConfigError
from training.config import TrainSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spatialalign.backbones.base import Backbone, ExpertName
    from training.processes import Processes

logger = logging.getLogger(__name__)


def with_launcher(settings: TrainSettings) -> TrainSettings:
    """The settings, with ``shard`` where ``accelerate launch --use_fsdp`` asks for it."""
    if settings.shard or os.environ.get("ACCELERATE_USE_FSDP", "").lower() != "true":
        return settings
    logger.info("shard is true: accelerate launch --use_fsdp asks for it; its other FSDP options are not used")
    return replace(settings, shard=True)


def backend(settings: TrainSettings, device: str) -> str:
    """The process group's backend: gloo through host memory, with nccl for weights that travel between cards."""
    if not settings.shard or device == "cpu":
        return "gloo"
    import torch

    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def check_sharding(settings: TrainSettings, processes: Processes) -> None:
    """Raise :class:`ConfigError` where one process alone is to shard."""
    if settings.shard and processes.size == 1:
        raise ConfigError(
            "shard (True) needs several processes, found 1; start them with torchrun, say how many with --processes in "
            "a dry run, or set shard false"
        )


def load_sharded(model: str, device: str, dtype: str, expert: ExpertName | None, processes: Processes) -> Backbone:
    """Load a model, as :func:`load_backbone`, so that this process's device never holds more than its part of it.

    It is read to host memory, and each block goes to the device when it is cut.
    """
    from spatialalign.backbones import load_backbone
    from spatialalign.backbones.loading import pick_device, pick_dtype

    where = pick_device(device)
    precision = str(pick_dtype(dtype, where)).removeprefix("torch.")  # of the device that computes, not of the host
    with processes.together():
        backbone = load_backbone(model, "cpu", precision, expert)
    shard(backbone.transformer, where, processes)
    return backbone


def shard(transformer: nn.Module, device: str, processes: Processes) -> None:
    """Leave this process its part of a transformer that carries no adapter, on ``device``."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from spatialalign.backbones.checkpointing import repeated_blocks

    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)  # fully_shard takes the current one
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)  # changed by nobody
    mesh = init_device_mesh(where.type, (processes.size,))
    for module in (*repeated_blocks(transformer), transformer):
        fully_shard(module, mesh=mesh)


def is_sharded(transformer: Any) -> bool:
    """Whether passes through the transformer need all processes."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(transformer, FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """A tensor with the parts of all processes; they must all ask for it."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
