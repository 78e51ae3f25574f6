"""One resumable training loop for every stage of the miniature."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from spatialalign.files import atomic_path


@dataclass
class Loop:
    """Trains ``model`` for ``steps`` steps; a step is a pure function of its number, so a resumed run is the same run.

    The learning rate warms up linearly, stays, and falls as a cosine over the last ``decay`` part. ``ema`` > 0 keeps an
    exponential moving average of the weights, which is what :meth:`run` leaves in the model at the end. ``fan_in`` > 0
    lowers the rate of matrices with more inputs than that in proportion: one step of Adam moves every weight by the
    rate, so 4096 inputs that move together move an output by thousands of times as much.
    """

    name: str
    folder: Path
    model: nn.Module
    steps: int
    lr: float
    warmup: int = 100
    decay: float = 0.5
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.0
    fan_in: int = 0
    save_every: int = 500
    log_every: int = 25
    betas: tuple[float, float] = (0.9, 0.98)
    average: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for parameter in self.parameters.values():
            matrix = parameter.ndim > 1
            scale = min(1.0, self.fan_in / parameter[0].numel()) if matrix and self.fan_in else 1.0
            groups.setdefault((scale, self.weight_decay if matrix else 0.0), []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": part, "scale": scale, "weight_decay": decay} for (scale, decay), part in groups.items()],
            lr=self.lr, betas=self.betas,
        )  # fmt: skip
        if self.ema:
            self.average = {n: p.detach().clone() for n, p in self.parameters.items()}

    @property
    def checkpoint(self) -> Path:
        return self.folder / f"{self.name}.safetensors"

    def rate(self, step: int) -> float:
        """Learning rate at ``step``."""
        rise = min(1.0, (step + 1) / self.warmup)
        begin = self.steps * (1 - self.decay)
        fall = 1.0 if step < begin else 0.5 * (1 + math.cos(math.pi * (step - begin) / (self.steps - begin)))
        return self.lr * rise * max(fall, 0.01)

    def save(self, step: int) -> None:
        tensors = {f"model.{n}": p.detach() for n, p in self.parameters.items()}
        tensors |= {f"ema.{n}": p for n, p in self.average.items()}
        for name, parameter in self.parameters.items():
            state = self.optimizer.state.get(parameter, {})
            tensors |= {f"adam.{key}.{name}": torch.as_tensor(value) for key, value in state.items()}
        with atomic_path(self.checkpoint) as path:
            save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path, metadata={"step": str(step)})

    def load(self) -> int:
        """Restore the newest state; returns the number of steps already taken."""
        if not self.checkpoint.exists():
            return 0
        with safe_open(self.checkpoint, "pt") as file:
            step = int(file.metadata()["step"])
            for key in file.keys():
                kind, _, name = key.partition(".")
                value = file.get_tensor(key)
                if kind == "model":
                    self.parameters[name].data.copy_(value)
                elif kind == "ema":
                    self.average[name] = value
                else:
                    slot, _, name = name.partition(".")
                    self.optimizer.state[self.parameters[name]][slot] = value
        return step

    def run(self, loss_of: Callable[[int], dict[str, Tensor]], check: Callable[[int], None] | None = None) -> None:
        """``loss_of(step)`` returns named scalars, ``"loss"`` among them; ``check(step)`` is called after each save."""
        start = self.load()
        began = time.time()
        bar = tqdm(range(start, self.steps), initial=start, total=self.steps, desc=self.name, mininterval=10)
        with open(self.folder / f"{self.name}.jsonl", "a", encoding="utf-8") as log:
            for step in bar:
                for group in self.optimizer.param_groups:
                    group["lr"] = self.rate(step) * group["scale"]
                parts = loss_of(step)
                self.optimizer.zero_grad(set_to_none=True)
                parts["loss"].backward()
                norm = nn.utils.clip_grad_norm_(list(self.parameters.values()), self.clip)
                self.optimizer.step()
                for name, mean in self.average.items():
                    mean.lerp_(self.parameters[name].detach(), 1 - min(self.ema, (step + 1) / (step + 10)))
                if step % self.log_every == 0:
                    row = {k: round(float(v.detach()), 5) for k, v in parts.items()}
                    row |= {"step": step, "grad_norm": round(float(norm), 4), "seconds": round(time.time() - began, 1)}
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                    bar.set_postfix({k: f"{v:.4f}" for k, v in row.items() if k in parts})
                if (step + 1) % self.save_every == 0 or step + 1 == self.steps:
                    self.save(step + 1)
                    if check is not None:
                        check(step + 1)
        for name, mean in self.average.items():
            self.parameters[name].data.copy_(mean)
