"""How the gradient of b pairs is formed: in one forward pass, in one a side, or with one side's graph at a time.

All three ways give the same gradient, whatever the loss; they differ in what is in memory at once. The benchmark
``benchmarks.dpo_cost`` counts these functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from spatialalign.backbones.flow import add_noise, velocity_target
from training.losses import PairLoss, Predictions

if TYPE_CHECKING:
    from spatialalign.backbones.base import Backbone

Passes = Literal["batched", "separate", "one-sample"]
"""``batched``: winners and losers in one forward pass, best where clips are small. ``separate``: a forward pass for
each side, both graphs alive until the backward pass. ``one-sample``: one graph at a time, for one more forward pass."""

Loss = Callable[[Predictions, Predictions], PairLoss]
"""The loss of b pairs from the predictions for winners and losers."""


@dataclass(frozen=True)
class Side:
    """What the model is asked about the winners, or the losers, of b pairs.

    Attributes:
        noisy: latents at their noise level, ``(b, c, f, h, w)``.
        target: the true velocity, of the same shape.
        told: the noise levels that the model is told, ``(b,)``.
        text: embeddings ``(n_i, d)``.
    """

    noisy: Tensor
    target: Tensor
    told: Tensor
    text: Sequence[Tensor]

    @classmethod
    def of(
        cls,
        clean: Tensor,
        noise: Tensor,
        sigma: Tensor,
        told: Tensor,
        text: Sequence[Tensor],
        device: torch.device | str,
    ) -> Side:
        """Bring clean latents ``(b, c, f, h, w)`` to the levels ``sigma (b,)`` and to the model's device."""
        return cls(add_noise(clean, noise, sigma).to(device), velocity_target(clean, noise).to(device), told, text)

    def part(self, index: int) -> Side:
        """One clip of it, ``b`` = 1."""
        here = slice(index, index + 1)
        return Side(self.noisy[here], self.target[here], self.told[here], self.text[here])


Pair = tuple[Tensor, Tensor]
"""Velocities of winners and of losers, ``(b, c, f, h, w)`` each."""


def predict(backbone: Backbone, winner: Side, loser: Side, passes: Passes) -> Pair:
    """Velocities of both sides by the transformer as it is, in one forward pass or two."""
    if passes != "batched":
        return _velocity(backbone, winner), _velocity(backbone, loser)
    both = backbone.velocity(
        torch.cat([winner.noisy, loser.noisy]),
        torch.cat([winner.told, loser.told]),
        [*winner.text, *loser.text],
    )
    return both[: len(winner.noisy)], both[len(winner.noisy) :]


def reference_predictions(backbone: Backbone, winner: Side, loser: Side, passes: Passes) -> Pair:
    """What the base model predicts: the same transformer with the adapter off."""
    with torch.no_grad(), adapter_off(backbone.transformer):
        return predict(backbone, winner, loser, passes)


def pair_gradients(
    backbone: Backbone,
    winner: Side,
    loser: Side,
    loss: Loss,
    batch_pairs: float,
    passes: Passes,
    reference: Pair | None = None,
) -> PairLoss:
    """Add the gradient of the summed losses of b pairs, over ``batch_pairs``, to the parameters' ``grad``.

    Args:
        backbone: its transformer carries the adapter that is trained, switched on.
        winner: the winners of the pairs.
        loser: the losers.
        loss: of the predictions.
        batch_pairs: pairs of the optimiser step, of which these b are a part; infinity to add nothing.
        passes: see :data:`Passes`.
        reference: the base model's velocities when they are known; None to compute them.

    Returns:
        The losses, without gradient.
    """
    if reference is None:
        reference = reference_predictions(backbone, winner, loser, passes)
    if passes == "one-sample":
        return _one_sample_at_a_time(backbone, winner, loser, reference, loss, batch_pairs)
    losses = loss(*_predictions(predict(backbone, winner, loser, passes), reference, winner, loser))
    (losses.total.sum() / batch_pairs).backward()
    return detached(losses)


def _one_sample_at_a_time(
    backbone: Backbone, winner: Side, loser: Side, reference: Pair, loss: Loss, batch_pairs: float
) -> PairLoss:
    """The chain rule in two parts, with ``v_w``, ``v_l`` the model's velocities and L the loss.

    ``dL/dtheta = (dL/dv_w) (dv_w/dtheta) + (dL/dv_l) (dv_l/dtheta)``: the losers are first predicted without a graph,
    so that both factors ``dL/dv`` are known when the winners' graph, which is then alone in memory, is gone through;
    the losers' graph follows. No approximation: the factors are those that one backward pass through both would use.
    """
    with torch.no_grad():
        of_losers = _velocity(backbone, loser)
    of_winners = _velocity(backbone, winner)
    known = of_winners.detach().requires_grad_(), of_losers.requires_grad_()
    losses = loss(*_predictions(known, reference, winner, loser))
    wanted = torch.autograd.grad(losses.total.sum() / batch_pairs, known, allow_unused=True)
    losses = detached(losses)
    if wanted[0] is not None:
        of_winners.backward(wanted[0])
    del of_winners, known, of_losers
    if wanted[1] is not None:  # a loss that takes no account of the losers needs no graph of them
        _velocity(backbone, loser).backward(wanted[1])
    return losses


def evaluate_pairs(
    backbone: Backbone, winner: Side, loser: Side, loss: Loss, passes: Passes, reference: Pair
) -> PairLoss:
    """The losses of b pairs without any gradient."""
    with torch.no_grad():
        return loss(*_predictions(predict(backbone, winner, loser, passes), reference, winner, loser))


def detached(losses: PairLoss) -> PairLoss:
    """The same numbers without the graph behind them."""
    return PairLoss(*(getattr(losses, field.name).detach() for field in fields(losses)))


@contextmanager
def adapter_off(transformer: Any) -> Iterator[None]:
    """Inside the ``with`` block the transformer is the base model, bit for bit."""
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()


def _velocity(backbone: Backbone, side: Side) -> Tensor:
    return backbone.velocity(side.noisy, side.told, side.text)


def _predictions(model: Pair, reference: Pair, winner: Side, loser: Side) -> tuple[Predictions, Predictions]:
    return Predictions(model[0], reference[0], winner.target), Predictions(model[1], reference[1], loser.target)
