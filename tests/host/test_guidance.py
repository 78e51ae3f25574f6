"""Reward guidance of ComfyUI's samplers against the engine's own, on the miniature with a random reward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

SEEDS = [3, 4]
STEPS = 6
NAME = "random.safetensors"


@pytest.fixture(autouse=True)
def inference(comfy: Any) -> Iterator[None]:
    """ComfyUI runs its nodes in inference mode."""
    import torch

    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def file(backbone: Any, comfy: Any) -> Any:
    """A reward that nobody trained, steep enough to be felt, where ComfyUI looks for rewards."""
    import torch

    from spatialalign.rewards.latent import LatentReward, RewardInfo, save_reward
    from spatialalign.rewards.wan_trunk import WanTrunk

    with torch.inference_mode(False), torch.random.fork_rng():
        torch.manual_seed(0)
        info = RewardInfo("miniature", backbone.latent_space, further=("quality",))
        reward = LatentReward(WanTrunk.from_transformer(backbone.transformer, 2), info)
        torch.nn.init.normal_(reward.head.to_values.weight)
    path = comfy / "models" / "latent_rewards" / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    save_reward(path, reward, torch.float32)
    return path


@pytest.fixture(scope="module")
def reward(file: Any, module: Callable[[str], ModuleType], execute: Callable[..., Any]) -> Any:
    """The same, as Load Latent Reward hands it out."""
    return execute(module("nodes.sampling").LoadLatentReward, reward=NAME, precision="float32")[0]


@pytest.fixture(scope="module")
def guided(
    module: Callable[[str], ModuleType], execute: Callable[..., Any], reward: Any, miniature: SimpleNamespace
) -> Callable[..., Any]:
    """``guided(strength=..., ...)``: the miniature's MODEL with guidance; the rest as in ``headless``."""
    start = {
        "strength": 100.0,
        "start_percent": 0.0,
        "end_percent": 1.0,
        "every": 1,
        "form": "nrg",
        "step_cap": 0.3,
        "factor_cap": 5.0,
    }

    def patch(**changes: Any) -> Any:
        node = module("nodes.sampling").RewardGuidance
        return execute(node, **({"model": miniature.model, "reward": reward} | start | changes))[0]

    return patch


@pytest.fixture
def sigmas() -> Any:
    """The levels of few steps; a copy each time, as ComfyUI's uni_pc writes into its argument."""
    from spatialalign.backbones.flow import sampling_sigmas

    return sampling_sigmas(STEPS, 3.0).float()


@pytest.fixture
def noise(backbone: Any) -> Any:
    """What two clips start from."""
    return backbone.noise(SEEDS, backbone.default_settings())


@pytest.fixture(scope="module")
def other_text(miniature: SimpleNamespace) -> Any:
    """Another sentence, as a CONDITIONING."""
    import torch

    import nodes

    with torch.inference_mode():
        return nodes.CLIPTextEncode().encode(miniature.clip, "A dog.")[0]


@pytest.fixture
def sample(noise: Any, sigmas: Any, conditioning: Any) -> Callable[..., Any]:
    """``sample(model, ...)``: a LATENT's samples."""
    import comfy.sample
    import comfy.samplers
    import torch

    def run(
        model: Any,
        sampler: str = "euler",
        cfg: float = 1.0,
        start: Any = None,
        positive: Any = conditioning,
        negative: Any = conditioning,
        levels: Any = None,
        fresh: bool = True,
        **more: Any,
    ) -> Any:
        return comfy.sample.sample_custom(
            model,
            noise if fresh else torch.zeros_like(noise),
            cfg,
            comfy.samplers.sampler_object(sampler),
            (sigmas if levels is None else levels).clone(),
            positive,
            negative,
            torch.zeros_like(noise) if start is None else start,
            disable_pbar=True,
            seed=0,
            **more,
        )

    return run


@pytest.fixture
def headless(file: Any, backbone: Any, prompt: str) -> Callable[..., Any]:
    """``headless(weights, ...)``: the same by the engine; :class:`GuidanceSettings` by keyword, in model space."""
    from dataclasses import replace

    from spatialalign.guidance import GuidanceSettings, RewardGuidance
    from spatialalign.rewards.latent import load_reward

    def run(scale: float = 1.0, negative: str | None = None, **changes: Any) -> Any:
        settings = replace(backbone.default_settings(), steps=STEPS, guidance=scale)
        given = {"form": "nrg", "strength": 100.0, "end": 1.0, "step_cap": 0.3} | changes
        text = backbone.encode_text([prompt, negative or prompt])
        flow = backbone.flow([text[0]] * len(SEEDS), text[1], settings)
        with flow as steps:
            adjust = RewardGuidance([load_reward(file)], GuidanceSettings(**given), steps.sigmas)
        return backbone.sample([text[0]] * len(SEEDS), text[1], SEEDS, settings, adjust=adjust)

    return run


