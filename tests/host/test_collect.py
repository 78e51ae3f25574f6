"""A clip made natively in ComfyUI and collected, against the same clip made by ``training.generate``'s backbone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

SEED = 3


def test_a_collected_clip_is_what_the_trainer_would_have_made(
    miniature: SimpleNamespace,
    conditioning: Any,
    backbone: Any,
    prompt: str,
    module: Callable[[str], ModuleType],
    execute: Callable[..., tuple[Any, ...]],
) -> None:
    """Latents, text and latent space are the backbone's own, so that the trainer takes them as its own."""
    import comfy.sample
    import comfy.samplers
    import torch

    import nodes
    from spatialalign.backbones.flow import sampling_sigmas
    from spatialalign.store import Store

    noise = backbone.noise([SEED], backbone.default_settings())
    method = comfy.samplers.sampler_object("euler")
    with torch.inference_mode():
        samples = comfy.sample.sample_custom(
            *(miniature.model, noise, 1.0, method, sampling_sigmas(16, 3.0).float(), conditioning, conditioning),
            torch.zeros_like(noise),
            disable_pbar=True,
            seed=0,
        )
        images = nodes.VAEDecode().decode(miniature.vae, {"samples": samples})[0]
    (path,) = execute(
        module("nodes.dataset").CollectSample,
        dsr=module("spatialalign.dsr").DSR.parse(prompt),
        latent={"samples": samples},
        positive=conditioning,
        vae=miniature.vae,
        set_name="native",
        prompt_id="0001_LR",
        seed=SEED,
        fps=8.0,
        base_model="miniature",
        images=images,
    )
    store = Store(Path(path).parent.parent)
    (sample,) = store.samples()
    (text,) = backbone.encode_text([prompt])
    expected = backbone.sample([text], text, [SEED], backbone.default_settings())[0]
    assert sample.read_header().space == backbone.latent_space
    torch.testing.assert_close(store.read_text("0001_LR"), text, rtol=0, atol=1e-4)
    assert expected.std() > 0.5
    torch.testing.assert_close(sample.read_latents(), expected, rtol=0, atol=1e-3)


def test_another_vae_is_named(module: Callable[[str], ModuleType]) -> None:
    import pytest
    import torch

    host, error = module("nodes.host"), module("spatialalign.errors").ModelError
    with pytest.raises(error, match="the VAE is a Linear, a Wan 2.1 VAE is needed"):
        host.vae_width(SimpleNamespace(first_stage_model=torch.nn.Linear(1, 1)))
