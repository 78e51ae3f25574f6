"""The flow schedule and its formulas, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spatialalign.backbones.flow import (
    add_noise,
    euler_step,
    guided,
    predicted_x0,
    sampling_sigmas,
    shift_sigma,
    training_sigmas,
    velocity_target,
)


def test_shift_five_moves_the_middle_to_five_sixths() -> None:
    """5 * 0.5 / (1 + 4 * 0.5) = 2.5 / 3; the ends stay."""
    assert shift_sigma(torch.tensor([0.0, 0.5, 1.0]), 5.0).tolist() == pytest.approx([0.0, 2.5 / 3, 1.0])


def test_training_levels_have_the_paper_statistics() -> None:
    """Mean 0.748 and 36 % above 0.9 over 1000 levels at shift 5, counted from the official schedule."""
    sigmas = training_sigmas(5.0)
    assert len(sigmas) == 1000
    assert sigmas[0] == 1
    assert sigmas[-1].item() == pytest.approx(0.005 / 1.004)
    assert sigmas.mean().item() == pytest.approx(0.748, abs=5e-4)
    assert (sigmas > 0.9).float().mean().item() == pytest.approx(0.36, abs=0.005)


def test_sampling_levels_of_two_steps() -> None:
    """u = 1, 1/2 shifted by 3: 1, 1.5 / 2 = 0.75, then 0."""
    assert sampling_sigmas(2, 3.0).tolist() == pytest.approx([1.0, 0.75, 0.0])


@given(steps=st.integers(1, 60), shift=st.floats(0.1, 20))
def test_levels_fall_from_one_to_zero(steps: int, shift: float) -> None:
    sigmas = sampling_sigmas(steps, shift)
    assert sigmas[0] == pytest.approx(1)
    assert sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_noise_target_and_prediction_agree() -> None:
    """With the true velocity, one step from any level lands on x0, and so does the prediction of x0."""
    x0, noise = torch.randn(3, 2, 1, 2, 2), torch.randn(3, 2, 1, 2, 2)
    sigma = torch.tensor([0.25, 0.5, 1.0])
    x, velocity = add_noise(x0, noise, sigma), velocity_target(x0, noise)
    assert torch.equal(x[2], noise[2])
    torch.testing.assert_close(x[0], 0.75 * x0[0] + 0.25 * noise[0])
    torch.testing.assert_close(predicted_x0(x, velocity, sigma), x0)
    torch.testing.assert_close(euler_step(x[1], velocity[1], 0.5, 0.0), x0[1])


def test_guidance_extrapolates() -> None:
    """2 + 3 * (4 - 2) = 8."""
    assert guided(torch.tensor(4.0), torch.tensor(2.0), 3.0) == 8
