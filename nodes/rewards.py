"""Latent rewards in a graph: their files, their weights, and which models they can read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..spatialalign.errors import ConfigError
from . import host
from .grounded_sam import MINIATURE

if TYPE_CHECKING:
    from ..spatialalign.backbones.latent_space import LatentSpace
    from ..spatialalign.rewards.latent import LatentReward

FOLDER = "latent_rewards"
"""Below ``models``."""
DEFAULT_WEIGHTS = {"dsr": 1.0}
_VAE_WIDTHS = {128: 8, 3072: 160}
"""Width of the VAE by width of the transformer: the miniature's and Wan 2.2 5B's. Every other Wan has Wan 2.1's VAE."""


@dataclass(frozen=True)
class WeightedReward:
    """One latent reward.

    Attributes:
        name: as it was chosen.
        network: the reward; it is on the device only while a sampler runs.
        patcher: the host's, about it.
        weights: of its dimensions; those that are not named count nothing.
    """

    name: str
    network: LatentReward
    patcher: Any
    weights: Mapping[str, float]


@dataclass(frozen=True)
class Reward:
    """The sum of latent rewards: what goes over the socket."""

    parts: tuple[WeightedReward, ...]

    def weighted(self, text: str) -> Reward:
        """The same rewards with other weights; see :func:`read_weights`."""
        return Reward(tuple(replace(part, weights=read_weights(text, part.network.dimensions)) for part in self.parts))

    def report(self) -> str:
        """What each one is, in words."""
        return "\n".join(_words(part) for part in self.parts)


def reward_file(name: str) -> Path:
    """The file of "miniature", or of a name in ``models/latent_rewards``."""
    from ..spatialalign.miniature import REWARD

    return REWARD if name == MINIATURE else host.model_path(FOLDER, name)


def load(name: str, precision: str) -> Reward:
    """Load a reward in host memory and hand it to the host's memory management.

    Args:
        name: as for :func:`reward_file`.
        precision: name of the torch number format of its blocks.

    Raises:
        ModelError: there is none, or it is damaged.
    """
    import torch

    from ..spatialalign.rewards.latent import load_reward

    network = load_reward(reward_file(name), dtype=getattr(torch, precision))
    return Reward((WeightedReward(name, network, host.patcher(network), DEFAULT_WEIGHTS),))


def read_weights(text: str, dimensions: Sequence[str]) -> dict[str, float]:
    """Weights from ``"dsr:1, valid:0.2"``; separated by commas or line breaks.

    Raises:
        ConfigError: no weights, a dimension twice or one that the reward does not have, or something that is no number.
    """
    found: dict[str, float] = {}
    for entry in filter(None, (one.strip() for one in text.replace("\n", ",").split(","))):
        name, _, value = (side.strip() for side in entry.partition(":"))
        if name not in dimensions:
            raise ConfigError(f"weights: the reward has no dimension {name!r}; it has {', '.join(dimensions)}")
        if name in found:
            raise ConfigError(f"weights: {name} is named twice; give it one weight")
        found[name] = _number(name, value)
    if not any(found.values()):
        raise ConfigError(f"weights: nothing counts; give a weight, such as {dimensions[0]}:1")
    return found


def _number(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"weights: {name} has the weight {text!r}; write a number behind a colon, as in {name}:1")
    return value


def _words(part: WeightedReward) -> str:
    from ..spatialalign.guidance import GRADIENT_PASSES

    info, config = part.network.info, part.network.trunk.config
    weights = ", ".join(f"{name} {part.weights.get(name, 0.0):g}" for name in part.network.dimensions)
    return (
        f"{part.name}: weights {weights}\n"
        f"  the first {config.blocks} of {config.depth} blocks of {info.base_model}, trained on {info.trained_on} "
        f"latents of {info.latent_space}\n"
        f"  a guided step costs about {GRADIENT_PASSES * part.network.blocks_share:.2g} passes of the model more"
    )


def check_model(reward: Reward, model: Any) -> None:
    """See that a MODEL generates what every part of a reward reads.

    Raises:
        ModelError: another kind of model, other latents or other texts; both sides are named.
    """
    from ..spatialalign.rewards.latent import check_fits

    found = host.describe_wan(model)
    for part in reward.parts:
        check_fits(part.network, latent_space(found).name, found.text_dim)


def latent_space(model: host.WanModel) -> LatentSpace:
    """The space that a model's latents live in; a LATENT of the graph becomes one of it by ``normalise``."""
    from ..spatialalign.backbones.latent_space import WAN21_WIDTH, LatentSpace

    return LatentSpace(_VAE_WIDTHS.get(model.width, WAN21_WIDTH), model.mean, model.std)
