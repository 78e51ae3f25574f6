"""Reward guidance for the programs: files and weights in, what adjusts the velocities of one run out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spatialalign.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from spatialalign.backbones.base import Backbone
    from spatialalign.guidance import GuidanceSettings, RewardGuidance
    from spatialalign.rewards.latent import LatentReward


@dataclass(frozen=True)
class GuideOptions:
    """The fields of ``GuidanceSettings`` as options of a program, for ``options_of``; the defaults are its own."""

    strength: float
    """Strength of the guidance: how much one unit of reward tilts the model's distribution."""
    guide_form: Literal["nrg", "x0"]
    """nrg asks the reward at the noisy clip, x0 at the predicted clean one."""
    guide_start: float
    """Where guidance begins, as a share of the steps."""
    guide_end: float
    """Where it ends, as a share of the steps."""
    guide_skip_first: int
    """Steps at the beginning that are never guided."""
    guide_every: int
    """Guide every so manieth step."""
    guide_factor_cap: float
    """Largest sigma / (1 - sigma) of the form nrg."""
    guide_step_cap: float
    """Largest change of a clip's velocity or prediction, relative to its size."""
    guide_weights: dict[str, float]
    """Weights of the rewards' dimensions, as {"dsr": 1.0}."""


@dataclass(frozen=True)
class GuideSpec:
    """Which rewards guide, and how.

    Attributes:
        rewards: files of latent rewards, each with a factor for its share of the sum.
        settings: form, strength, steps, and the weights of the dimensions.
    """

    rewards: tuple[tuple[Path, float], ...]
    settings: GuidanceSettings

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ConfigError("guidance needs at least one reward: give its file")
        for path, _ in self.rewards:
            if not path.is_file():
                raise ModelError(f"the latent reward {path} does not exist")

    @property
    def name(self) -> str:
        """Changes with the files' content, the weights and every setting."""
        files = [(digest(path), weight) for path, weight in self.rewards]
        settings = json.dumps([files, _plain(self.settings)], sort_keys=True)
        return f"guidance:{hashlib.sha256(settings.encode()).hexdigest()[:12]}@{self.settings.strength:g}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"rewards": [[str(path), weight] for path, weight in self.rewards], **_plain(self.settings)}

    def load(self, backbone: Backbone, text_dim: int) -> Callable[[Sequence[float]], RewardGuidance]:
        """Load the rewards; what comes back makes the guidance of one run over so many noise levels.

        Args:
            backbone: the generator.
            text_dim: width of its text embeddings.

        Raises:
            ConfigError: a weight for a dimension that no reward has.
            ModelError: a reward made for other latents or texts.
        """
        from spatialalign.guidance import RewardGuidance

        loaded = [load_fitting(path, backbone, text_dim) for path, _ in self.rewards]
        known = {name for reward in loaded for name in reward.dimensions}
        if unknown := sorted(set(self.settings.weights) - known):
            raise ConfigError(f"no reward has the dimension {unknown[0]!r}; there are {', '.join(sorted(known))}")
        weights = [
            {name: factor * value for name, value in self.settings.weights.items() if name in reward.dimensions}
            for reward, (_, factor) in zip(loaded, self.rewards, strict=True)
        ]
        return lambda sigmas: RewardGuidance(loaded, self.settings, sigmas, weights)


def load_fitting(path: Path, backbone: Backbone, text_dim: int) -> LatentReward:
    """Load a reward for a generator whose text embeddings are so wide.

    Raises:
        ModelError: no such file, no latent reward, or one made for other latents or texts.
    """
    from spatialalign.rewards.latent import check_fits, load_reward

    reward = load_reward(path, backbone.device, backbone.dtype)
    check_fits(reward, backbone.latent_space, text_dim)
    return reward


def load_noisy(path: Path, backbone: Backbone, text_dim: int) -> LatentReward:
    """Load a reward that is to judge clips on the way; raises :class:`ModelError` also for one of clean clips alone."""
    reward = load_fitting(path, backbone, text_dim)
    if not reward.knows_noise:
        raise ModelError(f"{path} was trained on clean clips; clips on the way need a reward trained on noisy ones")
    return reward


def digest(path: Path) -> str:
    """SHA-256 of a file; raises :class:`ModelError` when it does not exist."""
    if not path.is_file():
        raise ModelError(f"the latent reward {path} does not exist")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def guide_spec(rewards: Sequence[str], options: Mapping[str, Any]) -> GuideSpec | None:
    """The guidance that a command line asks for: rewards as ``file`` or ``file:weight``, and given options.

    None when neither is there.

    Raises:
        ConfigError: options without a reward, or out of their range.
        ModelError: a file that does not exist.
    """
    if not rewards and not options:
        return None
    from spatialalign.guidance import GuidanceSettings

    given = {name.removeprefix("guide_"): value for name, value in options.items()}
    return GuideSpec(parse_rewards(rewards), GuidanceSettings(**given))


def parse_rewards(texts: Sequence[str]) -> tuple[tuple[Path, float], ...]:
    """``"file"`` or ``"file:weight"`` as files and weights; 1 where none is given."""
    parsed = []
    for text in texts:
        file, colon, weight = text.rpartition(":")
        try:
            parsed.append((Path(file), float(weight)) if colon else (Path(text), 1.0))
        except ValueError:  # the colon belongs to the path
            parsed.append((Path(text), 1.0))
    return tuple(parsed)


def _plain(settings: GuidanceSettings) -> dict[str, Any]:
    values = asdict(settings)
    return {**values, "weights": dict(values["weights"])}