def normalised(samples: Any) -> Any:
    """A LATENT's samples in the model's space."""
    from spatialalign.backbones.latent_space import LatentSpace

    return LatentSpace().normalise(samples)


@pytest.mark.parametrize(
    ("node", "engine"),
    [
        ({}, {}),
        ({}, {}),
        (
            {"form": "x0", "strength": 1000.0, "end_percent": 0.6, "step_cap": 0.5},
            {"form": "x0", "strength": 1000.0, "end": 0.6, "step_cap": 0.5},
        ),
        ({"strength": 40.0, "step_cap": 10.0}, {"strength": 40.0, "step_cap": 10.0}),
        (
            {"start_percent": 0.2, "end_percent": 0.7, "every": 2, "factor_cap": 2.0},
            {"start": 0.2, "end": 0.7, "every": 2, "factor_cap": 2.0},
        ),
    ],
)
def test_it_agrees_with_the_engine(
    guided: Callable[..., Any],
    sample: Callable[..., Any],
    headless: Callable[..., Any],
    miniature: SimpleNamespace,
    node: dict[str, Any],
    engine: dict[str, Any],
) -> None:
    import torch

    native = normalised(sample(guided(**node)))
    assert (native - normalised(sample(miniature.model))).abs().mean() > 0.02, "guidance is not felt"
    torch.testing.assert_close(native, headless(**engine), rtol=0, atol=1e-3)


def test_it_comes_after_classifier_free_guidance(
    guided: Callable[..., Any], sample: Callable[..., Any], headless: Callable[..., Any], other_text: Any
) -> None:
    import torch

    native = normalised(sample(guided(), cfg=3.0, negative=other_text))
    torch.testing.assert_close(native, headless(3.0, "A dog."), rtol=0, atol=1e-3)


def test_strength_0_and_an_empty_window_change_no_bit(
    guided: Callable[..., Any], sample: Callable[..., Any], miniature: SimpleNamespace
) -> None:
    import torch

    plain = sample(miniature.model)
    assert torch.equal(sample(guided(strength=0.0)), plain)
    assert torch.equal(sample(guided(start_percent=0.5, end_percent=0.5)), plain)


@pytest.mark.parametrize(
    "sampler", ["euler_ancestral", "heun", "dpm_2", "dpmpp_2m", "dpmpp_sde", "uni_pc", "euler_cfg_pp"]
)
def test_every_kind_of_sampler_is_guided(
    guided: Callable[..., Any], sample: Callable[..., Any], miniature: SimpleNamespace, sampler: str
) -> None:
    import torch

    found, plain = sample(guided(), sampler), sample(miniature.model, sampler)
    assert torch.isfinite(found).all() and not torch.equal(found, plain)


def test_a_schedule_in_two_parts_is_guided_as_one(
    guided: Callable[..., Any], sample: Callable[..., Any], sigmas: Any
) -> None:
    """Where guidance acts is found by noise level: a sampler that continues half-way is not at its start."""
    import torch

    model = guided(start_percent=0.2, end_percent=0.7)
    half = sample(model, levels=sigmas[:4])
    torch.testing.assert_close(
        sample(model, start=half, levels=sigmas[3:], fresh=False), sample(model), rtol=0, atol=1e-3
    )


def test_the_window_follows_a_shift_that_is_set_behind_it(
    guided: Callable[..., Any], sample: Callable[..., Any], miniature: SimpleNamespace
) -> None:
    """At a shift of 1 the last 40 % of the schedule are the noise levels below 0.4; at the miniature's 3, below 2/3."""
    import torch
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    levels = torch.tensor([0.65, 0.55, 0.45, 0.41])
    model, plain = guided(start_percent=0.6), miniature.model
    assert not torch.equal(sample(model, levels=levels), sample(plain, levels=levels))
    flat, plain = (ModelSamplingSD3().patch(one, 1.0)[0] for one in (model, plain))
    assert torch.equal(sample(flat, levels=levels), sample(plain, levels=levels))


def test_what_a_mask_keeps_is_kept(
    guided: Callable[..., Any], sample: Callable[..., Any], miniature: SimpleNamespace
) -> None:
    import torch

    start = sample(miniature.model)
    mask = torch.zeros(2, 1, *start.shape[2:])
    mask[..., :4] = 1
    found = sample(guided(), start=start, noise_mask=mask)
    torch.testing.assert_close(found[..., 4:], start[..., 4:], rtol=0, atol=1e-4)
    plain = sample(miniature.model, start=start, noise_mask=mask)
    assert (found[..., :4] - plain[..., :4]).abs().mean() > 0.02


