"""From the tokens of a trunk to curves over latent frames and values of the clip."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ModelError
from .wan_trunk import Features

_TEXT_QUERIES = 4
_MIXER_HEADS = 4
_WAVES = (0.5, 1.0, 2.0)
"""Half turns over the clip, in cosine and sine, that tell a frame where it stands; right for any number of frames."""


@dataclass(frozen=True)
class HeadConfig:
    """Sizes of a head.

    Attributes:
        trunk_width: features of a token.
        outputs: values of a clip.
        width: features inside the head, a multiple of 4.
        queries: attention maps for each frame.
    """

    trunk_width: int
    outputs: int
    width: int = 128
    queries: int = 6

    def __post_init__(self) -> None:
        if self.width < 1 or self.width % _MIXER_HEADS or min(self.trunk_width, self.outputs, self.queries) < 1:
            raise ModelError(f"the head of a reward needs positive sizes and a width divisible by 4, found {self}")


class RewardHead(nn.Module):
    """Attention maps that the text asks for, one set per latent frame; where they lie and what they see, over time.

    A relation is about places, and rotary tokens hardly know theirs. So each map is read twice: what its tokens hold on
    average, and its centre of mass in the picture. A layer of self-attention then compares the frames.
    """

    def __init__(self, config: HeadConfig) -> None:
        super().__init__()
        width, trunk = config.width, config.trunk_width
        self.config = config
        self.token_norm, self.text_norm = nn.LayerNorm(trunk), nn.LayerNorm(trunk)
        self.to_key, self.to_value = nn.Linear(trunk, width), nn.Linear(trunk, width)
        self.place_key = nn.Linear(2, width, bias=False)
        self.text_queries = nn.Parameter(torch.randn(_TEXT_QUERIES, trunk) / math.sqrt(trunk))
        self.from_text, self.from_time = nn.Linear(_TEXT_QUERIES * trunk, width), nn.Linear(trunk, width)
        self.to_queries = nn.Linear(width, config.queries * width)
        self.merge = nn.Linear(config.queries * (width + 2), width)
        self.from_place_in_time = nn.Linear(2 * len(_WAVES), width)
        self.mixer = _Mixer(width)
        self.out_norm = nn.LayerNorm(width)
        self.to_curves = nn.Linear(width, 2)
        self.to_hidden, self.to_values = nn.Linear(3 * width, width), nn.Linear(width, config.outputs)
        nn.init.zeros_(self.to_values.weight)
        nn.init.zeros_(self.to_values.bias)

    def forward(self, features: Features) -> tuple[Tensor, Tensor]:
        """Values ``(b, outputs)``, without bounds, and curves ``(b, f, 2)`` in [-1, 1]."""
        condition = functional.silu(self._read_text(features) + self.from_time(features.time))
        frames = self._look(features, condition) + condition[:, None] + self._when(features.tokens)
        frames = self.out_norm(self.mixer(functional.silu(frames)))
        ends = torch.cat([frames.mean(1), frames[:, 0], frames[:, -1]], dim=-1)
        # no bound on the values: where a clip is surely wrong, a squashed value would have no slope left to follow
        return self.to_values(functional.silu(self.to_hidden(ends))), torch.tanh(self.to_curves(frames))

    def _read_text(self, features: Features) -> Tensor:
        """What a few learned questions find among the real tokens of the text, ``(b, width)``."""
        rows = self.text_norm(features.text.rows.float())
        logits = (self.text_queries @ rows.mT).masked_fill(~features.text.real[:, None], -torch.inf)
        read: Tensor = self.from_text((logits.softmax(-1) @ rows).flatten(1))
        return read

    def _look(self, features: Features, condition: Tensor) -> Tensor:
        """What the attention maps see and where, frame by frame, ``(b, f, width)``."""
        tokens = self.token_norm(features.tokens.float()).flatten(2, 3)
        rows, columns = features.tokens.shape[2:4]
        places = _places(rows, columns, tokens.device)
        queries = self.to_queries(condition).unflatten(1, (self.config.queries, -1))[:, None]
        logits = queries @ (self.to_key(tokens) + self.place_key(places)).mT / math.sqrt(self.config.width)
        maps = logits.softmax(-1)
        seen: Tensor = self.merge(torch.cat([maps @ self.to_value(tokens), maps @ places], dim=-1).flatten(2))
        return seen

    def _when(self, tokens: Tensor) -> Tensor:
        """Where in the clip each latent frame stands, ``(f, width)``."""
        moments = torch.linspace(0, 1, tokens.shape[1], device=tokens.device)
        angles = math.pi * moments[:, None] * torch.tensor(_WAVES, device=tokens.device)
        embedded: Tensor = self.from_place_in_time(torch.cat([angles.cos(), angles.sin()], dim=-1))
        return embedded


class _Mixer(nn.Module):
    """One pre-norm transformer layer over the frames ``(b, f, width)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_qkv, self.to_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.to_qkv(self.norm(x)).unflatten(2, (3, _MIXER_HEADS, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        x = x + self.to_out(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(self.norm_mlp(x))
        return out


def _places(rows: int, columns: int, device: torch.device) -> Tensor:
    """Centres of the patches, ``(rows * columns, 2)``: x and y in (-1, 1), right and down."""
    x, y = ((2 * torch.arange(size, device=device) + 1) / size - 1 for size in (columns, rows))
    return torch.stack([x.expand(rows, -1), y[:, None].expand(-1, columns)], dim=-1).flatten(0, 1)
