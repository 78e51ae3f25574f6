"""How latent rewards look at clips that are not finished: in their noise, without decoding them."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from ..spatialalign.errors import DataError, ModelError
from . import host
from .guiding import make_ready, unpadded
from .rewards import Reward, check_model

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("spatialalign")


class RewardLook:
    """Scores clips at any noise level by the weighted sum of latent rewards.

    Attributes:
        share: what a look at one clip costs, in passes of the model.
    """

    def __init__(self, reward: Reward, model: Any, positive: Any) -> None:
        """Prepare for the clips of one prompt.

        Args:
            reward: the sum.
            model: the MODEL that samples.
            positive: its encoded prompt, a CONDITIONING.

        Raises:
            ModelError: a reward made for other latents or texts, or one that was trained on finished clips alone.
        """
        check_model(reward, model)
        for part in reward.parts:
            if not part.network.knows_noise:
                raise ModelError(
                    f"reward: {part.name} was trained on clean clips; clips on the way need one trained on noisy ones"
                )
        self.share = sum(part.network.blocks_share for part in reward.parts)
        self._reward, self._model, self._positive = reward, model, positive
        self._warned = False

    def __call__(self, x: Tensor, sigma: float) -> list[float | None]:
        """Scores of clips ``x (b, c, f, h, w)`` in the model's space at one noise level; None where there is none.

        Raises:
            DataError: the conditioning holds no text for this level.
        """
        import torch

        host.check_interrupt()
        # A look needs less than a pass of the model at clips of this size.
        device = host.load(
            [part.patcher for part in self._reward.parts], self._model.model.memory_required(list(x.shape))
        )
        text, levels = self._text(sigma).to(device), torch.full((len(x),), sigma, device=device)
        total = torch.zeros(len(x), device=device)
        with torch.inference_mode():
            for part in self._reward.parts:
                make_ready(part.network, device)
                values = part.network(x.to(device), levels, [text] * len(x)).values
                total = total + part.network.total(values, part.weights)
        return [score if math.isfinite(score) else None for score in total.tolist()]

    def _text(self, sigma: float) -> Tensor:
        """The text of the first conditioning that is in force at this noise level, ``(n, text_dim)``."""
        level = self._model.get_model_object("model_sampling").percent_to_sigma
        found = [
            embedding
            for embedding, options in self._positive
            if level(options.get("start_percent", 0.0)) >= sigma >= level(options.get("end_percent", 1.0))
        ]
        if not found or found[0] is None:
            raise DataError("the reward found no text in the positive conditioning; connect a CLIP Text Encode")
        if len(found) > 1 and not self._warned:
            logger.warning("%d conditionings are in force at once; the reward reads the first", len(found))
            self._warned = True
        return unpadded(found[0][0])
