"""WanBackbone against the plain diffusers classes it is made of, on a tiny random pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from spatialalign.backbones import load_backbone
from spatialalign.backbones.base import SampleSettings
from spatialalign.backbones.wan import WanBackbone
from spatialalign.errors import ConfigError, DataError, ModelError

PROMPTS = ["a cat is on the left of a box", "a dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate("<pad> </s> <unk> a the is on left of cat dog box blurred".split())}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    vae = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    path = tmp_path_factory.mktemp("models") / "wan"
    WanPipeline(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=len(vocabulary), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, text_dim=16, freq_dim=16, ffn_dim=24, num_layers=2
        ),
    ).save_pretrained(path)
    settings = {"frames": 5, "height": 32, "width": 32, "steps": 3, "guidance": 4.0, "shift": 3.0, "fps": 8}
    (path / "spatialalign.json").write_text(json.dumps({**settings, "negative_prompt": "blurred"}))
    return path


@pytest.fixture(scope="module")
def backbone(folder: Path) -> WanBackbone:
    return load_backbone(str(folder), device="cpu")


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> WanPipeline:
    pipe = WanPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_settings_come_from_the_folder(backbone: WanBackbone) -> None:
    settings = backbone.default_settings()
    assert (settings.frames, settings.steps, settings.guidance, settings.negative_prompt) == (5, 3, 4.0, "blurred")
    assert backbone.fps == 8
    assert backbone.latent_shape(settings) == (16, 2, 4, 4)


def test_text_equals_the_pipeline_without_its_padding(backbone: WanBackbone, pipeline: WanPipeline) -> None:
    theirs, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=512)
    ours = backbone.encode_text(PROMPTS)
    assert [len(row) for row in ours] == [10, 3]  # words and the end mark
    for row, padded in zip(ours, theirs, strict=True):
        torch.testing.assert_close(row, padded[: len(row)], atol=1e-5, rtol=1e-5)
        assert (padded[len(row) :] == 0).all()


def test_velocity_equals_the_transformer_on_padded_text(backbone: WanBackbone, pipeline: WanPipeline) -> None:
    padded, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=512)
    x, sigma = torch.randn(2, 16, 2, 4, 4), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        expected = pipeline.transformer(x, sigma * 1000, padded, return_dict=False)[0]
        found = backbone.velocity(x, sigma, backbone.encode_text(PROMPTS))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_velocity_is_the_same_under_gradient_checkpointing(backbone: WanBackbone) -> None:
    text = backbone.encode_text(PROMPTS)
    x, sigma = torch.randn(2, 16, 2, 4, 4), torch.tensor([0.3, 0.9])
    gradients = []
    for checkpointing in (False, True):
        (backbone.transformer.enable_gradient_checkpointing if checkpointing else lambda: None)()
        noisy = x.clone().requires_grad_()
        backbone.velocity(noisy, sigma, text).square().mean().backward()
        assert noisy.grad is not None
        gradients.append(noisy.grad)
    backbone.transformer.disable_gradient_checkpointing()
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_samples_and_frames_equal_the_pipeline(backbone: WanBackbone, pipeline: WanPipeline) -> None:
    """Same noise, text and levels: the same latents, and frames equal to rounding of one grey level."""
    settings = backbone.default_settings()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=settings.shift)
    plain = scheduler.set_timesteps
    scheduler.set_timesteps = lambda steps, device: plain(sigmas=np.linspace(1, 1 / steps, steps), device=device)
    pipeline.scheduler = scheduler
    expected = pipeline(
        PROMPTS,
        negative_prompt=["blurred", "blurred"],
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=3,
        guidance_scale=4.0,
        latents=backbone.noise([5, 6], settings),
        output_type="latent",
    ).frames
    text, (negative,) = backbone.encode_text(PROMPTS), backbone.encode_text(["blurred"])
    steps: list[tuple[int, int]] = []
    found = backbone.sample(text, negative, [5, 6], settings, lambda done, total: steps.append((done, total)))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert steps == [(1, 3), (2, 3), (3, 3)]

    mean, std = (
        torch.tensor(getattr(pipeline.vae.config, key)).view(1, 16, 1, 1, 1) for key in ("latents_mean", "latents_std")
    )
    with torch.no_grad():
        video = pipeline.vae.decode(expected * std + mean, return_dict=False)[0]
    theirs = pipeline.video_processor.postprocess_video(video, output_type="np") * 255
    ours = backbone.decode(found)
    assert ours.dtype == np.uint8
    assert ours.shape == (2, 5, 32, 32, 3)
    assert np.abs(ours - theirs).max() <= 0.51


def test_a_clip_does_not_depend_on_its_batch(backbone: WanBackbone) -> None:
    text, (negative,) = backbone.encode_text(PROMPTS), backbone.encode_text(["blurred"])
    settings = backbone.default_settings()
    together = backbone.sample(text, negative, [1, 2], settings)
    alone = backbone.sample(text[1:], negative, [2], settings)
    torch.testing.assert_close(together[1:], alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together[0], together[1])


def test_encode_inverts_the_normalisation_of_decode(backbone: WanBackbone) -> None:
    """Encoding equals the VAE's posterior mode, normalised with the configured mean and deviation."""
    frames = np.random.default_rng(0).integers(0, 256, (1, 5, 32, 32, 3), dtype=np.uint8)
    latents = backbone.encode(frames)
    video = torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    config = backbone.vae.config
    mode = backbone.vae.encode(video).latent_dist.mode()
    for channel in (0, 7):
        expected = (mode[:, channel] - config.latents_mean[channel]) / config.latents_std[channel]
        torch.testing.assert_close(latents[:, channel], expected)


