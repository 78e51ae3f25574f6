"""LtxBackbone against diffusers' pipeline, on a tiny random one."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline

from spatialalign.backbones import load_backbone
from spatialalign.backbones.base import SampleSettings
from spatialalign.backbones.checkpointing import enable_checkpointing
from spatialalign.backbones.ltx import LTX_SETTINGS, LtxBackbone, pack, unpack
from spatialalign.backbones.storage import store_in_fp8
from spatialalign.errors import ConfigError, ModelError

PROMPTS = ["a cat is on the left of a box", "a dog"]


@pytest.fixture(scope="module")
def backbone(tiny_ltx: Path) -> LtxBackbone:
    found = load_backbone(str(tiny_ltx), device="cpu")
    assert isinstance(found, LtxBackbone)
    return found


@pytest.fixture(scope="module")
def pipeline(tiny_ltx: Path) -> LTXPipeline:
    pipe = LTXPipeline.from_pretrained(tiny_ltx)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_text_equals_the_pipeline_where_its_mask_is_one(backbone: LtxBackbone, pipeline: LTXPipeline) -> None:
    theirs, mask, _, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    ours = backbone.encode_text(PROMPTS)
    assert [len(row) for row in ours] == mask.sum(1).tolist() == [10, 3]
    for row, padded in zip(ours, theirs, strict=True):
        torch.testing.assert_close(row, padded[: len(row)], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prompts", [PROMPTS, ["a dog", "a cat"]], ids=["unequal", "equal"])
def test_samples_and_frames_equal_the_pipeline(
    backbone: LtxBackbone, pipeline: LTXPipeline, prompts: list[str]
) -> None:
    """Same noise, text and levels: the same latents, and frames equal to rounding of one grey level."""
    settings = backbone.default_settings()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=settings.shift)
    plain = scheduler.set_timesteps
    scheduler.set_timesteps = lambda device, sigmas, mu: plain(sigmas=sigmas, device=device)
    pipeline.scheduler = scheduler
    noise = backbone.noise([5, 6], settings)
    tokens = pipeline(
        prompts,
        negative_prompt=["blurred", "blurred"],
        height=64,
        width=64,
        num_frames=9,
        frame_rate=8,
        num_inference_steps=3,
        guidance_scale=4.0,
        latents=pipeline._pack_latents(noise),
        output_type="latent",
    ).frames
    expected = pipeline._unpack_latents(tokens, 2, 2, 2)
    text, (negative,) = backbone.encode_text(prompts), backbone.encode_text(["blurred"])
    found = backbone.sample(text, negative, [5, 6], settings)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(backbone.sample(text[1:], negative, [6], settings), found[1:], atol=1e-4, rtol=1e-4)

    vae = pipeline.vae
    with torch.no_grad():
        raw = pipeline._denormalize_latents(expected, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
        video = vae.decode(raw, None, return_dict=False)[0]
    theirs = pipeline.video_processor.postprocess_video(video, output_type="np") * 255
    ours = backbone.decode(found)
    assert ours.shape == (2, 9, 64, 64, 3)
    assert np.abs(ours - theirs).max() <= 0.51


def test_encode_is_normalised_with_the_constants_among_the_weights(backbone: LtxBackbone) -> None:
    """The fixture's constants run evenly from -0.5 to 0.5 and from 0.5 to 1.5 over 8 channels."""
    frames = np.random.default_rng(0).integers(0, 256, (1, 9, 64, 64, 3), dtype=np.uint8)
    latents = backbone.encode(frames)
    assert latents.shape == (1, *backbone.latent_shape(backbone.default_settings())) == (1, 8, 2, 2, 2)
    mode = backbone.vae.encode(torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1).latent_dist.mode()
    torch.testing.assert_close(latents[:, 0], (mode[:, 0] + 0.5) / 0.5, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(latents[:, 7], (mode[:, 7] - 0.5) / 1.5, atol=1e-5, rtol=1e-5)
    assert backbone.latent_space.startswith("ltx-vae:")


@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2), (2, 2, 2)])
def test_packing_equals_the_pipeline_and_comes_back(patch: tuple[int, int, int]) -> None:
    latents = torch.randn(2, 3, 4, 4, 6)
    tokens = pack(latents, patch)
    assert torch.equal(tokens, LTXPipeline._pack_latents(latents, patch[1], patch[0]))
    grid = (4 // patch[0], 4 // patch[1], 6 // patch[2])
    assert torch.equal(unpack(tokens, patch, grid), latents)


def test_sizes(backbone: LtxBackbone) -> None:
    assert backbone.latent_shape(LTX_SETTINGS) == (8, 21, 15, 22)
    assert backbone.tokens((8, 21, 15, 22)) == 21 * 15 * 22
    with pytest.raises(ConfigError, match="8 k .* multiples of 32"):
        backbone.latent_shape(SampleSettings(frames=13, height=64, width=64))


def test_lora_targets(backbone: LtxBackbone) -> None:
    """Two text linears and k, v of both blocks; all linears: 2 + 2 blocks x (2 attentions x 4 + 2)."""
    assert len(backbone.lora_targets("spatialalign")) == 2 + 4
    assert len(backbone.lora_targets("cross-kv")) == 4
    assert len(backbone.lora_targets("attention")) == 16
    assert len(backbone.lora_targets("all-linear")) == 22


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_checkpointing_gives_the_same_gradients(backbone: LtxBackbone, kind: str) -> None:
    text, x, sigma = backbone.encode_text(PROMPTS), torch.randn(2, 8, 2, 2, 2), torch.tensor([0.3, 0.9])
    gradients = []
    for how in ("none", kind):
        enable_checkpointing(backbone.transformer, how)  # type: ignore[arg-type]
        noisy = x.clone().requires_grad_()
        backbone.velocity(noisy, sigma, text).square().mean().backward()
        assert noisy.grad is not None
        gradients.append(noisy.grad)
    enable_checkpointing(backbone.transformer, "none")
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-5)


def test_the_base_can_be_stored_in_8_bits(tiny_ltx: Path) -> None:
    backbone = load_backbone(str(tiny_ltx), device="cpu")
    text, x, sigma = backbone.encode_text(PROMPTS), torch.randn(2, 8, 2, 2, 2), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        before = backbone.velocity(x, sigma, text)
        assert store_in_fp8(backbone.transformer) > 0
        after = backbone.velocity(x, sigma, text)
    assert 0 < float((after - before).norm() / before.norm()) < 0.1


def test_what_is_refused(backbone: LtxBackbone, tiny_ltx: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one transformer"):
        load_backbone(str(tiny_ltx), "cpu", expert="high")
    with pytest.raises(ConfigError, match="guidance_2"):
        backbone.sample([], torch.zeros(1, 16), [], SampleSettings(guidance_2=2.0))
    copy = tmp_path / "copy"
    shutil.copytree(tiny_ltx, copy)
    weights = copy / "vae/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("other.safetensors"))
    with pytest.raises(ModelError, match="mean and deviation"):
        load_backbone(str(copy), "cpu")
