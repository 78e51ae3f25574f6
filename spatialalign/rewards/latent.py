"""The latent reward: how a clip will score, asked of its latents at any noise level, with gradients (methods: 2.5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .files import RewardFile, trunk_of
from .head import HeadConfig, RewardHead
from .values import RewardValues, weighted_total
from .wan_trunk import EmbeddedText, WanTrunk

REWARD_FILE = RewardFile("latent-reward", version=1)

ALWAYS = ("dsr", "valid")
"""Dimensions that every latent reward has, the first ones."""


@dataclass(frozen=True)
class RewardInfo:
    """What a reward is and what it was made for.

    Attributes:
        base_model: whose first blocks the trunk was, as files name models.
        latent_space: of the latents that it reads.
        trained_on: ``"noisy"`` for latents at all noise levels, ``"clean"`` for finished clips only.
        further: dimensions behind ``dsr`` and ``valid``, learned from preferences.
        statistics: whatever of the training is worth keeping, plain JSON values.
        license: of the file.
    """

    base_model: str
    latent_space: str
    trained_on: Literal["noisy", "clean"] = "noisy"
    further: tuple[str, ...] = ()
    statistics: Mapping[str, Any] = field(default_factory=dict)
    license: str = "Apache-2.0"

    def __post_init__(self) -> None:
        if self.trained_on not in ("noisy", "clean"):
            raise ModelError(f"a reward is trained on 'noisy' or 'clean' latents, found {self.trained_on!r}")
        if len(set(self.dimensions)) != len(self.dimensions):
            raise ModelError(f"a reward's dimensions must differ from each other, found {', '.join(self.dimensions)}")

    @property
    def dimensions(self) -> tuple[str, ...]:
        """``dsr``, ``valid`` and the further ones: the columns of the values."""
        return ALWAYS + self.further


class LatentReward(nn.Module):
    """A trunk and a head.

    The dimensions: ``dsr`` is the predicted DSR-Score, one unit being the whole way from 0 to 1, not clipped;
    ``valid`` is the logit of the clip being scorable at all; every further one is a utility in standard deviations, see
    :meth:`standardise`.

    Attributes:
        info: what it was made for; set a new one to record statistics.
        offset, scale: ``(D,)``; values are the head's less ``offset``, over ``scale``.
    """

    offset: Tensor
    scale: Tensor

    def __init__(self, trunk: WanTrunk, info: RewardInfo, head_width: int = 128, queries: int = 6) -> None:
        """With a new head; it predicts a DSR-Score of 1/2 and 0 for the rest until it is trained."""
        super().__init__()
        self.info, self.trunk = info, trunk
        self.head = RewardHead(HeadConfig(trunk.config.width, len(info.dimensions), head_width, queries))
        self.register_buffer("offset", torch.tensor([-0.5] + [0.0] * (len(info.dimensions) - 1)))
        self.register_buffer("scale", torch.ones(len(info.dimensions)))
        self.to(trunk.patch_embedding.weight.device)

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Names of the columns of the values."""
        return self.info.dimensions

    @property
    def blocks_share(self) -> float:
        """Blocks of the trunk over those of the transformer that it is from."""
        return self.trunk.config.blocks / self.trunk.config.depth

    @property
    def knows_noise(self) -> bool:
        """Whether it was trained at all noise levels, not on finished clips only."""
        return self.info.trained_on == "noisy"

    def standardise(self, dimension: str, mean: float, std: float) -> None:
        """Shift and scale a further dimension, whose mean and deviation were found to be these, to 0 and 1."""
        if dimension not in self.info.further or not std > 0:
            raise ModelError(
                f"{dimension} cannot be standardised to deviation {std:g}: it must be positive, and the dimension one "
                f"of {', '.join(self.info.further) or 'the further ones, of which there are none'}"
            )
        column = self.dimensions.index(dimension)
        self.offset[column] += self.scale[column] * mean
        self.scale[column] *= std

    def prepare(self, text: Sequence[Tensor] | EmbeddedText) -> EmbeddedText:
        """Bring texts (trimmed embeddings ``(n_i, text_dim)``, one per clip) to the trunk's width, if they are not."""
        return text if isinstance(text, EmbeddedText) else self.trunk.embed_text(text)

    def forward(self, x: Tensor, sigma: Tensor, text: Sequence[Tensor] | EmbeddedText) -> RewardValues:
        """Judge clips ``x (b, c, f, h, w)`` at noise levels ``sigma (b,)`` in [0, 1]."""
        values, curves = self.head(self.trunk(x, sigma, self.prepare(text)))
        return RewardValues((values - self.offset) / self.scale, curves)

    def total(self, values: Tensor, weights: Mapping[str, float]) -> Tensor:
        """The weighted sum ``(b,)`` of values ``(b, D)``; see :func:`.values.weighted_total`."""
        return weighted_total(values, self.dimensions, weights)


def check_fits(reward: LatentReward, latent_space: str, text_dim: int) -> None:
    """See that a reward can read a generator's latents and texts; the generator may be another than its base model.

    Raises:
        ModelError: another latent space, or text embeddings of another width.
    """
    info, width = reward.info, reward.trunk.config.text_dim
    if info.latent_space != latent_space:
        raise ModelError(
            f"the reward, made with {info.base_model}, reads latents of {info.latent_space}; this model's are of "
            f"{latent_space}: train a reward for it (python -m training.latent_reward) or load the model it is for"
        )
    if width != text_dim:
        raise ModelError(
            f"the reward, made with {info.base_model}, reads text embeddings {width} wide; this model's are {text_dim} "
            "wide: use the text encoder that the reward was trained with"
        )


def save_reward(path: str | Path, reward: LatentReward, dtype: torch.dtype = torch.float16) -> None:
    """Write a reward atomically: matrices in ``dtype``, vectors in float32, the rest in the header."""
    content = {
        "info": asdict(reward.info),
        "dimensions": reward.dimensions,
        "trunk": asdict(reward.trunk.config),
        "head": asdict(reward.head.config),
    }
    REWARD_FILE.write(path, reward, content, dtype)


@torch.inference_mode(False)
def load_reward(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> LatentReward:
    """Read a reward: frozen, in evaluation mode, the trunk computing in ``dtype``.

    The weights can carry gradients wherever it is called, also inside ``torch.inference_mode``.

    Raises:
        ModelError: no such file, no latent reward, one of a later version, or a damaged one.
    """
    reward = REWARD_FILE.read(path, _build)
    reward.trunk.to(dtype)
    return reward.to(device).eval().requires_grad_(False)


def _build(content: dict[str, Any]) -> LatentReward:
    info, head = content["info"], content["head"]
    made_for = RewardInfo(**{**info, "further": tuple(info["further"])})
    return LatentReward(trunk_of(content), made_for, head["width"], head["queries"])
