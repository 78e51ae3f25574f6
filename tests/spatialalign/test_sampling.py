"""The stepwise sampler, on a model whose answers are known: it points from each clip to its text's own value."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from spatialalign.backbones.base import SampleSettings
from spatialalign.backbones.sampling import Flow, seeded_noise
from spatialalign.errors import ConfigError

SETTINGS = SampleSettings(steps=4, shift=3.0)
TEXT = [torch.full((1, 1), value) for value in (2.0, -1.0, 5.0)]
NEGATIVE = torch.full((1, 1), 1.0)
SHAPE = (1, 1, 2, 2)


def towards_text(x: Tensor, sigma: float, text: Sequence[Tensor]) -> Tensor:
    """The exact velocity where all clean clips of a text are the constant that the text holds: (x - x0) / sigma."""
    return (x - torch.stack([row.reshape(1, 1, 1, 1) for row in text])) / sigma


class Push:
    """Adds a constant to every velocity."""

    cost = 0.5

    def __call__(self, x: Tensor, sigma: float, velocity: Tensor, text: Sequence[Tensor]) -> Tensor:
        return velocity + 1


def flow(scale: float = 1.0, adjust: Push | None = None) -> Flow:
    return Flow(towards_text, lambda _: scale, TEXT, NEGATIVE, SETTINGS, torch.device("cpu"), adjust)


def test_exact_velocities_lead_to_the_clean_clips() -> None:
    clean = flow().run(seeded_noise([0, 1, 2], SHAPE))
    torch.testing.assert_close(clean, torch.tensor([2.0, -1.0, 5.0]).reshape(3, 1, 1, 1, 1).expand(3, *SHAPE))


def test_in_two_parts_it_takes_the_same_way() -> None:
    whole, parts, noise = flow(), flow(), seeded_noise([0, 1, 2], SHAPE)
    half = parts.run(noise, last=2)
    assert torch.equal(parts.run(half, first=2), whole.run(noise))
    assert parts.evaluations == whole.evaluations == 4 * 3


def test_chosen_rows_keep_their_texts() -> None:
    x, _ = flow().step(seeded_noise([1, 2], SHAPE), 3, rows=[1, 2])
    torch.testing.assert_close(x.mean(dim=(1, 2, 3, 4)), torch.tensor([-1.0, 5.0]))


def test_a_step_tells_the_clean_clips_it_predicts() -> None:
    _, x0 = flow().step(seeded_noise([0, 1, 2], SHAPE), 0)
    torch.testing.assert_close(x0.mean(dim=(1, 2, 3, 4)), torch.tensor([2.0, -1.0, 5.0]))


def test_guidance_doubles_the_passes_and_moves_away_from_the_negative() -> None:
    # x0 of the guided velocity: negative + scale (text - negative) = 1 + 3 (t - 1)
    guided = flow(scale=3.0)
    _, x0 = guided.step(seeded_noise([0, 1, 2], SHAPE), 0)
    torch.testing.assert_close(x0.mean(dim=(1, 2, 3, 4)), torch.tensor([4.0, -5.0, 13.0]))
    assert guided.evaluations == 6


def test_an_adjustment_comes_last_and_is_paid_for() -> None:
    noise = seeded_noise([0, 1, 2], SHAPE)
    plain, pushed = flow(), flow(adjust=Push())
    torch.testing.assert_close(pushed.velocity(noise, 0.5), plain.velocity(noise, 0.5) + 1)
    assert pushed.evaluations == 3 * 1.5


def test_progress_counts_the_steps_of_the_whole_schedule() -> None:
    seen: list[tuple[int, int]] = []
    flow().run(seeded_noise([0, 1, 2], SHAPE), first=2, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 4), (4, 4)]


def test_as_many_texts_as_clips() -> None:
    with pytest.raises(ConfigError, match="found 3 texts and 2 clips"):
        flow().run(seeded_noise([0, 1], SHAPE))
