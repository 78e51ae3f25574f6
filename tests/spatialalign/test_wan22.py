"""Wan 2.2 behind the protocol, on tiny random pipelines: A14B with its two experts, and TI2V-5B."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

from spatialalign.backbones import load_backbone
from spatialalign.backbones.base import Backbone, ExpertName
from spatialalign.backbones.experts import Experts
from spatialalign.backbones.flow import levels_between, sampling_sigmas, training_sigmas
from spatialalign.backbones.wan import A14B_SETTINGS, TI2V_5B_SETTINGS, WanBackbone
from spatialalign.errors import ConfigError, ModelError

PROMPTS = ["a cat is on the left of a box", "a dog"]


def pipeline_latents(folder: Path, backbone: WanBackbone) -> torch.Tensor:
    """What diffusers' pipeline samples from the noise of seeds 5 and 6 at our noise levels."""
    settings = backbone.default_settings()
    pipe = WanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=settings.shift)
    plain = scheduler.set_timesteps
    scheduler.set_timesteps = lambda steps, device: plain(sigmas=np.linspace(1, 1 / steps, steps), device=device)
    pipe.scheduler = scheduler
    return pipe(
        PROMPTS,
        negative_prompt=["blurred", "blurred"],
        height=settings.height,
        width=settings.width,
        num_frames=settings.frames,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        guidance_scale_2=settings.guidance_2,
        latents=backbone.noise([5, 6], settings),
        output_type="latent",
    ).frames


def load(folder: Path, expert: ExpertName | None = None) -> WanBackbone:
    found = load_backbone(str(folder), device="cpu", expert=expert)
    assert isinstance(found, WanBackbone)
    return found


def sample(backbone: Backbone, seeds: list[int], which: slice = slice(None)) -> torch.Tensor:
    text, (negative,) = backbone.encode_text(PROMPTS)[which], backbone.encode_text(["blurred"])
    return backbone.sample(text, negative, seeds, backbone.default_settings())


@pytest.mark.parametrize("expert", ["high", "low"])
def test_both_experts_sample_as_in_the_pipeline(tiny_a14b: Path, expert: ExpertName) -> None:
    """Levels 1, 0.96, 0.857: two steps of the high expert, one of the low one, with guidance 4 and 3."""
    backbone = load(tiny_a14b, expert)
    assert (sampling_sigmas(3, 12.0)[:3] >= 0.875).tolist() == [True, True, False]
    found = sample(backbone, [5, 6])
    torch.testing.assert_close(found, pipeline_latents(tiny_a14b, backbone), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sample(backbone, [6], slice(1, 2)), found[1:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("expert", "part", "sigma"), [("high", "transformer", 0.9), ("low", "transformer_2", 0.8)])
def test_velocity_is_the_chosen_expert_s(tiny_a14b: Path, expert: ExpertName, part: str, sigma: float) -> None:
    pipe, backbone = WanPipeline.from_pretrained(tiny_a14b), load(tiny_a14b, expert)
    padded, _ = pipe.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=512)
    x, level = torch.randn(2, 16, 2, 4, 4), torch.tensor([sigma, sigma])
    with torch.no_grad():
        expected = getattr(pipe, part)(x, 1000 * level, padded, return_dict=False)[0]
        found = backbone.velocity(x, level, backbone.encode_text(PROMPTS))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    level[1] = 0.95 if expert == "low" else 0.5
    with pytest.raises(ConfigError, match=f"the {expert}-noise expert .*{level[1]:g}"):
        backbone.velocity(x, level, backbone.encode_text(PROMPTS))


def test_the_other_expert_is_loaded_when_sampled_with_and_then_leaves_the_device(tiny_a14b: Path) -> None:
    """Each step has one transformer on the device; the parameters that an optimiser holds stay the same objects."""
    chosen, loads, moves = torch.nn.Linear(1, 1), list[str](), list[str]()

    class Watched(torch.nn.Linear):
        def to(self, device: object) -> Watched:  # type: ignore[override]
            moves.append(f"other to {device}")
            return self

    def load_other() -> torch.nn.Module:
        loads.append("other")
        return Watched(1, 1)

    experts = Experts("high", 0.875, load_other)
    weight = chosen.weight
    with experts.switching(chosen) as at:
        assert at(1.0) is chosen and at(0.875) is chosen and at(0.875 - 1e-9) is chosen
        assert not loads
        assert at(0.874) is experts.other
        assert moves == ["other to cpu"]
    assert moves[-1] == "other to cpu" and loads == ["other"] and chosen.weight is weight


