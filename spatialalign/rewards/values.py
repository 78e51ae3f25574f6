"""What a latent reward answers, and what guidance needs of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RewardValues:
    """Judgement of a batch.

    Attributes:
        values: ``(b, D)`` float32, a column for each of the reward's dimensions.
        curves: ``(b, f, 2)`` float32, predicted SSR of the initial and the final relation in [-1, 1] by latent frame.
    """

    values: Tensor
    curves: Tensor


class LatentRewardLike(Protocol):
    """A differentiable judgement of noisy clips."""

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Names of the columns of its values."""

    @property
    def blocks_share(self) -> float:
        """Price of one forward pass in passes of the generator's transformer."""

    @property
    def knows_noise(self) -> bool:
        """Whether it was trained at all noise levels, not on finished clips only."""

    def prepare(self, text: Any) -> Any:
        """What of the texts (one trimmed embedding per clip) can be computed once; of a prepared text, itself."""

    def __call__(self, x: Tensor, sigma: Tensor, text: Any) -> RewardValues:
        """Judge clips ``x (b, c, f, h, w)`` at noise levels ``sigma (b,)`` in [0, 1]; ``text`` may be prepared."""


def weighted_total(values: Tensor, dimensions: Sequence[str], weights: Mapping[str, float]) -> Tensor:
    """The sum ``(b,)`` of the columns of ``values (b, D)``, each times its weight; columns without a weight count 0.

    Raises:
        ConfigError: a weight for a dimension that there is not.
    """
    unknown = sorted(set(weights) - set(dimensions))
    if unknown:
        raise ConfigError(f"the reward has no dimension {unknown[0]!r}; it has {', '.join(dimensions)}")
    return values @ values.new_tensor([weights.get(name, 0.0) for name in dimensions])
