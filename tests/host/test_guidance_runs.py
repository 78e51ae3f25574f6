"""Runs of guided samplers: what the host loads for them, what they leave behind, and when they are stopped."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from .test_guidance import STEPS, file, guided, inference, noise, reward, sample, sigmas

__all__ = ["file", "guided", "inference", "noise", "reward", "sample", "sigmas"]


def test_weights_that_the_host_moved_in_inference_mode(
    guided: Callable[..., Any], sample: Callable[..., Any], reward: Any
) -> None:
    """As on a graphics card: no gradient passes such weights, see :func:`nodes.guiding.make_ready`."""
    import torch

    network = reward.parts[0].network
    expected = sample(guided())
    network.to(torch.float64).to(torch.float32)
    assert all(tensor.is_inference() for tensor in network.parameters())
    assert torch.equal(sample(guided()), expected)
    assert not any(tensor.is_inference() for tensor in network.parameters())


def test_the_reward_is_loaded_beside_the_model(
    guided: Callable[..., Any], sample: Callable[..., Any], reward: Any
) -> None:
    import comfy.model_management

    comfy.model_management.unload_all_models()
    model = guided()
    loaded = []
    sample(
        model,
        callback=lambda *_: loaded.append([one.model for one in comfy.model_management.loaded_models()]),
    )
    assert len(loaded) == STEPS
    for models in loaded:
        assert {id(model.model), id(reward.parts[0].patcher.model)} == {id(one) for one in models}


def test_a_run_leaves_nothing_behind(
    guided: Callable[..., Any],
    sample: Callable[..., Any],
    module: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    miniature: SimpleNamespace,
    reward: Any,
) -> None:
    runs, guiding = [], module("nodes.guiding")

    class Watched(guiding._Run):  # type: ignore[name-defined, misc]
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            runs.append(weakref.ref(self))

    monkeypatch.setattr(guiding, "_Run", Watched)
    model = guided()
    before = set(model.model_options)
    sample(model)
    sample(model.clone())
    gc.collect()
    assert [run() for run in runs] == [None, None]
    assert set(model.model_options) == before
    assert "sampler_post_cfg_function" not in miniature.model.model_options
    assert not miniature.model.get_additional_models()
    # The host copies the options deeply for every clone. The reward is not copied with them.
    (copied,) = model.clone().get_additional_models()
    assert copied.model is reward.parts[0].patcher.model


def test_it_can_be_stopped(guided: Callable[..., Any], sample: Callable[..., Any]) -> None:
    import comfy.model_management
    import torch

    model = guided()
    expected, seen = sample(model), []

    def stop(step: int, *_: Any) -> None:
        seen.append(step)
        if step == 2:
            comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(model, callback=stop)
    assert seen == [0, 1, 2]
    assert torch.equal(sample(model), expected)