def test_ranges_of_the_experts_share_out_the_schedule() -> None:
    """Shift 12: 12 u / (1 + 11 u) >= 0.875 from u = 0.368..., which leaves 632 and 368 of 1000 levels."""
    sigmas = training_sigmas(12.0)
    parts = [levels_between(sigmas, *Experts(name, 0.875, lambda: None).sigma_range) for name in ("high", "low")]  # type: ignore[arg-type]
    assert torch.equal(torch.cat(parts), sigmas)
    edge = 0.875 / (12 - 11 * 0.875)
    assert len(parts[1]) == int(edge * 1000)
    assert float(parts[0][0]) == 1.0


def test_what_is_refused(tiny_a14b: Path, tiny_ti2v: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="one transformer"):
        load_backbone(str(tiny_ti2v), "cpu", expert="low")
    with pytest.raises(ConfigError, match="'high' or 'low'"):
        load_backbone(str(tiny_a14b), "cpu", expert="both")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="between 0 and 1"):
        Experts("high", 1.0, lambda: None)
    copy = tmp_path / "copy"
    shutil.copytree(tiny_a14b, copy)
    shutil.rmtree(copy / "transformer_2")
    with pytest.raises(ModelError, match="'transformer_2'"):
        load_backbone(str(copy), "cpu")
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {"_class_name": "CogVideoXPipeline"}))
    with pytest.raises(ModelError, match="CogVideoXPipeline"):
        load_backbone(str(copy), "cpu")


def test_published_settings_where_the_folder_has_none(tiny_a14b: Path, tiny_ti2v: Path, tmp_path: Path) -> None:
    for folder, settings, fps in ((tiny_a14b, A14B_SETTINGS, 16), (tiny_ti2v, TI2V_5B_SETTINGS, 24)):
        copy = tmp_path / folder.name
        shutil.copytree(folder, copy)
        (copy / "spatialalign.json").unlink()
        backbone = load(copy)
        assert (backbone.default_settings(), backbone.fps) == (settings, fps)
        backbone.latent_shape(settings)


def test_guidance_2_changes_nothing_where_there_is_none(tiny_ti2v: Path) -> None:
    """Stores of models with one transformer keep their digest, and a value that would be ignored is refused."""
    assert "guidance_2" not in TI2V_5B_SETTINGS.to_dict()
    assert A14B_SETTINGS.to_dict()["guidance_2"] == 3.0
    backbone = load(tiny_ti2v)
    with pytest.raises(ConfigError, match="guidance_2"):
        backbone.sample(backbone.encode_text(["a"]), torch.zeros(1, 16), [0], A14B_SETTINGS)


def test_ti2v_samples_as_the_pipeline_with_a_timestep_for_each_token(tiny_ti2v: Path) -> None:
    backbone = load(tiny_ti2v)
    assert WanPipeline.load_config(tiny_ti2v)["expand_timesteps"]
    assert (backbone.expert, backbone.sigma_range) == (None, (0.0, 1.0))
    found = sample(backbone, [5, 6])
    torch.testing.assert_close(found, pipeline_latents(tiny_ti2v, backbone), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(sample(backbone, [6], slice(1, 2)), found[1:], atol=1e-4, rtol=1e-4)


def test_ti2v_has_its_own_latents(tiny_ti2v: Path, tiny_a14b: Path) -> None:
    """16 pixels and 4 frames a latent, 48 channels; normalised with the VAE's own constants."""
    backbone = load(tiny_ti2v)
    settings = backbone.default_settings()
    assert backbone.latent_shape(settings) == (48, 2, 4, 4)
    assert backbone.tokens((48, 2, 4, 4)) == 2 * 2 * 2
    assert backbone.latent_space != load(tiny_a14b).latent_space
    frames = np.random.default_rng(0).integers(0, 256, (1, 5, 64, 64, 3), dtype=np.uint8)
    latents = backbone.encode(frames)
    assert latents.shape == (1, 48, 2, 4, 4)
    mode = backbone.vae.encode(torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1).latent_dist.mode()
    torch.testing.assert_close(latents[:, 0], (mode[:, 0] + 0.5) / 0.5, atol=1e-5, rtol=1e-5)
    assert backbone.decode(latents).shape == (1, 5, 64, 64, 3)