def test_nan_latents_name_the_clip(backbone: WanBackbone) -> None:
    latents = torch.zeros(2, 16, 2, 4, 4)
    latents[1, 0, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="cat/7.*not finite"):
        backbone.decode(latents, ["cat/6", "cat/7"])


def test_lora_targets(backbone: WanBackbone) -> None:
    """Two text linears and k, v of both blocks; all linears: 2 + 2 blocks x (2 attentions x 4 + 2)."""
    assert len(backbone.lora_targets("spatialalign")) == 2 + 4
    assert len(backbone.lora_targets("cross-kv")) == 4
    assert len(backbone.lora_targets("attention")) == 2 * 2 * 4  # blocks, self and cross, q k v o
    assert len(backbone.lora_targets("all-linear")) == 2 + 2 * 10
    with pytest.raises(ConfigError, match="everything"):
        backbone.lora_targets("everything")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("model_index.json", "model_index.json"),
        ("vae", "'vae'"),
        ("text_encoder/config.json", "config.json"),
        ("transformer/diffusion_pytorch_model.safetensors", "weights"),
        ("tokenizer", "'tokenizer'"),
    ],
)
def test_a_missing_part_is_named(folder: Path, tmp_path: Path, remove: str, message: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    target = copy / remove
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    with pytest.raises(ModelError, match=message):
        load_backbone(str(copy), device="cpu")


def test_a_truncated_part_is_named(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    weights = copy / "transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(ModelError, match="'transformer'"):
        load_backbone(str(copy), device="cpu")


def test_neither_folder_nor_hub_id(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither a folder nor a hub id"):
        load_backbone(str(tmp_path / "absent"))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"frames": 80}, "4 k"), ({"height": 470}, "16"), ({"steps": 0}, "steps"), ({"guidance": 0.0}, "guidance")],
)
def test_settings_check_themselves(change: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SampleSettings(**change)  # type: ignore[arg-type]


def test_settings_digest_changes_with_any_field() -> None:
    assert SampleSettings().digest == SampleSettings().digest
    assert SampleSettings(steps=49).digest != SampleSettings().digest
