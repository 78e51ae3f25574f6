"""Predictions of the reference, kept on disk: the base model never changes, so neither does what it says about a draw.

A folder belongs to one base model, one schedule and one way of drawing noise, all written to ``reference.json``;
another one is refused. Each file holds one prediction and names the latents and the text it was made for::

    reference.json
    <prompt_id>/<seed>/<draw>.safetensors

Predictions are made one at a time, so each is a function of clip and draw alone and a run that is stopped and continued
reads the same bits as one that was not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from spatialalign.errors import ConfigError, DataError
from spatialalign.files import atomic_path, read_json, write_json
from training.gradients import Side, adapter_off
from training.sharding import whole

if TYPE_CHECKING:
    from spatialalign.backbones.base import Backbone
    from training.config import TrainSettings

FORMAT = "1"
Precision = Literal["float32", "bfloat16"]


def reference_identity(transformer: nn.Module, model_id: str, settings: TrainSettings) -> dict[str, Any]:
    """What every prediction of a folder has in common: the base model's weights, the schedule and the way of drawing.

    Where each draw is a fresh one (``reference_draws`` 0), a draw means the same to runs of one seed only.
    """
    return {
        "format": FORMAT,
        "model": model_id,
        "weights": weights_digest(transformer),
        "shift": settings.shift,
        "bf16_timesteps": settings.bf16_timesteps,
        "noise": settings.noise,
        "seed": settings.seed,
        "draws": settings.reference_draws,
        "precision": settings.reference_cache,
    }


def weights_digest(transformer: nn.Module) -> str:
    """Sixteen hexadecimal digits that change with any weight of the base model; adapters do not count.

    All processes must call this where the model is sharded over them.
    """
    digest = hashlib.sha256()
    state = transformer.state_dict()
    plain = {name.replace(".base_layer", ""): tensor for name, tensor in state.items() if "lora_" not in name}
    for name in sorted(plain):
        digest.update(f"{name} {plain[name].dtype} {tuple(plain[name].shape)}".encode())
        digest.update(_content(whole(plain[name])))
    return digest.hexdigest()[:16]


def tensor_digest(tensor: Tensor) -> str:
    """Sixteen hexadecimal digits of a tensor's content."""
    return hashlib.sha256(_content(tensor)).hexdigest()[:16]


class ReferenceCache:
    """A folder of predictions."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], precision: Precision) -> None:
        """Open the folder, or begin it.

        Raises:
            ConfigError: it was made for something else; the message says for what.
        """
        self.folder, self._dtype = folder, getattr(torch, precision)
        path = folder / "reference.json"
        if not path.is_file():
            write_json(path, dict(identity))
            return
        found = read_json(path)
        changes = [
            f"{name} {found.get(name)!r} there, {identity.get(name)!r} now"
            for name in sorted(found.keys() | identity.keys())
            if found.get(name) != identity.get(name)
        ]
        if changes:
            raise ConfigError(
                f"the reference predictions in {folder} were made otherwise: {'; '.join(changes)}. Name another "
                "folder, or delete this one"
            )

    def predictions(
        self, backbone: Backbone, clips: Sequence[tuple[str, int]], draws: Sequence[str], side: Side
    ) -> Tensor:
        """The reference's velocities for b clips ``(b, c, f, h, w)``, on the model's device; made where missing.

        Args:
            backbone: to make them with.
            clips: prompt id and seed of each.
            draws: a name for the noise and noise level of each, unique among all that its clip is given.
            side: what the model is asked about them.

        Raises:
            DataError: a file is damaged, or was made for other latents, noise or text.
        """
        rows = []
        for index, (prompt_id, seed) in enumerate(clips):
            path = self.folder / prompt_id / str(seed) / f"{draws[index]}.safetensors"
            alone = side.part(index)
            made_for = {
                "noisy latents": tensor_digest(alone.noisy),
                "noise level": repr(float(alone.told)),
                "text": tensor_digest(alone.text[0]),
            }
            rows.append(self._read(path, made_for) if path.is_file() else self._make(backbone, path, made_for, alone))
        return torch.stack(rows).to(backbone.device)

    def _read(self, path: Path, made_for: Mapping[str, str]) -> Tensor:
        try:
            with safe_open(path, framework="pt") as file:
                found, prediction = file.metadata() or {}, file.get_tensor("velocity")
        except SafetensorError as error:
            raise DataError(f"{path} cannot be read ({error}); delete it, and it is made again") from error
        changed = [name for name, value in made_for.items() if found.get(name) != value]
        if changed:
            raise DataError(
                f"{path} was made for another {' and another '.join(changed)}; the clips have changed since: delete "
                f"{self.folder} or name another folder"
            )
        return prediction.float()

    def _make(self, backbone: Backbone, path: Path, made_for: Mapping[str, str], side: Side) -> Tensor:
        with torch.no_grad(), adapter_off(backbone.transformer):
            prediction = backbone.velocity(side.noisy, side.told, side.text)[0]
        kept = prediction.to("cpu", self._dtype).contiguous()
        with atomic_path(path) as temporary:
            save_file({"velocity": kept}, temporary, metadata=dict(made_for))
        return kept.float()


def _content(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