def test_several_rewards_add_up(
    guided: Callable[..., Any],
    sample: Callable[..., Any],
    headless: Callable[..., Any],
    reward: Any,
    module: Callable[[str], ModuleType],
    execute: Callable[..., Any],
) -> None:
    """The same network twice, with different weights, is the network with both."""
    import torch

    node = module("nodes.sampling").RewardWeights
    first = execute(node, reward=reward, weights="quality: -0.5")[0]
    both, report = execute(node, reward=reward, weights="dsr:1\nvalid:0.25", also=first)
    assert "dsr 1, valid 0.25, quality 0" in report and "dsr 0, valid 0, quality -0.5" in report
    weights = {"dsr": 1.0, "valid": 0.25, "quality": -0.5}
    torch.testing.assert_close(normalised(sample(guided(reward=both))), headless(weights=weights), rtol=0, atol=1e-3)
    assert (headless(weights=weights) - headless()).abs().mean() > 0.02


def test_two_guidances_are_taken_in_turn(guided: Callable[..., Any], sample: Callable[..., Any], reward: Any) -> None:
    """One for the first part of the schedule and one behind it, as one for both."""
    import torch

    early = guided(end_percent=0.5)
    both = guided(model=early, start_percent=0.5)
    assert len(both.get_additional_models_with_key("spatialalign")) == 2
    torch.testing.assert_close(sample(both), sample(guided()), rtol=0, atol=1e-4)


def test_of_several_conditionings_the_first_in_force_is_read(
    guided: Callable[..., Any],
    sample: Callable[..., Any],
    conditioning: Any,
    other_text: Any,
    caplog: pytest.LogCaptureFixture,
    module: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import nodes

    asked = []
    guiding = module("nodes.guiding")
    unpadded = guiding.unpadded
    monkeypatch.setattr(guiding, "unpadded", lambda rows: asked.append(unpadded(rows)) or asked[-1])
    tokens = [len(unpadded(one[0][0][0])) for one in (conditioning, other_text)]
    assert tokens[0] != tokens[1]
    sample(guided(), positive=nodes.ConditioningCombine().combine(conditioning, other_text)[0])
    assert caplog.text.count("2 conditionings are in force at once") == 1
    assert [len(rows) for rows in asked] == tokens[:1]
    ranges = nodes.ConditioningSetTimestepRange()
    early, late = ranges.set_range(conditioning, 0.0, 0.5)[0], ranges.set_range(other_text, 0.5001, 1.0)[0]
    asked.clear()
    caplog.clear()
    sample(guided(), positive=early + late)
    assert [len(rows) for rows in asked] == tokens and "in force" not in caplog.text


def test_a_conditioning_without_a_text_is_an_error(
    guided: Callable[..., Any], sample: Callable[..., Any], conditioning: Any, module: Callable[[str], ModuleType]
) -> None:
    import nodes

    blank = nodes.ConditioningZeroOut().zero_out(conditioning)[0]
    with pytest.raises(module("spatialalign.errors").DataError, match="all zeros"):
        sample(guided(), positive=blank)


def test_models_that_it_cannot_lead(
    guided: Callable[..., Any],
    module: Callable[[str], ModuleType],
    execute: Callable[..., Any],
    reward: Any,
    miniature: SimpleNamespace,
) -> None:
    import comfy.latent_formats
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models
    import torch

    error = module("spatialalign.errors").ModelError
    config = comfy.supported_models.Flux(
        {"image_model": "flux", "guidance_embed": False, "disable_unet_model_creation": True}
    )
    flux = comfy.model_base.Flux(config, device="cpu")
    device = torch.device("cpu")
    with pytest.raises(error, match="the model is a Flux with Flux latents, .*a Wan 2.1 or 2.2 model"):
        guided(model=comfy.model_patcher.ModelPatcher(flux, device, device))
    # A transformer as wide as Wan 1.3B's reads the latents of Wan 2.1's VAE, not the miniature's.
    other = miniature.model.clone()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(other.model.diffusion_model, "dim", 1536)
        with pytest.raises(error, match="made with miniature, reads latents of wan-vae:.*this model's are of wan-vae:"):
            guided(model=other)
        patch.setattr(other.model, "latent_format", comfy.latent_formats.Wan22())
        with pytest.raises(error, match="this model's are of wan-vae:"):
            guided(model=other)
