"""The miniature in ComfyUI's native classes against the same weights in diffusers' and transformers'."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

SEEDS = [3, 4]


@pytest.fixture(autouse=True)
def inference(comfy: Any) -> Iterator[None]:
    """ComfyUI runs its nodes in inference mode."""
    import torch

    with torch.inference_mode():
        yield


@pytest.fixture
def sigmas() -> Any:
    """The levels the miniature is sampled at; a copy each time, as ComfyUI's uni_pc writes into its argument."""
    from spatialalign.backbones.flow import sampling_sigmas

    return sampling_sigmas(16, 3.0).float()


@pytest.fixture
def sample(miniature: SimpleNamespace, conditioning: Any, sigmas: Any, backbone: Any) -> Callable[[str], Any]:
    """Sample the clips of :data:`SEEDS` natively; returns a LATENT's samples."""
    import comfy.sample
    import comfy.samplers
    import torch

    noise = backbone.noise(SEEDS, backbone.default_settings())

    def run(sampler: str) -> Any:
        method = comfy.samplers.sampler_object(sampler)
        start = torch.zeros_like(noise)
        return comfy.sample.sample_custom(
            miniature.model, noise, 1.0, method, sigmas, conditioning, conditioning, start, disable_pbar=True, seed=0
        )

    return run


def test_every_weight_has_its_place(miniature: SimpleNamespace, module: Callable[[str], ModuleType]) -> None:
    from safetensors.torch import load_file

    folder = module("spatialalign.miniature").WAN
    names = module("spatialalign.wan_names")
    for convert, part, native in (
        (names.transformer_to_original, "transformer", miniature.model.model.diffusion_model),
        (names.vae_to_original, "vae", miniature.vae.first_stage_model),
    ):
        shipped = convert(load_file(folder / part / "diffusion_pytorch_model.safetensors"))
        own = native.state_dict()
        assert {key: value.shape for key, value in shipped.items()} == {key: value.shape for key, value in own.items()}
        assert all((own[key] == value).all() for key, value in shipped.items())
    encoder = miniature.clip.cond_stage_model.umt5xxl.transformer.state_dict()
    shipped = load_file(folder / "text_encoder" / "model.safetensors")
    assert shipped.keys() == encoder.keys()
    assert all((encoder[key] == value.float()).all() for key, value in shipped.items())


def test_text_agrees(conditioning: Any, backbone: Any, prompt: str) -> None:
    import torch

    native = conditioning[0][0]
    ours = backbone.encode_text([prompt])[0]
    assert native.shape == (1, 512, 4096)
    torch.testing.assert_close(native[0, : len(ours)], ours, rtol=0, atol=1e-4)
    assert not native[0, len(ours) :].any()


@pytest.mark.parametrize("text", ["A dog.", "", "an (unknown) zebra: 50% off"])
def test_other_texts_agree(miniature: SimpleNamespace, backbone: Any, text: str) -> None:
    import torch

    native = miniature.clip.encode_from_tokens(miniature.clip.tokenize(text.replace("(", "\\(").replace(")", "\\)")))
    ours = backbone.encode_text([text])[0]
    torch.testing.assert_close(native[0, : len(ours)], ours, rtol=0, atol=1e-4)
    assert not native[0, len(ours) :].any()


def test_euler_agrees(
    sample: Callable[[str], Any],
    backbone: Any,
    miniature: SimpleNamespace,
    prompt: str,
    module: Callable[[str], ModuleType],
) -> None:
    import torch

    space = module("spatialalign.backbones.latent_space").LatentSpace(module("nodes.host").vae_width(miniature.vae))
    assert space.name == backbone.latent_space
    native = space.normalise(sample("euler"))
    text = backbone.encode_text([prompt])[0]
    ours = backbone.sample([text] * len(SEEDS), text, SEEDS, backbone.default_settings())
    assert ours.std() > 0.5  # a clip, not zeros that would agree with anything
    torch.testing.assert_close(native, ours, rtol=0, atol=1e-3)


def test_uni_pc_runs(sample: Callable[[str], Any]) -> None:
    import torch

    assert torch.isfinite(sample("uni_pc")).all()


def test_video_agrees(sample: Callable[[str], Any], miniature: SimpleNamespace, backbone: Any) -> None:
    import torch

    latent = sample("euler")
    native = miniature.vae.decode(latent)
    decoded = backbone.vae.decode(latent, return_dict=False)[0]
    ours = ((decoded.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 4, 1)
    assert native.shape == (2, 13, 64, 64, 3)
    torch.testing.assert_close(native, ours, rtol=0, atol=1e-4)
    again = miniature.vae.encode(native[0])
    expected = backbone.vae.encode(native[:1].permute(0, 4, 1, 2, 3) * 2 - 1).latent_dist.mode()
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-3)


def test_the_plain_sampler_follows_the_training_schedule(miniature: SimpleNamespace, sigmas: Any) -> None:
    """KSampler with "simple" and 20 steps, which divide the host's 1000 levels, visits ``3 u / (1 + 2 u)``."""
    import comfy.samplers
    import torch

    sampling = miniature.model.get_model_object("model_sampling")
    u = torch.arange(20, -1, -1) / 20
    torch.testing.assert_close(
        comfy.samplers.calculate_sigmas(sampling, "simple", 20), 3 * u / (1 + 2 * u), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        comfy.samplers.calculate_sigmas(sampling, "simple", 16), sigmas, rtol=0, atol=2e-3
    )  # 16 steps fall between two of the levels


def test_another_shift_can_be_set_behind_it(miniature: SimpleNamespace) -> None:
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    patched = ModelSamplingSD3().patch(miniature.model, 5.0)[0]
    assert float(patched.get_model_object("model_sampling").sigma_max) == 1.0
    assert patched.get_model_object("model_sampling").shift == 5.0
    assert miniature.model.get_model_object("model_sampling").shift == 3.0


def test_latents_are_normalised_as_the_host_does(module: Callable[[str], ModuleType]) -> None:
    import torch
    from comfy.latent_formats import Wan21

    latents = torch.randn(2, 16, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    space = module("spatialalign.backbones.latent_space").LatentSpace()
    torch.testing.assert_close(space.normalise(latents), Wan21().process_in(latents), rtol=0, atol=1e-6)


def test_a_vae_of_another_family_is_refused(module: Callable[[str], ModuleType]) -> None:
    import torch

    with pytest.raises(module("spatialalign.errors").ModelError, match="Wan 2.1 VAE is needed"):
        module("nodes.host").vae_width(SimpleNamespace(first_stage_model=torch.nn.Identity()))


def test_weights_of_another_model_are_refused(module: Callable[[str], ModuleType]) -> None:
    import torch

    with pytest.raises(module("spatialalign.errors").ModelError, match="does not recognise"):
        module("nodes.host").wan_model({"layer.weight": torch.zeros(2, 2)}, 3.0)
