"""Files of rewards that are a trunk and a head: safetensors, with what they are as JSON in the header."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..files import atomic_path
from .wan_trunk import TrunkConfig, WanTrunk

Reward = TypeVar("Reward", bound=nn.Module)


@dataclass(frozen=True)
class RewardFile:
    """One kind of file.

    Attributes:
        kind: as in the header, such as ``"latent-reward"``, which ``training.latent_reward`` writes.
        version: raised when an older program would read the file wrongly.
    """

    kind: str
    version: int

    @property
    def name(self) -> str:
        """The kind in words."""
        return self.kind.replace("-", " ")

    def write(
        self, path: str | Path, reward: nn.Module, content: Mapping[str, Any], dtype: torch.dtype = torch.float16
    ) -> None:
        """Write a reward atomically: matrices in ``dtype``, vectors in float32, ``content`` in the header.

        ``content`` is JSON values and has a dictionary ``info`` with ``base_model`` and ``license``.
        """
        from safetensors.torch import save_file

        tensors = {
            name: tensor.detach().to("cpu", dtype if tensor.ndim > 1 else torch.float32).contiguous()
            for name, tensor in reward.state_dict().items()
        }
        info = content["info"]
        header = {
            "format": "pt",
            "spatialalign": json.dumps({"version": self.version, "kind": self.kind, **content}, sort_keys=True),
            "modelspec.title": f"SpatialAlign {self.name} for {info['base_model']}",
            "modelspec.license": info["license"],
        }
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata=header)

    def read(self, path: str | Path, build: Callable[[dict[str, Any]], Reward]) -> Reward:
        """What ``build`` makes of the header's content, with the file's tensors, in float32.

        Raises:
            ModelError: no such file, one of another kind or of a later version, or a damaged one.
        """
        content, tensors = self._read(Path(path))
        try:
            reward = build(content)
            reward.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        except (KeyError, TypeError, RuntimeError) as error:
            raise ModelError(f"{path} is a damaged {self.name} ({error}); copy or train it again") from error
        return reward

    def _read(self, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            raise ModelError(f"the {self.name} {path} does not exist")
        try:
            with safe_open(path, "pt") as file:
                content = json.loads((file.metadata() or {}).get("spatialalign", "{}"))
                if content.get("kind") != self.kind:
                    program = f"python -m training.{self.kind.replace('-', '_')}"
                    raise ModelError(f"{path} is no {self.name}; {program} writes them")
                if content["version"] > self.version:
                    raise ModelError(
                        f"{path} is of version {content['version']}, this program reads up to {self.version}; update it"
                    )
                return content, {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, json.JSONDecodeError, OSError) as error:
            raise ModelError(f"{path} is no safetensors file ({error}); copy it again") from error


def trunk_of(content: Mapping[str, Any]) -> WanTrunk:
    """A new trunk of the sizes that a file's content has under ``trunk``."""
    sizes = content["trunk"]
    return WanTrunk(TrunkConfig(**{**sizes, "patch": tuple(sizes["patch"])}))
