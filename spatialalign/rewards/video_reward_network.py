"""The network of VideoReward: Qwen2-VL read at three tokens by one linear layer (methods: 2.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .video_reward_config import SCORED


@dataclass(frozen=True)
class RewardBatch:
    """Clips and texts as the network takes them.

    Attributes:
        ids: tokens ``(b, n)`` int64, padded at the right.
        mask: ``(b, n)`` int64, 1 on tokens, 0 on padding.
        patches: ``(p, c)`` float, the patches of all clips one after another.
        grid: ``(b, 3)`` int64, patches of each clip in time, height and width.
    """

    ids: Tensor
    mask: Tensor
    patches: Tensor
    grid: Tensor

    def to(self, device: torch.device | str) -> RewardBatch:
        """The same on another device."""
        return RewardBatch(*(tensor.to(device) for tensor in (self.ids, self.mask, self.patches, self.grid)))


class VideoRewardNetwork(nn.Module):
    """Backbone and head.

    Attributes:
        backbone: a ``Qwen2VLForConditionalGeneration``; its ``lm_head`` is kept but not used.
        rm_head: without bias; one row for all dimensions, or a row for each.
        marks: ids of the tokens at which VQ, MQ and TA are read.
    """

    def __init__(self, backbone: Any, head: Tensor, marks: tuple[int, ...]) -> None:
        super().__init__()
        self.backbone, self.marks = backbone, marks
        self.rm_head = nn.Linear(head.shape[1], head.shape[0], bias=False, device=head.device, dtype=head.dtype)
        with torch.no_grad():
            self.rm_head.weight.copy_(head)

    def forward(self, batch: RewardBatch) -> Tensor:
        """Bare answers ``(b, 3)`` float32 for VQ, MQ and TA; every token of ``marks`` stands once in a row."""
        hidden = self.hidden_states(batch)
        marks = torch.tensor(self.marks, device=batch.ids.device)
        places = (batch.ids[:, :, None] == marks).int().argmax(dim=1)
        read = hidden.gather(1, places[:, :, None].expand(-1, -1, hidden.shape[-1]))
        # in float32 whatever the backbone is in: three digits would make ties of neighbours
        answers = functional.linear(read.float(), self.rm_head.weight.float())
        return answers.diagonal(dim1=1, dim2=2) if answers.shape[-1] == len(SCORED) else answers[..., 0]

    def hidden_states(self, batch: RewardBatch) -> Tensor:
        """Of the last layer, after its norm, ``(b, n, d)``.

        A token's position is its place in the row on all three rotary axes. Left to itself the backbone would give
        the tokens of a clip their frame, row and column, which the released weights have never seen.
        """
        rows, tokens = batch.ids.shape
        positions = torch.arange(tokens, device=batch.ids.device).expand(3, rows, tokens)
        out: Tensor = self.backbone.model(
            input_ids=batch.ids,
            attention_mask=batch.mask,
            position_ids=positions,
            pixel_values_videos=batch.patches,
            video_grid_thw=batch.grid,
            use_cache=False,
        ).last_hidden_state
        return out
