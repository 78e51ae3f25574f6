"""The patch reward: how good each space-time block of a clip is, by the network that judges the whole clip.

A stand-in of ours for HALO's patch reward (arXiv 2502.06812), whose architecture is not public (methods: 3). The trunk
reads the whole clip once. The head of the video reward, which it begins with, then reads the tokens of one block as it
reads those of a clip; so one head judges clips and blocks, on one scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import BlockGrid
from ..errors import ModelError
from .files import RewardFile, trunk_of
from .head import HeadConfig, RewardHead
from .latent import LatentReward
from .wan_trunk import EmbeddedText, Features, WanTrunk

PATCH_REWARD_FILE = RewardFile("patch-reward", version=1)


@dataclass(frozen=True)
class PatchInfo:
    """What a patch reward is and what it was made for.

    Attributes:
        base_model: whose first blocks the trunk was, as files name models.
        latent_space: of the latents that it reads.
        teacher: whose scores of blocks it learned; empty until it is trained.
        statistics: whatever of the training is worth keeping, plain JSON values.
        license: of the file.
    """

    base_model: str
    latent_space: str
    teacher: str = ""
    statistics: Mapping[str, Any] = field(default_factory=dict)
    license: str = "Apache-2.0"


@dataclass(frozen=True)
class PatchValues:
    """Judgement of a batch, larger being better.

    Attributes:
        video: ``(b,)`` float32, of the whole clips.
        blocks: ``(b, F, R, C)`` float32, of their blocks.
    """

    video: Tensor
    blocks: Tensor


class PatchReward(nn.Module):
    """A trunk, a head with one output, and a grid. It reads finished clips, noise level 0.

    Attributes:
        info: what it was made for; set a new one to record statistics.
        grid: of the blocks.
    """

    def __init__(self, trunk: WanTrunk, grid: BlockGrid, info: PatchInfo, width: int = 128, queries: int = 6) -> None:
        """With a new head, which gives 0 to everything until it is trained; see also :meth:`from_video`."""
        super().__init__()
        self.info, self.grid, self.trunk = info, grid, trunk
        self.head = RewardHead(HeadConfig(trunk.config.width, 1, width, queries))
        self.to(trunk.patch_embedding.weight.device)

    @classmethod
    def from_video(cls, reward: LatentReward, grid: BlockGrid, dimension: str = "dsr") -> PatchReward:
        """A copy of a video reward that judges clips as its ``dimension`` does, in float32 and trainable.

        Raises:
            ModelError: the reward has no such dimension.
        """
        if dimension not in reward.dimensions:
            raise ModelError(f"the video reward has no dimension {dimension!r}; it has {', '.join(reward.dimensions)}")
        column, config = reward.dimensions.index(dimension), reward.head.config
        info = PatchInfo(reward.info.base_model, reward.info.latent_space)
        patch = cls(deepcopy(reward.trunk).float(), grid, info, config.width, config.queries)
        weights = reward.head.state_dict()
        scale, offset = reward.scale[column], reward.offset[column]
        weights["to_values.weight"] = weights["to_values.weight"][column : column + 1] / scale
        weights["to_values.bias"] = (weights["to_values.bias"][column : column + 1] - offset) / scale
        patch.head.load_state_dict(weights)
        return patch.train().requires_grad_(True)

    def forward(self, x: Tensor, text: Sequence[Tensor] | EmbeddedText) -> PatchValues:
        """Judge finished clips ``x (b, c, f, h, w)`` and their blocks; texts as :class:`.latent.LatentReward` has them.

        Raises:
            ConfigError: the tokens (latent frames, and latent rows and columns over the patch size) cannot be cut into
                the grid.
        """
        embedded = text if isinstance(text, EmbeddedText) else self.trunk.embed_text(text)
        found: Features = self.trunk(x, x.new_zeros(len(x)), embedded)
        tokens = self.grid.cut(found.tokens, "tokens").flatten(0, 3)
        count = len(tokens) // len(x)
        repeated = EmbeddedText(
            *(part.repeat_interleave(count, 0) for part in (embedded.rows, embedded.bias, embedded.real))
        )
        blocks = self.head(Features(tokens, found.time.repeat_interleave(count, 0), repeated))[0]
        return PatchValues(self.head(found)[0][:, 0], blocks.view(len(x), *self.grid.shape))


def check_fits(reward: PatchReward, latent_space: str) -> None:
    """See that a patch reward reads latents of this space; raises :class:`ModelError`."""
    if reward.info.latent_space != latent_space:
        raise ModelError(
            f"the patch reward, made with {reward.info.base_model}, reads latents of {reward.info.latent_space}; these "
            f"are of {latent_space}: train one for them (python -m training.patch_reward)"
        )


def save_patch_reward(path: str | Path, reward: PatchReward, dtype: torch.dtype = torch.float16) -> None:
    """Write a patch reward atomically: matrices in ``dtype``, vectors in float32, the rest in the header."""
    content = {
        "info": asdict(reward.info),
        "grid": str(reward.grid),
        "trunk": asdict(reward.trunk.config),
        "head": asdict(reward.head.config),
    }
    PATCH_REWARD_FILE.write(path, reward, content, dtype)


def load_patch_reward(path: str | Path, device: str | torch.device = "cpu") -> PatchReward:
    """Read a patch reward: float32, frozen, in evaluation mode.

    Raises:
        ModelError: no such file, no patch reward, one of a later version, or a damaged one.
    """
    return PATCH_REWARD_FILE.read(path, _build).to(device).eval().requires_grad_(False)


def _build(content: dict[str, Any]) -> PatchReward:
    grid, info, head = BlockGrid.parse(content["grid"]), PatchInfo(**content["info"]), content["head"]
    return PatchReward(trunk_of(content), grid, info, head["width"], head["queries"])
